"""Preference losses with a reference: pure functions of the summed log-probs of a chosen and a rejected completion.

Every function takes `(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)`, each (P,) in nats, and
returns an unreduced `PreferenceLoss`; the reference gets no gradient. Rewards are detached, `beta (log pi - log pi_ref)`.
In the formulas D+ = c - c_ref and D- = r - r_ref, and s(.) is `score`, the identity unless another f-divergence than the
reverse KL holds the policy to the reference (`divergence.SCORES`). Lengths (P,) count completion tokens; 0 counts as 1.
All raise ValueError when shapes differ or beta is not positive. The losses without a reference are in `reference_free`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.divergence import Score, reverse_kl
from fastalign.losses.kl import bounded_exp
from fastalign.types import PreferenceLoss


def dpo(
    chosen_logps: Tensor,  # (P,) float32, nats, summed over the completion
    rejected_logps: Tensor,  # (P,)
    ref_chosen_logps: Tensor,  # (P,), no gradient
    ref_rejected_logps: Tensor,  # (P,), no gradient
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """Direct preference optimisation. Rafailov 2023, arXiv:2305.18290 eq. 7; cDPO is `label_smoothing` > 0.

    loss_i = -(1-e) log sigmoid(z_i) - e log sigmoid(-z_i),  z_i = beta (s(D+) - s(D-))_i

    TRL 1.16 ignores its `label_smoothing` for this type; here it means what it meant in cDPO.
    Raises ValueError when label_smoothing is not in [0, 0.5).

    >>> import torch
    >>> round(float(dpo(*[torch.zeros(1)] * 4).loss), 6)  # policy == reference: log 2
    0.693147
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    loss = smoothed_logistic(beta * (score(chosen) - score(rejected)), label_smoothing)
    return _with_rewards(loss, chosen, rejected, beta)


def hinge(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """Hinge loss on the normalised likelihood. Zhao 2023 (SLiC), arXiv:2305.10425; Liu 2023 (RSO), arXiv:2309.06657 eq. 11.

    loss_i = max(0, 1 - z_i),  z_i = beta (s(D+) - s(D-))_i; pairs beyond the margin have an exactly zero gradient.

    >>> import torch
    >>> float(hinge(*[torch.zeros(1)] * 4).loss)
    1.0
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    loss = (1 - beta * (score(chosen) - score(rejected))).relu()
    return _with_rewards(loss, chosen, rejected, beta)


def ipo(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,  # (P,) completion tokens; None: summed log-ratios
    rejected_lengths: Tensor | None = None,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """Identity preference optimisation. Azar 2023, arXiv:2310.12036 eq. 17.

    loss_i = (s(D+) / chosen_lengths - s(D-) / rejected_lengths - 1/(2 beta))_i^2

    With lengths this is TRL's length-normalised form; without, the summed log-ratios of the original code.

    >>> import torch
    >>> float(ipo(*[torch.zeros(1)] * 4, beta=0.5).loss)
    1.0
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths go together; one of them is None")
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    if chosen_lengths is None or rejected_lengths is None:
        gap = score(chosen) - score(rejected)
    else:
        gap = _gap_per_token(score, chosen, rejected, chosen_lengths, rejected_lengths)
    return _with_rewards((gap - 1 / (2 * beta)) ** 2, chosen, rejected, beta)


def sigmoid_norm(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,  # (P,) completion tokens
    rejected_lengths: Tensor,
    beta: float = 0.1,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """DPO on log-ratios per token, so that long answers have no larger reward. Lambert 2024 (Tulu 3), arXiv:2411.15124 eq. 6.

    loss_i = -log sigmoid(beta (s(D+) / chosen_lengths - s(D-) / rejected_lengths))_i

    >>> import torch
    >>> four = [torch.tensor([x]) for x in (-4.0, -8.0, -6.0, -6.0)]
    >>> round(float(sigmoid_norm(*four, chosen_lengths=torch.tensor([2]), rejected_lengths=torch.tensor([4]), beta=1.0).loss), 6)
    0.201413
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    gap = _gap_per_token(score, chosen, rejected, chosen_lengths, rejected_lengths)
    return _with_rewards(-logsigmoid(beta * gap), chosen, rejected, beta)


def exo(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """Exact optimisation: reverse KL from the policy's preference to the smoothed label. Ji 2024, arXiv:2402.00856 eq. 16.

    loss_i = q (log q - log(1-e)) + (1-q) (log(1-q) - log e),  q = sigmoid(beta (s(D+) - s(D-)))_i

    Raises ValueError when label_smoothing is not in (0, 0.5): at 0 the loss is infinite.

    >>> import torch
    >>> round(float(exo(*[torch.zeros(1)] * 4, label_smoothing=0.25).loss), 6)
    0.143841
    """
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in (0, 0.5) for exo, got {label_smoothing}; 1e-3 is usual")
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    z = beta * (score(chosen) - score(rejected))
    win = z.sigmoid() * (logsigmoid(z) - math.log1p(-label_smoothing))
    lose = (-z).sigmoid() * (logsigmoid(-z) - math.log(label_smoothing))
    return _with_rewards(win + lose, chosen, rejected, beta)


def robust(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """DPO whose mean over labels flipped with probability e is that of clean labels. Chowdhury 2024, arXiv:2403.00409 eq. 12.

    loss_i = (-(1-e) log sigmoid(z_i) + e log sigmoid(-z_i)) / (1 - 2e),  z_i = beta (s(D+) - s(D-))_i

    Not bounded below for e > 0. Raises ValueError when label_smoothing is not in [0, 0.5).

    >>> import torch
    >>> round(float(robust(*[torch.zeros(1)] * 4, label_smoothing=0.2).loss), 6)
    0.693147
    """
    _check_smoothing(label_smoothing)
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    z = beta * (score(chosen) - score(rejected))
    loss = (label_smoothing * logsigmoid(-z) - (1 - label_smoothing) * logsigmoid(z)) / (1 - 2 * label_smoothing)
    return _with_rewards(loss, chosen, rejected, beta)


def discopop(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    score: Score = reverse_kl,
) -> PreferenceLoss:
    """Log-ratio modulated loss, found by a language model. Lu 2024 (DiscoPOP), arXiv:2406.08414 eq. 5.

    loss_i = -(1-m) log sigmoid(z_i) + m e^(-z_i),  m = sigmoid(z_i / tau),  z_i = beta (s(D+) - s(D-))_i

    m e^(-z) is formed from logarithms: its two factors are 0 and infinity from z = -89 on, a NaN in TRL 1.16.

    >>> import torch
    >>> round(float(discopop(*[torch.zeros(1)] * 4).loss), 6)  # (log 2 + 1) / 2
    0.846574
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    z = beta * (score(chosen) - score(rejected))
    loss = bounded_exp(logsigmoid(z / tau) - z) - (-z / tau).sigmoid() * logsigmoid(z)
    return _with_rewards(loss, chosen, rejected, beta)


def nca(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Noise contrastive alignment: the likelihood of the chosen does not fall. Chen 2024, arXiv:2402.05369 eq. 11 with K = 2.

    loss_i = -log sigmoid(beta D+) - (log sigmoid(-beta D+) + log sigmoid(-beta D-)) / 2

    >>> import torch
    >>> round(float(nca(*[torch.zeros(1)] * 4).loss), 6)  # 2 log 2
    1.386294
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    a, b = beta * chosen, beta * rejected
    loss = -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)
    return _with_rewards(loss, chosen, rejected, beta)


def bco(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Binary classifier of chosen against rejected. Jung 2024 (BCO), arXiv:2404.04656 eq. 5, its reward shift being 0 as in TRL.

    loss_i = -log sigmoid(beta D+) - log sigmoid(-beta D-)

    >>> import torch
    >>> round(float(bco(*[torch.zeros(1)] * 4).loss), 6)  # 2 log 2
    1.386294
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _with_rewards(-logsigmoid(beta * chosen) - logsigmoid(-beta * rejected), chosen, rejected, beta)


def sppo(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Self-play preference optimisation with hard labels. Wu 2024, arXiv:2405.00675 eq. 4.7 with probabilities 1 and 0.

    loss_i = (D+ - 1/(2 beta))^2 + (D- + 1/(2 beta))^2

    >>> import torch
    >>> float(sppo(*[torch.zeros(1)] * 4, beta=0.5).loss)
    2.0
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _with_rewards((chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, chosen, rejected, beta)


def apo_zero(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Anchored: chosen up, rejected down; for chosen answers better than the model's own. D'Oosterlinck 2024, arXiv:2408.06266 eq. 7.

    loss_i = 1 - sigmoid(beta D+) + sigmoid(beta D-)

    >>> import torch
    >>> float(apo_zero(*[torch.zeros(1)] * 4).loss)
    1.0
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _with_rewards((-beta * chosen).sigmoid() + (beta * rejected).sigmoid(), chosen, rejected, beta)


def apo_down(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Anchored: both down, the rejected more; for chosen answers worse than the model's own. D'Oosterlinck 2024, arXiv:2408.06266 eq. 8.

    loss_i = sigmoid(beta D+) + 1 - sigmoid(beta (D+ - D-))

    >>> import torch
    >>> float(apo_down(*[torch.zeros(1)] * 4).loss)
    1.0
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _with_rewards((beta * chosen).sigmoid() + (beta * (rejected - chosen)).sigmoid(), chosen, rejected, beta)


def aot(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ref_quantiles: Tensor | None = None,  # (P,) what the pairs are compared with; None: found among these pairs
) -> PreferenceLoss:
    """Optimal transport, paired: the policy's k-th smallest gap is above the reference's. Melnyk 2024 (AOT), arXiv:2406.05882.

    loss_i = -(1-e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i),  d_i = (c - r)_i - ref_quantiles_i

    The ref_quantiles are `matched(c - r, c_ref - r_ref)`: pair i has rank k among the policy's gaps and meets the k-th gap of the
    reference. They couple all pairs; where those are cut into parts, match them first and give every part its own.

    >>> import torch
    >>> round(float(aot(*[torch.zeros(1)] * 4).loss), 6)
    0.693147
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    gap = chosen_logps - rejected_logps
    if ref_quantiles is None:
        ref_quantiles = matched(gap, ref_chosen_logps - ref_rejected_logps)
    return _with_rewards(smoothed_logistic(beta * (gap - ref_quantiles.detach()), label_smoothing), chosen, rejected, beta)


def aot_unpaired(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    quantiles: tuple[Tensor, Tensor] | None = None,  # each (P,); None: found among these pairs
) -> PreferenceLoss:
    """Optimal transport, unpaired: the k-th smallest D+ is above the k-th smallest D-. Melnyk 2024 (AOT), arXiv:2406.05882.

    loss_i = -(1-e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i),  d_i = D+_i - (the D- of the same rank)

    Ranks couple all pairs. Where those are cut into parts, `quantiles` gives every part its own of `matched(D+, D-)` and
    `matched(D-, D+)`: then the value of pair i is that of its D+, and its gradient that of its D+ and of its D-.

    >>> import torch
    >>> round(float(aot_unpaired(*[torch.zeros(1)] * 4).loss), 6)
    0.693147
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    if quantiles is None:
        loss = smoothed_logistic(beta * (chosen - matched(chosen, rejected)), label_smoothing)
    else:
        own_chosen = smoothed_logistic(beta * (chosen - quantiles[0].detach()), label_smoothing)
        own_rejected = smoothed_logistic(beta * (quantiles[1].detach() - rejected), label_smoothing)
        loss = own_chosen + (own_rejected - own_rejected.detach())
    return _with_rewards(loss, chosen, rejected, beta)


PREFERENCE_LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "sigmoid": dpo,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo,
    "robust": robust,
    "nca_pair": nca,
    "bco_pair": bco,
    "sppo_hard": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}


def matched(values: Tensor, others: Tensor) -> Tensor:
    """(P,) of `others` (P,), in the order of `values` (P,): the k-th smallest goes to where the k-th smallest value is.

    >>> import torch
    >>> matched(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([10.0, 30.0, 20.0]))
    tensor([30., 10., 20.])
    """
    ranks = values.detach().argsort(stable=True).argsort()
    return others.sort(stable=True).values[ranks]


def smoothed_logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z), elementwise. Raises ValueError when label_smoothing is not in [0, 0.5)."""
    _check_smoothing(label_smoothing)
    loss = -logsigmoid(z)
    return (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-z) if label_smoothing else loss


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def _log_ratios(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    shapes = {
        "chosen_logps": chosen.shape,
        "rejected_logps": rejected.shape,
        "ref_chosen_logps": ref_chosen.shape,
        "ref_rejected_logps": ref_rejected.shape,
    }
    if len(set(shapes.values())) != 1:
        got = {name: tuple(shape) for name, shape in shapes.items()}
        raise ValueError(f"preference losses take four log-prob tensors of one shape (P,), got {got}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return chosen - ref_chosen.detach(), rejected - ref_rejected.detach()


def _gap_per_token(score: Score, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    return score(chosen) / chosen_lengths.clamp(min=1) - score(rejected) / rejected_lengths.clamp(min=1)


def _with_rewards(loss: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> PreferenceLoss:
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())
