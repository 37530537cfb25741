"""Completions sampled from a model by Transformers' own generation: batched, with a KV cache, left-padded exactly.

The random numbers of a completion depend on the seed and on its own place among the prompts, not on what it is batched with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign.errors import ConfigError
from fastalign.models.trunk import causal_lm, evaluation, stock_attention
from fastalign.pausing import pause


class Completion(NamedTuple):
    """What a model said after a prompt."""

    tokens: tuple[int, ...]  # with the end-of-sequence token, if it came
    logps: tuple[float, ...]  # of each token, in nats, under the distribution it was drawn from; temperature 0: under softmax(logits)
    finished: bool  # by an end-of-sequence token, not by the limit


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    places: Sequence[int] | None = None,
    max_tokens: int = 16384,
) -> list[Completion]:
    """One completion of each prompt, in the order of the prompts; a prompt that is there twice is sampled twice.

    temperature     0 takes the most probable token every time
    top_k, top_p, min_p     leave out improbable tokens, see `truncate`
    places          of the prompts among those that `seed` is for; None: they are all
    max_tokens      of prompts and completions of one batch, padding included; bounds the cache

    Raises ConfigError for an option out of its range and for an empty prompt.
    """
    if temperature < 0:
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ConfigError(f"top_k must be 0 or more, top_p in (0, 1] and min_p in [0, 1], got {top_k}, {top_p} and {min_p}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i} is empty: a model needs a first token, such as BOS, to go on from")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    result: list[Completion | None] = [None] * len(prompts)
    with evaluation(model), stock_attention(model):
        for batch in _batches([len(p) for p in prompts], max_new_tokens, max_tokens):
            uniforms = _uniforms(seed, batch if places is None else [places[i] for i in batch], max_new_tokens).to(
                next(model.parameters()).device
            )
            sampler = _Sampler(uniforms, temperature, {"top_k": top_k, "top_p": top_p, "min_p": min_p})
            tokens = _run(model, [prompts[i] for i in batch], sampler, max_new_tokens, eos)
            logps = sampler.logps.cpu()
            for row, i in enumerate(batch):
                result[i] = _completion(tokens[row], logps[row], eos)
    return [r for r in result if r is not None]


def truncate(log_p: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Log-probs (B, V) of the tokens that may be drawn, renormalised, -inf for the others; in this order, as in Transformers.

    top_k    the so many most probable tokens and those as probable as the last of them; 0: all
    top_p    the fewest most probable tokens that together have this probability (nucleus). Holtzman 2019, arXiv:1904.09751
    min_p    tokens with at least this share of the probability of the most probable one. Nguyen 2024, arXiv:2407.01082

    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.7).exp()
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    if 0 < top_k < log_p.shape[-1]:
        log_p = _renormalised(log_p, log_p >= log_p.topk(top_k).values[:, -1:])
    if top_p < 1:
        ordered, order = log_p.sort(descending=True, stable=True)
        p = ordered.double().exp()
        log_p = _renormalised(log_p, torch.empty_like(log_p, dtype=torch.bool).scatter_(1, order, p.cumsum(-1) - p < top_p))
    if min_p > 0:
        log_p = _renormalised(log_p, log_p >= log_p.amax(-1, keepdim=True) + math.log(min_p))
    return log_p


def draw(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B, 1) of the distributions log_p (B, V), by inverting their distribution functions at `uniforms` (B, 1) float64 in [0, 1).

    >>> draw(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.6]], dtype=torch.float64))
    tensor([[1]])
    """
    below = log_p.double().exp().cumsum(-1)
    total = below[:, -1:]
    return torch.searchsorted(below, torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total))), right=True)


def _renormalised(log_p: Tensor, kept: Tensor) -> Tensor:
    return log_p.masked_fill(~kept, -torch.inf).log_softmax(-1)


class _Sampler:
    """A logits processor that draws the next token by inverting the distribution function, and leaves no other possible."""

    def __init__(self, uniforms: Tensor, temperature: float, truncation: dict[str, Any]) -> None:
        self.uniforms, self.temperature, self.truncation = uniforms, temperature, truncation  # (B, T)
        self.logps = torch.zeros_like(uniforms, dtype=torch.float32)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        pause()
        log_p = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature:
            log_p = truncate(log_p, **self.truncation)
            token = draw(log_p, self.uniforms[:, self.step, None])
        else:
            token = log_p.argmax(-1, keepdim=True)
        self.logps[:, self.step] = log_p.gather(1, token)[:, 0]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _run(model: Any, prompts: list[Sequence[int]], sampler: _Sampler, max_new_tokens: int, eos: list[int]) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList

    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[eos[0]] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    options = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0])
    causal = causal_lm(model)
    before, causal.generation_config = causal.generation_config, options  # the model's own would mix penalties in
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=options, logits_processor=LogitsProcessorList([sampler]))
    finally:
        causal.generation_config = before
    return out[:, longest:].tolist()


def _completion(tokens: list[int], logps: Tensor, eos: list[int]) -> Completion:
    length = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return Completion(tuple(tokens[:length]), tuple(logps[:length].tolist()), bool(length) and tokens[length - 1] in eos)


def _batches(lengths: Sequence[int], new: int, max_tokens: int) -> list[list[int]]:
    """Prompts of like length together, so that little is padded.

    >>> _batches([3, 9, 4], new=1, max_tokens=10)
    [[1], [2, 0]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + new) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _uniforms(seed: int | Sequence[int], members: Sequence[int], steps: int) -> Tensor:
    """(B, steps) float64 in [0, 1), a stream for each (seed, member); torch's generator takes no more than 32 bits of a seed."""
    seeds = [seed] if isinstance(seed, int) else list(seed)
    return torch.from_numpy(np.stack([np.random.default_rng([*seeds, i]).random(steps) for i in members]))
