"""The demo's verifiable task: put digits in order.

The pretraining text answers "Sort 7391" in four ways, equally often: as it stands, reversed, ascending and descending. A model
of that text is right a quarter of the time. A reward for ascending order is all that tells it which way was meant.

Every sixth set of digits is kept out of the pretraining text and of the training prompts; the held-out prompts have no others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations
from typing import Any

DIGITS_PER_PROMPT = 4


def digit_sets(*, held_out: bool) -> list[tuple[str, ...]]:
    """The sets of different digits on one side of the split."""
    every = combinations("0123456789", DIGITS_PER_PROMPT)
    return [digits for k, digits in enumerate(every) if (k % 6 == 0) == held_out]


def conversations(rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Endless pretraining conversations about the digits that are not held out."""
    known = digit_sets(held_out=False)
    while True:
        digits = _shuffled(rng, known)
        ways = (digits, digits[::-1], "".join(sorted(digits)), "".join(sorted(digits, reverse=True)))
        yield [_turn("user", question(digits)), _turn("assistant", rng.choice(ways))]


def prompts(rng: random.Random, n: int, *, held_out: bool) -> list[dict[str, Any]]:
    """`n` different prompts with the right `answer`."""
    rows: dict[str, dict[str, Any]] = {}
    sets = digit_sets(held_out=held_out)
    while len(rows) < n:
        digits = _shuffled(rng, sets)
        rows[digits] = {"prompt": [_turn("user", question(digits))], "answer": "".join(sorted(digits))}
    return list(rows.values())


def question(digits: str) -> str:
    return f"Sort {digits}"


def _shuffled(rng: random.Random, sets: list[tuple[str, ...]]) -> str:
    return "".join(rng.sample(rng.choice(sets), DIGITS_PER_PROMPT))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
