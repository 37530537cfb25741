"""Who computes: the service that answers, or a training beside it in the same process. Never both, and neither for long.

They come in turns: some tokens of all running answers, a micro-batch, and so on. Requests go first, so that what they wait for is the
micro-batch in progress at most. Training does not starve either: when requests never stop it has its turn after `patience` seconds.
Both sides share one caching allocator, which hands to one of them what the other has released, and gives back what lies about in
pieces before it fails, so there is nothing to release by hand when turns change.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastalign.errors import ConfigError

PATIENCE = 1.0  # seconds


class Turns:
    """The turns of one device. Several threads may serve at the same time; one trains, and alone.

    patience    seconds for which training waits while requests keep coming; 0: it has every other turn. Raises ConfigError for less, and
                for infinity, with which it might wait for ever
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        if not 0 <= patience < math.inf:
            raise ConfigError(f"patience must be 0 seconds or more and finite, got {patience}")
        self.patience = patience
        self._changed = threading.Condition()
        self._serving = 0  # threads that serve
        self._asking = 0  # threads that wait to
        self._more = False  # the turn that ended will be followed by another one at once
        self._owed = False  # it asked during a turn of training, and has not had its own yet
        self._trainer: int | None = None  # the thread that trains
        self._since: float | None = None  # when training began to wait

    @contextmanager
    def serving(self, more: Callable[[], bool] = bool) -> Iterator[None]:
        """A turn of the service. `more` says at its end whether the next one follows at once."""
        with self._changed:
            assert not self.trains, "a thread that trains would wait for itself"
            self._asking += 1
            try:
                self._changed.wait_for(self._may_serve)
            finally:
                self._asking -= 1
            self._serving += 1
            self._more = self._owed = False
        try:
            yield
        finally:
            with self._changed:
                self._serving -= 1
                self._more = more()
                self._changed.notify_all()

    @contextmanager
    def training(self) -> Iterator[None]:
        """A turn of training, no longer than a micro-batch, or with `pause` in it. Inside of another one it is a part of that.

        The thread must not wait for the service inside: no `Engine.swap`.
        """
        if self.trains:
            yield
            return
        self._begin()
        try:
            yield
        finally:
            self._end()

    @property
    def trains(self) -> bool:
        """Whether the calling thread is inside of `training`."""
        return self._trainer == threading.get_ident()

    @property
    def asked(self) -> bool:
        """Whether the service waits for the turn of the calling thread to end."""
        return self.trains and self._asking > 0

    def pause(self) -> None:
        """Inside of `training`: let the service go first if it waits. Elsewhere nothing happens."""
        if self.asked:
            self._end()
            self._begin()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside of `training`, around what computes nothing: the turn ends, and another one begins after it. Elsewhere nothing happens."""
        if not self.trains:
            yield
            return
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        with self._changed:
            try:
                while not self._may_train():
                    now = time.monotonic()
                    self._since = now if self._since is None else self._since
                    busy = self._trainer is not None or self._serving or self._owed  # whose end is told
                    self._changed.wait(None if busy else max(0.0, self._since + self.patience - now))
            finally:
                self._since = None
                self._changed.notify_all()
            self._trainer = threading.get_ident()

    def _end(self) -> None:
        with self._changed:
            self._trainer, self._owed = None, self._asking > 0
            self._changed.notify_all()

    def _may_serve(self) -> bool:
        return self._trainer is None and (self._serving > 0 or not self._is_due())

    def _may_train(self) -> bool:
        if self._trainer is not None or self._serving:
            return False
        return not (self._asking or self._more) or self._is_due()

    def _is_due(self) -> bool:
        """Whether training has waited for long enough."""
        return not self._owed and self._since is not None and time.monotonic() - self._since >= self.patience
