"""Whether the live version is liked less than the one that it replaced, so that it should be taken back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from fastalign.errors import ConfigError
from fastalign.serve.loop.evidence import Ratings
from fastalign.serve.loop.shares import limit
from fastalign.serve.records import Feedback
from fastalign.serve.store import Store
from fastalign.train.measures import wilson


@dataclass
class LiveConfig:
    """When the live version is taken back because of what people say of it."""

    min_feedback: int = 50  # judgements of its answers before the first look
    confidence: float = 0.95  # that it is liked less, over all looks together
    margin: float = 0.0  # by which the share of liked answers may fall
    per_user: float = 0.1  # largest share of the judgements of a version that one user may have

    def validate(self) -> None:
        """Raises ConfigError for an option that is out of range."""
        if self.min_feedback < 1:
            raise ConfigError(f"live.min_feedback must be 1 or more, got {self.min_feedback}")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"live.confidence must be in [0.5, 1), got {self.confidence}")
        if not 0 <= self.margin < 1:
            raise ConfigError(f"live.margin must be in [0, 1), got {self.margin}")
        if not 0 < self.per_user <= 1:
            raise ConfigError(f"live.per_user must be in (0, 1], got {self.per_user}")


class Opinion(NamedTuple):
    """One user's judgement of one answer; a user is a voice, see `Feedback`."""

    user: str
    liked: bool


def live_scores(store: Store, version: str, *, per_user: float = 1.0, good_rating: float | None = None) -> tuple[float, float]:
    """(how many judgements like an answer of `version`, how many there are), those of one user at most `per_user` of them.

    Thumbs say so; ratings by `good_rating`, as in `collect`; an edit says that the answer was not good enough. Choices are left out:
    what they compare is most often one version's own answers.
    """
    return scores(opinions(store, version, good_rating=good_rating), per_user)


def opinions(store: Store, version: str, *, good_rating: float | None = None) -> list[Opinion]:
    """What people think of the answers of `version`, in the order in which it came."""
    ratings = Ratings(good_rating)
    if good_rating is None:
        for feedback in store.feedback(kind="rating"):  # of every version: a user's mean is over all of them
            ratings.add(feedback.user, float(feedback.value))  # type: ignore[arg-type]
    found = ((feedback.voice, _way(feedback, ratings)) for feedback in store.feedback(version=version))
    return [Opinion(user, way > 0) for user, way in found if way]


def scores(given: Sequence[Opinion], per_user: float) -> tuple[float, float]:
    """(positive, count); each user counts with the mean of what they said, times how much, up to the limit of `shares.limit`.

    >>> scores([Opinion("ann", True), Opinion("bob", False), Opinion("bob", True)], 1.0)
    (2.0, 3.0)
    """
    amounts, liked = Counter(one.user for one in given), Counter(one.user for one in given if one.liked)
    cap = limit(amounts, per_user)
    factors = {user: min(1.0, cap / amount) for user, amount in amounts.items()}
    return math.fsum(factors[user] * liked[user] for user in amounts), math.fsum(factors[user] * amounts[user] for user in amounts)


def fallen(store: Store, config: LiveConfig, *, good_rating: float | None = None) -> str | None:
    """Why the live version should be taken back, in a sentence; None when it should not.

    It should when Newcombe's interval of the difference between the shares of liked answers, of the live version and of the one that
    it replaced, lies under -margin. This may be asked as often as one likes: what counts is the first min_feedback, 2 min_feedback,
    4 min_feedback, ... judgements of the live version, as many as there are by now, and the k-th such look (from 0) spends
    (1 - confidence) / 2^(k+1) of the chance to be wrong.

    No user decides alone: it has to hold without what any one of them said, unless there is only one.
    """
    live = store.live_version()
    if live is None or live.replaced is None:
        return None
    mine = opinions(store, live.name, good_rating=good_rating)
    look = math.floor(math.log2(len(mine) / config.min_feedback)) if len(mine) >= config.min_feedback else -1
    if look < 0:
        return None
    mine = mine[: config.min_feedback * 2**look]
    before = opinions(store, live.replaced, good_rating=good_rating)
    confidence = 1 - (1 - config.confidence) / 2 ** (look + 1)
    if not _is_less(mine, before, confidence, config):
        return None
    users = {one.user for one in (*mine, *before)}
    for user in users if len(users) > 1 else ():
        mine_left, before_left = ([one for one in side if one.user != user] for side in (mine, before))
        if not _is_less(mine_left, before_left, confidence, config):
            return None
    (liked, count), (liked_before, count_before) = (scores(side, config.per_user) for side in (mine, before))
    fall = f" by more than {config.margin:g}" if config.margin else ""
    return (
        f"version {live.name!r} is liked in {liked / count:.2f} of {count:.0f} judgements, {live.replaced!r}, which it replaced, in "
        f"{liked_before / count_before:.2f} of {count_before:.0f}: less{fall} with {100 * config.confidence:g} % confidence"
    )


def difference(positive: float, count: float, other_positive: float, other_count: float, z: float = 1.959964) -> tuple[float, float]:
    """Interval of the difference of two independent shares, 95 % by default (Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8
    <873::AID-SIM779>3.0.CO;2-I, method 10: from Wilson's intervals of both).

    >>> [round(bound, 4) for bound in difference(56, 70, 48, 80)]
    [0.0524, 0.3339]
    """
    p, q = positive / count, other_positive / other_count
    (low, high), (other_low, other_high) = wilson(positive, count, z), wilson(other_positive, other_count, z)
    return p - q - math.hypot(p - low, other_high - q), p - q + math.hypot(high - p, q - other_low)


def _is_less(mine: Sequence[Opinion], before: Sequence[Opinion], confidence: float, config: LiveConfig) -> bool:
    if not (mine and before):
        return False
    z = NormalDist().inv_cdf(confidence)
    return difference(*scores(mine, config.per_user), *scores(before, config.per_user), z)[1] < -config.margin


def _way(feedback: Feedback, ratings: Ratings) -> int:
    """1: liked, -1: not, 0: neither."""
    if feedback.kind == "thumb":
        return 1 if feedback.value is True else -1
    if feedback.kind == "rating":
        return ratings.opinion(feedback.user, float(feedback.value))  # type: ignore[arg-type]
    return -1 if feedback.kind == "edit" else 0
