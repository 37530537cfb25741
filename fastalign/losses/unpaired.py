"""Losses on single completions that are desirable or not: pure functions of their summed log-probs, unreduced.

`logps` and `ref_logps` (S,) are nats summed over the completion (the reference gets no gradient), `desirable` is (S,) bool. Either
class may be absent. Both return an `UnpairedLoss` whose rewards are detached, beta (log pi - log pi_ref), and raise ValueError when
shapes differ or beta is not positive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastalign.types import UnpairedLoss


def kto(
    logps: Tensor,  # (S,) float32, nats
    ref_logps: Tensor,  # (S,), no gradient
    desirable: Tensor,  # (S,) bool
    kl: Tensor | float,  # scalar, nats, 0 or more, no gradient
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """Kahneman-Tversky optimisation. Ethayarajh 2024, arXiv:2402.01306 eq. 8.

    loss_i = w_d (1 - sigmoid(beta (D_i - kl))) of a desirable and w_u (1 - sigmoid(beta (kl - D_i))) of another one, D = log pi / pi_ref

    `kl` estimates KL(pi || pi_ref) from completions paired with the prompts of others (`mismatched_kl`).

    >>> kto(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), 0.0, desirable_weight=2.0).loss
    tensor([1.0000, 0.5000])
    """
    log_ratio = _log_ratio(logps, ref_logps, desirable, beta)
    z = beta * (log_ratio - (kl.detach() if isinstance(kl, Tensor) else kl))
    loss = torch.where(desirable, desirable_weight * (-z).sigmoid(), undesirable_weight * z.sigmoid())
    return UnpairedLoss(loss, beta * log_ratio.detach())


def apo_zero_unpaired(
    logps: Tensor,  # (S,)
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """APO-zero of single completions: `kto` without its KL. D'Oosterlinck 2024, arXiv:2408.06266 eq. 7, unpaired as in TRL.

    loss_i = w_d (1 - sigmoid(beta D_i)) of a desirable and w_u sigmoid(beta D_i) of another one

    >>> apo_zero_unpaired(torch.zeros(1), torch.zeros(1), torch.tensor([False])).loss
    tensor([0.5000])
    """
    return kto(logps, ref_logps, desirable, 0.0, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def mismatched_kl(logps: Tensor, ref_logps: Tensor, counts: Tensor | None = None) -> Tensor:
    """KTO's reference point: the mean log-ratio of completions after prompts that are not theirs, 0 at least. A scalar, no gradient.

    `counts` (S,) bool leaves rows out, such as those without a scored token, as HALOs does; without any row the result is 0.

    >>> mismatched_kl(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -1.0]))
    tensor(1.)
    """
    difference = (logps - ref_logps).detach()
    if counts is None:
        counts = torch.ones_like(difference, dtype=torch.bool)
    return (difference.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)).clamp(min=0)


UNPAIRED_LOSSES: dict[str, Callable[..., UnpairedLoss]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def _log_ratio(logps: Tensor, ref_logps: Tensor, desirable: Tensor, beta: float) -> Tensor:
    shapes = {"logps": tuple(logps.shape), "ref_logps": tuple(ref_logps.shape), "desirable": tuple(desirable.shape)}
    if len(set(shapes.values())) != 1 or desirable.dtype != torch.bool:
        raise ValueError(f"unpaired losses take tensors of one shape (S,), desirable of bool; got {shapes}, {desirable.dtype}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return logps - ref_logps.detach()
