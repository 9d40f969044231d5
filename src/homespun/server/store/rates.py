"""How many reports came of the devices that were drawn, by task and hour of the day, and how many to draw therefore.

Counts only, faded. A device that still worked when its round had its goal is neither a report nor a loss, as long as it
hears of it: devices ask while they train, and send what they made. Who has not been heard of by the deadline is lost.
Neither is a straggler that is carried on, whose report says nothing about how many come in time; it is a loss of the
round in which it is lost.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from homespun.protocol.messages import ReportState
from homespun.protocol.round import RoundState
from homespun.protocol.selection import beside, cohort_for, evidence, faded
from homespun.protocol.tasks import TaskSpec
from homespun.server.store.database import Database
from homespun.server.store.schema import rates, receipts, rounds

_GOOD = (ReportState.ACKNOWLEDGED, ReportState.INCLUDED)
_SETTLED = (RoundState.COMMITTED, RoundState.SCRUBBED)


class Rates:
    """Named transactions about what became of those that were drawn."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tally(self, now: float) -> None:
        """Count what became of the cohorts of committed rounds whose deadline has passed."""
        query = select(rounds).where(
            rounds.c.is_tallied.is_(False),
            rounds.c.state.in_(_SETTLED),
            rounds.c.deadline_at <= now,
        )
        with self._database.read() as connection:
            if connection.execute(query.limit(1)).first() is None:
                return
        with self._database.write() as connection:
            for row in connection.execute(query).all():
                tally(connection, row, now)


def tally(connection: Connection, row: Row[Any], now: float) -> None:
    """Count what became of a round's cohort, once. `row`: of `rounds`.

    After who is carried on has left it, before the receipts of the others are made void.
    """
    query = (
        select(receipts.c.state, receipts.c.has_heard, receipts.c.is_carried, func.count())
        .where(receipts.c.round_id == row.round_id)
        .group_by(receipts.c.state, receipts.c.has_heard, receipts.c.is_carried)
    )
    reported = lost = 0
    had_time = row.closed_at is not None and row.closed_at < row.deadline_at
    for state, has_heard, is_carried, count in connection.execute(query):
        if state in _GOOD:
            reported += 0 if is_carried else count
        elif not (state == ReportState.LATE and has_heard and had_time):
            lost += count
    mine = (rates.c.task_id == row.task_id) & (rates.c.hour == _hour(row.selected_at))
    before = connection.execute(select(rates).where(mine)).first()
    if before is None:
        connection.execute(
            insert(rates).values(
                task_id=row.task_id,
                hour=_hour(row.selected_at),
                num_reported=reported,
                num_lost=lost,
                at=now,
            )
        )
    else:
        age_s = now - before.at
        connection.execute(
            update(rates)
            .where(mine)
            .values(
                num_reported=faded(before.num_reported, age_s) + reported,
                num_lost=faded(before.num_lost, age_s) + lost,
                at=now,
            )
        )
    connection.execute(
        update(rounds).where(rounds.c.round_id == row.round_id).values(is_tallied=True)
    )


def num_wanted(
    connection: Connection, task_id: str, spec: TaskSpec, num_carried: int, now: float
) -> int:
    """Devices to draw for a round of this task that opens now, with so many carried into it."""
    if spec.over_selection is not None:
        return beside(spec.cohort_size, num_carried)
    rows = connection.execute(select(rates).where(rates.c.task_id == task_id))
    by_hour = {
        row.hour: (faded(row.num_reported, now - row.at), faded(row.num_lost, now - row.at))
        for row in rows
    }
    seen = evidence(by_hour, now % 86_400.0 / 3600.0)
    return beside(cohort_for(spec.goal, *seen, limit=spec.cohort_size), num_carried)


def _hour(at: float) -> int:
    """Of the day, UTC."""
    return int(at % 86_400.0 // 3600.0)
