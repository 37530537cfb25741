"""Preference losses: pure functions of the summed log-probs of a chosen and a rejected completion.

Every function takes `(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)`, each (P,) in nats, and
returns an unreduced `PreferenceLoss`; the reference gets no gradient. Rewards are detached, `beta (log pi - log pi_ref)`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.types import PreferenceLoss


def dpo(
    chosen_logps: Tensor,  # (P,) float32, nats, summed over the completion
    rejected_logps: Tensor,  # (P,)
    ref_chosen_logps: Tensor,  # (P,), no gradient
    ref_rejected_logps: Tensor,  # (P,), no gradient
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Direct preference optimisation. Rafailov 2023, arXiv:2305.18290 eq. 7; cDPO is `label_smoothing` > 0.

    loss_i = -(1-e) log sigmoid(z_i) - e log sigmoid(-z_i),  z_i = beta ((c - c_ref) - (r - r_ref))_i

    TRL 1.16 ignores its `label_smoothing` for this type; here it means what it meant in cDPO.
    Raises ValueError when shapes differ, beta is not positive, or label_smoothing is not in [0, 0.5).

    >>> import torch
    >>> round(float(dpo(*[torch.zeros(1)] * 4).loss), 6)  # policy == reference: log 2
    0.693147
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    z = beta * (chosen - rejected)
    loss = -logsigmoid(z)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-z)
    return _with_rewards(loss, chosen, rejected, beta)


def hinge(
    chosen_logps: Tensor,  # (P,)
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Hinge loss on the normalised likelihood. Zhao 2023 (SLiC), arXiv:2305.10425; Liu 2023 (RSO), arXiv:2309.06657 eq. 11.

    loss_i = max(0, 1 - z_i),  z_i = beta ((c - c_ref) - (r - r_ref))_i; pairs beyond the margin have an exactly zero gradient.

    >>> import torch
    >>> float(hinge(*[torch.zeros(1)] * 4).loss)
    1.0
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    loss = (1 - beta * (chosen - rejected)).relu()
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
) -> PreferenceLoss:
    """Identity preference optimisation. Azar 2023, arXiv:2310.12036 eq. 17.

    loss_i = (c'_i - r'_i - 1/(2 beta))^2,  c' = (c - c_ref) / chosen_lengths, r' = (r - r_ref) / rejected_lengths

    With lengths this is TRL's length-normalised form; without, the summed log-ratios of the original code. A length of 0 counts as 1.

    >>> import torch
    >>> float(ipo(*[torch.zeros(1)] * 4, beta=0.5).loss)
    1.0
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths go together; one of them is None")
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    if chosen_lengths is None or rejected_lengths is None:
        score = chosen - rejected
    else:
        score = chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(min=1)
    loss = (score - 1 / (2 * beta)) ** 2
    return _with_rewards(loss, chosen, rejected, beta)


PREFERENCE_LOSSES: dict[str, Callable[..., PreferenceLoss]] = {"sigmoid": dpo, "hinge": hinge, "ipo": ipo}


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


def _with_rewards(loss: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> PreferenceLoss:
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())
