"""One thread that answers: requests are generated together, joining and leaving between two tokens.

A change of version waits until the answers that are being made have ended, and new requests wait for the change. So every
answer is made by one version from its first token to its last, and no request is dropped for a change.

Prompts are read in turns with the steps of the answers that are being made: several short ones together, a long one in parts, so that
reading holds up a running answer by a bounded number of tokens, however long a prompt is.
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
READ = 512  # tokens of prompts between two steps


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
    max_read                tokens of prompts, with padding, that are read at once. Between two steps that is done once for prompts that
                            have no more, together, and once for a longer one, of which it reads a part
    """

    def __init__(
        self, models: Models, *, max_rows: int = 16, max_tokens: int = 32768, max_waiting: int = 256, max_read: int = READ
    ) -> None:
        self.models, self.max_rows, self.max_tokens, self.max_waiting, self.max_read = models, max_rows, max_tokens, max_waiting, max_read
        self._jobs: deque[Job] = deque()
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._unread: list[Job] = []  # taken, and nothing of their prompts has been read
        self._long: Batch | None = None  # rows of a prompt that has been read in part
        self._batch: Batch | None = None  # rows that are being generated
        self._owners: dict[int, Job] = {}  # of all these, by id(row)
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
                while not (self._has_more() or self._stopping):
                    self._changed.wait()
                if not self._has_more():
                    return
                order = self._orders.popleft() if self._orders and not self._owners else None
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
        return bool(self._jobs or self._orders or self._owners)

    def _stretch(self) -> None:
        """Some steps with the current version; the model is used nowhere else."""
        try:
            with self.models.turns.serving(self._has_more), self.models.serving() as model, evaluation(model), stock_attention(model):
                for _ in range(STRETCH):
                    self._join()
                    self._read(model)
                    if self._batch is not None:
                        self._tell(self._batch.step(model))
                    self._prune()  # also those that were cancelled
                    if not self._owners:
                        return
        except Exception as error:  # out of memory, or a fault of the model: these answers fail, the next ones are another matter
            jobs = self._owners.values()
            self._unread, self._long, self._batch, self._owners = [], None, None, {}
            self._fail(jobs, error)

    def _join(self) -> None:
        """Take the oldest jobs that can be answered beside those that are; the first of all always can."""
        with self._changed:
            if self._orders or not self._is_open:
                return
            taken = self._take()
        for job in taken:
            job.version = self.models.current.version
            self._owners |= {id(row): job for row in job.rows}
        self._unread += taken

    @property
    def _is_open(self) -> bool:
        """Whether others can join those that are being answered."""
        return self._batch is None or self._batch.open

    def _take(self) -> list[Job]:
        taken: list[Job] = []
        mine = self._rows()
        rows = len(mine)
        slots = max((self._batch.slots if self._batch else 0, *(len(row.prompt) for row in mine if not row.tokens)))
        left = max((row.sampling.max_new_tokens - len(row.tokens) for row in mine), default=0)
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

    def _read(self, model: Any) -> None:
        """Read short prompts together, and on in a long one. Rows whose prompt has been read join those that are being answered."""
        if self._is_open and (short := self._short()):
            self._read_on(model, Batch(self.models.eos, short), None)
        if self._is_open and self._long is not None:
            self._read_on(model, self._long, self.max_read)

    def _short(self) -> list[Row]:
        """Rows of jobs whose prompts are read together now: the oldest with a short prompt, and those that fit in beside it. The oldest
        with a long one is begun, where no other has been."""
        chosen: list[Job] = []
        widest = 0
        for job in list(self._unread):
            size = len(job.rows[0].prompt)
            if size > self.max_read:
                if self._long is not None:
                    continue
                self._long = Batch(self.models.eos, job.rows)
            elif chosen and (len(chosen) + 1) * max(widest, size) > self.max_read:
                continue
            else:
                chosen, widest = [*chosen, job], max(widest, size)
            self._unread.remove(job)
            job.began = time.perf_counter()
        return [row for job in chosen for row in job.rows]

    def _read_on(self, model: Any, fresh: Batch, tokens: int | None) -> None:
        """Read on in `fresh`, which joins when all of it has been read. What fails here fails these rows' jobs alone."""
        try:
            drawn = fresh.read(model, tokens)
        except Exception as error:
            if fresh is self._long:
                self._long = None
            self._fail([self._owners.pop(id(row)) for row in fresh.rows], error)
            return
        if not drawn:
            return
        if fresh is self._long:
            self._long = None
        if self._batch is None:
            self._batch = fresh
        else:
            self._batch.add(fresh)
        self._tell(drawn)

    def _prune(self) -> None:
        """Forget rows that are complete, and jobs that nobody waits for."""
        self._unread = [job for job in self._unread if not job.cancelled]
        if self._long is not None and all(row.cancelled for row in self._long.rows):
            self._long = None
        if self._batch is not None and not self._batch.rows:
            self._batch = None
        self._owners = {id(row): self._owners[id(row)] for row in self._rows()}

    def _rows(self) -> list[Row]:
        """All that have been taken and are not complete."""
        unread = [row for job in self._unread for row in job.rows]
        return unread + [row for batch in (self._long, self._batch) if batch for row in batch.rows]

    def _tell(self, drawn: list[Drawn]) -> None:
        heard: dict[int, tuple[Job, list[Piece]]] = {}
        for row, text in drawn:
            job = self._owners[id(row)]
            heard.setdefault(id(job), (job, []))[1].append(Piece(row, text, len(row.tokens), row.finish_reason is not None))
        self._prune()  # who hears of an end finds the place free
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
