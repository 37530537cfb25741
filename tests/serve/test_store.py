"""The store: round trips, which feedback counts, versions that change places, and every way in which a database can be unusable."""

from __future__ import annotations

import sqlite3
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastalign.errors import DataError, NotFoundError, StoreBusyError, StoreConflictError, StoreError
from fastalign.serve import database, schema
from fastalign.serve.records import Answer, DayCount, Feedback
from fastalign.serve.store import PAGE, Store

NASTY = ["'; DROP TABLE feedback; --", '" OR 1=1 --', "../../etc/passwd", "%00", "a\x00b", "名前\U0001f600", "?1", "${jndi}", ""]


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "feedback.db") as store:
        store.add_version("base", tmp_path / "model")
        store.promote("base")
        yield store


def answer(name: str = "a", **changes) -> Answer:
    made = Answer(
        name, "response", [{"role": "user", "content": "hé\n"}], (1, 2, 2**31), "text", (3, 0), (-0.5, -0.25), "base", "user", 12.5, "stop",
        {"temperature": 1.0},
    )  # fmt: skip
    return replace(made, **changes)


def test_what_is_stored_comes_back_also_in_another_process_s_connection(store: Store, tmp_path: Path):
    stored = [
        answer(),
        answer("b", finish_reason="length", stopped=True, text="'\"\x00\U0001f600", messages=[{"role": "user", "content": NASTY[0]}]),
    ]
    store.add_answers(stored)
    kept = [
        store.add_feedback(Feedback("a", "thumb", True, "u", reason="because")),
        store.add_feedback(Feedback("a", "rating", 3.5, "u")),
        store.add_feedback(Feedback("a", "edit", "as it\nshould be", "u")),
        store.add_feedback(Feedback("b", "choice", ("a",), "u")),
    ]
    with Store(tmp_path / "feedback.db") as other:
        assert list(other.answers()) == stored and other.answer("b") == stored[1]
        assert list(other.feedback()) == kept and [f.id for f in kept] == [1, 2, 3, 4] and all(f.created > 0 for f in kept)
        assert list(other.feedback(after=2)) == kept[2:] and list(other.feedback(kind="rating")) == kept[1:2]
        assert list(other.feedback(version="base")) == kept and not list(other.feedback(version="x"))
        assert [a.id for a in other.answers(version="base", response="response")] == ["a", "b"] and not list(other.answers(response="x"))


def test_the_last_feedback_of_a_user_kind_and_subject_counts_and_the_history_stays(store: Store):
    store.add_answers([answer("a"), answer("b"), answer("c")])
    said = [
        Feedback("a", "thumb", True, "u"),
        Feedback("a", "thumb", True, "v"),  # another user
        Feedback("a", "thumb", False, "u"),  # replaces the first
        Feedback("a", "rating", 2.0, "u"),  # another kind
        Feedback("a", "choice", ("b",), "u"),
        Feedback("b", "choice", ("a",), "u"),  # replaces: the same two answers
        Feedback("b", "choice", ("a", "c"), "u"),  # three answers are another subject
        Feedback("c", "choice", ("b", "a"), "u"),  # replaces the one before
    ]
    stored = [store.add_feedback(one) for one in said]
    assert list(store.feedback()) == [stored[i] for i in (1, 2, 3, 5, 7)]
    assert store.history("a") == stored[:5]  # those that are about it, replaced ones too
    assert [f.id for f in store.feedback(after=5)] == [6, 8]
    today = time.strftime("%Y-%m-%d", time.gmtime(stored[0].created))
    counts = store.feedback_counts()
    assert counts == [
        DayCount(today, "base", "choice", 2, 0),
        DayCount(today, "base", "rating", 1, 0),
        DayCount(today, "base", "thumb", 2, 1),
    ]
    with pytest.raises(sqlite3.IntegrityError, match="only added to"), sqlite3.connect(store.database.path) as connection:
        connection.execute("UPDATE feedback SET value = 'true'")


def test_long_lists_are_read_in_pages(store: Store):
    store.add_answers([answer(f"a{i}") for i in range(PAGE + 7)])
    futures = [store.add_feedback_later(Feedback(f"a{i}", "thumb", i % 2 == 0, "u")) for i in range(PAGE + 7)]
    assert [f.result().id for f in futures] == list(range(1, PAGE + 8))
    assert [f.answer for f in store.feedback()] == [a.id for a in store.answers()] == [f"a{i}" for i in range(PAGE + 7)]


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("thumb", 1, "a thumb is true or false"),
        ("rating", float("nan"), "a rating is a number"),
        ("rating", 10**400, "a rating is a number"),
        ("rating", True, "a rating is a number"),
        ("edit", "  ", "an edit is the text"),
        ("edit", "\ud800", "lone surrogate"),
        ("choice", (), "names the answers that were not chosen"),
        ("choice", ("a",), "named twice"),
        ("choice", ("b", "b"), "named twice"),
        ("choice", tuple(map(str, range(16))), "at most 16 answers, got 17"),
        ("like", True, "must be one of thumb, choice, rating, edit"),
    ],
)
def test_feedback_that_means_nothing(kind, value, told):
    with pytest.raises(DataError, match=told):
        Feedback("a", kind, value, "u")


def test_feedback_on_what_is_not_there_or_cannot_be_compared(store: Store):
    store.add_answers([answer("a"), answer("b", prompt_ids=(9,))])
    with pytest.raises(NotFoundError, match="no answer 'x'"):
        store.add_feedback(Feedback("x", "thumb", True, "u"))
    with pytest.raises(NotFoundError, match="no answer 'x'"):
        store.add_feedback(Feedback("a", "choice", ("x",), "u"))
    with pytest.raises(DataError, match="b answers another conversation than a"):
        store.add_feedback(Feedback("a", "choice", ("b",), "u"))
    with pytest.raises(DataError, match="at most 4000"):
        store.add_feedback(Feedback("a", "thumb", True, "u", reason="x" * 4001))
    for text in NASTY:
        with pytest.raises(NotFoundError):
            store.add_feedback(Feedback(text, "thumb", True, text, reason=text))
    assert not list(store.feedback())
    with pytest.raises(StoreConflictError):  # an answer of a version that is not there; nothing of the call is kept
        store.add_answers([answer("c"), answer("d", version="x")])
    assert [a.id for a in store.answers()] == ["a", "b"]


def test_versions_change_places(store: Store):
    with pytest.raises(StoreConflictError, match="nothing to roll back to"):
        store.rollback_target()
    made = store.add_version("v1", "v1", parent="base", metrics={"win_rate": 0.5})
    assert (made.state, made.metrics, made.replaced) == ("candidate", {"win_rate": 0.5}, None)
    store.add_version("v2", "v2", parent="v1")
    for name in ("v1", "v2", "v2"):  # the second time nothing changes
        assert store.promote(name).state == "live"
    states = {v.name: (v.state, v.replaced) for v in store.versions()}
    assert states == {"base": ("retired", None), "v1": ("retired", "base"), "v2": ("live", "v1")}
    with pytest.raises(StoreConflictError, match="leads to version 'v1' by now, not to 'base'"):
        store.roll_back("base")
    assert store.rollback_target().name == "v1" == store.roll_back("v1", reason="worse").name
    assert store.roll_back().name == "base" and store.live_version() == store.version("base")
    assert [v.state for v in store.versions()] == ["live", "rolled_back", "rolled_back"]
    assert store.set_metrics("v1", {"n": 3}).metrics == {"win_rate": 0.5, "n": 3}
    kinds = [event.kind for event in store.events()]
    assert kinds == ["version added", "promoted"] + ["version added"] * 2 + ["promoted"] * 2 + ["rolled back"] * 2
    assert store.events(limit=1)[0].detail == {"version": "v1", "to": "base", "reason": ""} and len(store.events(after=2)) == 6
    assert store.move_version("v1", "elsewhere").folder == "elsewhere"


def test_a_promotion_replaces_the_version_that_it_expects_or_none(store: Store):
    for name in ("v1", "v2"):
        store.add_version(name, name, parent="base")
    assert store.promote("v1", expected="base").state == "live" and store.version("v1").replaced == "base"
    store.roll_back("base", reason="worse")
    events = store.events()
    with pytest.raises(StoreConflictError, match="version 'base' is live by now, not 'v1'; look again"):
        store.promote("v2", expected="v1")
    assert store.live_version() == store.version("base") and store.version("v2").state == "candidate" and store.events() == events
    with pytest.raises(NotFoundError):
        store.promote("v3", expected="base")
    assert store.promote("v2", expected="base") == store.promote("v2", expected="base")  # the second time nothing changes


def test_of_promotions_at_once_that_expect_the_same_version_one_succeeds(store: Store, tmp_path: Path):
    """Also from several processes, each with a connection of its own."""
    names = [f"v{i}" for i in range(8)]
    for name in names:
        store.add_version(name, name)
    barrier, outcomes = threading.Barrier(len(names)), []

    def run(name: str) -> None:
        with Store(tmp_path / "feedback.db") as mine:
            barrier.wait(60)
            try:
                outcomes.append(mine.promote(name, expected="base").name)
            except StoreConflictError:
                outcomes.append(None)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [name for name in outcomes if name]
    assert len(outcomes) == len(names) and store.live_version() == store.version(winner) and store.version(winner).replaced == "base"


def test_versions_that_cannot_be(store: Store):
    for name in [*NASTY, "-x", "x" * 65, "a b"]:
        with pytest.raises(DataError, match="a name is up to 64"):
            store.add_version(name, "x")
    with pytest.raises(StoreConflictError, match="'base' is there already"):
        store.add_version("base", "x")
    with pytest.raises(NotFoundError, match="no version 'v0'; the newest are base"):
        store.add_version("v1", "x", parent="v0")
    with pytest.raises(DataError, match="JSON can hold"):
        store.add_version("v1", "x", metrics={"loss": float("nan")})
    for call in (store.promote, store.version, lambda name: store.set_metrics(name, {}), lambda name: store.move_version(name, "x")):
        with pytest.raises(NotFoundError):
            call("v1")
    assert [v.name for v in store.versions()] == ["base"]


def test_tokens_are_hashed_checked_and_revoked(store: Store, tmp_path: Path):
    token, secret = store.add_token("operator", "laptop")
    _, other = store.add_token("user")
    assert store.check_token(secret) == token == store.tokens()[0] and store.check_token(other).role == "user"
    many, believed = store.add_token("user", many_users=True)
    assert [one.many_users for one in store.tokens()] == [False, False, True] and store.check_token(believed) == many
    for wrong in (secret[:-1], secret + "x", secret.replace("fa-", ""), other[:15] + secret[15:], *NASTY, "fa-" + "\udcff" * 12):
        assert wrong.startswith("fa-\udcff") or store.check_token(wrong) is None
    store.revoke_token(token.id)
    assert store.check_token(secret) is None and store.tokens()[0].revoked is not None and store.check_token(other)
    with pytest.raises(NotFoundError, match="no token 'nope'"):
        store.revoke_token("nope")
    content = b"".join(path.read_bytes() for path in tmp_path.glob("feedback.db*"))
    assert token.id.encode() in content and secret[16:].encode() not in content
    assert stat.S_IMODE((tmp_path / "feedback.db").stat().st_mode) == 0o600


def test_hashes_of_users_differ_between_databases(store: Store, tmp_path: Path):
    with Store(tmp_path / "other.db") as other:
        assert store.user_key("a", "b") == store.user_key("a", "b") != other.user_key("a", "b")
    assert len({store.user_key(*parts) for parts in (["a", "b"], ["ab"], ["a"], ["b", "a"])}) == 4


def test_acknowledged_writes_are_synced(store: Store):
    writer = store.database._writer
    assert writer.execute("PRAGMA synchronous").fetchone()[0] == 2 and writer.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    with pytest.raises(StoreError, match="readonly"):
        store.database.read(lambda c: c.execute("DELETE FROM versions"))


def test_many_threads_write_at_once_and_a_bad_write_fails_alone(store: Store):
    store.add_answers([answer("a")])
    outcomes = []

    def write(i: int) -> None:
        for j in range(20):
            name = "missing" if (i + j) % 5 == 0 else "a"
            try:
                outcomes.append((name, store.add_feedback(Feedback(name, "rating", float(j), f"u{i}")).id))
            except NotFoundError:
                outcomes.append((name, 0))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [number for _, number in outcomes if number]
    assert len(outcomes) == 200 and sorted(ids) == list(range(1, 161)) and {name for name, number in outcomes if not number} == {"missing"}
    assert len(store.history("a")) == 160


def test_a_locked_database_says_so_and_works_again(store: Store, tmp_path: Path):
    store.add_answers([answer("a")])
    with Store(tmp_path / "feedback.db", timeout=0.1) as hasty:
        blocker = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusyError, match=r"feedback\.db: another process has locked it for over 0.1 s"):
            hasty.add_feedback(Feedback("a", "thumb", True, "u"))
        assert hasty.answer("a") == answer("a")  # reading goes on
        with pytest.raises(StoreBusyError):
            Store(tmp_path / "feedback.db", timeout=0.1)
        blocker.execute("ROLLBACK")
        assert hasty.add_feedback(Feedback("a", "thumb", True, "u")).id == 1
        blocker.close()


def test_a_full_disk_says_so_keeps_what_was_acknowledged_and_works_again(store: Store):
    store.add_answers([answer("a")])
    writer, before = store.database._writer, 0
    writer.execute(f"PRAGMA max_page_count = {writer.execute('PRAGMA page_count').fetchone()[0] + 2}")
    failed = None
    while failed is None and before < 10:
        try:
            store.add_feedback(Feedback("a", "edit", "x" * 3000, f"u{before}"))
            before += 1
        except StoreBusyError as error:
            failed = error
    assert "no room left on its disk" in str(failed) and len(store.history("a")) == before > 0
    writer.execute("PRAGMA max_page_count = 1000000")
    assert store.add_feedback(Feedback("a", "edit", "y", "u")).id and len(store.history("a")) == before + 1


def test_a_cancelled_write_does_not_stop_the_writer(store: Store):
    started, go = threading.Event(), threading.Event()
    slow = store.database.write(lambda c: (started.set(), go.wait(60)))
    started.wait(60)
    cancelled = store.database.write(lambda c: c.execute("DELETE FROM versions"))
    assert cancelled.cancel()
    go.set()
    slow.result()
    store.add_answers([answer("a")])
    assert store.versions()


def test_files_that_are_no_database_of_ours(tmp_path: Path, monkeypatch):
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as the header of one" * 20)
    with sqlite3.connect(tmp_path / "foreign.db") as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    for name, told in (
        ("text.db", "not a database"),
        ("foreign.db", "of something else .*customers"),
        ("no/such/folder.db", "cannot be created"),
    ):
        with pytest.raises(StoreError, match=told):
            Store(tmp_path / name)
    assert "customers" in str(sqlite3.connect(tmp_path / "foreign.db").execute("SELECT name FROM sqlite_master").fetchall())


def test_an_older_schema_is_brought_up_to_date_and_a_newer_one_refused(tmp_path: Path, monkeypatch):
    path = tmp_path / "feedback.db"
    with Store(path) as store:
        store.add_version("base", "x")
    newer = (*schema.MIGRATIONS, ("ALTER TABLE versions ADD COLUMN note TEXT NOT NULL DEFAULT 'old'",))
    broken = (*schema.MIGRATIONS, ("ALTER TABLE versions ADD COLUMN half TEXT", "ALTER TABLE nowhere ADD COLUMN x TEXT"))
    monkeypatch.setattr(database, "MIGRATIONS", broken)
    with pytest.raises(StoreError, match="nowhere"):
        Store(path)
    monkeypatch.setattr(database, "MIGRATIONS", newer)
    file = database.Database(path)  # the step that failed left nothing behind
    assert [dict(row)["note"] for row in file.read(lambda c: c.execute("SELECT * FROM versions").fetchall())] == ["old"]
    done = len(schema.MIGRATIONS)
    assert [row[0] for row in file.read(lambda c: c.execute("SELECT version FROM migrations").fetchall())] == [*range(1, done + 2)]
    file.close()
    monkeypatch.undo()
    with pytest.raises(StoreError, match=rf"written by a newer fastalign \(schema {done + 1}, this one knows {done}\)"):
        Store(path)


def test_what_an_older_fastalign_stored_is_read_as_it_was_meant(tmp_path: Path, monkeypatch):
    """A database of the first schema, with an answer, feedback and a token in it."""
    path = tmp_path / "feedback.db"
    monkeypatch.setattr(database, "MIGRATIONS", schema.MIGRATIONS[:1])
    first = database.Database(path)
    rows = {
        "versions": ("base", "x", None, None, 1.0, 1.0, "live", "{}"),
        "answers": ("a", "r", '[{"role": "user", "content": "q"}]', b"", "text", b"", b"", "base", "u", 1.0, "stop", "{}"),
        "feedback": (1, "thumb", "a", "a", "true", None, "u", 1.0),
        "tokens": ("t", b"", "user", "note", 1.0, None),
    }
    for table, row in rows.items():
        first.write(lambda c, table=table, row=row: c.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)).result()
    first.close()
    monkeypatch.undo()
    with Store(path) as store:
        assert store.answer("a").finish_reason == "stop" and store.answer("a").stopped is False
        assert [(f.answer, f.value, f.user, f.voice) for f in store.feedback()] == [("a", True, "u", "u")]
        assert [(token.note, token.many_users) for token in store.tokens()] == [("note", False)]
        added = store.add_feedback(Feedback("a", "thumb", False, "v", voice="w"))
        assert list(store.feedback(after=1)) == [added] and added.voice == "w"
        store.add_answers([answer("b", stopped=True)])
        assert [one.stopped for one in store.answers()] == [False, True]


def test_a_closed_store_says_so(tmp_path: Path):
    store = Store(tmp_path / "feedback.db")
    store.close()
    store.close()
    for call in (store.versions, lambda: store.add_event("x")):
        with pytest.raises(StoreError, match="has been closed"):
            call()
