"""Generating answers together, token by token: each row with its own sampling, its own random numbers, beginning and end.

Row i of a request with seed s draws what `fastalign.rollout.generate` draws for member i with seed s. What a row is batched
with changes its logits by rounding only; its random numbers depend on seed and index alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastalign.models.trunk import causal_lm
from fastalign.rollout.generate import draw, truncate
from fastalign.serve.text import TextStream


@dataclass(frozen=True)
class RowSampling:
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most probable token every time
    top_p: float = 1.0  # the fewest most probable tokens that together have this probability
    stops: tuple[str, ...] = ()  # the answer ends before the first of these texts
    seed: int = 0
    top_logprobs: int | None = None  # None: no log-probs to show; k: the drawn token's and those of the k most probable ones


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs to show, in nats, under softmax(logits): without temperature and truncation."""

    token: int
    logp: float
    top: tuple[tuple[int, float], ...]  # (token, log-prob), the most probable first


@dataclass
class Row:
    """One answer while it is being made."""

    prompt: tuple[int, ...]
    sampling: RowSampling
    index: int  # among the answers of its request: a random stream for each
    stream: TextStream
    tokens: list[int] = field(default_factory=list)  # with the end-of-sequence token
    logps: list[float] = field(default_factory=list)  # under the distribution that each was drawn from
    text: str = ""
    shown: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    cancelled: bool = False  # set from outside: nobody waits for it any longer

    @cached_property
    def random(self) -> np.random.Generator:
        """Its own random numbers."""
        return np.random.default_rng([self.sampling.seed, self.index])

    def add(self, token: int, logp: float, eos: frozenset[int]) -> str:
        """Take the next token; returns the text that can be shown now."""
        self.tokens.append(token)
        self.logps.append(logp)
        piece = "" if token in eos else self.stream.push(token)
        if token in eos or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self.stream.finish()
        if self.stream.stopped:  # also in what the last token held back
            self.finish_reason = "stop"
        self.text += piece
        return piece


Drawn = tuple[Row, str]  # a row that has one more token, and the text that it may show now


class Batch:
    """Rows that are generated together, a token of each at a time, once their prompts have been read.

    Rows may be added between two steps, and leave when they have a finish_reason or are cancelled. The cache has as many slots
    for each row as the longest one needs; shorter ones are padded at the left, so that the next token of all goes into one slot.
    The model that `read` and `step` get is the same one each time, inside `evaluation` and `stock_attention`. Every row needs a
    token in its prompt and room for one in its answer.
    """

    def __init__(self, eos: frozenset[int], rows: Sequence[Row] = ()) -> None:
        self.eos, self.rows = eos, list(rows)
        self._prompts = list(dict.fromkeys(row.prompt for row in rows))  # one for all answers to it
        self._cache: Any = None
        self._options: dict[str, Any] = {"use_cache": True}
        self._mask = torch.empty(len(self._prompts), 0, dtype=torch.int64)  # (B, slots), 0 for padding

    @property
    def unread(self) -> int:
        """Slots that the prompts still need."""
        return max(map(len, self._prompts), default=0) - self._mask.shape[1] if self._prompts else 0

    def read(self, model: Any, tokens: int | None = None) -> list[Drawn]:
        """Read on in the prompts; when that was all of them, draw the first tokens, as in `step`.

        tokens    of all prompts together, padding included; None: all. A cache of layers that may have to see a prompt at once reads
                  it at once
        """
        if self._cache is None:
            self._begin(model)
        count, at = len(self._prompts), self._mask.shape[1]
        width = self.unread if tokens is None else min(self.unread, max(1, tokens // count))
        pads, device = [at + self.unread - len(prompt) for prompt in self._prompts], self._mask.device
        pad = min(self.eos)
        ids = torch.tensor(
            [[pad if k < n else p[k - n] for k in range(at, at + width)] for n, p in zip(pads, self._prompts)], device=device
        )
        fresh = torch.tensor([[int(k >= n) for k in range(at, at + width)] for n in pads], device=device)
        before, self._mask = self._mask, torch.cat([self._mask, fresh], dim=1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, at:]
        logits = self._forward(model, ids, positions)
        if self.unread and not self._is_padded:
            self._cache, self._mask = None, before[:, :0]
            return self.read(model)
        return [] if self.unread else self._spread(logits)

    @property
    def slots(self) -> int:
        """Of each row in the cache."""
        return self._mask.shape[1] if self.rows else 0

    @property
    def open(self) -> bool:
        """Whether other rows can be added: not to a cache of layers that we do not know how to pad."""
        return not self.rows or self._is_padded

    @property
    def _is_padded(self) -> bool:
        layers = getattr(self._cache, "layers", ())
        return bool(layers) and all(type(layer).__name__ in _PADDED for layer in layers)

    def add(self, other: Batch) -> None:
        """Take the rows of another batch in, which is of no use afterwards."""
        if not other.rows:
            return
        if not self.rows:
            self.rows, self._cache, self._mask, self._options = other.rows, other._cache, other._mask, other._options
            return
        more = other.slots - self.slots
        self._pad(max(more, 0))
        other._pad(max(-more, 0))
        for layer, added in zip(self._cache.layers, other._cache.layers):
            if layer.keys is not None:  # else a layer that looks into another one's
                layer.keys, layer.values = torch.cat([layer.keys, added.keys]), torch.cat([layer.values, added.values])
        self.rows, self._mask = self.rows + other.rows, torch.cat([self._mask, other._mask])

    def step(self, model: Any) -> list[Drawn]:
        """Draw the next token of every row; what each may show now. Rows that are done then leave."""
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._mask.device)
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        return self._take(self._forward(model, ids, positions))

    def _begin(self, model: Any) -> None:
        if "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters:
            self._options["logits_to_keep"] = 1
        self._mask = self._mask.to(next(causal_lm(model).parameters()).device)

    def _forward(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        """(B, V) logits after the last of `ids` (B, width)."""
        out = model(input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache, **self._options)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    def _spread(self, logits: Tensor) -> list[Drawn]:
        """From a row of the cache for each prompt to one for each answer, with its first token."""
        places = {prompt: i for i, prompt in enumerate(self._prompts)}
        self._prompts = []
        if len(places) < len(self.rows):
            of = torch.tensor([places[row.prompt] for row in self.rows], device=logits.device)
            self._cache.batch_select_indices(of)
            self._mask, logits = self._mask[of], logits[of]
        return self._take(logits)

    def _take(self, logits: Tensor) -> list[Drawn]:
        chosen = _draw(logits, self.rows)
        pieces = [(row, row.add(token, logp, self.eos)) for row, (token, logp) in zip(self.rows, chosen)]
        self._leave()
        return pieces

    def _leave(self) -> None:
        keep = [i for i, row in enumerate(self.rows) if not (row.finish_reason or row.cancelled)]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        if not keep:
            self._cache = None
            return
        kept = torch.tensor(keep, device=self._mask.device)
        self._cache.batch_select_indices(kept)
        self._mask = self._mask[kept]
        if self.open:
            self._pad(-int(self._mask.argmax(1).min()))  # what is padding in every row by now

    def _pad(self, more: int) -> None:
        """So many more slots of padding at the left, or fewer."""
        if not more:
            return
        for layer in self._cache.layers:
            if layer.keys is not None:
                _pad_layer(layer, more)
        self._mask = functional.pad(self._mask, (more, 0))


_PADDED = ("DynamicLayer", "DynamicSlidingWindowLayer")  # layers of Transformers' cache


def _pad_layer(layer: Any, more: int) -> None:
    """A layer with a window keeps its last window - 1 slots, and counts those that it has seen."""
    if layer.is_sliding:
        layer.cumulative_length += more
        more = min(layer.cumulative_length, layer.sliding_window - 1) - layer.keys.shape[-2]
    layer.keys, layer.values = functional.pad(layer.keys, (0, 0, more, 0)), functional.pad(layer.values, (0, 0, more, 0))


def _draw(logits: Tensor, rows: Sequence[Row]) -> list[tuple[int, float]]:
    """The next token of each row and its log-prob; log-probs to show go into the rows."""
    scores = logits.float()  # (B, V)
    heat = torch.tensor([[row.sampling.temperature or 1.0] for row in rows], device=scores.device)
    log_p = (scores / heat).log_softmax(-1)
    for top_p in {row.sampling.top_p for row in rows if row.sampling.temperature and row.sampling.top_p < 1}:
        cut = torch.tensor(
            [i for i, row in enumerate(rows) if row.sampling.temperature and row.sampling.top_p == top_p], device=scores.device
        )
        log_p[cut] = truncate(log_p[cut], top_p=top_p)
    tokens = log_p.argmax(-1, keepdim=True)
    hot = [i for i, row in enumerate(rows) if row.sampling.temperature]
    if hot:
        uniforms = torch.tensor([[rows[i].random.random()] for i in hot], dtype=torch.float64, device=scores.device)
        where = torch.tensor(hot, device=scores.device)
        tokens[where] = draw(log_p[where], uniforms)
    logps = log_p.gather(1, tokens)[:, 0].tolist()
    chosen = tokens[:, 0].tolist()
    for i, row in enumerate(rows):
        if row.sampling.top_logprobs is not None:
            plain = scores[i].log_softmax(-1)
            top = plain.topk(row.sampling.top_logprobs)
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist()))
            row.shown.append(TokenLogprobs(chosen[i], float(plain[chosen[i]]), pairs))
    return list(zip(chosen, logps))
