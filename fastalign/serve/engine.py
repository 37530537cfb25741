"""One thread that answers: requests are generated together, joining and leaving between two tokens.

A change of version waits until the answers that are being made have ended, and new requests wait for the change. So every
answer is made by one version from its first token to its last, and no request is dropped for a change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastalign.errors import FastalignError
from fastalign.models.trunk import evaluation, stock_attention
from fastalign.serve.decode import Batch, Drawn, Row, RowSampling
from fastalign.serve.models import Models
from fastalign.serve.text import TextStream

log = logging.getLogger(__name__)

STRETCH = 32  # steps with the model at most, before something else may have it


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
        self.submitted = self.began = self.ended = 0.0  # time.perf_counter(): taken, first step begun, last row complete

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
        self._batch: Batch | None = None  # rows that are being generated
        self._owners: dict[int, Job] = {}  # by id(row)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._jobs)

    @property
    def running(self) -> int:
        """Jobs that are being answered."""
        return len({id(job) for job in list(self._owners.values())})

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def rows(self, prompt: Sequence[int], n: int, sampling: RowSampling) -> list[Row]:
        """The rows of a job with `n` answers to one prompt."""
        return [Row(tuple(prompt), sampling, index, TextStream(self.models.tokenizer, sampling.stops)) for index in range(n)]

    def submit(self, *jobs: Job) -> list[QueueFullError | None]:
        """Let jobs wait for their turn, all before any of them begins; for each, why it cannot be taken, or None."""
        with self._changed:
            found = [self._enqueue(job) for job in jobs]
            self._changed.notify()
        return found

    def _enqueue(self, job: Job) -> QueueFullError | None:
        if self._stopping:
            return QueueFullError("the service is shutting down; try again when it is back")
        if len(self._jobs) >= self.max_waiting:
            return QueueFullError(f"{len(self._jobs)} requests wait already; try again later")
        job.submitted = time.perf_counter()
        self._jobs.append(job)
        return None

    def swap(self, version: str, folder: str, commit: Callable[[], Any]) -> Any:
        """Answer with another version from now on, and return what `commit` returns.

        `commit` runs when the version can answer; when it raises, or the version cannot be loaded (ModelError), the version
        before stays. Blocks the calling thread until the answers that are being made have ended; requests wait meanwhile and are
        answered by the new version. A whole model is read while the one before still answers.
        """
        with self.models.turns.serving():  # beside the answers, but not beside training
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

        return self._between_answers(change)

    def stop(self) -> None:
        """Answer all that wait, then end; no job is taken any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _between_answers(self, order: Callable[[], Any]) -> Any:
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
                while not (self._jobs or self._orders or self._batch or self._stopping):
                    self._changed.wait()
                if not (self._jobs or self._orders or self._batch):
                    return
                order = self._orders.popleft() if self._orders and not self._batch else None
            if order is None:
                self._stretch()
                continue
            call, future = order
            try:
                with self.models.turns.serving(self._has_more):
                    result = call()
                future.set_result(result)
            except Exception as error:
                future.set_exception(error)

    def _has_more(self) -> bool:
        return bool(self._jobs or self._orders or self._batch)

    def _stretch(self) -> None:
        """Some steps with the current version; the model is used nowhere else."""
        try:
            with self.models.turns.serving(self._has_more), self.models.serving() as model, evaluation(model), stock_attention(model):
                for _ in range(STRETCH):
                    self._begin(model, self._joining())
                    if self._batch is None:
                        return
                    self._tell(self._batch.step(model))
                    self._keep(self._batch)
        except Exception as error:  # out of memory, or a fault of the model: these answers fail, the next ones are another matter
            jobs = self._owners.values()
            self._batch, self._owners = None, {}
            self._fail(jobs, error)

    def _joining(self) -> list[Job]:
        """The oldest jobs that can be answered beside those that are; the first of all always can."""
        with self._changed:
            if self._orders or (self._batch and not self._batch.open):
                return []
            return self._take()

    def _take(self) -> list[Job]:
        taken: list[Job] = []
        running = self._batch.rows if self._batch else []
        rows, slots = len(running), self._batch.slots if self._batch else 0
        left = max((row.sampling.max_new_tokens - len(row.tokens) for row in running), default=0)
        while self._jobs:
            job = self._jobs[0]
            if not job.cancelled:
                wide = max(slots, *(len(row.prompt) for row in job.rows))
                long = max(left, *(row.sampling.max_new_tokens for row in job.rows))
                many = rows + len(job.rows)
                if rows and (many > self.max_rows or many * (wide + long) > self.max_tokens):
                    break
                taken.append(job)
                rows, slots, left = many, wide, long
            self._jobs.popleft()
        return taken

    def _begin(self, model: Any, jobs: list[Job]) -> None:
        """Read the prompts of jobs, which join those that are being answered. What fails here fails these jobs alone."""
        rows = [row for job in jobs for row in job.rows]
        if not rows:
            return
        for job in jobs:
            job.version, job.began = self.models.current.version, time.perf_counter()
            self._owners |= {id(row): job for row in job.rows}
        try:
            fresh, drawn = Batch.read(model, rows, self.models.eos)
        except Exception as error:
            self._owners = {key: job for key, job in self._owners.items() if job not in jobs}
            self._fail(jobs, error)
            return
        self._tell(drawn)
        if self._batch:
            self._batch.add(fresh)
        self._keep(self._batch or fresh)

    def _keep(self, batch: Batch) -> None:
        self._batch = batch if batch.rows else None
        self._owners = {id(row): self._owners[id(row)] for row in batch.rows}

    def _tell(self, drawn: list[Drawn]) -> None:
        heard: dict[int, tuple[Job, list[Piece]]] = {}
        for row, text in drawn:
            job = self._owners[id(row)]
            heard.setdefault(id(job), (job, []))[1].append(Piece(row, text, len(row.tokens), row.finish_reason is not None))
        for job, parts in heard.values():
            if not job.cancelled:
                job.ended = time.perf_counter()
                job.listener(parts)

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        jobs = list({id(job): job for job in jobs}.values())
        log.error("%d requests failed: %s: %s", len(jobs), type(error).__name__, error)
        for job in jobs:
            if not job.cancelled and not all(row.finish_reason for row in job.rows):
                job.listener(error)
