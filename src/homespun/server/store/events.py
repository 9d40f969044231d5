"""Events: what happened, in order, for people and dashboards. Written in the transaction that made it so."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select

from homespun.protocol.views import Event
from homespun.server.store.database import Database
from homespun.server.store.schema import events


def add_event(
    connection: Connection,
    kind: str,
    now: float,
    text: str = "",
    *,
    task_id: str | None = None,
    round_number: int | None = None,
    attempt: int | None = None,
) -> None:
    """`text` speaks of cohorts, never of one device."""
    connection.execute(
        insert(events).values(
            at=now,
            kind=kind,
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            text=text,
        )
    )


class Events:
    """Reading the log of events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def after(self, sequence: int, limit: int) -> list[Event]:
        """The first `limit` events behind `sequence`."""
        query = select(events).where(events.c.sequence > sequence).order_by(events.c.sequence)
        with self._database.read() as connection:
            return [Event(**row) for row in connection.execute(query.limit(limit)).mappings()]
