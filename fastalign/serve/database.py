"""One SQLite file: a thread that writes, connections that read, and the schema brought up to date when it is opened.

WAL with synchronous=FULL: what a write has returned for is on the disk, whatever happens to the process or the machine.
Writes that wait together are committed together, which costs one sync instead of many.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastalign.errors import NotFoundError, StoreBusyError, StoreConflictError, StoreError
from fastalign.serve.schema import MIGRATIONS

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
GROUP = 256  # writes of one commit, at most


class Database:
    """An open database file, created and migrated if need be. Any thread may call it; several processes may open one file.

    `timeout` is how many seconds a write waits for another process's. Raises StoreError for a file that is no database of
    fastalign's, was written by a newer fastalign, or cannot be opened; StoreBusyError when it is locked for longer.
    """

    def __init__(self, path: str | Path, *, timeout: float = 5.0) -> None:
        self.path, self.timeout = Path(path), timeout
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._jobs: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        with self._explained():
            self._private()
            self._writer = self._connect()
            try:
                self._migrate(self._writer)
            except BaseException:
                self._writer.close()
                raise
        self._thread = threading.Thread(target=self._write_all, name=f"writer of {self.path.name}", daemon=True)
        self._thread.start()

    def write(self, work: Work[T]) -> Future[T]:
        """Run `work(connection)` in the writing thread, in a transaction; the future is done once it is on the disk.

        What `work` raises is what the future raises, and then nothing of it is kept. Errors of SQLite come as StoreBusyError
        or StoreError. `work` may run again after a failure that undid it.
        """
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise StoreError(f"{self.path}: the database has been closed")
            self._jobs.put((work, future))
        return future

    def read(self, work: Work[T]) -> T:
        """`work(connection)` on a connection that only reads, in the calling thread; it sees every write that was acknowledged."""
        if self._closed:
            raise StoreError(f"{self.path}: the database has been closed")
        with self._explained():
            try:
                connection = self._readers.get_nowait()
            except queue.Empty:
                connection = self._connect()
                connection.execute("PRAGMA query_only = ON")
            try:
                return work(connection)
            finally:
                self._readers.put(connection)

    def close(self) -> None:
        """Finish the writes that wait, and close every connection."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        while not self._readers.empty():
            self._readers.get_nowait().close()
        self._writer.close()

    def _private(self) -> None:
        """Created for its owner alone: it holds what people wrote."""
        if not self.path.exists():
            try:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            except OSError as error:
                raise StoreError(
                    f"{self.path}: cannot be created ({error.strerror}); give a file in a folder that can be written"
                ) from error

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")  # a second process waits here, and then finds the work done
        try:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "migrations" not in tables:
                shown = ", ".join(sorted(tables)[:3])
                raise StoreError(f"{self.path}: a database of something else (its tables: {shown}); give another file")
            done = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0] if tables else 0
            if done > len(MIGRATIONS):
                raise StoreError(
                    f"{self.path}: written by a newer fastalign (schema {done}, this one knows {len(MIGRATIONS)}); upgrade fastalign"
                )
            for version, statements in enumerate(MIGRATIONS[done:], done + 1):
                for statement in statements:
                    connection.execute(statement)
                connection.execute("INSERT INTO migrations (version, applied) VALUES (?, ?)", (version, time.time()))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _write_all(self) -> None:
        ended = False
        while not ended:
            jobs = [self._jobs.get()]
            while len(jobs) < GROUP and jobs[-1] is not None and not self._jobs.empty():
                jobs.append(self._jobs.get())
            ended = jobs[-1] is None
            group = [job for job in jobs if job is not None and job[1].set_running_or_notify_cancel()]
            if group and not self._commit(group):  # undone as a whole: each alone, so that none fails for another's sake
                for job in group:
                    self._commit([job])

    def _commit(self, group: list[tuple[Work[Any], Future[Any]]]) -> bool:
        """Whether each of the futures has its result or its error; never so for a group that was undone, unless it is one job."""
        results: list[Any] = []
        try:
            with self._explained():
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    results = [work(self._writer) for work, _ in group]
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:  # SQLite ends a transaction itself when the disk is full
                        self._writer.execute("ROLLBACK")
                    raise
        except Exception as error:
            if len(group) > 1:
                return False
            for _, future in group:
                future.set_exception(error)
            return True
        for (_, future), result in zip(group, results):
            future.set_result(result)
        return True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except (StoreError, NotFoundError):
            raise
        except sqlite3.IntegrityError as error:
            raise StoreConflictError(f"{self.path}: contradicts what is stored ({error})") from error
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                raise StoreBusyError(f"{self.path}: another process has locked it for over {self.timeout:g} s; try again later") from error
            if "full" in text:
                raise StoreBusyError(f"{self.path}: no room left on its disk; free some, and try again") from error
            raise StoreError(f"{self.path}: cannot be used ({text}); see that its folder and disk can be written") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.path}: not a database of fastalign's, or damaged ({error}); give another file, or a copy") from error
