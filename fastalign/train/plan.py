"""`fastalign plan`: what a training run will hold in memory, before anything of it is downloaded, loaded or run.

It takes the options of the run. Of the model only config.json is read; the step is run without storage (`footprint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastalign.errors import ConfigError, ModelError
from fastalign.objectives.base import RunConfig
from fastalign.ranks import ParallelConfig
from fastalign.train.cards import CARDS
from fastalign.train.flops import Flops, main_dtype, model_flops
from fastalign.train.footprint import PARTS, Footprint, head_plan, keeps_copy
from fastalign.train.footprint_ranks import check_predicted, travels
from fastalign.train.remedies import Remedy, Search, command, merged, remedies
from fastalign.train.shallow import Predictions
from fastalign.train.speed import Rates, Step, measure, of_card, seconds

GIB = 1 << 30
SIZES = (8, 16, 24, 48, 80, 141)  # GB of devices, 10^9 bytes
CONTEXT = 1.0e9  # bytes that a CUDA context and its libraries take
WASTE = 0.05  # of what is allocated, lost between blocks
GRID = (512, 2048, 8192, 32768, 131072)  # tokens at which memory is computed; between them it is at most on the line
FURTHER = 4  # times the tokens of a proposal: through both goes the line of what fits with it


@dataclass(frozen=True)
class Outlook:
    """What `plan` found out."""

    now: Footprint
    flops: Flops  # of one micro-batch, the reference's forward included
    head: str  # how the head is computed
    fits: list[tuple[int, int]]  # GB of a device, the largest max_tokens that fits (0: none)
    sparing: tuple[str, list[tuple[int, int]]]  # options that hold the fewest activations, and what fits with them
    remedies: list[tuple[Remedy, int]]  # each alone: bytes at the peak with it
    proposals: list[tuple[int, str | None, int]]  # GB of a device that has no room, options with which it has (None: none), the peak then
    reached: dict[int, int]  # GB of a device, the largest max_tokens that fits it with what is proposed
    speeds: list[tuple[str, Rates, Step]]  # of devices
    ranks: int = 1  # processes, each of which holds this
    travels: tuple[int, int] = (0, 0)  # bytes through each, in a micro-batch and at an update


def plan(config: RunConfig, *, scored: float = 1.0, timed: bool = True, ranks: int = 1) -> Outlook:
    """Predict the run that `config` describes. `scored` is the share of tokens that are scored; 1 is the most that can be.

    Micro-batches are full (`max_tokens`) and several to a step. With `timed` the device at hand is measured for a second. Of several
    `ranks`, the processes of the run, memory is that of the one that holds the most. Raises ConfigError for an objective whose memory is
    not that of one model and its head (distill), and for several processes of a kind that is not predicted, ModelError for a model that
    cannot run without storage.
    """
    if ranks < 1:
        raise ConfigError(f"ranks must be the number of processes, at least 1, got {ranks}")
    if ranks == 1 and config.parallel != ParallelConfig():
        raise ConfigError("parallel: options of several processes, and one is planned; set --ranks N as torchrun --nproc_per_node N, too")
    if config.name == "distill":
        raise ConfigError("plan does not know the memory of distill, which holds a teacher as well; plan sft for the student's part")
    if config.max_tokens == "auto":
        raise ConfigError(
            "max_tokens auto is what a run asks the device that it finds; give plan a number, its table says the largest for each size"
        )
    if config.model.gradient_checkpointing == "auto":
        raise ConfigError(
            "model.gradient_checkpointing auto is what a run asks the device that it finds; give plan true or false, its table says what "
            "each kind of it needs"
        )
    if not 0 < scored <= 1:
        raise ConfigError(f"scored must be a share in (0, 1], got {scored}")
    device = torch.device("cpu" if config.model.device == "cpu" else "cuda")  # a device that need not be here
    config.check_ranks(ranks)
    check_predicted(config, ranks, device)
    predicted = Predictions(config, device, scored, ranks)

    def largest_of(options: dict[str, Any]) -> list[tuple[int, int]]:
        points: list[tuple[int, float]] = []
        for tokens in GRID:
            points.append((tokens, predicted(options, tokens).peak))
            if points[-1][1] > room(max(SIZES)):
                break
        return [(size, largest(points, room(size))) for size in SIZES]

    model, now = predicted.model, predicted.exact()
    rows = max(1, round(scored * config.token_limit))
    chosen = head_plan(model, config, rows, device)
    fits = largest_of({})
    ladder = remedies(config, half=main_dtype(model) == torch.bfloat16)
    alone = [(remedy, predicted(remedy.options).peak) for remedy in ladder if remedy.kind != "tokens" and _goes(predicted, remedy)]
    search = Search(ladder, lambda options: predicted(options).peak)
    proposals: list[tuple[int, str | None, int]] = []
    reached: dict[int, int] = {}
    for size, most in fits:
        if most < config.token_limit:
            found = search.enough(room(size))
            if found is None:
                proposals.append((size, None, 0))
                continue
            options = merged(found[0])
            proposals.append((size, command(options, config), found[1]))
            tokens = options.pop("max_tokens", config.token_limit)
            reached[size] = largest([(tokens, found[1]), (FURTHER * tokens, predicted(options, FURTHER * tokens).peak)], room(size))
    sparing = merged([remedy for remedy in ladder if remedy in _sparing(ladder) and _goes(predicted, remedy)])
    lengths = _lengths(config)
    flops = model_flops(model, config.token_limit, lengths, rows)
    own, forward = flops, model_flops(model, config.token_limit, lengths, rows, backward=False)
    if forwards_reference(config):
        flops = Flops(*(a + b for a, b in zip(own, forward)))
    return Outlook(
        now,
        flops,
        "scores, without a vocabulary" if chosen is None else str(chosen).splitlines()[0],
        fits,
        (command(sparing, config), largest_of(sparing) if sparing else fits),
        alone,
        proposals,
        reached,
        _speeds(config, model, now, own.attention, forward.total * forwards_reference(config), lengths) if timed else [],
        ranks,
        travels(model, config, ranks, forwards=1 + forwards_reference(config)) if ranks > 1 else (0, 0),
    )


def _goes(predicted: Callable[[dict[str, Any]], Footprint], remedy: Remedy) -> bool:
    """Whether the model and the other options take `remedy`."""
    try:
        predicted(remedy.options)
    except (ConfigError, ModelError):
        return False
    return True


def _sparing(ladder: list[Remedy]) -> list[Remedy]:
    """The last of checkpointing, and MLPs in slices."""
    return [found for kind in ("mlp", "layers") for found in [r for r in ladder if r.kind == kind][-1:]]


def _speeds(
    config: RunConfig, model: Any, now: Footprint, attention: float, reference: float, lengths: list[int]
) -> list[tuple[str, Rates, Step]]:
    """Of the device at hand, measured, and, in bfloat16, of cards by their data sheets."""
    here = torch.device("cuda" if torch.cuda.is_available() and config.model.device != "cpu" else "cpu")
    rates = [("here", measure(model, here, tokens=config.token_limit, length=lengths[0]))]
    if main_dtype(model) == torch.bfloat16 and config.model.device != "cpu":
        listed = {name: card.gigabytes for name, card in CARDS.items() if card.listed}
        rates += [(f"{name}, {size} GB" if str(size) not in name else name, of_card(name)) for name, size in listed.items()]
    return [(name, rate, seconds(now.work, attention, rate, reference=reference)) for name, rate in rates]


def room(size: float) -> float:
    """Bytes that a run may hold on a device of `size` GB."""
    return (size * 1e9 - CONTEXT) / (1 + WASTE)


def forwards_reference(config: Any) -> bool:
    """Whether every micro-batch goes through a reference, too."""
    kind = getattr(config, "reference", None)
    if kind is None or getattr(config, "reference_free", False):
        return False
    return kind in ("adapter", "copy") or keeps_copy(config) or (kind == "auto" and config.lora.enabled)


def largest(points: Sequence[tuple[int, float]], room: float) -> int:
    """The most tokens that fit into `room`, a multiple of 64; memory between the points lies on lines, and after the last on its line.

    >>> largest([(100, 1000), (300, 3000)], 2000), largest([(100, 1000), (300, 3000)], 5000), largest([(100, 1000), (300, 3000)], 999)
    (192, 448, 0)
    """
    if points[0][1] > room:
        return 0
    (x0, y0), (x1, y1) = points[0], points[1]
    for after in points[1:]:
        (x0, y0), (x1, y1) = (x1, y1) if after is not points[1] else (x0, y0), after
        if y1 > room:
            break
    return int(x0 + (room - y0) * (x1 - x0) / (y1 - y0)) // 64 * 64


def show(config: RunConfig, outlook: Outlook, console: Any, *, tflops: float | None = None) -> None:
    """Print the tables."""
    from rich.table import Table

    now, tokens = outlook.now, config.token_limit
    ranks = outlook.ranks
    each = f", each of {ranks} processes" if ranks > 1 else ""
    table = Table(title=f"{config.name} of {config.model.path}, {tokens:,} tokens a micro-batch{each}", title_justify="left")
    for name, side in (("memory", "left"), ("GiB", "right"), ("share", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for part in PARTS:
        if size := now.parts[part]:
            table.add_row(part, _gib(size), f"{size / now.peak:.0%}")
    table.add_section()
    table.add_row(f"peak ({now.moment})", _gib(now.peak), "100%", style="bold")
    console.print(table)
    if now.on_host:
        console.print(f"in the host's memory: {_gib(now.on_host)} GiB of moments and copies of weights", highlight=False)
    console.print(f"head: {outlook.head}", highlight=False)
    total = outlook.flops.total
    told = f"; at {tflops:g} TFLOP/s {total / tflops / 1e12:.3g} s, {tokens * tflops * 1e12 / total:,.0f} tokens/s" if tflops else ""
    console.print(
        f"arithmetic: {total / 1e12:.3g} TFLOP a micro-batch, {outlook.flops.head / total:.0%} in the head{told}", highlight=False
    )
    if outlook.speeds:
        table = Table(title="how long", title_justify="left")
        for name in ("device", "s a micro-batch", "s an update", "tokens/s" + f" of {ranks}" * (ranks > 1), "rates"):
            table.add_column(name, justify="left" if name in ("device", "rates") else "right")
        for device, rates, step in outlook.speeds:
            per_second = f"{speed:,.0f}" if (speed := ranks * tokens / step.micro_batch) >= 10 else f"{speed:.2g}"
            table.add_row(device, f"{step.micro_batch:.3g}", f"{step.update:.3g}", per_second, rates.source)
        console.print(table)
    if ranks > 1:
        small, large = (_gib(size) for size in outlook.travels)
        console.print(
            f"Through each process travel {small} GiB in a micro-batch and {large} GiB at an update. Seconds are an estimate of processes "
            f"that have such a device each, 1/{ranks} of the rows to update, and nothing to wait for: what travels is not in them.",
            highlight=False,
            soft_wrap=True,
        )
    spare, sparing = outlook.sparing
    table = Table(title="what fits", title_justify="left")
    spares = any(longest for _, longest in sparing)
    proposed = "as proposed below"
    columns = ["device, GB", "largest --max_tokens", *["and sparingly"] * spares, *[proposed] * bool(outlook.reached), ""]
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for (size, most), (_, longest) in zip(outlook.fits, sparing):
        note = "" if most >= tokens else f"not {tokens:,}: see below"
        cells = {"device, GB": str(size), "largest --max_tokens": _tokens(most), "and sparingly": _tokens(longest), "": note}
        cells[proposed] = "" if most >= tokens else _tokens(outlook.reached.get(size, 0))
        table.add_row(*(cells[name] for name in columns))
    console.print(table)
    console.print(
        "A sample must fit with all its completions: the longest sequence that fits has as many tokens as the largest --max_tokens.",
        highlight=False,
    )
    if spare and spares:
        console.print(f"Sparingly: {spare}", highlight=False, soft_wrap=True)
    for size, text, peak in outlook.proposals:
        if not text:
            console.print(f"{size} GB: none of the options below, nor all of them, make it fit", highlight=False)
            continue
        limit = "" if "--max_tokens" in text else f"--max_tokens {tokens} "
        start = f"torchrun --nproc_per_node {ranks} -m " if ranks > 1 else ""
        line = f"{start}fastalign {config.name} --model.path {config.model.path} {limit}{text}"
        console.print(f"{size} GB, besides your other options ({_gib(peak)} GiB):\n  {line}", highlight=False, soft_wrap=True)
    table = Table(title="what to set for less, the fastest first", title_justify="left")
    for name, side in (("options", "left"), ("peak, GiB", "right"), ("saved", "right"), ("costs", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for remedy, peak in outlook.remedies:
        table.add_row(command(remedy.options, config), _gib(peak), f"{1 - peak / now.peak:.0%}", remedy.cost)
    console.print(table)
    if config.name in ("grpo", "rloo"):
        console.print("The keys and values of sampling are not counted.", highlight=False)


def _tokens(most: int) -> str:
    return f"{most:,}" if most else "none"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 4 else f"{size / GIB:.4f}"


def _lengths(config: RunConfig) -> list[int]:
    """Sequences as long as the data may have, that fill a micro-batch."""
    longest = min(getattr(config.data, "max_length", None) or 1024, config.token_limit)
    return [longest] * (config.token_limit // longest)
