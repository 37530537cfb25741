"""What people said of the answers to one conversation, weighed: which texts are good or bad, and which of two is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, TypeVar

from fastalign.data.feedback import digest

T = TypeVar("T")

Parties = tuple[tuple[str, ...], ...]  # who a judgement rests on, see `shares.owners`

TIED = "as many for as against"
SELF = "one user said both"
OUTVOTED = "outvoted"
REPEATED = "said by several users"
AVERAGE = "rated as that user rates on average"


class Label(NamedTuple):
    """A text that is good, or not."""

    text: bytes
    good: bool
    parties: Parties
    newest: int  # id of the newest feedback that says so


class Pair(NamedTuple):
    """A text that is better than another one."""

    better: bytes
    worse: bytes
    parties: Parties
    newest: int


@dataclass
class _Vote:
    net: int = 0  # above 0: for it
    newest: int = 0

    def add(self, way: int, id: int) -> None:
        self.net, self.newest = self.net + way, max(self.newest, id)


@dataclass
class Ratings:
    """Every user's ratings, to tell from which on one is good: from `good` on, or, without it, above the user's own mean."""

    good: float | None = None
    _sums: dict[str, tuple[Fraction, int]] = field(default_factory=dict)

    def add(self, user: str, rating: float) -> None:
        total, count = self._sums.get(user, (Fraction(0), 0))
        self._sums[user] = total + Fraction(rating), count + 1  # exact, so that equal ratings are equal to their mean

    def opinion(self, user: str, rating: float) -> int:
        """1: good, -1: bad, 0: neither."""
        if self.good is not None:
            return 1 if rating >= self.good else -1
        total, count = self._sums[user]
        mine = Fraction(rating) * count
        return (mine > total) - (mine < total)


@dataclass
class Conversation:
    """The judgements of the answers to one conversation; texts are known by their digests."""

    key: bytes  # digest of its messages
    answer: str  # id of an answer to it
    held_out: bool
    texts: dict[bytes, tuple[str, str | None]] = field(default_factory=dict)  # (id of an answer with the text, or the text of an edit)
    _labels: dict[bytes, dict[str, _Vote]] = field(default_factory=dict)
    _orders: dict[tuple[bytes, bytes], dict[str, _Vote]] = field(default_factory=dict)  # of two digests, the smaller one first
    _ratings: dict[tuple[str, str], list[tuple[float, bytes, int]]] = field(default_factory=dict)  # by user and voice

    def text(self, answer: str, edited: str | None, content: bytes) -> bytes:
        """Make a text known."""
        self.texts.setdefault(content, (answer, edited))
        return content

    def label(self, text: bytes, good: bool, user: str, id: int) -> None:
        """A user (here and below: a voice, see `Feedback`) finds a text good or bad."""
        self._labels.setdefault(text, {}).setdefault(user, _Vote()).add(1 if good else -1, id)

    def rate(self, text: bytes, rating: float, user: str, voice: str, id: int) -> None:
        """A user, by whose other ratings this one is to be read, rates a text."""
        self._ratings.setdefault((user, voice), []).append((rating, text, id))

    def prefer(self, better: bytes, worse: bytes, user: str, id: int) -> None:
        """A user finds one text better than another."""
        if better != worse:
            key = min(better, worse), max(better, worse)
            self._orders.setdefault(key, {}).setdefault(user, _Vote()).add(1 if better == key[0] else -1, id)

    def judged(self, ratings: Ratings, dropped: Counter[str]) -> tuple[list[Label], list[Pair]]:
        """What the majority of the users says; `dropped` counts what is left out.

        Labels come from thumbs and ratings; pairs from choices, edits and the ratings of one user, and, for two texts that nobody
        compared, from a good and a bad label.
        """
        for (user, voice), rated in self._ratings.items():
            for rating, text, id in rated:
                way = ratings.opinion(user, rating)
                if way:
                    self.label(text, way > 0, voice, id)
                else:
                    dropped[AVERAGE] += 1
            groups: dict[float, list[tuple[bytes, int]]] = {}
            for rating, text, id in rated:
                groups.setdefault(rating, []).append((text, id))
            for better, worse in pairwise(groups[rating] for rating in sorted(groups, reverse=True)):
                for (one, first), (other, second) in matched(better, worse):
                    self.prefer(one, other, voice, max(first, second))
        self._ratings = {}
        labels = [Label(text, *found) for text, votes in self._labels.items() if (found := _majority(votes, dropped))]
        pairs: list[Pair] = []
        for (smaller, larger), votes in self._orders.items():
            if found := _majority(votes, dropped):
                forwards, parties, newest = found
                pairs.append(Pair(*((smaller, larger) if forwards else (larger, smaller)), parties, newest))
        good, bad = ([label for label in labels if label.good == way] for way in (True, False))
        for liked, disliked in matched(good, bad):
            if (min(liked.text, disliked.text), max(liked.text, disliked.text)) not in self._orders:
                parties, newest = liked.parties + disliked.parties, max(liked.newest, disliked.newest)
                pairs.append(Pair(liked.text, disliked.text, parties, newest))
        return labels, pairs


def single(labels: Iterable[Label], pairs: Iterable[Pair]) -> list[Label]:
    """The labels of texts that are in no pair."""
    paired = {text for pair in pairs for text in pair[:2]}
    return [label for label in labels if label.text not in paired]


def unpaired(labels: Sequence[Label], pairs: Iterable[Pair], dropped: Counter[str]) -> Iterator[Label]:
    """Every text once: with its label where it has one, else good if it won more often than it lost, bad if less often."""
    yield from labels
    known = {label.text for label in labels}
    results: dict[bytes, list[tuple[bool, Pair]]] = {}
    for pair in pairs:
        for text, won in ((pair.better, True), (pair.worse, False)):
            if text not in known:
                results.setdefault(text, []).append((won, pair))
    for text, outcomes in results.items():
        net = sum(1 if won else -1 for won, _ in outcomes)
        if not net:
            dropped["better than one answer and worse than another"] += 1
            continue
        support = [pair for good, pair in outcomes if good == (net > 0)]
        users = tuple(sorted({user for pair in support for group in pair.parties for user in group}))
        yield Label(text, net > 0, (users,), max(pair.newest for pair in support))


def matched(some: Sequence[T], others: Sequence[T]) -> list[tuple[T, T]]:
    """Each of the longer sequence with one of the shorter, all of which come up as often, give or take one.

    >>> matched("abc", "xy")
    [('a', 'x'), ('b', 'y'), ('c', 'x')]
    """
    if not (some and others):
        return []
    return [(some[i % len(some)], others[i % len(others)]) for i in range(max(len(some), len(others)))]


def content_key(text: str) -> bytes:
    """Digest of the text of an answer."""
    return digest(text)


def _majority(votes: dict[str, _Vote], dropped: Counter[str]) -> tuple[bool, Parties, int] | None:
    sides: tuple[list[str], list[str]] = ([], [])
    for user, vote in votes.items():
        if vote.net:
            sides[vote.net > 0].append(user)
        else:
            dropped[SELF] += 1
    good = len(sides[True]) > len(sides[False])
    if len(sides[True]) == len(sides[False]):
        dropped[TIED] += len(sides[True]) * 2
        return None
    winners = sorted(sides[good])
    dropped[OUTVOTED] += len(sides[not good])
    dropped[REPEATED] += len(winners) - 1
    return good, (tuple(winners),), max(votes[user].newest for user in winners)
