"""The engine: how a transaction begins and ends. The only file that knows which database it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DatabaseError, IntegrityError

from homespun.errors import StorageFailure

_READ = "homespun_read"


class Database:
    """`read` and `write` transactions; a write is durable when its block ends."""

    def __init__(self, url: str) -> None:
        sqlite = url.startswith("sqlite")
        options: dict[str, Any] = {"pool_size": 16, "max_overflow": 32}
        self._engine = create_engine(url, **options)
        # SQLite has one writer at a time: a lock hands over at once, where the busy handler would sleep.
        self._turn: AbstractContextManager[Any] = threading.Lock() if sqlite else nullcontext()
        if sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view. Raises `StorageFailure`."""
        with _named_failures(), self._engine.connect() as connection:
            yield connection.execution_options(**{_READ: True})

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """All of the block or nothing of it. Raises `StorageFailure`."""
        with _named_failures(), self._turn, self._engine.begin() as connection:
            yield connection

    def upgrade(self) -> None:
        """Create the tables, or bring those of an older version up to date.

        Raises `StorageFailure` for those of a newer version, and leaves them as they are.
        """
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self.write() as connection:
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
        except CommandError as error:  # there is no such revision among ours
            raise StorageFailure(
                "the database belongs to a newer version of Homespun",
                hint="run that version again, or restore a backup from before it",
            ) from error

    def forget(self) -> None:
        """What was deleted is gone from the files as well: SQLite keeps it in its log until that is written anew."""
        if self._engine.dialect.name == "sqlite":
            with self._turn, closing(self._engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        self._engine.dispose()


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",  # an acknowledged report survives a power cut
        "foreign_keys = ON",
        "secure_delete = ON",  # what is deleted is overwritten, not only forgotten
        "busy_timeout = 10000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reading = connection.get_execution_options().get(_READ)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def _named_failures() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # a mistake of ours, not of the medium
    except DatabaseError as error:
        raise StorageFailure(
            f"the database failed: {error.orig}",  # without the statement and its values
            hint="check the disk's free space, its permissions and its health",
        ) from error
