"""The example store: what the app gives the device to learn from, and nothing else ever reads.

Every example is sealed with AES-GCM under a key that lies outside the database: delete the key and all is
forgotten. Old examples expire; each collection has caps, oldest dropped first. A salted hash of its content
puts an example among the held-out ones or not, once and for all, so that equal examples lie on one side
and what a model is tested with was never trained on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from homespun.device.home import Home, Settings, remove, storage
from homespun.device.sealing import Seal
from homespun.errors import InvalidExample
from homespun.rng import derive_seed, unit_interval
from homespun.tensors.codec import digest

DAY_S = 86_400.0
_CHECK = b"homespun-examples-v1"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS example (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    collection TEXT NOT NULL,
    added_at REAL NOT NULL,                -- Unix seconds
    held_out INTEGER NOT NULL,             -- 1: for evaluation only
    size_bytes INTEGER NOT NULL,           -- as plain MessagePack
    sealed BLOB NOT NULL                   -- nonce, AES-GCM of the MessagePack
);
CREATE INDEX IF NOT EXISTS example_order ON example (collection, held_out, id);
CREATE TABLE IF NOT EXISTS proof (sealed BLOB NOT NULL);  -- a known text: tells a wrong key at once
"""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Per collection: `max_age_s` from adding to expiry, most examples and bytes; and most bytes of one example."""

    max_age_s: float = 180 * DAY_S
    max_examples: int = 100_000
    max_bytes: int = 64 * 2**20
    max_example_bytes: int = 256 * 2**10


class ExampleStore:
    """The store in `path`, sealed with the key in `key_path` (made on first use).

    `salt` decides which examples are held out, a share of `held_out_share`. Raises `StorageFailure` for a
    database that is damaged or belongs to another key.
    """

    def __init__(
        self,
        path: Path,
        key_path: Path,
        salt: str,
        *,
        held_out_share: float = 0.2,
        limits: Limits | None = None,
    ) -> None:
        self._path, self._salt = path, salt
        self._share, self._limits = held_out_share, limits or Limits()
        if not key_path.exists():  # a new store, or the key was deleted: nothing readable is left
            _remove(path)
        self._key_path, self._seal = key_path, Seal(key_path)
        with storage(path):
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
            path.chmod(0o600)

    def _open(self) -> None:
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.executescript(_SCHEMA)
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            proof = self._db.execute("SELECT sealed FROM proof").fetchone()
            if proof is None:
                self._db.execute(
                    "INSERT INTO proof VALUES (?)", (self._seal.seal(_CHECK, b"proof"),)
                )
            else:
                self._seal.unseal(proof[0], b"proof", self._path)

    def add(self, example: Mapping[str, Any], now: float, collection: str = "default") -> None:
        """Keep one example: a mapping of field names to text, numbers, booleans, bytes or lists of them.

        Raises `InvalidExample`, which never repeats the example's content.
        """
        self.add_many([example], now, collection)

    def add_many(
        self, examples: Iterable[Mapping[str, Any]], now: float, collection: str = "default"
    ) -> int:
        """Keep several examples, all or none; how many they were."""
        rows = []
        for example in examples:
            plain = self._plain(example)
            held_out = unit_interval(self._salt, digest(plain)) < self._share
            bound = _bound(collection, now, held_out)
            rows.append((collection, now, held_out, len(plain), self._seal.seal(plain, bound)))
        with storage(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO example (collection, added_at, held_out, size_bytes, sealed)"
                " VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            self._drop(now, collection)
        return len(rows)

    def expire(self, now: float) -> None:
        """Drop what is too old, in every collection."""
        with storage(self._path):
            self._db.execute(
                "DELETE FROM example WHERE added_at < ?", (now - self._limits.max_age_s,)
            )

    def training(
        self, now: float, max_age_s: float | None = None, collection: str = "default"
    ) -> list[dict[str, Any]]:
        """The examples there were to train on at `now`, in order of arrival; never a held-out one."""
        return self._read(now, False, max_age_s, collection)

    def held_out(
        self, now: float, max_age_s: float | None = None, collection: str = "default"
    ) -> list[dict[str, Any]]:
        """The examples there were to evaluate on at `now`, in order of arrival; only held-out ones."""
        return self._read(now, True, max_age_s, collection)

    def count(
        self,
        now: float,
        held_out: bool | None = None,
        max_age_s: float | None = None,
        collection: str = "default",
    ) -> int:
        """Examples that `training` (`held_out` False), `held_out` (True) or both (None) would give."""
        sides = (0, 1) if held_out is None else (int(held_out), int(held_out))
        with storage(self._path):
            row = self._db.execute(
                "SELECT count(*) FROM example WHERE collection = ? AND held_out IN (?, ?) AND added_at >= ?",
                (collection, *sides, self._oldest(now, max_age_s)),
            ).fetchone()
        return int(row[0])

    def forget(self) -> None:
        """Delete everything, the key first; the store is closed."""
        with storage(self._key_path):
            self._key_path.unlink(missing_ok=True)
        self.close()
        _remove(self._path)

    def close(self) -> None:
        self._db.close()

    def _oldest(self, now: float, max_age_s: float | None) -> float:
        age = self._limits.max_age_s
        return now - (age if max_age_s is None else min(age, max_age_s))

    def _read(
        self, now: float, held_out: bool, max_age_s: float | None, collection: str
    ) -> list[dict[str, Any]]:
        with storage(self._path):
            rows = self._db.execute(
                "SELECT added_at, sealed FROM example"
                " WHERE collection = ?1 AND held_out = ?2 AND added_at >= ?3"
                # Not what came while the work was under way; still what a clock dated that was set back since.
                " AND NOT (added_at > ?4 AND added_at < ?4 + ?5) ORDER BY id",
                (collection, held_out, self._oldest(now, max_age_s), now, DAY_S),
            ).fetchall()
        return [
            msgspec.msgpack.decode(
                self._seal.unseal(sealed, _bound(collection, added_at, held_out), self._path)
            )
            for added_at, sealed in rows
        ]

    def _plain(self, example: object) -> bytes:
        if not isinstance(example, Mapping) or not example:
            raise InvalidExample(
                f"an example is {type(example).__name__}, expected a mapping with at least one field",
                hint='for text: {"text": "..."}',
            )
        for name, value in example.items():
            if not isinstance(name, str) or not _is_plain(value):
                raise InvalidExample(
                    f"field {name!r} of an example is {type(value).__name__}",
                    hint="store text, numbers, booleans, bytes, or lists of them",
                )
        try:
            plain = msgspec.msgpack.encode(dict(example), order="deterministic")
        except (OverflowError, ValueError, RecursionError) as error:
            raise InvalidExample(
                f"an example cannot be stored: {error}", hint="integers have at most 64 bits"
            ) from error
        if len(plain) > self._limits.max_example_bytes:
            raise InvalidExample(
                "an example is too large",
                hint="cut it into several examples",
                expected=f"<= {self._limits.max_example_bytes} bytes",
                got=len(plain),
            )
        return plain

    def _drop(self, now: float, collection: str) -> None:
        """Apply age and caps to one collection: the oldest go first."""
        self._db.execute("DELETE FROM example WHERE added_at < ?", (now - self._limits.max_age_s,))
        self._db.execute(
            "DELETE FROM example WHERE collection = ?1 AND id IN (SELECT id FROM ("
            " SELECT id, row_number() OVER newest AS place, sum(size_bytes) OVER newest AS total"
            " FROM example WHERE collection = ?1 WINDOW newest AS (ORDER BY id DESC)"
            ") WHERE place > ?2 OR total > ?3)",
            (collection, self._limits.max_examples, self._limits.max_bytes),
        )


def open_examples(home: Home, settings: Settings) -> ExampleStore:
    """The store of an enrolled device."""
    salt = str(derive_seed(settings.seed, "held-out"))
    return ExampleStore(home.examples_file, home.store_key_file, salt)


def _bound(collection: str, added_at: float, held_out: bool) -> bytes:
    """What a sealed example cannot be separated from: a row moved to the other side does not open."""
    return f"{collection}/{added_at!r}/{int(held_out)}".encode()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | bytes | bool | int | float)


def _remove(path: Path) -> None:
    for suffix in ("", "-journal"):
        remove(path.with_name(path.name + suffix))
