"""A reward model as a function of text, whatever tokenizer the policy has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastalign.data.encode import Encoder
from fastalign.data.examples import Example
from fastalign.data.messages import Turns
from fastalign.data.tokenizer import load_tokenizer
from fastalign.errors import ConfigError, DataError
from fastalign.models.fingerprint import model_fingerprint
from fastalign.models.trunk import evaluation
from fastalign.models.value_head import is_reward_model, load_reward_model, scores
from fastalign.packing import collate, pack
from fastalign.types import Sample


class RewardModel:
    """A reward model folder, an adapter of one, or a run of `fastalign reward`.

    Prompts and completions are text or messages, rendered and tokenized by the reward model's own tokenizer, as in its
    training. Raises ConfigError when the folder holds no reward model, DataError when its template cannot render a prompt.
    """

    on_device = True

    def __init__(self, path: str, *, max_tokens: int = 16384) -> None:
        folder = Path(path) / "final" if (Path(path) / "final").is_dir() else Path(path)
        if not is_reward_model(folder):
            raise ConfigError(f"{path} is no reward model: train one with fastalign reward, or name the folder of one")
        self.name, self.max_tokens = Path(path).name, max_tokens
        self.tokenizer = tokenizer = load_tokenizer(folder)
        self.encoder = Encoder(tokenizer)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.model = load_reward_model(folder, pad_token_id=pad).requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights and config."""
        return model_fingerprint(self.model)

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any) -> list[float]:
        """One score per completion; a call of a reward function."""
        tools = columns.get("tools") or [None] * len(prompts)
        examples = [Example(f"completion {i}", i, p, (c,), tools=tools[i]) for i, (p, c) in enumerate(zip(prompts, completions))]
        samples = []
        for i, encoded in enumerate(self.encoder.encode(examples)):
            if isinstance(encoded, DataError):
                raise encoded
            samples.append(Sample(i, tuple(encoded.prompt), (tuple(encoded.completions[0]),)))
        result = torch.empty(len(samples))
        device = next(self.model.parameters()).device
        with evaluation(self.model):
            for members in pack([s.num_tokens for s in samples], max(self.max_tokens, *(s.num_tokens for s in samples), 1)):
                result[members] = scores(self.model, collate([samples[i] for i in members]).to(device)).cpu()
        return result.tolist()
