"""The journal: what must survive a crash, and nothing more. SQLite with `synchronous=FULL`.

It holds the record of the session under way, the time to come back, what the device took part in (which
its policy and the tasks' criteria ask about), receipts that are not final yet, plans that it refuses, and
traffic per hour. When a session is CLEANED only hashes, the round and the outcome stay, in the write-ahead log too:
what is deleted is overwritten, and the log is emptied.

The running device holds the journal exclusively: two processes can never be one device.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from homespun.device.home import storage
from homespun.errors import Conflict, StorageFailure
from homespun.protocol.messages import Mode, Offer, ReportState
from homespun.protocol.session import Session

DAY_S = 86_400.0
_HOUR_S = 3_600.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS session (           -- the session under way: at most one row
    id INTEGER PRIMARY KEY CHECK (id = 1),
    record BLOB NOT NULL                       -- protocol.session.Session as JSON
);
CREATE TABLE IF NOT EXISTS participation (     -- one row per session that got an assignment
    session_id TEXT PRIMARY KEY,
    at REAL NOT NULL,                          -- of the assignment
    task_name TEXT NOT NULL,
    round_number INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    plan_hash TEXT NOT NULL,
    digest TEXT,                               -- of the report; NULL: nothing was ever sent
    outcome TEXT NOT NULL,                     -- a session state, or how the receipt ended
    checkpoint TEXT,                           -- the one that the report went into
    reason TEXT NOT NULL,
    assignment_id TEXT                         -- only until the receipt is final
);
CREATE TABLE IF NOT EXISTS watched (           -- of which release a session reports
    session_id TEXT PRIMARY KEY,
    release_id TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS refused_plan (
    plan_hash TEXT PRIMARY KEY,
    reason TEXT NOT NULL,
    until REAL                                 -- NULL: for good
);
CREATE TABLE IF NOT EXISTS traffic (hour INTEGER PRIMARY KEY, up INTEGER NOT NULL, down INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS retry (id INTEGER PRIMARY KEY CHECK (id = 1), at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS given (              -- end of the last window that the server set, from then
    id INTEGER PRIMARY KEY CHECK (id = 1),
    latest_s REAL NOT NULL
);
"""

_COUNTED = f"digest IS NOT NULL AND outcome <> '{ReportState.VOID}'"
"""A participation counts from INTENT on, unless the server said that it was void."""


class Participation(msgspec.Struct, frozen=True, kw_only=True):
    """How one session ended, as far as is known."""

    at: float
    task_name: str
    round_number: int
    attempt: int
    outcome: str
    checkpoint: str | None
    reason: str


class Journal:
    """The journal at `path`. Raises `Conflict` while another process holds it, `StorageFailure` if it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=0.5, isolation_level=None)
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.executescript(SCHEMA)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise _failure(self._path, error) from error
            raise Conflict(
                f"another process is running the device of {self._path.parent}",
                hint="stop it first, or use another directory",
            ) from error
        except sqlite3.Error as error:
            raise _failure(self._path, error) from error

    def close(self) -> None:
        self._db.close()

    # --- the session under way ---------------------------------------------------------------------------

    def session(self) -> Session | None:
        """The session under way, if there is one."""
        with storage(self._path):
            row = self._db.execute("SELECT record FROM session").fetchone()
        if row is None:
            return None
        try:
            return msgspec.json.decode(row[0], type=Session)
        except msgspec.MsgspecError as error:
            raise _failure(self._path, error) from error

    def save(self, session: Session, now: float) -> None:
        """Make `session` durable; from its assignment on also as a participation."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO session VALUES (1, ?)", (msgspec.json.encode(session),)
            )
            if session.offer is not None and session.assigned is not None:
                self._db.execute(
                    "INSERT INTO participation VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)"
                    " ON CONFLICT (session_id) DO UPDATE SET"
                    " round_number = excluded.round_number, attempt = excluded.attempt,"
                    " digest = excluded.digest, outcome = excluded.outcome, reason = excluded.reason",
                    (
                        session.session_id,
                        now,
                        session.offer.task_name,
                        session.assigned.round_number,
                        session.assigned.attempt,
                        session.assigned.plan_hash,
                        session.digest,
                        str(session.outcome or session.state),
                        session.reason,
                        session.assigned.assignment_id,
                    ),
                )
                if session.offer.watch is not None:
                    self._db.execute(
                        "INSERT OR IGNORE INTO watched VALUES (?, ?)",
                        (session.session_id, session.offer.watch.release_id),
                    )

    def finish(self, session: Session) -> None:
        """The session is over and clean: forget all but its line among the participations."""
        with self._transaction():
            self._db.execute("DELETE FROM session")
            if session.outcome != ReportState.ACKNOWLEDGED:
                self._forget_assignment(session.session_id)
        self._empty_log()

    # --- when to come back --------------------------------------------------------------------------------

    @property
    def retry_at(self) -> float:
        """Unix seconds before which the device does nothing; 0 if it may."""
        with storage(self._path):
            row = self._db.execute("SELECT at FROM retry").fetchone()
        return float(row[0]) if row else 0.0

    @property
    def given_s(self) -> float:
        """In how many seconds, at the latest, the server last had the device come back; 0: it never did."""
        with storage(self._path):
            row = self._db.execute("SELECT latest_s FROM given").fetchone()
        return float(row[0]) if row else 0.0

    def set_retry(self, at: float, given_s: float | None = None) -> None:
        """`given_s`: if the server gave the window, its end."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO retry VALUES (1, ?)", (at,))
            if given_s is not None:
                self._db.execute("INSERT OR REPLACE INTO given VALUES (1, ?)", (given_s,))

    # --- receipts -----------------------------------------------------------------------------------------

    def unresolved(self) -> list[tuple[str, str]]:
        """(session id, assignment id) of reports that were acknowledged and have no final receipt yet."""
        with storage(self._path):
            rows = self._db.execute(
                "SELECT session_id, assignment_id FROM participation"
                " WHERE outcome = ? AND assignment_id IS NOT NULL ORDER BY at",
                (ReportState.ACKNOWLEDGED,),
            )
            return [(str(row[0]), str(row[1])) for row in rows]

    def resolve(
        self, session_id: str, outcome: str, checkpoint: str | None = None, reason: str = ""
    ) -> None:
        """The receipt of an acknowledged report is final: INCLUDED in a checkpoint, or VOID."""
        with self._transaction():
            self._db.execute(
                "UPDATE participation SET outcome = ?, checkpoint = ?, reason = ? WHERE session_id = ?",
                (outcome, checkpoint, reason, session_id),
            )
            self._forget_assignment(session_id)
        self._empty_log()

    def _empty_log(self) -> None:
        """SQLite's log shows what pages held before; nobody else reads the journal, so it can always go."""
        with storage(self._path):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _forget_assignment(self, session_id: str) -> None:
        self._db.execute(
            "UPDATE participation SET assignment_id = NULL WHERE session_id = ?", (session_id,)
        )

    # --- participations -----------------------------------------------------------------------------------

    def last_round(self, task_name: str) -> int | None:
        """The newest round of this task that the device took part in."""
        with storage(self._path):
            row = self._db.execute(
                f"SELECT max(round_number) FROM participation WHERE task_name = ? AND {_COUNTED}",
                (task_name,),
            ).fetchone()
        return None if row[0] is None else int(row[0])

    def last_at(self, task_name: str) -> float | None:
        """When the device was last assigned to a round of this task that it took part in, in Unix seconds."""
        with storage(self._path):
            row = self._db.execute(
                f"SELECT max(at) FROM participation WHERE task_name = ? AND {_COUNTED}",
                (task_name,),
            ).fetchone()
        return None if row[0] is None else float(row[0])

    def was_assigned(self, offer: Offer) -> bool:
        """Whether this very round attempt has been tried, however it ended.

        An async round goes on for as long as it takes, so whoever failed may try again.
        """
        if offer.mode is Mode.ASYNC:
            return False
        with storage(self._path):
            row = self._db.execute(
                "SELECT 1 FROM participation WHERE task_name = ? AND round_number = ? AND attempt = ?"
                " AND plan_hash = ?",
                (offer.task_name, offer.round_number, offer.attempt, offer.plan_hash),
            ).fetchone()
        return row is not None

    def has_watched(self, release_id: str) -> bool:
        """Whether the device has reported on this release."""
        with storage(self._path):
            row = self._db.execute(
                "SELECT 1 FROM watched JOIN participation USING (session_id)"
                f" WHERE release_id = ? AND {_COUNTED}",
                (release_id,),
            ).fetchone()
        return row is not None

    def daily_participations(self, now: float) -> int:
        with storage(self._path):
            row = self._db.execute(
                f"SELECT count(*) FROM participation WHERE at > ? AND {_COUNTED}", (now - DAY_S,)
            ).fetchone()
        return int(row[0])

    def recent(self, limit: int = 10) -> list[Participation]:
        """The latest participations, newest first."""
        columns = ", ".join(Participation.__struct_fields__)
        with storage(self._path):
            rows = self._db.execute(
                f"SELECT {columns} FROM participation ORDER BY at DESC, rowid DESC LIMIT ?",
                (limit,),
            ).fetchall()
        return [
            Participation(**dict(zip(Participation.__struct_fields__, row, strict=True)))
            for row in rows
        ]

    # --- refused plans ------------------------------------------------------------------------------------

    def refuse_plan(self, plan_hash: str, reason: str, until: float | None) -> None:
        """Do not claim this plan again before `until` (None: ever)."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO refused_plan VALUES (?, ?, ?)", (plan_hash, reason, until)
            )

    def reconsider_plans(self) -> None:
        """Forget which plans were refused: the device's policy has changed."""
        with self._transaction():
            self._db.execute("DELETE FROM refused_plan")

    def plan_refusal(self, plan_hash: str, now: float) -> str | None:
        """Why the device refuses this plan, or None: it does not."""
        with storage(self._path):
            row = self._db.execute(
                "SELECT reason FROM refused_plan WHERE plan_hash = ? AND (until IS NULL OR until > ?)",
                (plan_hash, now),
            ).fetchone()
        return None if row is None else str(row[0])

    # --- traffic ------------------------------------------------------------------------------------------

    def add_traffic(self, now: float, up: int, down: int) -> None:
        if not (up or down):
            return
        with self._transaction():
            self._db.execute(
                "INSERT INTO traffic VALUES (?, ?, ?) ON CONFLICT (hour) DO UPDATE SET"
                " up = up + excluded.up, down = down + excluded.down",
                (int(now // _HOUR_S), up, down),
            )

    def traffic(self, since: float = 0.0) -> tuple[int, int]:
        """Bytes (up, down) since then, by whole hours."""
        with storage(self._path):
            row = self._db.execute(
                "SELECT coalesce(sum(up), 0), coalesce(sum(down), 0) FROM traffic WHERE hour >= ?",
                (int(since // _HOUR_S),),
            ).fetchone()
        return int(row[0]), int(row[1])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with storage(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield


def _failure(path: Path, error: Exception) -> StorageFailure:
    return StorageFailure(
        f"the journal {path} is damaged or cannot be written: {error}",
        hint="check free disk space; if it stays, remove it: the device then forgets what it took part in",
    )
