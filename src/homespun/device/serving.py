"""The record of what a device serves, in one SQLite file that all its processes share.

The device installs, the app predicts, a command predicts, all at once: every change is one transaction. What decides
which model is served is durable; what is only counted may be lost with the power.

A new release is on probation for its first `PROBATION` predictions. Each of them is noted before it begins and struck
out when it has ended, so that a note whose process is gone tells of a crash that nobody lived to report.
"""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import msgspec

from homespun.device.home import TEMPORARY, storage, sync_directory
from homespun.device.slots import Slots, name_of
from homespun.errors import StorageFailure
from homespun.protocol.messages import ReleaseManifest

PROBATION = 100
"""Predictions after which a release is no longer on probation."""
FLUSH_AFTER_S = 5.0
FLUSH_AFTER_PREDICTIONS = 50
"""What is counted in memory is written down at the first prediction after either, and when the process ends."""
LOCK_S = 2.0
"""Longest wait for another process that is writing, which takes milliseconds."""
SAME_PROCESS_S = 60.0
"""Two measurements of when a process began differ by less, even if the clock was set meanwhile."""

_SCHEMA = """
CREATE TABLE slot (
    name TEXT PRIMARY KEY,
    record BLOB NOT NULL         -- Slots as JSON
);
CREATE TABLE note (              -- a prediction on probation that has begun and not ended
    id INTEGER PRIMARY KEY,
    slot TEXT NOT NULL,
    release TEXT NOT NULL,
    pid INTEGER NOT NULL,        -- of the process that predicts
    began_at REAL NOT NULL       -- when that process began: numbers of processes are used again
);
CREATE TABLE usage (             -- never leaves the device as it is
    slot TEXT NOT NULL,
    release TEXT NOT NULL,
    num_predictions INTEGER NOT NULL,
    total_s REAL NOT NULL,
    num_failures INTEGER NOT NULL,
    PRIMARY KEY (slot, release)
);
"""
_COUNT = (
    "INSERT INTO usage VALUES (?, ?, ?, ?, ?) ON CONFLICT (slot, release) DO UPDATE SET"
    " num_predictions = num_predictions + excluded.num_predictions,"
    " total_s = total_s + excluded.total_s, num_failures = num_failures + excluded.num_failures"
)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """How a release has done here. `total_s`: seconds of all predictions together."""

    num_predictions: int = 0
    total_s: float = 0.0
    num_failures: int = 0

    @property
    def mean_s(self) -> float | None:
        """Seconds of a prediction; None before the first."""
        return self.total_s / self.num_predictions if self.num_predictions else None


@dataclass
class _Pending:
    """Predictions that are counted in memory only: (slot, release) -> [how many, seconds]."""

    counts: dict[tuple[str, str], list[float]]
    num_predictions: int = 0
    flushed_at: float = float("-inf")


class Record:
    """The file at `path`, made by the first change. Raises `StorageFailure`.

    Not for two threads at once; `Models` sees to that.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._pid = 0
        self._pending = _Pending({})
        self._trusted: set[tuple[str, str]] = set()
        self._finalizer: weakref.finalize[..., Record] | None = None

    def close(self) -> None:
        """Write down what was counted. The next use opens the file again."""
        if self._finalizer is not None:
            self._finalizer()
        self._database = None

    # --- what is served -----------------------------------------------------------------------------------

    def all(self) -> dict[str, Slots]:
        """Every slot that holds something, by name."""
        with storage(self._path):
            db = self._db()
            rows = db.execute("SELECT name, record FROM slot ORDER BY name") if db else ()
            return {name: self._decode(record) for name, record in rows}

    def slots(self, slot: str) -> Slots:
        with storage(self._path):
            db = self._db()
            query = "SELECT record FROM slot WHERE name = ?"
            row = db.execute(query, (slot,)).fetchone() if db else None
        return Slots() if row is None else self._decode(row[0])

    def change(self, slot: str, to: Callable[[Slots], Slots]) -> Slots:
        """Make `to` of what the slot holds durable, whoever else changes it now; what it holds then."""
        with self._transaction(durable=True) as db:
            return self._change(db, slot, to)

    def _change(self, db: sqlite3.Connection, slot: str, to: Callable[[Slots], Slots]) -> Slots:
        before = self.slots(slot)
        after = to(before)
        if after != before:
            record = msgspec.json.encode(after)
            db.execute("INSERT OR REPLACE INTO slot VALUES (?, ?)", (slot, record))
        return after

    def fail(
        self, slot: str, manifest: ReleaseManifest, reason: str, *, crashed: bool = False
    ) -> Slots:
        """A release that is served has failed; nothing if it is not served any more. What the slot holds then."""
        release = name_of(manifest)
        with self._transaction(durable=True) as db:
            db.execute("DELETE FROM note WHERE slot = ? AND release = ?", (slot, release))
            if self.slots(slot).active != manifest:
                return self.slots(slot)
            db.execute(_COUNT, (slot, release, 0, 0.0, 1))
            return self._change(db, slot, lambda s: s.failing(manifest, reason, crashed=crashed))

    # --- predictions --------------------------------------------------------------------------------------

    def begin(self, slot: str, release: str) -> int | None:
        """Note a prediction on probation; its number, or None: the release is not on probation any more, or the note
        cannot be written, which keeps nobody from predicting.
        """
        if (slot, release) in self._trusted:
            return None
        if self.usage(slot, release).num_predictions >= PROBATION:
            self._trusted.add((slot, release))
            return None
        mine = (slot, release, os.getpid(), _began_at(os.getpid()))
        query = "INSERT INTO note (slot, release, pid, began_at) VALUES (?, ?, ?, ?)"
        try:
            with self._transaction() as db:
                return db.execute(query, mine).lastrowid
        except StorageFailure:
            return None

    def strike(self, note: int | None) -> None:
        """The prediction has ended, with an exception."""
        if note is not None:
            with suppress(StorageFailure), self._transaction() as db:
                db.execute("DELETE FROM note WHERE id = ?", (note,))

    def finish(self, note: int | None, slot: str, release: str, seconds: float) -> None:
        """The prediction has ended well, after so long."""
        if note is not None:
            with suppress(StorageFailure), self._transaction() as db:
                db.execute("DELETE FROM note WHERE id = ?", (note,))
                db.execute(_COUNT, (slot, release, 1, seconds, 0))
            return
        pending = self._pending
        count = pending.counts.setdefault((slot, release), [0, 0.0])
        count[0] += 1
        count[1] += seconds
        pending.num_predictions += 1
        age_s = monotonic() - pending.flushed_at
        if pending.num_predictions >= FLUSH_AFTER_PREDICTIONS or age_s > FLUSH_AFTER_S:
            with suppress(StorageFailure), storage(self._path):
                if (connection := self._db()) is not None:
                    _flush(connection, pending)

    def crashed(self, slot: str, release: str) -> bool:
        """Whether a prediction on probation of this release ended its process."""
        with storage(self._path):
            db = self._db()
            query = "SELECT pid, began_at FROM note WHERE slot = ? AND release = ?"
            notes = db.execute(query, (slot, release)).fetchall() if db else []
        return any(
            abs((_began_at(pid) or float("inf")) - began_at) > SAME_PROCESS_S
            for pid, began_at in notes
        )

    def usage(self, slot: str, release: str) -> Usage:
        with storage(self._path):
            db = self._db()
            query = (
                "SELECT num_predictions, total_s, num_failures FROM usage"
                " WHERE slot = ? AND release = ?"
            )
            row = db.execute(query, (slot, release)).fetchone() if db else None
        return Usage(**dict(zip(Usage.__struct_fields__, row, strict=True))) if row else Usage()

    # --- the file -----------------------------------------------------------------------------------------

    def _db(self, *, create: bool = False) -> sqlite3.Connection | None:
        """The connection of this process; None while there is no file."""
        if self._database is not None and self._pid == os.getpid():
            return self._database
        if not self._path.exists():
            if not create:
                return None
            self._create()
        # A connection must not be used on the other side of a fork, nor closed there: the old one is left alone.
        db = sqlite3.connect(
            self._path, timeout=LOCK_S, isolation_level=None, check_same_thread=False
        )
        self._database, self._pid, self._pending = db, os.getpid(), _Pending({})
        self._finalizer = weakref.finalize(self, _close, db, self._pending, self._pid)
        return db

    def _create(self) -> None:
        """Complete before it has its name, so that no other process ever sees half of it."""
        beside = self._path.with_name(self._path.name + TEMPORARY)
        beside.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside.unlink(missing_ok=True)
        with closing(sqlite3.connect(beside, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA secure_delete = ON")
            db.executescript(_SCHEMA)
        beside.chmod(0o600)
        beside.replace(self._path)
        sync_directory(self._path.parent)

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """`durable`: survives a power cut too, not only the end of the process."""
        with storage(self._path):
            db = self._db(create=True)
            assert db is not None
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with db:
                db.execute("BEGIN IMMEDIATE")
                yield db

    def _decode(self, record: bytes) -> Slots:
        try:
            return msgspec.json.decode(record, type=Slots)
        except msgspec.MsgspecError as error:
            raise StorageFailure(
                f"{self._path} is damaged: {error}",
                hint=f"remove {self._path.parent}; what is served is fetched again",
            ) from error


def _flush(db: sqlite3.Connection, pending: _Pending) -> None:
    rows = [(*key, count, seconds, 0) for key, (count, seconds) in pending.counts.items()]
    pending.counts.clear()
    pending.num_predictions, pending.flushed_at = 0, monotonic()
    if rows:
        db.execute("PRAGMA synchronous = NORMAL")
        with db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(_COUNT, rows)


def _close(db: sqlite3.Connection, pending: _Pending, pid: int) -> None:
    """At the end of the process too; its statistics are not worth a failure then."""
    if pid == os.getpid():
        try:
            _flush(db, pending)
        except sqlite3.Error:
            return
        finally:
            db.close()


_began: dict[int, float] = {}
"""Of this process: it does not change."""


def _began_at(pid: int) -> float | None:
    """Unix seconds at which a process began; None if there is none of this number."""
    import psutil

    if pid in _began:
        return _began[pid]
    try:
        process = psutil.Process(pid)
        began = None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
    if pid == os.getpid() and began is not None:
        _began[pid] = began
    return began
