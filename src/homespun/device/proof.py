"""Proof that nothing of past sessions is left: every file of the directory, every row, what databases keep beside rows.

It looks and changes nothing, also while another process runs the device: then the files of the session under way are
left out, and the journal, which that process holds for itself, is read without asking it. Files come and go
meanwhile, so only what several looks have found is left.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from homespun.clock import Clock
from homespun.device.cleaning import left_over
from homespun.device.home import Home, storage
from homespun.device.journal import SCHEMA
from homespun.device.models import CHECKPOINT_FILE, PLAN_FILE, POINTER_FILE, Models, open_models
from homespun.device.status import read_status
from homespun.protocol.messages import ReportState
from homespun.protocol.session import Session, SessionState

LOOKS = 3
BETWEEN_S = 0.2
COMPANIONS = ("-journal", "-wal", "-shm")
"""What SQLite puts beside a database."""
_RECORD = re.compile(rb'"session_id":"([^"]*)"')
_HASH = re.compile(r"[0-9a-f]{64}")
_IDLE = (
    SessionState.WAITING,
    SessionState.ELIGIBLE,
    SessionState.CHECKED_IN,
    SessionState.REJECTED,
)


class Left(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """What should not be there. `path`: below the device's directory."""

    path: str
    what: str


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and what was found. `num_free_pages`: pages of databases that hold nothing any more.

    `under_way`: the session whose files (`num_files_under_way`) were left out; empty: there is none.
    """

    num_files: int
    size_bytes: int
    num_rows: int
    num_free_pages: int
    under_way: str = ""
    num_files_under_way: int = 0
    left: tuple[Left, ...] = ()


def verify(home: Home, clock: Clock) -> Proof:
    """Look at everything. Raises `InvalidConfig` if this is no device's directory, `StorageFailure`."""
    models = open_models(home, home.settings())
    proof = _look(home, models)
    for _ in range(LOOKS - 1):
        if not proof.left:
            break
        clock.sleep(BETWEEN_S)
        before, proof = proof, _look(home, models)
        still = tuple(each for each in proof.left if each in before.left)
        proof = msgspec.structs.replace(proof, left=still)
    return proof


def _look(home: Home, models: Models) -> Proof:
    with storage(home.root):
        return _Look(home, models).proof()


class _Look:
    """One walk over the directory."""

    def __init__(self, home: Home, models: Models) -> None:
        self._home, self._models = home, models
        self._left: list[Left] = []
        self._is_running, self._session = _session(home)
        self._num_rows = self._num_free_pages = 0

    def proof(self) -> Proof:
        kept = self._session.session_id
        work = self._home.work / kept
        files = [path for path in self._home.root.rglob("*") if not _is_directory(path)]
        aside = [path for path in files if work in path.parents]
        for path in left_over(self._home, self._models, keep=kept):
            self._find(path, "a file that the device was writing, using or serving before")
        for path in sorted(set(files) - set(aside)):
            if not self._is_known(path) and not self._is_found(path):
                self._find(path, "not a file of the device")
        self._databases()
        return Proof(
            num_files=len(files) - len(aside),
            size_bytes=sum(_size(path) for path in files if path not in aside),
            num_rows=self._num_rows,
            num_free_pages=self._num_free_pages,
            under_way="" if self._session.state in _IDLE else kept,
            num_files_under_way=len(aside),
            left=tuple(sorted(set(self._left))),
        )

    def _find(self, path: Path, what: str) -> None:
        self._left.append(Left(path=path.relative_to(self._home.root).as_posix(), what=what))

    def _is_found(self, path: Path) -> bool:
        """Whether it lies in something that was found as a whole."""
        found = {self._home.root / each.path for each in self._left}
        return not found.isdisjoint((path, *path.parents))

    def _is_known(self, path: Path) -> bool:
        home = self._home
        if path.is_symlink():
            return False
        if path.parent == home.root:
            beside = (Path(f"{each}{end}") for each in home.databases for end in COMPANIONS)
            return path in (*home.written_files, *home.databases, *beside)
        place = path.relative_to(home.root).parts
        if place[0] != home.models.name:
            return False
        return place[2:] == (POINTER_FILE,) or place[3:] in ((PLAN_FILE,), (CHECKPOINT_FILE,))

    # --- databases ----------------------------------------------------------------------------------------

    def _databases(self) -> None:
        for path in self._home.databases:
            if path.exists():
                try:
                    self._raw(path)
                    self._rows(path)
                except sqlite3.Error as error:
                    self._find(path, f"it cannot be read: {error}")

    def _raw(self, path: Path) -> None:
        """What is beside the rows: pages that are not in use, and records of sessions in any copy of a page."""
        num_free, clean = free_pages(path.read_bytes())
        self._num_free_pages += num_free
        if not clean:
            self._find(path, "unused pages hold what was deleted")
        if path == self._home.journal_file:
            for file in (path, *(Path(f"{path}{end}") for end in COMPANIONS)):
                data = file.read_bytes() if file.exists() else b""
                sessions = {found.decode("ascii", "replace") for found in _RECORD.findall(data)}
                for session in sorted(sessions - {self._session.session_id}):
                    self._find(file, f"a record of session {session}")

    def _rows(self, path: Path) -> None:
        is_journal = path == self._home.journal_file
        with _reading(path, is_held=is_journal and self._is_running) as db:
            for (table,) in db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table'"
            ).fetchall():
                self._num_rows += db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
                if is_journal:
                    self._journal_table(db, table)

    def _journal_table(self, db: sqlite3.Connection, table: str) -> None:
        """What the schema has and nothing else; no bytes; ids of open receipts only; hashes."""
        path, expected = self._home.journal_file, _tables()
        cursor = db.execute(f'SELECT * FROM "{table}"')
        columns = [column for column, *_ in cursor.description]
        if set(columns) - expected.get(table, set()):
            self._find(path, f"a table that the journal does not have: {table}")
        for row in cursor:
            values = dict(zip(columns, row, strict=True))
            if table == "session":
                continue  # its record was looked for in the bytes of the file
            if any(isinstance(value, bytes) for value in row):
                self._find(path, f"bytes in {table}")
            if table == "participation":
                self._participation(values)

    def _participation(self, row: dict[str, object]) -> None:
        path, session = self._home.journal_file, row["session_id"]
        is_open = row["outcome"] == ReportState.ACKNOWLEDGED or session == self._session.session_id
        if row["assignment_id"] is not None and not is_open:
            self._find(path, f"the assignment of session {session}, which is over")
        for name in ("plan_hash", "digest", "checkpoint"):
            if row[name] is not None and not _HASH.fullmatch(str(row[name])):
                self._find(path, f"{name} of session {session} is not a hash")


def free_pages(database: bytes) -> tuple[int, bool]:
    """Pages on the free list of a database file, and whether nothing is left on them (SQLite file format, 1.5)."""
    if not database:
        return 0, True
    page_bytes = int.from_bytes(database[16:18], "big")
    page_bytes = 65_536 if page_bytes == 1 else page_bytes
    pages = [database[at : at + page_bytes] for at in range(0, len(database), page_bytes)]

    def number(data: bytes, place: int) -> int:
        return int.from_bytes(data[4 * place : 4 * place + 4], "big")

    trunk, seen, clean = number(database, 8), set[int](), True
    while 0 < trunk <= len(pages) and trunk not in seen:
        seen.add(trunk)
        page = pages[trunk - 1]
        places = range(2, page_bytes // 4)
        clean &= all(number(page, place) <= len(pages) for place in places)  # numbers of pages only
        for place in places[: number(page, 1)]:
            leaf = number(page, place)
            seen.add(leaf)
            clean &= not any(pages[leaf - 1]) if 0 < leaf <= len(pages) else False
        trunk = number(page, 0)
    return len(seen), clean


def _session(home: Home) -> tuple[bool, Session]:
    """Whether a process runs the device, and the session under way: as the process says, or as the journal has it."""
    status = read_status(home)
    nobody = Session(session_id="", population="", state=SessionState.WAITING, started_at=0.0)
    if not home.journal_file.exists():
        return False, nobody
    try:
        with _reading(home.journal_file, is_held=False) as db:
            has = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'session'").fetchone()
            row = db.execute("SELECT record FROM session").fetchone() if has else None
            return False, msgspec.json.decode(row[0], type=Session) if row else nobody
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
    except (sqlite3.DatabaseError, msgspec.MsgspecError):
        return False, nobody  # damaged: that is found when it is read
    if status is None or status.state not in list(SessionState):
        return True, nobody
    return True, msgspec.structs.replace(
        nobody, session_id=status.session_id, state=SessionState(status.state)
    )


@contextmanager
def _reading(path: Path, *, is_held: bool) -> Iterator[sqlite3.Connection]:
    """`is_held`: by a process that lets nobody in; then its last checkpoint is read, without locks.

    Without a log there is nothing but the file, and SQLite need not make one to read it.
    """
    has_log = Path(f"{path}-wal").exists()
    how = "immutable=1" if is_held or not has_log else "mode=ro"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=0.2)) as db:
        yield db


def _tables() -> dict[str, set[str]]:
    """Tables and columns of a journal."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        names = [
            row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        return {
            name: {row[1] for row in db.execute(f"PRAGMA table_info({name})")} for name in names
        }


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _size(path: Path) -> int:
    """0 for a file that has gone meanwhile."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
