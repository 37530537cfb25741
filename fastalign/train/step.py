"""One optimizer step: which samples it takes, how they are cut into micro-batches, and what their sum is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastalign.errors import ConfigError, DataError
from fastalign.objectives.base import Objective, Prepared, RunConfig
from fastalign.packing import collate, pack_samples, packed_tokens, spared_tokens
from fastalign.pausing import pause
from fastalign.ranks import Ranks
from fastalign.types import Sample


@dataclass(frozen=True)
class Order:
    """Which samples a step takes: a pure function of the step, so that a resumed run needs no state of a loader.

    Every epoch is its own permutation, drawn from `(seed, epoch)`; its last step takes what is left.
    """

    num_samples: int
    batch_size: int
    seed: int
    epochs: float
    max_steps: int | None = None
    steps_per_draw: int = 1  # optimizer steps that share the samples

    @classmethod
    def of(cls, config: RunConfig, num_samples: int) -> Order:
        return cls(num_samples, config.draw_size, config.seed, config.epochs, config.max_steps, config.steps_per_draw)

    @property
    def draws_per_epoch(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return self.draws_per_epoch * self.steps_per_draw

    @property
    def total_steps(self) -> int:
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch)

    def samples_of(self, step: int) -> list[int]:
        """Indices of the samples of optimizer step `step`, counted from 0."""
        epoch, draw = divmod(step // self.steps_per_draw, self.draws_per_epoch)
        permutation = _permutation(self.num_samples, self.seed, epoch)
        return permutation[draw * self.batch_size : (draw + 1) * self.batch_size]


@lru_cache(maxsize=1)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def check_lengths(samples: Sequence[Sample], max_tokens: int, *, share: bool = False) -> None:
    """Raise ConfigError when a sample does not fit into a micro-batch, its prompt counted once if it is shared."""
    length, longest = max(((packed_tokens(sample, share=share), sample) for sample in samples), key=lambda found: found[0])
    if length > max_tokens:
        raise ConfigError(
            f"max_tokens {max_tokens} is less than the longest sample (row {longest.index}, {length} tokens with all its "
            f"completions); set --max_tokens {length} or more, or a smaller --data.max_length"
        )


def check_vocabulary(samples: Sequence[Sample], vocab_size: int) -> None:
    """Raise DataError when a token has no row in the head."""
    for sample in samples:
        if (largest := max(map(max, filter(None, (sample.prompt, *sample.completions))))) >= vocab_size:
            raise DataError(
                f"row {sample.index}: token id {largest} is beyond the model's vocabulary of {vocab_size}; "
                "use the model's own tokenizer, or resize its embeddings"
            )


def with_target(sample: Sample) -> Sample:
    """A sample that has something to score: of a prompt without completions its own tokens after the first."""
    if sample.completions:
        return sample
    return Sample(sample.index, sample.prompt[:1], (sample.prompt[1:] or sample.prompt,))


def micro_batches(samples: Sequence[Sample], max_tokens: int, *, share: bool = False) -> list[list[Sample]]:
    """The samples of a step, cut into bins of at most `max_tokens` tokens."""
    return [[samples[i] for i in members] for members in pack_samples(samples, max_tokens, share=share)]


def deal(samples: Sequence[Sample], max_tokens: int, ranks: int, *, share: bool = False) -> list[list[list[Sample]]]:
    """The samples of a step, cut into bins of at most `max_tokens` tokens for each of so many ranks, balanced by tokens.

    No rank has more bins than another needs to have: as many as if all bins were full. One rank has those of `micro_batches`. For
    several the bins are as small as their number allows (MULTIFIT, Coffman 1978), and each goes, longest first, to the rank with
    the fewest tokens that still may have one.
    """
    bins = micro_batches(samples, max_tokens, share=share)
    if ranks == 1:
        return [bins]
    most = -(-len(bins) // ranks)
    low, high = max(packed_tokens(sample, share=share) for sample in samples), max_tokens
    while low < high:
        limit = (low + high) // 2
        found = micro_batches(samples, limit, share=share)
        if len(found) <= most * ranks:
            bins, high = found, limit
        else:
            low = limit + 1
    dealt: list[list[list[Sample]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for tokens, members in sorted(((_tokens(members, share), members) for members in bins), key=lambda found: -found[0]):
        rank = min((r for r in range(ranks) if len(dealt[r]) < most), key=lambda r: (loads[r], r))
        dealt[rank].append(members)
        loads[rank] += tokens
    return dealt


def _tokens(members: Sequence[Sample], share: bool) -> int:
    return sum(sample.num_tokens for sample in members) - (spared_tokens(members) if share else 0)


def run_step(
    objective: Objective,
    bins: Sequence[Sequence[Sample]],
    *,
    device: torch.device,
    backward: bool = True,
    share: bool = False,
    samples: Sequence[Sample] | None = None,
    idle: Sequence[Sequence[Sample]] = (),
    whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    before_last: Callable[[Tensor], None] | None = None,
    max_tokens: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Add the gradient of the loss of all samples to the weights, one bin at a time.

    `before_last` is called with the loss of the whole step before the backward of the last bin. Returns the metric sums, still on the
    device, and the denominators. None of it depends on how the samples are cut into bins, or on whether those of a bin share their
    prompts. Where other processes have bins of the step, too, `samples` are all of its samples, and `idle` are bins that this one runs
    after its own for nothing, so that all processes run the layers equally often; inside of `whole` they need not. What is scored
    before the first bin is cut into bins of `max_tokens`; None: as the objective's options say.
    """
    if samples is None:
        samples = [sample for members in bins for sample in members]
    denominators = objective.denominators(samples)
    if isinstance(objective, Prepared) and objective.prepares:
        with torch.no_grad(), whole():
            objective.prepare(samples, max_tokens)
    totals: dict[str, Tensor] = {}
    with torch.set_grad_enabled(backward):
        for at, members in enumerate(bins):
            pause()
            batch = collate(members, share=share).to(device)
            loss, sums = objective.loss(batch, denominators)
            for name, value in sums.items():
                totals[name] = join(name, totals[name], value) if name in totals else value
            if backward:
                if before_last is not None and at == len(bins) - 1:
                    before_last(totals["loss"])
                loss.backward()
        for members in idle:
            batch = collate(members, share=share).to(device)
            loss, _ = objective.loss(batch, dict.fromkeys(denominators, math.inf))  # a share of nothing: the gradient is 0
            if backward:
                loss.backward()
    return totals, denominators


def join(name: str, a: Tensor, b: Tensor) -> Tensor:
    """What is kept of two values of the metric sum `name`."""
    if name.startswith("min_"):
        return torch.minimum(a, b)
    return torch.maximum(a, b) if name.startswith("max_") else a + b


def over_ranks(values: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """The metric sums of a step from those of every rank's share of it."""
    totals: dict[str, float] = {}
    for part in ranks.gather(values):
        for name, value in part.items():
            totals[name] = float(join(name, *torch.tensor([totals[name], value]).double())) if name in totals else value
    return totals


def to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """The scalars on the host, fetched in one transfer."""
    if not values:
        return {}
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return dict(zip(values, numbers))
