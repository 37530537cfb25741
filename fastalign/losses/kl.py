"""Per-token estimates of KL(policy || reference) from the log-probs of sampled tokens. Schulman 2020, "Approximating KL divergence".

Each takes `logps` and `ref_logps` (N,) in nats and returns (N,), unreduced; the reference gets no gradient. `ratio` (N,), the
importance ratio pi / pi_old, corrects the estimate for samples of an older policy; it multiplies and keeps its gradient, as TRL's
`use_bias_correction_kl` does. On-policy it is 1, and its gradient makes that of k3 the gradient of the true KL.
"""

from __future__ import annotations

from torch import Tensor

MAX_EXPONENT = 20.0


def kl_k1(logps: Tensor, ref_logps: Tensor, *, ratio: Tensor | None = None) -> Tensor:
    """log pi - log pi_ref: unbiased, of either sign, and its own gradient has mean 0: for a penalty in the reward.

    >>> import torch
    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    return _corrected(logps - ref_logps.detach(), ratio)


def kl_k2(logps: Tensor, ref_logps: Tensor, *, ratio: Tensor | None = None) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: biased, never negative; on-policy its gradient is that of the KL.

    >>> import torch
    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    return _corrected(0.5 * (logps - ref_logps.detach()) ** 2, ratio)


def kl_k3(logps: Tensor, ref_logps: Tensor, *, ratio: Tensor | None = None) -> Tensor:
    """e^d - d - 1, d = log pi_ref - log pi: unbiased and never negative; the penalty of GRPO (Shao 2024, arXiv:2402.03300 eq. 4).

    >>> import torch
    >>> kl_k3(torch.tensor([-1.0, -3.0]), torch.tensor([-1.0, -3.0]))
    tensor([0., 0.])
    """
    d = ref_logps.detach() - logps
    return _corrected(bounded_exp(d) - d - 1, ratio)


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), continued by its tangent above 20: what a ratio of log-probs 88 nats apart would overflow stays finite, and so does
    its gradient, which keeps its sign. (Clamping would drop it; without either, inf * 0 is NaN in TRL 1.16.)
    """
    return x.clamp(max=MAX_EXPONENT).exp() * (1 + (x - MAX_EXPONENT).relu())


def _corrected(kl: Tensor, ratio: Tensor | None) -> Tensor:
    return kl if ratio is None else kl * ratio
