"""Losses of imitation: functions of the log-probs of the tokens to imitate, per token and unreduced."""

from __future__ import annotations

from torch import Tensor


def nll(
    logps: Tensor,  # (N,) float32, nats; gradient
    lse: Tensor | None = None,  # (N,) log sum_v exp(logit_v); gradient
    mean_logits: Tensor | None = None,  # (N,) mean_v logit_v; gradient
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood, (N,), with label smoothing e (Szegedy 2016, arXiv:1512.00567 section 7) over the vocabulary.

    loss_i = -(1-e) logp_i + e mean_v(-log p_iv),  mean_v(-log p_iv) = lse_i - mean_logits_i

    Raises ValueError for e outside [0, 1), or e > 0 without `lse` and `mean_logits`.

    >>> import torch
    >>> nll(torch.tensor([-1.0, -3.0]))
    tensor([1., 3.])
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not label_smoothing:
        return -logps
    if lse is None or mean_logits is None:
        raise ValueError("label_smoothing needs lse and mean_logits of each token: ask the head for these outputs")
    return (label_smoothing - 1) * logps + label_smoothing * (lse - mean_logits)


def dft(logps: Tensor) -> Tensor:
    """Dynamic fine-tuning, (N,): every token weighted by its own probability. Wu 2025, arXiv:2508.05629 eq. 9.

    loss_i = -sg(p_i) logp_i; sg: no gradient. The gradient is that of -p_i: tokens that the model finds unlikely barely count.

    >>> import torch
    >>> dft(torch.tensor([0.5]).log())
    tensor([0.3466])
    """
    return -logps.detach().exp() * logps


def z_loss(lse: Tensor) -> Tensor:
    """Square of the log-normaliser, (N,), which keeps logits from drifting. Chowdhery 2022 (PaLM), arXiv:2204.02311 section 5.

    >>> import torch
    >>> z_loss(torch.tensor([2.0]))
    tensor([4.])
    """
    return lse.square()
