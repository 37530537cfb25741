"""Sums and means over the sequences of a packed batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of `values` (N,) over each segment `cu_seqlens[s]:cu_seqlens[s+1]`, as (S,) float32 (float64 for float64 values).

    `cu_seqlens` is (S+1,) int32 and ends at N; `mask` (N,) bool, True counts. What is masked may be NaN. An empty segment
    gives 0. Gradient flows to `values`. No atomics and no device sync: the same bits on every run.
    Raises ValueError when shapes do not fit together.
    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1, 3], dtype=torch.int32))
    tensor([1., 0., 6.])
    """
    _check_shapes(values, cu_seqlens, mask)
    values = values if values.dtype == torch.float64 else values.float()
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    # unsafe=True skips the check of `lengths`, which would wait for the device.
    return torch.segment_reduce(values, "sum", lengths=cu_seqlens.diff(), unsafe=True, initial=0)


def segment_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` (N,) over each segment, counting only where `mask`; shapes and dtypes as in `segment_sum`.

    A segment with nothing to count gives 0 and zero gradient, never NaN.
    >>> segment_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1, 3], dtype=torch.int32))
    tensor([1., 0., 3.])
    """
    total = segment_sum(values, cu_seqlens, mask)
    count = cu_seqlens.diff() if mask is None else segment_sum(mask.to(total.dtype), cu_seqlens)
    return total / count.clamp(min=1)


def shared_length_sum(values: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """`segment_sum` of pairs of segments in which what goes beyond the shorter of a pair counts `alpha`.

    The length-desensitised sum of Liu 2024 (LD-DPO), arXiv:2409.06411 eq. 10. `values` (N,), `cu_seqlens` (2P+1,) int32, chosen
    and rejected in turn; alpha 1 is the plain sum, 0 cuts both to one length.
    >>> shared_length_sum(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 4], dtype=torch.int32), 0.5)
    tensor([1., 8.])
    """
    _check_shapes(values, cu_seqlens, None)
    if cu_seqlens.numel() % 2 == 0:
        raise ValueError(f"cu_seqlens must be (2P+1,), the bounds of P pairs of segments: got {tuple(cu_seqlens.shape)}")
    total = values.shape[0]
    lengths = cu_seqlens.diff()
    shared = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2, output_size=lengths.shape[0])
    tail_starts = segment_expand(cu_seqlens[:-1] + shared, cu_seqlens, total)
    in_tail = torch.arange(total, device=values.device) >= tail_starts
    return segment_sum(torch.where(in_tail, alpha * values, values), cu_seqlens)


def segment_expand(values: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """`values` (S,) given to every token of its segment, (N,) with N = `total` = cu_seqlens[-1]; the gradient is the segment's sum.

    The gradient is summed in a fixed order (by sorting, not by atomics), and nothing waits for the device.
    >>> segment_expand(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1, 3], dtype=torch.int32), 3)
    tensor([1., 4., 4.])
    """
    if values.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(f"values must be (S,), one per segment of cu_seqlens (S+1,): got {tuple(values.shape)}, {tuple(cu_seqlens.shape)}")
    return values[torch.repeat_interleave(cu_seqlens.diff(), output_size=total)]


def segments_in(bounds: Sequence[int], rows: slice) -> tuple[int, int]:
    """First and last-plus-one of the segments whose rows are `rows`; these hold whole segments, empty ones included.

    >>> segments_in((0, 5, 5, 8, 8), slice(5, 8))
    (1, 4)
    """
    last = len(bounds) - 1 if rows.stop == bounds[-1] else bisect_left(bounds, rows.stop)
    return bisect_left(bounds, rows.start), last


def _check_shapes(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> None:
    if values.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"values must be (N,) and cu_seqlens (S+1,): got {tuple(values.shape)} and {tuple(cu_seqlens.shape)}; flatten values first"
        )
    if mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(values.shape)}: got {mask.dtype} of shape {tuple(mask.shape)}")
