"""What a device is predicted to have room for: the largest micro-batch (`--max_tokens auto`), and the layers' activations.

`--model.gradient_checkpointing auto` is settled first, for micro-batches that keep a device busy; then they become as large as they can.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastalign.errors import ConfigError, ModelError
from fastalign.models.checkpointing import enable_checkpointing
from fastalign.models.trunk import causal_lm
from fastalign.objectives.base import Dataset, RunConfig
from fastalign.packing import collate, packed_tokens, spared_tokens
from fastalign.ranks import Ranks
from fastalign.train.config import read_mapping
from fastalign.train.footprint import Footprint
from fastalign.train.footprint_ranks import footprint_of_rank, unpredicted
from fastalign.types import PackedBatch, Sample

logger = logging.getLogger("fastalign")

SHARE = {"cuda": 0.9, "cpu": 0.5}  # of what is free: the rest is for libraries, lost blocks, and on a host for others who use it
STEP = 64  # tokens that a limit is a multiple of
PIECES = 8  # sequences of the batch that is predicted: of more it takes longer, and says the same
FIRST = 2048  # tokens that are predicted first

# The settings of `--model.gradient_checkpointing auto`, the fastest first.
CHECKPOINTING: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": False, "checkpoint_keep": "nothing"},
    {"gradient_checkpointing": True, "checkpoint_keep": "products"},
    {"gradient_checkpointing": True, "checkpoint_keep": "attention"},
    {"gradient_checkpointing": True, "checkpoint_keep": "nothing"},
)

Config = TypeVar("Config", bound=RunConfig)


def with_checkpointing(
    config: Config, model: Any, data: Dataset, folder: Path, ranks: Ranks, *, device: torch.device, budget: float | None = None
) -> Config:
    """`config` and `model` with a setting where gradient_checkpointing is auto: that of the run which it resumes in `folder`, or what fits.

    It is the first one of `CHECKPOINTING` with which the prediction stays within the memory that `with_max_tokens` would fill, in
    micro-batches of `max_tokens` tokens; where that is auto, too, of 2048 (or a whole step, or the longest sample). If none
    fits it is the last one. All processes take the same. Raises ConfigError for a run whose memory cannot be predicted.
    """
    if config.model.gradient_checkpointing != "auto":
        return config
    saved = folder / "config.yaml"
    if config.resume and saved.is_file():
        there = read_mapping(saved)["model"]
        return _checkpointed(config, model, {name: there[name] for name in CHECKPOINTING[0]})
    if gap := unpredicted(config, ranks.size, device):
        raise ConfigError(f"model.gradient_checkpointing auto: {gap}, so it is not predicted; set it to true or false")
    low, high = step_tokens(config, data, ranks.size)
    tokens = max(low, min(high, FIRST if config.max_tokens == "auto" else config.token_limit))
    room = min(math.inf if budget is None else budget, share_of(device) * free_bytes(device))
    samples, found = _most_scored(config, data.samples), 0
    for setting in CHECKPOINTING:
        if config.model.mlp_chunk and setting["checkpoint_keep"] == "products":  # which do not go together
            continue
        settled = _checkpointed(config, model, setting)
        try:
            predicted = _footprint(settled, model, samples, tokens, ranks.size, device)
        except ModelError as error:
            raise ConfigError(f"model.gradient_checkpointing auto: {error}; set it to true or false") from error
        found = _needed(predicted, device, ranks, budget)
        if fits := not ranks.any(found > room):
            break
    keeps = f" with --model.checkpoint_keep {settled.model.checkpoint_keep}" * (settled.model.checkpoint_keep != "nothing")
    logger.log(
        logging.INFO if fits else logging.WARNING,
        "model.gradient_checkpointing auto: %s%s; micro-batches of %d tokens are predicted to need %.2f GiB%s",
        str(settled.model.gradient_checkpointing).lower(), keeps, tokens, found / 2**30,
        "" if fits else f", and {room / 2**30:.2f} are for them; trying it. fastalign plan says what needs less",
    )  # fmt: skip
    return settled


def _checkpointed(config: Config, model: Any, setting: dict[str, Any]) -> Config:
    """`config` with this setting, and `model` made so: it has what was set last."""
    settled = replace(config, model=replace(config.model, **setting))
    if setting["gradient_checkpointing"]:
        enable_checkpointing(causal_lm(model), settled.model)
    return settled


def _needed(predicted: Footprint, device: torch.device, ranks: Ranks, budget: float | None) -> int:
    """Bytes that must be free, where the weights of a process alone on a device are there; a host reads them when they are used."""
    there = budget is not None or (device.type == "cuda" and ranks.size == 1)
    return predicted.growth if there else predicted.peak


def share_of(device: torch.device) -> float:
    """The part of what is free there that a run may take."""
    return SHARE.get(device.type, 0.5)


def with_max_tokens(
    config: Config, model: Any, data: Dataset, folder: Path, ranks: Ranks, *, device: torch.device, budget: float | None = None
) -> Config:
    """`config` with a number where `max_tokens` is auto: that of the run which it resumes in `folder`, or what fits now.

    `device` is where the run trains; the model may not be there yet. The number is the largest one, a multiple of 64, with which the
    prediction stays within a share of the free memory (nine tenths of a CUDA device's, half of a host's), at most the tokens of the
    longest step, and no less than the longest sample. Several processes take the smallest of theirs, each predicted with what it holds,
    or, where that is not known (`unpredicted`), as if it held all that they divide. With a `budget` of bytes beside the weights a number
    is kept only where it fits, too. Raises ConfigError for a model whose memory cannot be predicted, and where the longest sample does
    not fit the budget.
    """
    if config.max_tokens != "auto" and budget is None:
        return config
    if budget is not None and (reason := config.unpredicted):
        raise ConfigError(f"memory_budget bounds max_tokens: {reason}; leave memory_budget out")
    saved = folder / "config.yaml"
    if config.resume and saved.is_file():
        return replace(config, max_tokens=int(read_mapping(saved)["max_tokens"]))
    low, high = step_tokens(config, data, ranks.size)
    high, room = min(high, config.token_limit), budget or math.inf
    if config.max_tokens == "auto":
        room = min(room, share_of(device) * free_bytes(device))
    samples = _most_scored(config, data.samples)
    found: dict[int, int] = {}

    def needed(tokens: int) -> int:
        found[tokens] = _needed(_footprint(config, model, samples, tokens, ranks.size, device), device, ranks, budget)
        return found[tokens]

    try:
        tokens = largest_fit(needed, low, high, room)
    except ModelError as error:
        if budget is not None:
            raise ConfigError(f"memory_budget: {error}; leave it out") from error
        raise ConfigError(f"max_tokens auto: {error}; set a number, such as --max_tokens {RunConfig.max_tokens}") from error
    if budget is not None and found[tokens] > budget:
        raise ConfigError(
            f"memory_budget: the longest sample, {low} tokens, is predicted to need {found[tokens] / 2**30:.3g} GiB, and training may take "
            f"{budget / 2**30:.3g}; give it more, or set --model.gradient_checkpointing true or a smaller --data.max_length"
        )
    if config.max_tokens != "auto":
        if tokens == high:
            return config
        logger.info("memory_budget: micro-batches of %d tokens in place of %d, which gives the same result", tokens, config.max_tokens)
        return replace(config, max_tokens=tokens)
    if found[tokens] > room:
        logger.warning(
            "max_tokens auto: the longest sample, %d tokens, is predicted to need %.2f GiB, and %.2f are free; trying it. "
            "fastalign plan says what needs less",
            tokens, found[tokens] / 2**30, room / share_of(device) / 2**30,
        )  # fmt: skip
    tokens = min(ranks.gather(tokens))
    why = "a whole step" if tokens == high else f"{room / 2**30:.2f} GiB of those free are for it"
    logger.info("max_tokens auto: %d, for which %.2f GiB are predicted (%s)", tokens, found.get(tokens, 0) / 2**30, why)
    return replace(config, max_tokens=tokens)


def step_tokens(config: RunConfig, data: Dataset, processes: int = 1) -> tuple[int, int]:
    """Tokens of the longest sample that may be trained on, and the most that a process may have of one step."""
    share, longest, of_samples = config.share_prompts, 1, []
    for sample in data.samples:
        trained = config.longest(sample)
        longest = max(longest, *(packed_tokens(each, share=share) for each in trained))
        of_samples.append(sum(each.num_tokens for each in trained) - (spared_tokens(trained) if share else 0))
    for sample in data.eval_samples:
        longest = max(longest, *(packed_tokens(each, share=share) for each in config.longest(sample)))
    step = sum(sorted(of_samples)[-config.batch_size :])
    return longest, max(longest, step if processes == 1 else min(step, -(-step // processes) + longest))


def largest_fit(needed: Callable[[int], int], low: int, high: int, room: float) -> int:
    """The largest number of tokens from `low` to `high` whose `needed(tokens)` bytes, which rise with them, are at most `room`; else `low`.

    Bytes are close to a line, so it takes a few calls, and stops where the next multiple of 64 is a hundredth away.
    >>> largest_fit(lambda tokens: 1000 + 10 * tokens, 100, 10**6, 91_000), largest_fit(lambda tokens: 10 * tokens, 100, 500, 91_000)
    (8960, 500)
    """
    start = (low, needed(low))
    fits, fails = start, None
    if fits[1] > room or low >= high:
        return low
    guess = min(high, max(FIRST, 2 * low))
    while fits[0] < guess:
        point = (guess, needed(guess))
        before = start
        if point[1] <= room:
            before, fits = fits, point
        else:
            fails = point
        if fits[0] == high or (fails and fails[0] - fits[0] <= max(STEP, fits[0] // 100)):
            break
        (x0, y0), (x1, y1) = (fits, fails) if fails else (before, fits)
        reached = x0 + (room - y0) * (x1 - x0) / max(1, y1 - y0)
        guess = high if reached >= high else int(reached) // STEP * STEP
    return fits[0]


def free_bytes(device: torch.device) -> int:
    """Bytes of `device` that nobody uses, torch's cached blocks among them; on a host this process's share of them, inside its cgroup."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return host_free() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def host_free(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that are available: what the system says, or less where a cgroup (version 2) limits this process."""
    found = [size for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:") for size in [1024 * int(line.split()[1])]]
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            top = root / "sys/fs/cgroup"
            group = top / line[3:].strip().lstrip("/")
            for place in (group, *group.parents):
                found += _left_in(place)
                if place == top:
                    break
    if not found:
        raise ConfigError("max_tokens auto: this system does not say how much memory is free; set a number, such as --max_tokens 4096")
    return max(0, min(found))


def _left_in(group: Path) -> list[int]:
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if not limit or not used or limit[0].strip() == "max":
        return []
    cache = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith("inactive_file ")]
    return [int(limit[0]) - int(used[0]) + sum(cache)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _most_scored(config: RunConfig, samples: Iterable[Sample]) -> list[Sample]:
    """What a step trains on, with the largest share of scored tokens first."""
    trained = [each for sample in samples for each in config.longest(sample)[:2]]
    return sorted(trained, key=lambda each: -each.num_targets / max(1, packed_tokens(each, share=config.share_prompts)))


def _footprint(config: RunConfig, model: Any, samples: Sequence[Sample], tokens: int, processes: int = 1, device: Any = None) -> Footprint:
    """Of steps with micro-batches of so many tokens; where what several processes hold is not known, as if each held everything."""
    batch, rows = filled(samples, tokens, share=config.share_prompts, most=PIECES)
    if processes == 1 or device is None:  # of several, the model may not be on its device yet
        device = next(model.parameters()).device
    if unpredicted(config, processes, torch.device(device)):
        processes = 1
    return footprint_of_rank(model, config, processes, tokens=tokens, rows=rows, device=device, batch=batch)


def filled(samples: Sequence[Sample], tokens: int, *, share: bool, most: int) -> tuple[PackedBatch, int]:
    """A batch of `tokens` tokens (or one less) as `samples` fill it, and its scored rows.

    It has at most about `most` sequences: of more, the first ones are made longer, so that prompts, what shares them and scored rows
    keep their proportions, on which the memory depends.
    """
    members: list[Sample] = []
    held = pieces = 0
    for sample in samples:
        size, pieces = packed_tokens(sample, share=share), pieces + len(sample.completions)
        if held + size > tokens or (members and pieces > most):
            break
        members.append(sample)
        held += size
    rows = sum(sample.num_targets for sample in members)
    stretch = tokens / max(1, held)
    batch = collate([longer for sample in members for longer in _longer(sample, stretch)], share=share)
    if (rest := tokens - len(batch.input_ids)) >= 2:
        filler = Sample(-1, (0,), ((0,) * (rest - 1),))
        batch = collate([*(longer for sample in members for longer in _longer(sample, stretch)), filler], share=share)
    return batch, max(1, round(rows * stretch))


def _longer(sample: Sample, stretch: float) -> list[Sample]:
    """`sample` with all its lengths times `stretch`, at least 1; its sequences apart where they do not share their prompt."""

    def of(length: int) -> tuple[int, ...]:
        return (sample.index,) * int(length * stretch)

    if sample.shared_context is not None:
        return [Sample(sample.index, of(len(sample.prompt)), tuple(of(len(c)) for c in sample.completions))]
    return [Sample(sample.index, of(len(p)), (of(len(c)),)) for p, c in zip(sample.contexts, sample.completions)]
