"""Generating a batch of answers token by token: each row with its own sampling, its own random numbers and its own end.

Row i of a request with seed s draws what `fastalign.rollout.generate` draws for member i with seed s. What a row is batched
with changes its logits by rounding only; its random numbers depend on seed and index alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastalign.models.trunk import causal_lm, evaluation, stock_attention
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

    def __post_init__(self) -> None:
        self.random = np.random.default_rng([self.sampling.seed, self.index])

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


def decode(
    model: Any,
    rows: Sequence[Row],
    eos: frozenset[int],
    emit: Callable[[list[tuple[Row, str]]], None],
) -> None:
    """Fill every row until it has a finish_reason or is cancelled; `emit` gets each step's rows with the text that each may show.

    A row that is done leaves the batch, and its part of the cache with it. Every row needs a token in its prompt and room for
    one in its answer.
    """
    causal = causal_lm(model)
    device = next(causal.parameters()).device
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(causal.forward).parameters:
        options["logits_to_keep"] = 1
    running, pad = list(rows), min(eos)
    longest = max(len(row.prompt) for row in running)
    ids = torch.tensor([[pad] * (longest - len(row.prompt)) + list(row.prompt) for row in running], device=device)
    mask = torch.tensor([[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in running], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    with evaluation(model), stock_attention(model):
        while True:
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **options)
            cache = out.past_key_values
            chosen = _draw(out.logits[:, -1], running)
            pieces = [(row, row.add(token, logp, eos)) for row, (token, logp) in zip(running, chosen)]
            emit(pieces)
            keep = [i for i, row in enumerate(running) if not (row.finish_reason or row.cancelled)]
            if not keep:
                return
            last = positions[:, -1:]
            if len(keep) < len(running):
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                mask, last, running = mask[kept], last[kept], [running[i] for i in keep]
            ids = torch.tensor([[row.tokens[-1]] for row in running], device=device)
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
            positions = last + 1


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
