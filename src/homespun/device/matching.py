"""Which examples match comparisons, remembered.

What is compared is inside what is sealed, so a query with comparisons must open every example of its collection and
side. A device that checks in every few seconds asks the same each time. So the ids that matched stay in memory, in a
temporary table that SQL can join, and asking again opens only what was added since. Ids are never used twice and
examples never change, so nothing that is remembered can become wrong.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from itertools import count
from typing import Any

import msgspec

from homespun.protocol.criteria import matches
from homespun.protocol.messages import ExampleQuery

MATCHED = "id IN (SELECT id FROM matched WHERE query = ?)"
"""SQL for the examples that matched; its value is what `update` gives."""
REMEMBERED = 16
"""Queries; who asks for more of them pays for opening all examples anew."""
_CHUNK = 1_000
"""Examples that are in memory at once while they are compared."""

Open = Callable[[str, float, bool, bytes], dict[str, Any]]
"""An example from its collection, when it was added, whether it is held out, and its sealed bytes."""


class Matches:
    """Of the examples behind `db`, which `open_` opens."""

    def __init__(self, db: sqlite3.Connection, open_: Open) -> None:
        self._db, self._open = db, open_
        self._known: dict[bytes, tuple[int, int]] = {}  # query: its number, the last id looked at
        self._numbers = count()
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("CREATE TEMP TABLE matched (query, id, PRIMARY KEY (query, id)) WITHOUT ROWID")

    def update(self, query: ExampleQuery, held_out: bool) -> int:
        """Look at what was added to one side since the last time; the query's number in `matched`."""
        key = msgspec.json.encode((query.collection, query.where, held_out))
        if key not in self._known:
            self._known[key] = (next(self._numbers), 0)
        number, last = self._known.pop(key)
        while rows := self._after(last, query.collection, held_out):
            found = [
                (number, row)
                for row, added_at, sealed in rows
                if matches(query.where, self._open(query.collection, added_at, held_out, sealed))
            ]
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany("INSERT INTO matched VALUES (?, ?)", found)
            last = rows[-1][0]
        self._known[key] = (number, last)
        if len(self._known) > REMEMBERED:
            oldest, _ = self._known.pop(next(iter(self._known)))
            self._db.execute("DELETE FROM matched WHERE query = ?", (oldest,))
        return number

    def _after(self, last: int, collection: str, held_out: bool) -> list[tuple[int, float, bytes]]:
        return self._db.execute(
            "SELECT id, added_at, sealed FROM example"
            " WHERE collection = ? AND held_out = ? AND id > ? ORDER BY id LIMIT ?",
            (collection, held_out, last, _CHUNK),
        ).fetchall()
