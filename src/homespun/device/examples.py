"""The example store: what the app gives the device to learn from, and nothing else ever reads.

Every example is sealed with AES-GCM under a key that lies outside the database: delete the key and all is
forgotten. Old examples expire; each collection has caps, oldest dropped first. A salted hash of its content
puts an example among the held-out ones or not, once and for all, so that equal examples lie on one side
and what a model is tested with was never trained on.

An app may declare fields of a collection, with their types; only those can a task's criteria compare
(`protocol.criteria`, `device.matching`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from homespun.device.home import Home, Settings, remove, storage
from homespun.device.matching import MATCHED, Matches
from homespun.device.sealing import Seal, destroy_key
from homespun.errors import InvalidConfig, InvalidExample
from homespun.protocol.criteria import Fields, FieldType, is_of, undecided
from homespun.protocol.messages import ExampleQuery, FieldName, Name
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
CREATE TABLE IF NOT EXISTS collection (name TEXT PRIMARY KEY, fields TEXT NOT NULL);  -- declared ones, as JSON
INSERT OR IGNORE INTO collection VALUES ('default', '{}');
CREATE TABLE IF NOT EXISTS proof (sealed BLOB NOT NULL);  -- a known text: tells a wrong key at once
"""
_ANY = ExampleQuery()
_CHUNK = 1_000
"""Examples that `stored` has in memory at once."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Per collection: `max_age_s` from adding to expiry, most examples and bytes; and most bytes of one example."""

    max_age_s: float = 180 * DAY_S
    max_examples: int = 100_000
    max_bytes: int = 64 * 2**20
    max_example_bytes: int = 256 * 2**10


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """An example as it lies in the store."""

    id: int
    collection: str
    added_at: float
    held_out: bool
    example: dict[str, Any]


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection holds: how many, of which held out, their size as plain MessagePack, and from when."""

    name: str
    fields: dict[str, FieldType]
    num_examples: int
    num_held_out: int
    size_bytes: int
    oldest_at: float | None
    newest_at: float | None


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
            forget(path, key_path)
        self._key_path, self._seal = key_path, Seal(key_path)
        with storage(path):
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
            path.chmod(0o600)
            self._matches = Matches(self._db, self._open_example)

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

    def declare(self, fields: Mapping[str, str], collection: str = "default") -> None:
        """Say which fields the examples of a collection have, by type: text, integer, number or boolean.

        A task's criteria can compare these and no others. It replaces what was declared before, and binds
        what is added from now on. Raises `InvalidConfig`, and `InvalidExample` if the store holds an example whose
        field is of another type.
        """
        try:
            name = msgspec.convert(collection, Name)
            declared = msgspec.convert(dict(fields), dict[FieldName, FieldType])
        except msgspec.ValidationError as error:
            raise InvalidConfig(
                f"the fields of {collection!r} cannot be declared: {error}",
                hint="fields are plain names, their types " + ", ".join(FieldType),
            ) from error
        if declared == self._fields(name):
            return
        with storage(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for stored in self.stored(name):
                _check_fields(stored.example, declared)
            self._db.execute(
                "INSERT OR REPLACE INTO collection VALUES (?, ?)",
                (name, msgspec.json.encode(declared).decode()),
            )

    def add(self, example: Mapping[str, Any], now: float, collection: str = "default") -> None:
        """Keep one example: a mapping of field names to text, numbers, booleans, bytes or lists of them.

        Raises `InvalidExample`, which never repeats the example's content.
        """
        self.add_many([example], now, collection)

    def add_many(
        self, examples: Iterable[Mapping[str, Any]], now: float, collection: str = "default"
    ) -> int:
        """Keep several examples, all or none; how many they were."""
        rows, fields = [], self.declared(collection)
        for example in examples:
            plain = self._plain(example)
            _check_fields(example, fields)
            held_out = unit_interval(self._salt, digest(plain)) < self._share
            bound = _bound(collection, now, held_out)
            rows.append((collection, now, held_out, len(plain), self._seal.seal(plain, bound)))
        with storage(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT OR IGNORE INTO collection VALUES (?, '{}')", (collection,))
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

    def training(self, now: float, query: ExampleQuery = _ANY) -> list[dict[str, Any]]:
        """The examples of `query` there were to train on at `now`, in order of arrival; never a held-out one."""
        return self._read(now, False, query)

    def held_out(self, now: float, query: ExampleQuery = _ANY) -> list[dict[str, Any]]:
        """The examples of `query` there were to evaluate on at `now`, in order of arrival; only held-out ones."""
        return self._read(now, True, query)

    def count(self, now: float, held_out: bool | None = None, query: ExampleQuery = _ANY) -> int:
        """Examples that `training` (`held_out` False), `held_out` (True) or both (None) would give.

        Without comparisons this is one count of SQLite; with them see `device.matching`.
        """
        sides = (False, True) if held_out is None else (held_out,)
        return sum(self._count(now, side, query) for side in sides)

    def undecided(self, query: ExampleQuery) -> str:
        """Why it is unknown which examples match `query`; empty if it is known."""
        return undecided(query, self._fields(query.collection))

    def declared(self, collection: str = "default") -> Fields:
        """The fields that were declared; none for a collection that does not exist."""
        return self._fields(collection) or {}

    def collections(self) -> list[Collection]:
        """What the store holds, by collection."""
        with storage(self._path):
            rows = self._db.execute(
                "SELECT name, fields, count(id), coalesce(sum(held_out), 0), coalesce(sum(size_bytes), 0),"
                " min(added_at), max(added_at) FROM collection LEFT JOIN example ON collection = name"
                " GROUP BY name ORDER BY name"
            ).fetchall()
        return [
            Collection(
                name=row[0],
                fields=msgspec.json.decode(row[1], type=dict[str, FieldType]),
                num_examples=row[2],
                num_held_out=row[3],
                size_bytes=row[4],
                oldest_at=row[5],
                newest_at=row[6],
            )
            for row in rows
        ]

    def stored(self, collection: str | None = None) -> Iterator[Stored]:
        """Every example, opened, newest first; of one collection, or of all."""
        last = 2**63 - 1
        while True:
            with storage(self._path):
                rows = self._db.execute(
                    "SELECT id, collection, added_at, held_out, sealed FROM example"
                    " WHERE id < ? AND collection = coalesce(?, collection) ORDER BY id DESC LIMIT ?",
                    (last, collection, _CHUNK),
                ).fetchall()
            for last, name, added_at, held_out, sealed in rows:
                yield Stored(
                    id=last,
                    collection=name,
                    added_at=added_at,
                    held_out=bool(held_out),
                    example=self._open_example(name, added_at, bool(held_out), sealed),
                )
            if len(rows) < _CHUNK:
                return

    def delete(
        self,
        *,
        collection: str | None = None,
        before: float | None = None,
        ids: Iterable[int] | None = None,
    ) -> int:
        """Delete the examples for which all that is given holds (nothing: every one); how many they were."""
        chosen = None if ids is None else msgspec.json.encode(sorted(set(ids))).decode()
        with storage(self._path):
            return self._db.execute(
                "DELETE FROM example WHERE collection = coalesce(?1, collection)"
                " AND added_at < coalesce(?2, 1e300)"
                " AND (?3 IS NULL OR id IN (SELECT value FROM json_each(?3)))",
                (collection, before, chosen),
            ).rowcount

    def forget(self) -> None:
        """Delete everything, the key first; the store is closed."""
        self.close()
        forget(self._path, self._key_path)

    def close(self) -> None:
        self._db.close()

    def _oldest(self, now: float, max_age_s: float | None) -> float:
        age = self._limits.max_age_s
        return now - (age if max_age_s is None else min(age, max_age_s))

    def _fields(self, collection: str) -> Fields | None:
        with storage(self._path):
            row = self._db.execute(
                "SELECT fields FROM collection WHERE name = ?", (collection,)
            ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=dict[str, FieldType])

    def _count(self, now: float, held_out: bool, query: ExampleQuery) -> int:
        condition, values = self._condition(now, held_out, query)
        with storage(self._path):
            row = self._db.execute(f"SELECT count(*) FROM example WHERE {condition}", values)
            return int(row.fetchone()[0])

    def _read(self, now: float, held_out: bool, query: ExampleQuery) -> list[dict[str, Any]]:
        condition, values = self._condition(now, held_out, query)
        with storage(self._path):
            rows = self._db.execute(
                f"SELECT added_at, sealed FROM example WHERE {condition} ORDER BY id", values
            ).fetchall()
        return [
            self._open_example(query.collection, added_at, held_out, sealed)
            for added_at, sealed in rows
        ]

    def _condition(
        self, now: float, held_out: bool, query: ExampleQuery
    ) -> tuple[str, tuple[object, ...]]:
        """The examples of one side that match `query`, as a condition of SQL and its values."""
        # Not what came while work with them was under way; still what a clock dated that was set back since.
        condition = "collection = ? AND held_out = ? AND added_at >= ? AND NOT (added_at > ? AND added_at < ?)"
        oldest = self._oldest(now, query.max_age_s)
        values = (query.collection, held_out, oldest, now, now + DAY_S)
        if not query.where:
            return condition, values
        with storage(self._path):
            number = self._matches.update(query, held_out)
        return f"{condition} AND {MATCHED}", (*values, number)

    def _open_example(
        self, collection: str, added_at: float, held_out: bool, sealed: bytes
    ) -> dict[str, Any]:
        bound = _bound(collection, added_at, held_out)
        found: dict[str, Any] = msgspec.msgpack.decode(self._seal.unseal(sealed, bound, self._path))
        return found

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


def forget(path: Path, key_path: Path) -> None:
    """Delete a store that nobody has open, the key first: from then on the rest is noise."""
    destroy_key(key_path)
    for suffix in ("", "-journal"):
        remove(path.with_name(path.name + suffix))


def _bound(collection: str, added_at: float, held_out: bool) -> bytes:
    """What a sealed example cannot be separated from: a row moved to the other side does not open."""
    return f"{collection}/{added_at!r}/{int(held_out)}".encode()


def _check_fields(example: Mapping[str, Any], fields: Fields) -> None:
    for name, kind in fields.items():
        if name in example and not is_of(example[name], kind):
            raise InvalidExample(
                f"field {name!r} of an example is {type(example[name]).__name__}",
                hint=f"it is declared to be {kind}; leave it out where it has no value",
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | bytes | bool | int | float)
