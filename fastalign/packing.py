"""Cutting a step into token-budget bins, and laying the sequences of a bin end to end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, compress, zip_longest

import torch

from fastalign.errors import ConfigError
from fastalign.types import IGNORE_INDEX, PackedBatch, Sample


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices into `lengths` whose lengths add up to at most `max_tokens`: best fit decreasing, deterministic.

    Each length goes, longest first and ties by index, to the fullest bin that still has room. Bins come in the order in
    which they were opened (the fullest first, so that a step that does not fit in memory fails at once), indices
    ascending inside. Best fit decreasing needs at most 11/9 OPT + 4 bins (Johnson 1973). Raises ConfigError naming the
    sample when one length alone is over the budget.
    >>> pack([3, 5, 2, 4], max_tokens=7)
    [[1, 2], [0, 3]]
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[0]] > max_tokens:
        longest = order[0]
        raise ConfigError(
            f"sample {longest} has {lengths[longest]} tokens, more than max_tokens={max_tokens}: "
            f"raise max_tokens to at least {lengths[longest]}, or lower data.max_length"
        )
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> bins with exactly that much room, latest last
    free = 0  # bit r is set when some bin has r tokens of room: the tightest fit is one shift and one lowest set bit
    for index in order:
        length = lengths[index]
        fits = free >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            stack = with_room[room]
            bin_id = stack.pop()
            if not stack:
                free ^= 1 << room
        else:
            room = max_tokens
            bin_id = len(bins)
            bins.append([])
        bins[bin_id].append(index)
        rest = room - length
        with_room.setdefault(rest, []).append(bin_id)
        free |= 1 << rest
    return [sorted(b) for b in bins]


def collate(samples: Sequence[Sample]) -> PackedBatch:
    """The sequences of `samples` (sample by sample, completion by completion) as one packed batch of CPU tensors.

    Row i predicts token i+1 of its own sequence; the scored rows (`live`) are those whose next token belongs to the
    completion and is not masked. The first token of a sequence with an empty prompt has nothing before it and is not
    scored. Either all samples have labels or none has.
    """
    tokens: list[int] = []
    positions: list[int] = []
    live: list[int] = []
    lengths: list[int] = []
    live_lengths: list[int] = []
    for sample in samples:
        for prompt, completion, mask in zip_longest(sample.contexts, sample.completions, sample.masks):
            start = len(tokens)
            length = len(prompt) + len(completion)
            first = max(len(prompt) - 1, 0)  # the row that predicts the first scored token
            tokens += prompt
            tokens += completion
            positions += range(length)
            rows: Sequence[int] = range(start + first, start + length - 1)
            if mask is not None:
                assert len(mask) == len(completion), "a mask has one entry per completion token"
                rows = list(compress(rows, mask[len(mask) - len(rows) :]))
            scored_before = len(live)
            live += rows
            lengths.append(length)
            live_lengths.append(len(live) - scored_before)

    input_ids = torch.tensor(tokens, dtype=torch.int64)
    live_rows = torch.tensor(live, dtype=torch.int64)
    live_target = input_ids[live_rows + 1]
    target = torch.full_like(input_ids, IGNORE_INDEX)
    target[live_rows] = live_target
    labels = list(chain.from_iterable(sample.labels for sample in samples))
    assert len(labels) in (0, len(lengths)), "labels: one number per completion in every sample, or none in any"
    bounds = (0, *accumulate(lengths))
    live_bounds = (0, *accumulate(live_lengths))
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(lengths, default=0),
        target=target,
        live=live_rows,
        live_target=live_target,
        live_cu_seqlens=torch.tensor(live_bounds, dtype=torch.int32),
        live_bounds=live_bounds,
        bounds=bounds,
        index=tuple(sample.index for sample in samples),
        completions=tuple(len(sample.completions) for sample in samples),
        weight=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        margin=torch.tensor([sample.margin for sample in samples], dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.float32) if labels else None,
    )
