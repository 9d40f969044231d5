"""Pacing: how many check-ins were promised to each minute, per population, so that a restart is no cold start."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import delete, insert, select

from homespun.protocol.messages import encode
from homespun.protocol.pacing import Pace, PaceRecord
from homespun.server.store.database import Database
from homespun.server.store.schema import pacing, populations


class Pacing:
    """Named transactions about the paces of populations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> dict[str, Pace]:
        """The paces as they were saved last."""
        with self._database.read() as connection:
            return {
                row.population: Pace.restored(msgspec.json.decode(row.state, type=PaceRecord))
                for row in connection.execute(select(pacing))
            }

    def save(self, records: Mapping[str, PaceRecord]) -> None:
        """Replace what was saved; populations that do not exist are left out."""
        with self._database.write() as connection:
            known = set(connection.scalars(select(populations.c.name)))
            rows = [
                {"population": name, "state": encode(record).decode()}
                for name, record in records.items()
                if name in known
            ]
            connection.execute(delete(pacing))
            if rows:
                connection.execute(insert(pacing), rows)
