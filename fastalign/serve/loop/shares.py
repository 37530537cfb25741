"""How much each user may weigh, so that nobody alone can steer what a model learns or whether it is taken back."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

SPREAD = 10  # rows that a user over the limit keeps for each row's weight that is left to them


def owners(parties: Sequence[Sequence[Iterable[str]]]) -> list[str]:
    """Whose each row is, of rows that rest on `parties`: groups of users, each of which any one of its users would do for.

    Of a group that is the user who supports the fewest rows, because the row would be there without the others; of several groups
    the one of them with the most rows, because the row needs both. So nobody gains or takes weight by agreeing with others.
    """
    counts = Counter(user for groups in parties for user in {user for group in groups for user in group})
    rank = {user: (count, user) for user, count in counts.items()}
    return [max((min(group, key=rank.__getitem__) for group in groups), key=rank.__getitem__) for groups in parties]


def limit(amounts: Mapping[str, float], most: float) -> float:
    """The largest c such that no user has more than `most` of the sum of min(amount, c); infinite where nobody has without it.

    With fewer than 1 / most users nobody can stay under that share; then the limit is that nobody has more than twice an equal
    share, which of one or two users is no limit.

    >>> limit({"ann": 1000, **{str(i): 1 for i in range(29)}}, 0.1)  # 3.22 of 32.22
    3.2222222222222223
    """
    ordered = sorted(amounts.values(), reverse=True)
    if most * len(ordered) < 1 - 1e-9:
        most = min(1.0, 2 / len(ordered)) if ordered else 1.0
    rest = math.fsum(ordered)
    if not ordered or ordered[0] <= most * rest * (1 + 1e-12):
        return math.inf
    for capped in range(1, len(ordered) + 1):
        rest = math.fsum(ordered[capped:])
        if most * capped >= 1 - 1e-9:  # all are equal
            break
        found = most * rest / (1 - most * capped)
        if capped == len(ordered) or ordered[capped] <= found * (1 + 1e-12):
            return found
    return ordered[-1]


def thinned(owner: Sequence[str], keys: Sequence[bytes], most: float) -> list[int]:
    """The rows to keep, in order: of a user over the limit SPREAD times as many as the weight that is left to them, those first by `keys`.

    The others would cost as much to train on as any row, and have next to no weight.
    """
    mine: dict[str, list[int]] = {}
    for i, user in enumerate(owner):
        mine.setdefault(user, []).append(i)
    cap = limit({user: len(rows) for user, rows in mine.items()}, most)
    if cap == math.inf:
        return list(range(len(owner)))
    kept = (sorted(rows, key=keys.__getitem__)[: math.ceil(SPREAD * cap)] for rows in mine.values())
    return sorted(i for rows in kept for i in rows)


def weights(owner: Sequence[str], most: float) -> list[float]:
    """The weight of each row: their mean is 1, and the rows of no user have more than `most` of the sum, see `limit`.

    >>> [round(weight, 3) for weight in weights(["ann", "ann", "ann", "bob", "eve"], 0.4)]
    [0.667, 0.667, 0.667, 1.5, 1.5]
    """
    amounts = Counter(owner)
    cap = limit(amounts, most)
    factors = {user: min(1.0, cap / amount) for user, amount in amounts.items()}
    scale = len(owner) / math.fsum(factors[user] for user in owner) if owner else 1.0
    return [scale * factors[user] for user in owner]


def draw_key(seed: int, *parts: bytes) -> bytes:
    """What rows are sorted by to draw among them: as good as random, and the same every time."""
    return hashlib.sha256(b"\0".join([str(seed).encode(), *(part.hex().encode() for part in parts)])).digest()
