"""Rows of every kind for the data tests, and how a sample looks as a sequence with its scored tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import CHAT_TEMPLATE

from fastalign.types import Sample

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "old river"}
GOOD = {"role": "assistant", "content": "quiet stone holds"}
BAD = {"role": "assistant", "content": "bread"}

# Like CHAT_TEMPLATE, with what the assistant writes marked, EOS included.
MARKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
assert "generation %}" not in CHAT_TEMPLATE


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sequences(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """Every sequence of a sample, and 1 where a token is scored (whether or not anything comes before it)."""
    masks = sample.masks or [[True] * len(completion) for completion in sample.completions]
    return [([*p, *c], [0] * len(p) + [int(m) for m in mask]) for p, c, mask in zip(sample.contexts, sample.completions, masks)]
