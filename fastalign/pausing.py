"""Computations that let others go first: they call `pause` where that does no harm, and who started them says what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_act: ContextVar[Callable[[], object]] = ContextVar("pause", default=bool)  # which does nothing


def pause() -> None:
    """Called between two batches, or two tokens of a batch."""
    _act.get()()


@contextmanager
def pausing(act: Callable[[], object]) -> Iterator[None]:
    """Inside, `pause` calls `act`, in this thread alone.

    >>> with pausing(lambda: print("after you")):
    ...     pause()
    after you
    """
    token = _act.set(act)
    try:
        yield
    finally:
        _act.reset(token)
