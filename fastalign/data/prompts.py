"""Prompts to be answered, with the columns that reward functions read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastalign.data.config import DataConfig, PromptDataConfig
from fastalign.data.examples import Dropped, Example, Fields
from fastalign.data.messages import Turns, has_text
from fastalign.data.samples import Format, Samples, load
from fastalign.data.sources import Row
from fastalign.errors import DataError


@dataclass
class Prompts(Samples):
    """Samples without completions. `turns[index]` is the prompt as it was written, `columns[index]` the rest of its row."""

    turns: dict[int, Turns] = field(default_factory=dict)
    columns: dict[int, Row] = field(default_factory=dict)
    tokenizer: Any = None  # which wrote the prompts and reads the answers


def parse_prompt(place: str, index: int, row: Row, config: DataConfig) -> Example:
    """The prompt of a row, without completions. Raises DataError for a row that asks nothing."""
    given = Fields(place, row, config)
    given.require("prompt")
    options = given.options()
    prompt = given.turns("prompt")
    if not has_text(prompt):
        raise DataError(f"{given.where('prompt')}: the prompt is empty; give a prompt or remove the row")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{given.where('prompt')}: the last message is the assistant's, so there is nothing to answer; remove it")
    return Example(place, index, prompt, (), **options)


PROMPTS = Format("prompt", (), lambda place, index, row, config: [parse_prompt(place, index, row, config)])


def load_prompts(config: PromptDataConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> Prompts:
    """The prompts of `config.path`, tokenized as they are at inference; see `load` for the arguments and errors.

    A conversation is rendered up to where the assistant speaks next. Every other column of a row is kept for the reward functions.
    """
    turns: dict[int, Turns] = {}
    columns: dict[int, Row] = {}

    def parse(place: str, index: int, row: Row, config: DataConfig) -> Sequence[Example | Dropped]:
        example = parse_prompt(place, index, row, config)
        assert example.prompt is not None
        turns[index] = example.prompt
        columns[index] = {name: value for name, value in row.items() if name != config.columns.get("prompt", "prompt")}
        return [example]

    loaded = load(Format("prompt", (), parse), config, tokenizer, vocab_size=vocab_size)
    kept = {sample.index for sample in (*loaded.samples, *loaded.eval_samples)}
    columns = {index: columns[index] for index in sorted(kept)}
    digest = hashlib.sha256(f"{loaded.fingerprint} {json.dumps(columns, sort_keys=True, default=str)}".encode()).hexdigest()
    values = {f.name: getattr(loaded, f.name) for f in fields(Samples)} | {"fingerprint": digest}
    return Prompts(**values, turns={index: turns[index] for index in columns}, columns=columns, tokenizer=tokenizer)
