"""verl's `linear_cross_entropy`: per-token log-probs and entropies of a head, under the call of its Triton kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.dropin.precision import as_multiplied
from fastalign.head.api import linear_logps
from fastalign.types import IGNORE_INDEX


def linear_cross_entropy(
    hidden: Tensor,  # (..., D); gradient
    weight: Tensor,  # (V, D); gradient
    labels: Tensor,  # (...) int64
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of softmax(hidden weight^T / temperature), float32, of the shape of `labels`; both have a gradient.

    As in verl the first is a log-prob, not a loss. A row whose label is `ignore_index` is 0 in both and reaches no GEMM. Budget and
    impl: `linear_logps`. Raises ValueError for another reduction than "none" and for a vocabulary cut over a process group.

    >>> import torch
    >>> logps, entropy = linear_cross_entropy(torch.zeros(1, 4), torch.zeros(8, 4), torch.tensor([3]))
    >>> round(float(logps), 4), round(float(entropy), 4)
    (-2.0794, 2.0794)
    """
    if reduction != "none":
        raise ValueError(f"reduction must be 'none', got {reduction!r}: sum or average the log-probs that come back")
    if dist_process_group is not None:
        raise ValueError("dist_process_group cuts the vocabulary over processes, which the head operator does not: pass the whole weight")
    hidden, weight = as_multiplied(hidden, weight)  # type: ignore[assignment]
    out = linear_logps(
        hidden, weight, labels, temperature=temperature, outputs=("entropy",), ignore_index=ignore_index, budget=budget, impl=impl
    )
    assert out.entropy is not None
    return out.logps, out.entropy
