"""Computations that let others go first: they call `pause` where that does no harm, and who started them says what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

_act: ContextVar[Callable[[], object]] = ContextVar("pause", default=bool)  # which does nothing
_aside: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar("aside", default=nullcontext)


def pause() -> None:
    """Called between two batches, or two tokens of a batch."""
    _act.get()()


def aside() -> AbstractContextManager[None]:
    """Around what waits for somebody else, and neither runs a model nor draws torch's random numbers: others may have the device."""
    return _aside.get()()


@contextmanager
def pausing(act: Callable[[], object], stand_aside: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
    """Inside, `pause` calls `act`, and `aside` is `stand_aside`, in this thread alone.

    >>> with pausing(lambda: print("after you")):
    ...     pause()
    after you
    """
    token, other = _act.set(act), _aside.set(stand_aside)
    try:
        yield
    finally:
        _act.reset(token)
        _aside.reset(other)
