"""The call of Apple's cut-cross-entropy: `linear_cross_entropy(e, c, targets, ...)`, with the same names and the same defaults."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.dropin.precision import as_multiplied
from fastalign.head import api
from fastalign.types import IGNORE_INDEX


def linear_cross_entropy(
    e: Tensor,  # (..., D) embeddings, the hidden states; gradient
    c: Tensor,  # (V, D) classifier, the head's weight; gradient
    targets: Tensor,  # (...) int64
    bias: Tensor | None = None,  # (V,); gradient
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    return_lse: bool = False,
    *,
    budget: int | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of softcap tanh((e c^T + bias) / softcap) to `targets`: a scalar, or for reduction "none" one per target.

    shift k (True: 1) pairs row i with target i + k along the last dimension of `targets`, and shortens the result by k; "none" is 0
    where the target is ignored. return_lse adds the log-sum-exp (...) of each logit row, with a gradient, 0 where ignored. Nothing
    is filtered: the gradient is exact. With "mean" and "sum" the logits are formed once, 6NVD; budget and impl: `linear_logps`.
    Raises ValueError for another reduction, a negative or too long shift, and shapes that do not fit.

    >>> import torch
    >>> round(float(linear_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(8, 4), torch.ones(2, 3, dtype=torch.int64), shift=True)), 4)
    2.0794
    """
    step = int(shift)
    if step < 0 or (step and (targets.dim() == 0 or step >= targets.shape[-1])):
        raise ValueError(f"shift must be at least 0 and below the length of targets, got {shift} for targets of {tuple(targets.shape)}")
    if step:
        e, targets = e[..., :-step, :], targets[..., step:]
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    e, c, bias = as_multiplied(e, c, bias)  # type: ignore[assignment]
    options: dict[str, Any] = {"bias": bias, "ignore_index": ignore_index, "softcap": softcap, "budget": budget, "impl": impl}
    if not return_lse:
        return api.linear_cross_entropy(e, c, targets, reduction=reduction, **options)  # type: ignore[arg-type]
    out = api.linear_logps(e, c, targets, outputs=("lse",), **options)
    assert out.lse is not None
    loss = -out.logps
    if reduction != "none":
        loss = loss.sum() / ((targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)
    return loss, out.lse
