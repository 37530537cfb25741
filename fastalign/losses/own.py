"""What a loss of the user's own says of itself: which samples it couples, and how its values become the loss of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from fastalign.errors import ConfigError
from fastalign.losses.aggregate import fixed_length, sequence_mean, sequence_sum, token_mean

Function = TypeVar("Function", bound=Callable[..., Any])

AGGREGATES: dict[str, Callable[..., Any]] = {
    "token_mean": token_mean, "sequence_mean": sequence_mean, "sequence_sum": sequence_sum, "fixed_length": fixed_length,
}  # fmt: skip
LEVELS = ("token", "sequence", "product")


class Declared(NamedTuple):
    """What `own_loss` was told; None: nothing."""

    couples: str | None = None
    aggregate: str | None = None
    level: str | None = None


def own_loss(
    *,
    couples: Literal["pair", "step"] | None = None,
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"] | None = None,
    level: Literal["token", "sequence", "product"] | None = None,
) -> Callable[[Function], Function]:
    """A decorator that declares what cannot be seen from a function; one that is not decorated has the first of each.

    `couples`, of a preference loss: "pair", the loss of a pair depends on no other pair and is taken while a slab of logits is there;
    "step", it depends on the others of the optimizer step, which the policy then scores once more beforehand.
    `aggregate` and `level`, of a policy loss: how values of tokens become a scalar, as in `losses.aggregate`, and whose importance
    ratio `log_ratio` is, as in `losses.policy`. Raises ConfigError for anything else.

    >>> @own_loss(aggregate="sequence_mean")
    ... def clip_soft(logps, old_logps, advantages): ...
    >>> declared(clip_soft)
    Declared(couples=None, aggregate='sequence_mean', level=None)
    """
    for option, value, choices in (("couples", couples, ("pair", "step")), ("aggregate", aggregate, AGGREGATES), ("level", level, LEVELS)):
        if value is not None and value not in choices:
            raise ConfigError(f"own_loss: {option} must be one of {', '.join(choices)}, got {value!r}")

    def declare(function: Function) -> Function:
        function.fastalign_loss = Declared(couples, aggregate, level)  # type: ignore[attr-defined]
        return function

    return declare


def declared(function: Callable[..., Any]) -> Declared:
    """What `function` says of itself."""
    return getattr(function, "fastalign_loss", Declared())
