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
from homespun.device.models import CHECKPOINT_FILE, PLAN_FILE, Models, open_models
from homespun.device.status import IN_SESSION, read_status
from homespun.protocol.session import Session, SessionState

LOOKS = 3
BETWEEN_S = 0.2
_RECORD = re.compile(rb'"session_id":"([^"]*)"')
_NOT_OVER = {
    "the assignment of a session that is over": """
        SELECT session_id FROM participation
        WHERE assignment_id IS NOT NULL AND outcome <> 'acknowledged' AND session_id <> ?""",
    "something else than a hash of a session": """
        SELECT session_id FROM participation WHERE session_id <> ?
        AND plan_hash || coalesce(digest, '') || coalesce(checkpoint, '') GLOB '*[^0-9a-f]*'""",
}
"""What it means that one of these has an answer for sessions other than the one under way."""


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
        home, kept = self._home, self._session.session_id
        files = [path for path in home.root.rglob("*") if path.is_symlink() or not path.is_dir()]
        aside = {path for path in files if kept and home.work / kept in path.parents}
        for path in left_over(home, self._models, keep=kept):
            self._find(path, "a file that the device was writing, using or serving before")
        for path in sorted(set(files) - aside):
            if not self._is_known(path) and not self._is_found(path):
                self._find(path, "not a file of the device")
        for path in home.databases:
            if path.exists():
                try:
                    self._database(path)
                except sqlite3.Error as error:
                    self._find(path, f"it cannot be read: {error}")
        return Proof(
            num_files=len(files) - len(aside),
            size_bytes=sum(_size(path) for path in files if path not in aside),
            num_rows=self._num_rows,
            num_free_pages=self._num_free_pages,
            under_way=kept if self._session.state in IN_SESSION else "",
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
        beside = (each for database in home.databases for each in _companions(database))
        if path in (*home.written_files, home.log_file, *home.databases, *beside):
            return True
        place = path.relative_to(home.root).parts
        return place[0] == home.models.name and place[3:] in ((PLAN_FILE,), (CHECKPOINT_FILE,))

    # --- databases ----------------------------------------------------------------------------------------

    def _database(self, path: Path) -> None:
        num_free, is_clean = free_pages(path)
        self._num_free_pages += num_free
        if not is_clean:
            self._find(path, "unused pages hold what was deleted")
        is_journal = path == self._home.journal_file
        with _reading(path, is_held=is_journal and self._is_running) as db:
            tables = _tables(db)
            for table in tables:
                self._num_rows += db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
            if is_journal:
                self._journal(db, tables)

    def _journal(self, db: sqlite3.Connection, tables: dict[str, set[str]]) -> None:
        """What the schema has and nothing else; and no record of another session, in any copy of a page."""
        path, under_way = self._home.journal_file, self._session.session_id
        with closing(sqlite3.connect(":memory:")) as empty:
            empty.executescript(SCHEMA)
            expected = _tables(empty)
        for table, columns in tables.items():
            if columns - expected.get(table, set()):
                self._find(path, f"a table that the journal does not have: {table}")
        for what, query in _NOT_OVER.items() if "participation" in tables else ():
            for (session,) in db.execute(query, (under_way,)):
                self._find(path, f"{what}: {session}")
        for file in (path, *_companions(path)):
            data = file.read_bytes() if file.exists() else b""
            for session in set(_RECORD.findall(data)) - {under_way.encode()}:
                self._find(file, f"a record of session {session.decode('ascii', 'replace')}")


def free_pages(database: Path) -> tuple[int, bool]:
    """Pages on a database's free list, and whether nothing is left on them (SQLite's file format, section 1.5)."""
    with database.open("rb") as file:
        header = file.read(100)
        size_bytes = int.from_bytes(header[16:18], "big")
        size_bytes = 65_536 if size_bytes == 1 else size_bytes

        num_pages = database.stat().st_size // size_bytes if size_bytes else 0

        def page(number: int) -> bytes:
            """Empty where a damaged list leads out of the file."""
            if not 0 < number <= num_pages:
                return b""
            file.seek((number - 1) * size_bytes)
            return file.read(size_bytes)

        trunk, num_free, is_clean = _number(header, 8), 0, True
        while num_free < num_pages and (found := page(trunk)):
            places = range(2, min(2 + _number(found, 1), size_bytes // 4))
            leaves = [_number(found, place) for place in places]
            is_clean &= not any(any(page(leaf)) for leaf in leaves)
            num_free += 1 + len(leaves)
            trunk = _number(found, 0)
    return num_free, is_clean


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[4 * place : 4 * place + 4], "big")


def _tables(db: sqlite3.Connection) -> dict[str, set[str]]:
    """Tables and their columns."""
    names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return {
        name: {row[1] for row in db.execute(f'PRAGMA table_info("{name}")')} for (name,) in names
    }


def _companions(path: Path) -> tuple[Path, ...]:
    """What SQLite puts beside a database."""
    return tuple(Path(f"{path}{end}") for end in ("-journal", "-wal", "-shm"))


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


def _size(path: Path) -> int:
    """0 for a file that has gone meanwhile."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
