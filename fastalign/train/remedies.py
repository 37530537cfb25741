"""What makes a run fit a smaller device: options in the order of what they cost in speed, and the fewest of them that are enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.errors import ConfigError, ModelError
from fastalign.objectives.base import RunConfig
from fastalign.objectives.online import OnlineConfig
from fastalign.train.footprint import keeps_copy

LOGITS = 32 << 20  # bytes of a small slab
TOKENS = 2048  # in a micro-batch, below which a device is hardly busy
WORTH = 0.995  # of the peak: what saves less than the rest is left out


@dataclass(frozen=True)
class Remedy:
    """Options that save memory together, and what they cost."""

    kind: str  # of the same kind, a later one replaces an earlier one
    options: dict[str, Any]  # dotted name -> value
    cost: str
    instead_of: tuple[str, ...] = ()  # kinds that do not go with it

    @property
    def text(self) -> str:
        """As on a command line.

        >>> Remedy("a", {"max_grad_norm": None, "model.mlp_chunk": 8, "share_prompts": True}, "nothing").text
        '--max_grad_norm null --model.mlp_chunk 8 --share_prompts true'
        """
        return " ".join(f"--{name} {_spelled(value)}" for name, value in self.options.items())


def remedies(config: Any, *, half: bool) -> list[Remedy]:
    """All that there are for `config`, the fastest first; at the end those that train something else. `half`: the weights are bfloat16."""
    checkpointing = {"model.gradient_checkpointing": True, "model.checkpoint_every": 1, "model.checkpoint_keep": "nothing"}
    found = [
        Remedy("prompts", {"share_prompts": True}, "saves time"),
        Remedy("reference", {"reference": "cache"}, "a pass over the data before training, then saves time"),
        Remedy("logits", {"logits_budget": LOGITS}, "next to nothing"),
        Remedy("rounding", {"master_weights": False, "stochastic_rounding": True}, "nothing; rounds at random"),
        Remedy("moments", {"optimizer": "adamw_8bit"}, "nothing; moments in 8 bits"),
        Remedy("update", {"update_in_backward": True, "max_grad_norm": None}, "nothing; the gradient is not clipped"),
    ]
    tokens, floor = config.token_limit // 2, max(TOKENS, 2 * (getattr(config.data, "max_length", None) or 0))
    while tokens >= floor:
        found.append(Remedy("tokens", {"max_tokens": tokens}, "nothing while the device is busy"))
        tokens //= 2
    found += [
        Remedy("layers", checkpointing | {"model.checkpoint_keep": "products"}, "norms, rotations, activation functions once more"),
        Remedy("layers", checkpointing | {"model.checkpoint_every": 2}, "half a forward more"),
        Remedy("mlp", {"model.mlp_chunk": 2048}, "a forward of the MLPs more"),
        Remedy("layers", checkpointing | {"model.checkpoint_keep": "attention"}, "a forward without attention more"),
        Remedy("layers", checkpointing, "a forward more"),
        Remedy("layers", checkpointing | {"model.checkpoint_offload": True}, "a forward more, and copies to the host"),
        Remedy("reference", {"reference": "stream"}, "all weights over the bus in every micro-batch"),
        Remedy("moments", {"optimizer": "adamw_offload"}, "all gradients and weights over the bus in every step", ("rounding",)),
        Remedy("dtype", {"model.dtype": "bfloat16"}, "saves time; another precision"),
        Remedy("adapter", {"lora.r": 16}, "saves time; trains an adapter"),
        Remedy("adapter", {"lora.r": 16, "model.quantization": "nf4"}, "unpacks weights; trains an adapter on rounded ones"),
    ]
    return [remedy for remedy in found if _counts(config, remedy, half)]


def changed(config: RunConfig, options: dict[str, Any], processes: int = 1) -> RunConfig:
    """A copy of `config` with these options. Raises ConfigError where they do not go together."""
    other = copy.deepcopy(config)
    for name, value in options.items():
        section, _, leaf = name.rpartition(".")
        setattr(getattr(other, section) if section else other, leaf, value)
    other.output, other.data.path = other.output or "run", other.data.path or "data.jsonl"
    other.validate()
    if processes > 1:
        other.check_ranks(processes)
    return other


class Search:
    """The fewest remedies that bring a peak under a limit. `peak` predicts it with options, and raises where they do not go together."""

    def __init__(self, ladder: list[Remedy], peak: Callable[[dict[str, Any]], int]) -> None:
        self.peak = peak
        self.known: dict[tuple[tuple[str, str], ...], int] = {(): peak({})}
        self.rungs = self._climb(ladder)
        self.passed: list[tuple[list[Remedy], int]] = []  # rungs so far

    def enough(self, limit: float) -> tuple[list[Remedy], int] | None:
        """The first rung with a peak of at most `limit`, without what is not needed there, and the peak then; None: there is none."""
        for taken, size in self._reached():
            if size <= limit:
                return self._needed(taken, size, limit)
        return None

    def _reached(self) -> Iterator[tuple[list[Remedy], int]]:
        yield from self.passed
        for rung in self.rungs:
            self.passed.append(rung)
            yield rung

    def _climb(self, ladder: list[Remedy]) -> Iterator[tuple[list[Remedy], int]]:
        taken: list[Remedy] = []
        size = self.known[()]
        for remedy in ladder:
            kept = [other for other in taken if other.kind != remedy.kind and other.kind not in remedy.instead_of]
            less = self._of([*kept, remedy])
            if less is not None and less <= WORTH * size:
                taken, size = [*kept, remedy], less
                yield taken, size

    def _needed(self, taken: list[Remedy], size: int, limit: float) -> tuple[list[Remedy], int]:
        for remedy in reversed(taken):  # the costliest first
            fewer = [other for other in taken if other is not remedy]
            less = self._of(fewer)
            if less is not None and less <= limit:
                taken, size = fewer, less
        return taken, size

    def _of(self, taken: list[Remedy]) -> int | None:
        options = merged(taken)
        key = tuple(sorted((name, str(value)) for name, value in options.items()))
        if key not in self.known:
            try:
                self.known[key] = self.peak(options)
            except (ConfigError, ModelError):
                return None
        return self.known[key]


def merged(taken: list[Remedy]) -> dict[str, Any]:
    """The options of all."""
    return {name: value for remedy in taken for name, value in remedy.options.items()}


def command(options: dict[str, Any], config: RunConfig) -> str:
    """The options as words of a command line, but for those that `config` has already."""
    return Remedy("", {name: value for name, value in options.items() if value != _value(config, name)}, "").text


def _counts(config: Any, remedy: Remedy, half: bool) -> bool:
    """Whether `config` does not have it yet, and has a use for it."""
    options, on_host = remedy.options, config.model.device == "cpu"
    try:
        if all(_value(config, name) == value for name, value in options.items()):
            return False
    except AttributeError:  # an option of other objectives
        return False
    if remedy.kind == "reference":
        follows = getattr(config, "sync_ref_model", False) or (isinstance(config, OnlineConfig) and options["reference"] == "cache")
        return keeps_copy(config) and not follows and not (on_host and options["reference"] == "stream")
    if remedy.kind == "logits":
        return config.logits_budget is None or config.logits_budget > LOGITS
    if remedy.kind == "rounding":
        return half
    if remedy.kind == "moments":
        return config.optimizer == "adamw" and not (on_host and options["optimizer"] == "adamw_offload")
    if remedy.kind == "layers":
        return not config.model.gradient_checkpointing and not (on_host and options.get("model.checkpoint_offload"))
    if remedy.kind == "dtype":
        return not half and config.model.dtype != "float16"
    if remedy.kind == "adapter":
        adapter = config.lora.enabled or (Path(config.model.path) / "adapter_config.json").is_file()
        return not adapter and not (on_host and "model.quantization" in options)
    return True


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _spelled(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
