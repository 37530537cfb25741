"""Completions sampled from a model by Transformers' own generation: batched, with a KV cache, left-padded exactly.

The random numbers of a completion depend on the seed and on its own place among the prompts, not on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalign.errors import ConfigError
from fastalign.models.trunk import causal_lm, evaluation, stock_attention


class Completion(NamedTuple):
    """What a model said after a prompt."""

    tokens: tuple[int, ...]  # with the end-of-sequence token, if it came
    logps: tuple[float, ...]  # of each token under softmax(logits / temperature), in nats; temperature 0: under softmax(logits)
    finished: bool  # by an end-of-sequence token, not by the limit


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    max_tokens: int = 16384,
) -> list[Completion]:
    """One completion of each prompt, in the order of the prompts; a prompt that is there twice is sampled twice.

    temperature     0 takes the most probable token every time
    max_tokens      of prompts and completions of one batch, padding included; bounds the cache

    Raises ConfigError for a temperature below 0 and for an empty prompt.
    """
    if temperature < 0:
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i} is empty: a model needs a first token, such as BOS, to go on from")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    result: list[Completion | None] = [None] * len(prompts)
    with evaluation(model), stock_attention(model):
        for batch in _batches([len(p) for p in prompts], max_new_tokens, max_tokens):
            sampler = _Sampler(_uniforms(seed, batch, max_new_tokens).to(next(model.parameters()).device), temperature)
            tokens = _run(model, [prompts[i] for i in batch], sampler, max_new_tokens, eos)
            logps = sampler.logps.cpu()
            for row, i in enumerate(batch):
                result[i] = _completion(tokens[row], logps[row], eos)
    return [r for r in result if r is not None]


class _Sampler:
    """A logits processor that draws the next token by inverting the distribution function, and leaves no other possible."""

    def __init__(self, uniforms: Tensor, temperature: float) -> None:
        self.uniforms, self.temperature = uniforms, temperature  # (B, T)
        self.logps = torch.zeros_like(uniforms, dtype=torch.float32)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature:
            below = log_p.double().exp().cumsum(-1)
            u = self.uniforms[:, self.step, None] * below[:, -1:]
            token = torch.searchsorted(below, u, right=True).clamp(max=log_p.shape[1] - 1)
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
