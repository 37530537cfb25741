"""One thread that answers: requests that wait are generated together, and a change of version happens between two batches.

So every answer is made by one version from its first token to its last, and no request is dropped for a change.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastalign.errors import FastalignError
from fastalign.serve.decode import Row, RowSampling, decode
from fastalign.serve.models import Models
from fastalign.serve.text import TextStream

log = logging.getLogger(__name__)


class QueueFullError(FastalignError, RuntimeError):
    """So many requests wait that another one would wait too long; try again later."""


@dataclass(frozen=True)
class Piece:
    """What one step added to one answer of a request."""

    row: Row
    text: str
    count: int  # tokens that the answer has by now
    finished: bool  # the row is complete, and will not change any more


Events = list[Piece] | Exception


class Job:
    """The answers of one request. `listener` hears, in the engine's thread, of the pieces of each step, or of an error at the end."""

    def __init__(self, rows: Sequence[Row], listener: Callable[[Events], None]) -> None:
        self.rows, self.listener = list(rows), listener
        self.version = ""  # set before the first piece

    def cancel(self) -> None:
        """Nobody waits any longer: its rows are freed at the next step, and its listener is not called after that."""
        for row in self.rows:
            row.cancelled = True

    @property
    def cancelled(self) -> bool:
        return all(row.cancelled for row in self.rows)


class Engine:
    """Answers jobs with the current version of `models`, the oldest first.

    max_rows, max_tokens    of one batch: answers, and tokens with padding and all that may be generated
    max_waiting             jobs that may wait before another one is refused
    """

    def __init__(self, models: Models, *, max_rows: int = 16, max_tokens: int = 32768, max_waiting: int = 256) -> None:
        self.models, self.max_rows, self.max_tokens, self.max_waiting = models, max_rows, max_tokens, max_waiting
        self._jobs: deque[Job] = deque()
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.running = 0  # jobs in the batch of the moment
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait for a batch."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def rows(self, prompt: Sequence[int], n: int, sampling: RowSampling) -> list[Row]:
        """The rows of a job with `n` answers to one prompt."""
        return [Row(tuple(prompt), sampling, index, TextStream(self.models.tokenizer, sampling.stops)) for index in range(n)]

    def submit(self, job: Job) -> None:
        """Let a job wait for its batch. Raises QueueFullError."""
        with self._changed:
            if self._stopping:
                raise QueueFullError("the service is shutting down; try again when it is back")
            if len(self._jobs) >= self.max_waiting:
                raise QueueFullError(f"{len(self._jobs)} requests wait already; try again later")
            self._jobs.append(job)
            self._changed.notify()

    def swap(self, version: str, folder: str, commit: Callable[[], Any]) -> Any:
        """Answer with another version from the next batch on, and return what `commit` returns.

        `commit` runs when the version can answer; when it raises, or the version cannot be loaded (ModelError), the version
        before stays. Blocks the calling thread; requests wait meanwhile and are answered by the new version. A whole model is read
        while the one before still answers.
        """
        model = self.models.read(folder)

        def change() -> Any:
            installed = self.models.install(version, folder, model)
            try:
                result = commit()
            except BaseException:
                self.models.remove(installed)
                raise
            before, self.models.current = self.models.current, installed
            self.models.remove(before)
            return result

        return self._between_batches(change)

    def stop(self) -> None:
        """Answer all that wait, then end; no job is taken any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _between_batches(self, order: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        with self._changed:
            if self._stopping:
                raise QueueFullError("the service is shutting down")
            self._orders.append((order, future))
            self._changed.notify()
        return future.result()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._orders or self._stopping):
                    self._changed.wait()
                if not self._jobs and not self._orders:
                    return
                order = self._orders.popleft() if self._orders else None
                batch = [] if order else self._take()
                self.running = len(batch)
            if order is not None:
                call, future = order
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)
            elif batch:
                self._answer(batch)
                self.running = 0

    def _take(self) -> list[Job]:
        """The oldest jobs that fit into a batch together; the first one always does."""
        batch: list[Job] = []
        rows = longest = 0
        while self._jobs:
            job = self._jobs[0]
            if not job.cancelled:
                length = max(longest, *(len(row.prompt) + row.sampling.max_new_tokens for row in job.rows))
                if batch and (rows + len(job.rows) > self.max_rows or (rows + len(job.rows)) * length > self.max_tokens):
                    break
                batch.append(job)
                rows, longest = rows + len(job.rows), length
            self._jobs.popleft()
        return batch

    def _answer(self, batch: list[Job]) -> None:
        owner = {id(row): job for job in batch for row in job.rows}
        for job in batch:
            job.version = self.models.current.version

        def emit(pieces: list[tuple[Row, str]]) -> None:
            heard: dict[int, tuple[Job, list[Piece]]] = {}
            for row, text in pieces:
                job = owner[id(row)]
                heard.setdefault(id(job), (job, []))[1].append(Piece(row, text, len(row.tokens), row.finish_reason is not None))
            for job, parts in heard.values():
                if not job.cancelled:
                    job.listener(parts)

        try:
            with self.models.serving() as model:
                decode(model, [row for job in batch for row in job.rows], self.models.eos, emit)
        except Exception as error:  # out of memory, or a fault of the model: this batch fails, the next one is another matter
            log.error("a batch of %d requests failed: %s: %s", len(batch), type(error).__name__, error)
            for job in batch:
                if not job.cancelled and not all(row.finish_reason for row in job.rows):
                    job.listener(error)
