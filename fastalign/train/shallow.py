"""What a deep model holds, from two copies of it with few layers: where layers repeat, memory lies on a line over their number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import nn

from fastalign.errors import ModelError
from fastalign.models.trunk import causal_lm, decoder_layers, text_config
from fastalign.objectives.base import RunConfig
from fastalign.train.empty import bare_model, empty_model, with_options
from fastalign.train.footprint import Footprint, moments
from fastalign.train.footprint_ranks import check_predicted, moments_of_rank
from fastalign.train.remedies import changed

SHALLOW = 8  # layers, of which all are run
LONGEST = 8  # layers after which they repeat


class Predictions:
    """Footprints of a run under other options. Nothing is built or run twice, and of a deep model only a few layers are.

    Layers that are of several kinds in turn, or unlike at the beginning, are kept in whole turns; a model whose layers do not repeat is
    run as it is. The memory of a shallow model is exact; of a deep one it is where the same moment is the highest in all its copies.
    Of several `ranks` it is that of one of them.
    """

    def __init__(self, config: RunConfig, device: torch.device, scored: float = 1.0, ranks: int = 1) -> None:
        self.config, self.device, self.scored, self.ranks = config, device, scored, ranks
        self.model = empty_model(config)
        self.kinds = _kinds(self.model)
        self.known: dict[Any, Any] = {}  # what has been run
        self.models: dict[Any, Any] = {self._key(config, None): self.model}
        self.bare: dict[Any, Any] = {}
        self.found: dict[Any, Footprint] = {}

    def exact(self) -> Footprint:
        """Of the run as it is, all layers run."""
        return self._moments(self.config, None, self.config.token_limit).footprint

    def __call__(self, options: dict[str, Any], tokens: int | None = None) -> Footprint:
        """With `options` and micro-batches of `tokens` tokens. Raises ConfigError or ModelError where they do not go together."""
        asked = (str(sorted(options.items())), tokens)
        if asked not in self.found:
            config = changed(self.config, options, self.ranks) if options else self.config
            size = tokens or config.token_limit
            counts = few_layers(self.kinds, config.model.checkpoint_every)
            if counts is None:
                self.found[asked] = self._moments(config, None, size).footprint
            else:
                few, more = (self._moments(config, count, size) for count in counts)
                self.found[asked] = few.beyond(more, (len(self.kinds) - counts[0]) // (counts[1] - counts[0])).footprint
        return self.found[asked]

    def _moments(self, config: RunConfig, layers: int | None, tokens: int) -> Any:
        options: dict[str, Any] = {
            "tokens": tokens,
            "rows": max(1, round(self.scored * tokens)),
            "device": self.device,
            "known": self.known,
        }
        model = self._model(config, layers)
        if self.ranks == 1:
            return moments(model, config, **options)
        check_predicted(config, self.ranks, self.device)
        return moments_of_rank(model, config, self.ranks, whole=model if layers is None else self._whole(config), **options)

    def _whole(self, config: RunConfig) -> Any:
        """A model of all layers, which is asked for its weights alone."""
        return self._model(replace(config, model=replace(self.config.model, dtype=config.model.dtype)), None)

    def _model(self, config: RunConfig, layers: int | None) -> Any:
        key = self._key(config, layers)
        if key not in self.models:
            kind = config.model.dtype
            if kind not in self.bare:
                self.bare[kind] = bare_model(config)
            self.models[key] = with_options(shortened(self.bare[kind], layers), config)
        return self.models[key]

    @staticmethod
    def _key(config: RunConfig, layers: int | None) -> Any:
        return str(config.model), str(config.lora), layers


def few_layers(kinds: Sequence[Any], every: int = 1) -> tuple[int, int] | None:
    """Two numbers of layers through which the line to all of them goes, for layers of these `kinds`; None: there are none.

    They are apart by a turn of the kinds that is also one of `every` layers, as all layers are from them.
    >>> few_layers(["a"] * 36), few_layers(["a"] * 9, every=2), few_layers(["d", *"abababababab"]), few_layers("abcdefghijkl")
    ((1, 2), (1, 3), (3, 5), None)
    """
    if len(kinds) < SHALLOW:
        return None
    for turn in range(1, LONGEST + 1):
        unlike = [k for k in range(len(kinds) - turn) if kinds[k] != kinds[k + turn]]
        first = unlike[-1] + 1 if unlike else 0  # from here on they repeat
        step = lcm(turn, every)
        few = first + 1
        few += (len(kinds) - few) % step
        if few + step < len(kinds):
            return few, few + step
    return None


def shortened(model: Any, layers: int | None) -> Any:
    """A copy of `model` (on the meta device) with its first `layers` layers, or with all."""
    if layers is None:
        return copy.deepcopy(model)
    stack = decoder_layers(causal_lm(model))
    rest = list(stack)[layers:]
    del stack[layers:]
    try:
        short = copy.deepcopy(model)
    finally:
        stack.extend(rest)
    text_config(causal_lm(short)).num_hidden_layers = layers
    return short


def _kinds(model: Any) -> list[str]:
    try:
        return [_kind(layer) for layer in decoder_layers(causal_lm(model))]
    except ModelError:  # no list of layers
        return []


def _kind(layer: nn.Module) -> str:
    """What tells layers apart: their modules, the shapes of their weights, and every plain attribute but their number."""
    found = []
    for name, module in layer.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str)) and key != "layer_idx"}
        found.append((name, type(module).__name__, sorted(plain.items())))
    weights = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
    return str((found, weights))
