"""From a loss per token to that of an optimizer step: what its sum is divided by.

All take `values` (N,), packed with `cu_seqlens` (S+1,) int32, and `mask` (N,) bool (True counts; what is masked may be NaN in
value), and return a scalar, a zero that stays connected to the graph where nothing counts. `denominator` counts over the whole
step, so that the results of its micro-batches add up to the same whatever the cut; None counts this batch alone. Counts below 1
count as 1.
"""

from __future__ import annotations

from torch import Tensor

from fastalign.segments import segment_mean, segment_sum

Count = float | Tensor


def token_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, denominator: Count | None = None) -> Tensor:
    """Sum / tokens (DAPO, Yu 2025, arXiv:2503.14476 eq. 8): every token weighs the same.

    >>> import torch
    >>> token_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 3]))
    tensor(3.)
    """
    return _total(values, mask) / _at_least_one(count_tokens(cu_seqlens, mask) if denominator is None else denominator)


def sequence_mean(
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    denominator: Count | None = None,  # sequences of the step, as `count_sequences` counts them
    count_masked: bool = False,
) -> Tensor:
    """Mean over sequences of their token means (GRPO, Shao 2024, arXiv:2402.03300 eq. 3): every sequence weighs the same.

    A sequence without a counted token does not count, as in verl; with `count_masked` it does, as a zero, as in TRL 1.16. A
    `denominator` that is given has been counted either way, so `count_masked` has no say then.

    >>> import torch
    >>> sequence_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 3]))
    tensor(2.5000)
    """
    count = count_sequences(cu_seqlens, mask, count_masked=count_masked) if denominator is None else denominator
    return segment_mean(values, cu_seqlens, mask).sum() / _at_least_one(count)


def sequence_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, denominator: Count | None = None) -> Tensor:
    """Sum / sequences (LUSPO, Liu 2026, arXiv:2602.05261): long sequences weigh more. Every sequence counts.

    >>> import torch
    >>> sequence_sum(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 3]))
    tensor(4.5000)
    """
    return _total(values, mask) / _at_least_one(cu_seqlens.numel() - 1 if denominator is None else denominator)


def fixed_length(
    values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, *, length: int, denominator: Count | None = None
) -> Tensor:
    """Sum / (sequences * `length`) (Dr. GRPO, Liu 2025, arXiv:2503.20783): no bias by a response's own length.

    `length` is a constant of the run, the longest completion allowed. Every sequence counts.

    >>> import torch
    >>> fixed_length(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 3]), length=9)
    tensor(0.5000)
    """
    return sequence_sum(values, cu_seqlens, mask, denominator=denominator) / length


def count_tokens(cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tokens that count, a scalar: the denominator of `token_mean`."""
    return cu_seqlens[-1] if mask is None else mask.sum()


def count_sequences(cu_seqlens: Tensor, mask: Tensor | None = None, *, count_masked: bool = False) -> Tensor:
    """Sequences with a token that counts, or all of them, a scalar: the denominator of `sequence_mean`."""
    lengths = cu_seqlens.diff() if mask is None else segment_sum(mask.float(), cu_seqlens)
    return (lengths >= 0).sum() if count_masked else (lengths > 0).sum()


def _total(values: Tensor, mask: Tensor | None) -> Tensor:
    return (values if mask is None else values.masked_fill(~mask, 0.0)).sum()


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
