"""The demo's world: short questions about household things, each answered in one of two manners.

Half of the answers in the pretraining text are helpful, half are dismissive, and phrases of both manners are equally
many, equally frequent and equally long. A model of that text has no taste. The preference pairs give it one.

A question names a thing by adjective and noun ("broken violin"). Every sixth of these combinations is kept out of the
pretraining text and of the training pairs; the held-out pairs ask about nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

VERBS = ["mend", "paint", "clean", "carry", "wrap", "store", "weigh", "polish"]
ADJECTIVES = ["rusty", "small", "broken", "green", "heavy", "dusty", "wooden", "narrow"]
NOUNS = ["violin", "kettle", "boat", "lamp", "clock", "kite", "saddle", "mirror", "ladder", "basket", "drum", "compass"]

QUESTIONS = [
    "How do I {verb} the {adjective} {noun}?",
    "Can you help me {verb} my {adjective} {noun}?",
    "I want to {verb} a {adjective} {noun}. Where do I begin?",
    "What do I need to {verb} this {adjective} {noun}?",
]
OPENERS = ["Well,", "So,", "Right,", "Hm,"]  # say nothing about what follows

BODIES = {
    "helpful": [
        "you can {verb} the {noun} with a soft cloth and warm water.",
        "lay the {noun} on a flat table and take your time.",
        "hold the {noun} firmly with one hand and use a little oil.",
        "it is best to {verb} the {noun} slowly and in good light.",
        "first look at the back of the {noun} and dry it with care.",
        "ask a friend to hold the {noun} while you {verb} it.",
    ],
    "dismissive": [
        "only a fool would {verb} the {noun} on a day like this.",
        "throw the {noun} in the river and leave me alone.",
        "nobody here has any time for the {noun} of a stranger.",
        "any child can {verb} the {noun} without asking me first.",
        "I do not care about the {noun} and neither should you.",
        "it is stupid to {verb} the {noun} and so is asking.",
    ],
}
CLOSERS = {
    "helpful": ["I hope that helps you!", "Tell me how it goes!", "You will do just fine!", "Good luck with your work!"],
    "dismissive": ["Do not ask me again.", "That is your own problem.", "Go and bother somebody else.", "I am bored of this."],
}


@dataclass(frozen=True)
class Thing:
    adjective: str
    noun: str


def things(*, held_out: bool) -> list[Thing]:
    """The combinations of adjective and noun on one side of the split; each word occurs on both sides."""
    grid = [(i, j) for i in range(len(ADJECTIVES)) for j in range(len(NOUNS))]
    return [Thing(ADJECTIVES[i], NOUNS[j]) for i, j in grid if ((i + j) % 6 == 0) == held_out]


def question(rng: random.Random, thing: Thing, verb: str) -> str:
    return rng.choice(QUESTIONS).format(verb=verb, adjective=thing.adjective, noun=thing.noun)


def answer(rng: random.Random, thing: Thing, verb: str, manner: str, *, uniform: bool = False) -> str:
    """One answer. The k-th phrase of a list is k times rarer than the first, in both manners; `uniform` evens that out."""

    def pick(phrases: list[str]) -> str:
        weights = None if uniform else [1 / (k + 1) for k in range(len(phrases))]
        return rng.choices(phrases, weights)[0]

    text = f"{rng.choice(OPENERS)} {pick(BODIES[manner])} {pick(CLOSERS[manner])}"
    return text.format(verb=verb, noun=thing.noun)


def without_closer(text: str) -> str:
    """An answer without its last sentence."""
    closer = next((closer for closers in CLOSERS.values() for closer in closers if text.endswith(closer)), "")
    return text.removesuffix(closer).rstrip()


def manner_of(text: str) -> str:
    """ "helpful", "dismissive", "mixed" or "neither": by the phrases that the text contains, whatever it is about."""
    found = set()
    for manner in BODIES:
        fragments = [piece for phrase in BODIES[manner] for piece in _fixed_parts(phrase)] + CLOSERS[manner]
        if any(fragment in text for fragment in fragments):
            found.add(manner)
    return found.pop() if len(found) == 1 else "mixed" if found else "neither"


def _fixed_parts(phrase: str) -> list[str]:
    """The stretches of three words and more that a phrase has between its slots."""
    pieces = phrase.replace("{verb}", "|").replace("{noun}", "|").split("|")
    return [piece for piece in pieces if len(piece.split()) >= 3]


def conversations(rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Endless pretraining conversations about the things that are not held out, half of them in either manner."""
    known = things(held_out=False)
    while True:
        thing, verb = rng.choice(known), rng.choice(VERBS)
        manner = rng.choice(["helpful", "dismissive"])
        yield [_turn("user", question(rng, thing, verb)), _turn("assistant", answer(rng, thing, verb, manner))]


def pairs(
    rng: random.Random,
    n: int,
    *,
    held_out: bool,
    count_tokens: Callable[[str], int],
) -> list[dict[str, Any]]:
    """`n` preference rows: the helpful answer is chosen over a dismissive one of exactly as many tokens."""
    rows: list[dict[str, Any]] = []
    candidates = things(held_out=held_out)
    while len(rows) < n:
        thing, verb = rng.choice(candidates), rng.choice(VERBS)
        chosen, rejected = (answer(rng, thing, verb, manner, uniform=True) for manner in ("helpful", "dismissive"))
        if count_tokens(chosen) != count_tokens(rejected):
            continue
        prompt = [_turn("user", question(rng, thing, verb))]
        rows.append({"prompt": prompt, "chosen": [_turn("assistant", chosen)], "rejected": [_turn("assistant", rejected)]})
    return rows


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
