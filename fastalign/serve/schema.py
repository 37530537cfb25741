"""The tables of the database of answers and feedback, as steps from each schema version to the next.

A step that has been released is never changed: a new one is added. Times are seconds since 1970, UTC. Token ids are
little-endian uint32, log-probs float32.
"""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE migrations (version INTEGER PRIMARY KEY, applied REAL NOT NULL)",
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value BLOB NOT NULL)",
        "INSERT INTO settings VALUES ('salt', randomblob(32))",
        """CREATE TABLE versions (
            name TEXT PRIMARY KEY,
            folder TEXT NOT NULL,
            parent TEXT REFERENCES versions (name),
            replaced TEXT REFERENCES versions (name),
            created REAL NOT NULL,
            promoted REAL,
            state TEXT NOT NULL CHECK (state IN ('candidate', 'live', 'retired', 'rolled_back')),
            metrics TEXT NOT NULL)""",
        "CREATE UNIQUE INDEX one_live_version ON versions (state) WHERE state = 'live'",
        """CREATE TABLE answers (
            id TEXT PRIMARY KEY,
            response TEXT NOT NULL,
            messages TEXT NOT NULL,
            prompt_ids BLOB NOT NULL,
            text TEXT NOT NULL,
            tokens BLOB NOT NULL,
            logps BLOB NOT NULL,
            version TEXT NOT NULL REFERENCES versions (name),
            user TEXT NOT NULL,
            created REAL NOT NULL,
            finish_reason TEXT NOT NULL CHECK (finish_reason IN ('stop', 'length')),
            sampling TEXT NOT NULL)""",
        "CREATE INDEX answers_by_version ON answers (version, created)",
        """CREATE TABLE feedback (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            kind TEXT NOT NULL CHECK (kind IN ('thumb', 'choice', 'rating', 'edit')),
            answer TEXT NOT NULL REFERENCES answers (id),
            subject TEXT NOT NULL,
            value TEXT NOT NULL,
            reason TEXT,
            user TEXT NOT NULL,
            created REAL NOT NULL)""",
        "CREATE INDEX feedback_last ON feedback (user, kind, subject, id)",
        "CREATE INDEX feedback_by_answer ON feedback (answer)",
        "CREATE INDEX feedback_by_time ON feedback (created)",
        "CREATE TRIGGER feedback_is_kept BEFORE UPDATE ON feedback BEGIN SELECT raise(ABORT, 'feedback is only added to'); END",
        """CREATE TABLE tokens (
            id TEXT PRIMARY KEY,
            hash BLOB NOT NULL,
            role TEXT NOT NULL CHECK (role IN ('user', 'operator')),
            note TEXT NOT NULL,
            created REAL NOT NULL,
            revoked REAL)""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            kind TEXT NOT NULL,
            detail TEXT NOT NULL,
            created REAL NOT NULL)""",
    ),
    # 1: the answer goes on, and a stop text of the request's ended it. What was stored before is taken for whole.
    ("ALTER TABLE answers ADD COLUMN stopped INTEGER NOT NULL DEFAULT 0 CHECK (stopped IN (0, 1))",),
    # Whether the "user" of a request with this token is believed; whose voice a judgement is, '' for that of its user.
    (
        "ALTER TABLE tokens ADD COLUMN many_users INTEGER NOT NULL DEFAULT 0 CHECK (many_users IN (0, 1))",
        "ALTER TABLE feedback ADD COLUMN voice TEXT NOT NULL DEFAULT ''",
    ),
)
