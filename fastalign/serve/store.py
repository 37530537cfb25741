"""The store of the online loop: who answered what with which version, and what people think of it.

Everything is in one SQLite file, which the service and the training loop may hold open at the same time. A method that
writes returns when its write is on the disk; one whose name ends in `_later` gives a future instead.

>>> import tempfile
>>> store = Store(tempfile.mkdtemp() + "/feedback.db")
>>> store.add_version("base", "models/base").state, store.promote("base").state
('candidate', 'live')
>>> store.close()
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.errors import DataError, NotFoundError, StoreConflictError
from fastalign.serve.database import Database
from fastalign.serve.records import Answer, DayCount, Event, Feedback, Kind, Role, State, Token, Version

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PAGE = 500  # rows that one read of `answers` and `feedback` holds in memory


class Store:
    """The database at `path`, created and migrated if need be; see `Database` for what may go wrong. Safe to call from any thread."""

    def __init__(self, path: str | Path, *, timeout: float = 5.0) -> None:
        self.database = Database(path, timeout=timeout)
        self._salt: bytes = self.database.read(lambda c: c.execute("SELECT value FROM settings WHERE name = 'salt'").fetchone()[0])

    def close(self) -> None:
        """Finish what is being written, and close the file."""
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Versions

    def add_version(self, name: str, folder: str | Path, *, parent: str | None = None, metrics: dict[str, Any] | None = None) -> Version:
        """A new candidate. Raises DataError for an unusable name, StoreConflictError for one in use, NotFoundError for the parent."""
        if not NAME.fullmatch(name):
            raise DataError(f"version {name!r:.80}: a name is up to 64 letters, digits, dots, dashes and underscores, the first no sign")
        row = (name, str(folder), parent, time.time(), "candidate", _to_json(metrics or {}))

        def work(connection: sqlite3.Connection) -> None:
            if connection.execute("SELECT 1 FROM versions WHERE name = ?", (name,)).fetchone():
                raise StoreConflictError(f"version {name!r} is there already; choose another name")
            if parent is not None:
                _version(connection, parent)
            connection.execute("INSERT INTO versions (name, folder, parent, created, state, metrics) VALUES (?, ?, ?, ?, ?, ?)", row)
            _event(connection, "version added", {"version": name, "folder": str(folder), "parent": parent})

        self.database.write(work).result()
        return self.version(name)

    def version(self, name: str) -> Version:
        """Raises NotFoundError for an unknown name."""
        return self.database.read(lambda connection: _version(connection, name))

    def versions(self) -> list[Version]:
        """All of them, the oldest first."""
        return self.database.read(lambda c: [_as_version(row) for row in c.execute("SELECT * FROM versions ORDER BY created, rowid")])

    def live_version(self) -> Version | None:
        """The one that answers now."""
        return self.database.read(_live)

    def set_metrics(self, name: str, metrics: dict[str, Any]) -> Version:
        """Add to what is known of a version; a metric that is there already is replaced."""

        def work(connection: sqlite3.Connection) -> None:
            merged = {**_version(connection, name).metrics, **metrics}
            connection.execute("UPDATE versions SET metrics = ? WHERE name = ?", (_to_json(merged), name))

        self.database.write(work).result()
        return self.version(name)

    def promote(self, name: str, *, expected: str | None = None) -> Version:
        """Make a version the live one; the one before is retired. Nothing changes where it is live already.

        `expected` names the version that the caller wants to replace; StoreConflictError when another one is live by now, such
        as after a roll-back that the caller has not heard of. This is bookkeeping: a running service changes its model by
        POST /admin/versions/NAME/promote, which ends here.
        """

        def work(connection: sqlite3.Connection) -> None:
            _version(connection, name)
            before = _live(connection)
            if before is not None and before.name == name:
                return
            check_live(before, expected)
            _go_live(connection, name, before, "retired")
            _event(connection, "promoted", {"version": name, "replaced": before.name if before else None})

        self.database.write(work).result()
        return self.version(name)

    def rollback_target(self) -> Version:
        """The version that was live before the live one. Raises StoreConflictError when there is none."""
        return self.database.read(_rollback_target)

    def roll_back(self, expected: str | None = None, *, reason: str = "") -> Version:
        """Make the version that was live before live again; the live one is then rolled_back. Returns the version now live.

        `expected` names the version that the caller wants to get to; StoreConflictError when it would be another one by now.
        """

        def work(connection: sqlite3.Connection) -> str:
            before, target = _live(connection), _rollback_target(connection)
            if expected is not None and target.name != expected:
                raise StoreConflictError(f"a roll-back leads to version {target.name!r} by now, not to {expected!r}; look again")
            # What the target once replaced stays what a further roll-back leads to.
            _go_live(connection, target.name, before, "rolled_back", replaced=target.replaced)
            _event(connection, "rolled back", {"version": before.name if before else None, "to": target.name, "reason": reason})
            return target.name

        return self.version(self.database.write(work).result())

    def move_version(self, name: str, folder: str | Path) -> Version:
        """The folder of a version is somewhere else now."""

        def work(connection: sqlite3.Connection) -> None:
            _version(connection, name)
            connection.execute("UPDATE versions SET folder = ? WHERE name = ?", (str(folder), name))

        self.database.write(work).result()
        return self.version(name)

    # Answers

    def add_answers(self, answers: Sequence[Answer]) -> None:
        """All of them or none."""
        self.add_answers_later(answers).result()

    def add_answers_later(self, answers: Sequence[Answer]) -> Future[None]:
        """As `add_answers`, done when they are on the disk."""
        rows = [
            (
                a.id, a.response, json.dumps(a.messages, ensure_ascii=False), np.array(a.prompt_ids, "<u4").tobytes(), a.text,
                np.array(a.tokens, "<u4").tobytes(), np.array(a.logps, "<f4").tobytes(), a.version, a.user, a.created, a.finish_reason,
                _to_json(a.sampling), a.stopped,
            )
            for a in answers
        ]  # fmt: skip

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany(f"INSERT INTO answers VALUES ({', '.join('?' * 13)})", rows)

        return self.database.write(work)

    def answer(self, answer_id: str) -> Answer:
        """Raises NotFoundError for an unknown id."""
        return self.database.read(lambda connection: _answer(connection, answer_id))

    def answers(self, *, version: str | None = None, response: str | None = None) -> Iterator[Answer]:
        """Answers of one version, of one response, or all, in the order in which they were stored."""
        where = "(?1 IS NULL OR version = ?1) AND (?2 IS NULL OR response = ?2)"
        return (
            _as_answer(row) for row in self._pages(f"SELECT *, rowid AS place FROM answers WHERE {where}", "rowid", (version, response))
        )

    def answer_counts(self) -> dict[str, int]:
        """How many answers each version gave."""
        return self.database.read(lambda c: dict(tuple(row) for row in c.execute("SELECT version, count(*) FROM answers GROUP BY version")))

    # Feedback

    def add_feedback(self, feedback: Feedback) -> Feedback:
        """Store it durably and return it with its id and time; see `add_feedback_later`."""
        return self.add_feedback_later(feedback).result()

    def add_feedback_later(self, feedback: Feedback) -> Future[Feedback]:
        """Add to the history; the last one of a user, kind and subject counts. Done when it is on the disk.

        Raises NotFoundError for an unknown answer, DataError for a choice between answers to different conversations.
        """
        created = feedback.created or time.time()
        value = json.dumps(feedback.value, ensure_ascii=False)

        def work(connection: sqlite3.Connection) -> Feedback:
            prompt = _prompt_of(connection, feedback.answer)
            for other in feedback.value if isinstance(feedback.value, tuple) else ():
                if _prompt_of(connection, other) != prompt:
                    raise DataError(f"feedback: {other} answers another conversation than {feedback.answer}; they cannot be compared")
            voice = "" if feedback.voice == feedback.user else feedback.voice
            row = (feedback.kind, feedback.answer, feedback.subject, value, feedback.reason, feedback.user, created, voice)
            cursor = connection.execute(
                "INSERT INTO feedback (kind, answer, subject, value, reason, user, created, voice) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row
            )
            return replace(feedback, id=cursor.lastrowid or 0, created=created)

        return self.database.write(work)

    def feedback(
        self, *, after: int = 0, upto: int | None = None, kind: Kind | None = None, version: str | None = None
    ) -> Iterator[Feedback]:
        """What counts: the last feedback of each user, kind and subject, with an id over `after`, in the order in which it came.

        upto             as if nothing had come with an id over this one: what is added later changes nothing
        kind, version    only feedback of that kind, only on answers of that version
        """
        query = (
            "SELECT f.*, f.id AS place FROM feedback f JOIN answers a ON a.id = f.answer WHERE f.id > ?1 AND f.id <= ?2"
            " AND (?3 IS NULL OR f.kind = ?3) AND (?4 IS NULL OR a.version = ?4) AND NOT EXISTS (SELECT 1 FROM feedback g"
            " WHERE g.user = f.user AND g.kind = f.kind AND g.subject = f.subject AND g.id > f.id AND g.id <= ?2)"
        )
        last = 2**63 - 1 if upto is None else upto
        return (_as_feedback(row) for row in self._pages(query, "f.id", (after, last, kind, version)))

    def history(self, answer_id: str) -> list[Feedback]:
        """All feedback whose answer this is, what was replaced later included, the oldest first."""
        query = "SELECT * FROM feedback WHERE answer = ? ORDER BY id"
        return self.database.read(lambda c: [_as_feedback(row) for row in c.execute(query, (answer_id,))])

    def feedback_counts(self) -> list[DayCount]:
        """Of what counts: how many per day, version and kind, the first day first."""
        query = (
            "SELECT date(f.created, 'unixepoch') AS day, a.version, f.kind, count(*) AS count,"
            " sum(f.kind = 'thumb' AND f.value = 'true') AS positive FROM feedback f JOIN answers a ON a.id = f.answer"
            " WHERE NOT EXISTS (SELECT 1 FROM feedback g WHERE g.user = f.user AND g.kind = f.kind AND g.subject = f.subject"
            " AND g.id > f.id) GROUP BY day, a.version, f.kind ORDER BY day, a.version, f.kind"
        )
        return self.database.read(lambda c: [DayCount(**row) for row in c.execute(query)])

    def user_key(self, *parts: str) -> str:
        """What stands for a user: a hash that only this database's salt can repeat."""
        return hmac.new(self._salt, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:32]

    # Tokens

    def add_token(self, role: Role, note: str = "", *, many_users: bool = False) -> tuple[Token, str]:
        """A new token and its secret, which cannot be shown again."""
        token = Token(secrets.token_hex(6), role, note, time.time(), None, many_users)
        secret = f"fa-{token.id}-{secrets.token_urlsafe(32)}"
        row = (token.id, self._hash(secret), role, note, token.created, many_users)
        insert = "INSERT INTO tokens (id, hash, role, note, created, many_users) VALUES (?, ?, ?, ?, ?, ?)"
        self.database.write(lambda c: c.execute(insert, row)).result()
        return token, secret

    def check_token(self, secret: str) -> Token | None:
        """The token with that secret, unless it is unknown or revoked; takes the same time for every secret of one id."""
        name = secret[3:15] if secret.startswith("fa-") else ""
        row = self.database.read(lambda c: c.execute("SELECT * FROM tokens WHERE id = ?", (name,)).fetchone())
        right = hmac.compare_digest(self._hash(secret), row["hash"] if row else bytes(32))
        return _as_token(row) if row and right and row["revoked"] is None else None

    def revoke_token(self, token_id: str) -> None:
        """From now on nobody can use it. Raises NotFoundError for an unknown id."""

        def work(connection: sqlite3.Connection) -> None:
            if not connection.execute("SELECT 1 FROM tokens WHERE id = ?", (token_id,)).fetchone():
                raise NotFoundError(f"there is no token {token_id!r:.80}; fastalign serve token list shows those that there are")
            connection.execute("UPDATE tokens SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), token_id))

        self.database.write(work).result()

    def tokens(self) -> list[Token]:
        """All of them, the oldest first."""
        return self.database.read(lambda c: [_as_token(row) for row in c.execute("SELECT * FROM tokens ORDER BY created, rowid")])

    # Events

    def add_event(self, kind: str, detail: dict[str, Any] | None = None) -> None:
        """Note that something happened."""
        self.database.write(lambda connection: _event(connection, kind, detail or {})).result()

    def events(self, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """The newest `limit` events with an id over `after`, the oldest first."""
        query = "SELECT * FROM (SELECT * FROM events WHERE id > ? ORDER BY id DESC LIMIT ?) ORDER BY id"
        rows = self.database.read(lambda c: c.execute(query, (after, limit)).fetchall())
        return [Event(row["id"], row["kind"], json.loads(row["detail"]), row["created"]) for row in rows]

    def _hash(self, secret: str) -> bytes:
        """A plain hash is enough: a secret has 256 random bits, which nobody tries out."""
        return hashlib.sha256(self._salt + secret.encode(errors="surrogatepass")).digest()

    def _pages(self, query: str, key: str, values: tuple[Any, ...]) -> Iterator[sqlite3.Row]:
        """Rows of a query that has `place` (the column `key`), a page at a time: no transaction stays open while they are used."""
        place, bound = -1, len(values) + 1
        paged = f"{query} AND {key} > ?{bound} ORDER BY {key} LIMIT {PAGE}"
        while True:
            rows = self.database.read(lambda c, at=place: c.execute(paged, (*values, at)).fetchall())  # type: ignore[misc]
            yield from rows
            if len(rows) < PAGE:
                return
            place = rows[-1]["place"]


def _version(connection: sqlite3.Connection, name: str) -> Version:
    row = connection.execute("SELECT * FROM versions WHERE name = ?", (name,)).fetchone()
    if row is None:
        known = [r[0] for r in connection.execute("SELECT name FROM versions ORDER BY created DESC LIMIT 5")]
        raise NotFoundError(f"there is no version {name!r:.80}; the newest are {', '.join(known) or 'none'}")
    return _as_version(row)


def _live(connection: sqlite3.Connection) -> Version | None:
    row = connection.execute("SELECT * FROM versions WHERE state = 'live'").fetchone()
    return _as_version(row) if row else None


def check_live(live: Version | None, expected: str | None) -> None:
    """Raises StoreConflictError when `expected` is given and another version is live."""
    if expected is not None and (live is None or live.name != expected):
        raise StoreConflictError(f"version {live.name if live else 'none'!r} is live by now, not {expected!r:.80}; look again")


def _rollback_target(connection: sqlite3.Connection) -> Version:
    live = _live(connection)
    if live is None or live.replaced is None:
        raise StoreConflictError(f"version {live.name if live else 'none'!r} replaced no other, so there is nothing to roll back to")
    return _version(connection, live.replaced)


_SAME: Any = object()


def _go_live(connection: sqlite3.Connection, name: str, before: Version | None, state: State, *, replaced: Any = _SAME) -> None:
    if before is not None:
        connection.execute("UPDATE versions SET state = ? WHERE name = ?", (state, before.name))
    after = (before.name if before else None) if replaced is _SAME else replaced
    connection.execute("UPDATE versions SET state = 'live', promoted = ?, replaced = ? WHERE name = ?", (time.time(), after, name))


def _answer(connection: sqlite3.Connection, answer_id: str) -> Answer:
    row = connection.execute("SELECT * FROM answers WHERE id = ?", (answer_id,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no answer {answer_id!r:.80}")
    return _as_answer(row)


def _prompt_of(connection: sqlite3.Connection, answer_id: str) -> bytes:
    row = connection.execute("SELECT prompt_ids FROM answers WHERE id = ?", (answer_id,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no answer {answer_id!r:.80}")
    return row[0]


def _event(connection: sqlite3.Connection, kind: str, detail: dict[str, Any]) -> None:
    connection.execute("INSERT INTO events (kind, detail, created) VALUES (?, ?, ?)", (kind, _to_json(detail), time.time()))


def _as_version(row: sqlite3.Row) -> Version:
    return Version(**{**dict(row), "metrics": json.loads(row["metrics"])})


def _as_answer(row: sqlite3.Row) -> Answer:
    fields = {name: row[name] for name in ("id", "response", "text", "version", "user", "created", "finish_reason")}
    prompt, tokens = (tuple(np.frombuffer(row[name], "<u4").tolist()) for name in ("prompt_ids", "tokens"))
    logps = tuple(np.frombuffer(row["logps"], "<f4").tolist())
    messages, sampling = json.loads(row["messages"]), json.loads(row["sampling"])
    found: dict[str, Any] = {"messages": messages, "prompt_ids": prompt, "tokens": tokens, "logps": logps, "sampling": sampling}
    return Answer(**fields, **found, stopped=bool(row["stopped"]))


def _as_feedback(row: sqlite3.Row) -> Feedback:
    value = json.loads(row["value"])
    fields = {name: row[name] for name in ("answer", "kind", "user", "reason", "created", "id", "voice")}
    return Feedback(**fields, value=tuple(value) if isinstance(value, list) else value)


def _as_token(row: sqlite3.Row) -> Token:
    return Token(row["id"], row["role"], row["note"], row["created"], row["revoked"], bool(row["many_users"]))


def _to_json(value: dict[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"metrics and details are numbers, texts and lists of them that JSON can hold: {error}") from error
