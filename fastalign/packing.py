"""Cutting a step into token-budget bins, and laying the sequences of a bin end to end.

Sequences that begin with the same prompt can share it: the prompt's tokens but the last are there once, and every sequence is
a piece that starts with the last one, `[prompt[:-1]] [prompt[-1] completion 1] [prompt[-1] completion 2]`, so that the rows which
predict completions are as many and in the same order as without sharing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, compress, pairwise, zip_longest

import torch

from fastalign.errors import ConfigError
from fastalign.pausing import pause
from fastalign.ranks import current
from fastalign.types import IGNORE_INDEX, PackedBatch, Sample, SharedPrompts

SHARE_FROM = 16  # tokens of a prompt from which sharing it saves more than the attention of one piece more costs


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


def packed_tokens(sample: Sample, *, share: bool) -> int:
    """Tokens that `sample` occupies in a packed batch of its own, its prompt counted once where that is shared."""
    prompt, own = _parts(sample, share)
    return prompt + own


def pack_samples(samples: Sequence[Sample], max_tokens: int, *, share: bool = False) -> list[list[int]]:
    """Bins of indices into `samples` of at most `max_tokens` tokens each, as `pack` makes them.

    With `share`, samples with the same prompt go into one bin as far as they fit, and their prompt is counted once there.
    >>> pair = Sample(0, tuple(range(20)), ((1,), (2, 3)))
    >>> [pack_samples([pair] * 3, 50, share=share) for share in (True, False)]
    [[[0, 1, 2]], [[0], [1], [2]]]
    """
    units: list[list[int]] = []
    lengths: list[int] = []
    families: dict[object, int] = {}  # prompt -> the unit that still takes samples of it
    for i, sample in enumerate(samples):
        prompt, own = _parts(sample, share)
        unit = families.get(sample.prompt, -1) if prompt else -1
        if unit >= 0 and lengths[unit] + own <= max_tokens:
            units[unit].append(i)
            lengths[unit] += own
            continue
        if prompt:
            families[sample.prompt] = len(units)
        units.append([i])
        lengths.append(prompt + own)
    if len(units) == len(samples) or max(lengths) > max_tokens:  # in the latter case the error names the sample
        return pack([packed_tokens(sample, share=share) for sample in samples], max_tokens)
    return [sorted(chain.from_iterable(units[u] for u in members)) for members in pack(lengths, max_tokens)]


def batches(samples: Sequence[Sample], max_tokens: int, *, share: bool = False) -> Iterator[tuple[list[int], PackedBatch]]:
    """All samples in packed batches of at most `max_tokens` tokens: the members of each, as indices into `samples`, and the batch."""
    for members in pack_samples(samples, max_tokens, share=share):
        pause()
        yield members, collate([samples[i] for i in members], share=share)


def per_sample(
    samples: Sequence[Sample],
    max_tokens: int,
    score: Callable[[PackedBatch], torch.Tensor],
    *,
    rows: Sequence[int],
    share: bool = False,
) -> list[torch.Tensor]:
    """What `score` says of each sample: of its result for a packed batch, whose tensors are on the CPU, the rows of the sample.

    `rows` says how many each has. Every rank of a run scores its share of the batches, and all get everything;
    all of them call `score` equally often.
    """
    bins, ranks = pack_samples(samples, max_tokens, share=share), current()

    def of_bins(numbers: Sequence[int]) -> list[torch.Tensor]:
        found = []
        for k in numbers:
            pause()
            found.append(score(collate([samples[i] for i in bins[k]], share=share)))
        for _ in range(-(-len(bins) // ranks.size) - len(numbers)):  # for nothing: others wait for this rank's layers, or its head
            score(collate([samples[i] for i in bins[-1]], share=share))
        return found if ranks.size == 1 else [values.cpu() for values in found]

    parts: dict[int, torch.Tensor] = {}
    for members, values in zip(bins, ranks.spread(len(bins), of_bins)):
        parts.update(zip(members, values.split([rows[i] for i in members])))
    return [parts[i] for i in range(len(samples))]


def spared_tokens(samples: Sequence[Sample]) -> int:
    """Tokens that sharing prompts leaves out of one batch of `samples`."""
    return sum((count - 1) * (len(context) - 1) for context, count in _uses(samples, SHARE_FROM).items())


def _uses(samples: Sequence[Sample], shortest: int) -> Counter[tuple[int, ...]]:
    """How many sequences begin with each prompt of `shortest` tokens or more."""
    return Counter(context for sample in samples for context in sample.contexts if len(context) >= shortest)


def collate(samples: Sequence[Sample], *, share: bool = False, share_from: int | None = None) -> PackedBatch:
    """The sequences of `samples` (sample by sample, completion by completion) as one packed batch of CPU tensors.

    Row i predicts token i+1 of its own sequence; the scored rows (`live`) are those whose next token belongs to the
    completion and is not masked. The first token of a sequence with an empty prompt has nothing before it and is not
    scored. Either all samples have labels or none has. With `share`, a prompt of `share_from` tokens or more (2 at least; None:
    SHARE_FROM) that several sequences have is there once, right before the first of them.
    """
    uses = _uses(samples, SHARE_FROM if share_from is None else share_from) if share else Counter()
    prompts: dict[tuple[int, ...], int] = {}  # shared prompt -> its piece
    tokens: list[int] = []
    positions: list[int] = []
    live: list[int] = []
    lengths: list[int] = []  # of pieces
    prefix: list[int] = []
    ends: list[int] = []
    live_lengths: list[int] = []
    for sample in samples:
        for context, completion, mask in zip_longest(sample.contexts, sample.completions, sample.masks):
            own = context
            if uses[context] > 1:
                own = context[-1:]
                if context not in prompts:
                    prompts[context] = len(lengths)
                    tokens += context[:-1]
                    positions += range(len(context) - 1)
                    lengths.append(len(context) - 1)
                    prefix.append(-1)
            start, before = len(tokens), len(context) - len(own)
            length = len(own) + len(completion)
            first = max(len(own) - 1, 0)  # the row that predicts the first scored token
            tokens += own
            tokens += completion
            positions += range(before, before + length)
            rows: Sequence[int] = range(start + first, start + length - 1)
            if mask is not None:
                assert len(mask) == len(completion), "a mask has one entry per completion token"
                rows = list(compress(rows, mask[len(mask) - len(rows) :]))
            live_before = len(live)
            live += rows
            ends.append(len(lengths))
            lengths.append(length)
            prefix.append(prompts.get(context, -1))
            live_lengths.append(len(live) - live_before)

    input_ids = torch.tensor(tokens, dtype=torch.int64)
    live_rows = torch.tensor(live, dtype=torch.int64)
    live_target = input_ids[live_rows + 1]
    target = torch.full_like(input_ids, IGNORE_INDEX)
    target[live_rows] = live_target
    labels = list(chain.from_iterable(sample.labels for sample in samples))
    assert len(labels) in (0, len(ends)), "labels: one number per completion in every sample, or none in any"
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
        shared=_shared_prompts(bounds, prefix, ends) if prompts else None,
    )


def _parts(sample: Sample, share: bool) -> tuple[int, int]:
    """Tokens of `sample` that are there once for all samples with its prompt, and those of its own.

    The last token of the prompt belongs to every sequence, so a sequence alone counts the same either way.
    """
    prompt = sample.shared_context if share else None
    if prompt is None or len(prompt) < SHARE_FROM:
        return 0, sample.num_tokens
    return len(prompt) - 1, sum(1 + len(completion) for completion in sample.completions)


def _shared_prompts(bounds: Sequence[int], prefix: Sequence[int], ends: Sequence[int]) -> SharedPrompts:
    pieces = [range(start, stop) for start, stop in pairwise(bounds)]
    rows: list[int] = []
    lengths: list[int] = []
    turns: list[list[int]] = [[]]  # the first: every piece's own rows; the k-th: the k-th use of every prompt
    uses: Counter[int] = Counter()
    for piece, parent in zip(pieces, prefix):
        if parent >= 0:
            uses[parent] += 1
            if uses[parent] == len(turns):
                turns.append([])
            turns[uses[parent]] += range(len(rows), len(rows) + len(pieces[parent]))
            rows += pieces[parent]
        turns[0] += range(len(rows), len(rows) + len(piece))
        rows += piece
        lengths.append(len(piece) + (len(pieces[parent]) if parent >= 0 else 0))
    return SharedPrompts(
        prefix=tuple(prefix),
        ends=tuple(ends),
        cu_seqlens_k=torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        max_seqlen_k=max(lengths),
        key_rows=torch.tensor(rows, dtype=torch.int64),
        key_order=torch.tensor(list(chain.from_iterable(turns)), dtype=torch.int64),
        key_turns=(0, *accumulate(map(len, turns))),
    )
