"""Claims: devices that gather for a draw, or for an async task are let in as they come, and what became of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from homespun.protocol.messages import ReportState
from homespun.protocol.round import RoundState, pool_ready
from homespun.protocol.tasks import TaskSpec
from homespun.server.store.assignments import assign, num_places
from homespun.server.store.database import Database
from homespun.server.store.records import ClaimAnswer, Drawn, Gathered, TurnedAway, decode_spec
from homespun.server.store.reports import receipt_id
from homespun.server.store.rounds import ROUND_AND_TASK, num_waiting
from homespun.server.store.schema import assignments, claims, receipts, rounds


class Claims:
    """Named transactions of a device that wants to take part in a round attempt."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self,
        task_id: str,
        number: int,
        attempt: int,
        device_id: str,
        now: float,
        waits_until: float,
    ) -> ClaimAnswer:
        """Ask to take part; asking again refreshes the claim, which lapses at `waits_until`.

        An async round that runs lets the device in at once, first come first served, if it has a place.
        """
        with self._database.write() as connection:
            row = _find(connection, task_id, number, attempt)
            if row is not None and row.state == RoundState.RUNNING:
                spec = decode_spec(row.task_spec)
                if spec.is_async:
                    return _admit(connection, row, spec, device_id, now)
            if row is None or row.state != RoundState.OPEN:
                return _answer(connection, row, device_id)
            mine = (claims.c.round_id == row.round_id) & (claims.c.device_id == device_id)
            refresh = update(claims).where(mine).values(expires_at=waits_until)
            is_new = connection.execute(refresh).rowcount == 0
            if is_new:
                connection.execute(
                    insert(claims).values(
                        round_id=row.round_id, device_id=device_id, expires_at=waits_until
                    )
                )
            spec = decode_spec(row.task_spec)
            waiting = num_waiting(connection, row.round_id, now)
            over = now >= row.select_at
            if over and is_new and waiting == 1:  # those that meet now are all to have a chance
                over = spec.selection_s == 0
                connection.execute(
                    update(rounds)
                    .where(rounds.c.round_id == row.round_id)
                    .values(select_at=now + spec.selection_s)
                )
            ready = pool_ready(
                waiting, spec.pool_size(row.num_wanted), spec.minimum, window_over=over
            )
            return Gathered(ready, is_new)

    def answer(self, task_id: str, number: int, attempt: int, device_id: str) -> ClaimAnswer:
        """What became of a claim, without asking again."""
        with self._database.read() as connection:
            return _answer(connection, _find(connection, task_id, number, attempt), device_id)


def _find(connection: Connection, task_id: str, number: int, attempt: int) -> Row[Any] | None:
    query = ROUND_AND_TASK.where(
        rounds.c.task_id == task_id, rounds.c.number == number, rounds.c.attempt == attempt
    )
    return connection.execute(query).first()


def _answer(connection: Connection, row: Row[Any] | None, device_id: str) -> ClaimAnswer:
    if row is None or row.state == RoundState.PLANNED:
        return TurnedAway("unknown_round")
    if row.state == RoundState.OPEN:
        return Gathered(due=False)
    known = connection.execute(
        select(assignments.c.assignment_id, assignments.c.expires_at).where(
            assignments.c.origin_id == row.round_id, assignments.c.device_id == device_id
        )
    ).first()
    if known is None and row.state != RoundState.RUNNING:
        return TurnedAway("round_closed")
    if known is None:
        claimed = select(claims.c.device_id).where(
            claims.c.round_id == row.round_id, claims.c.device_id == device_id
        )
        gathered = connection.execute(claimed).first() is not None
        return TurnedAway("not_drawn" if gathered else "round_closed")
    state = connection.execute(
        select(receipts.c.state).where(receipts.c.receipt_id == receipt_id(known.assignment_id))
    ).scalar()
    if state not in (ReportState.EXPECTED, ReportState.ACKNOWLEDGED):
        return TurnedAway("round_closed")
    return Drawn(known.assignment_id, row.base, known.expires_at)


def _admit(
    connection: Connection, row: Row[Any], spec: TaskSpec, device_id: str, now: float
) -> ClaimAnswer:
    """A place in an async round: the one that the device has, or a new one while there are any."""
    locked = select(rounds.c.round_id).where(rounds.c.round_id == row.round_id)
    connection.execute(locked.with_for_update())  # of two that see the last place one gets it
    answer = _answer(connection, row, device_id)
    if isinstance(answer, Drawn):
        return answer
    bound = select(assignments.c.assignment_id).where(
        assignments.c.round_id == row.round_id,
        assignments.c.device_id == device_id,
        assignments.c.group_id.is_not(None),
    )
    if connection.execute(bound).first() is not None:
        return TurnedAway("round_closed")  # its earlier report is on the way into this round's sum
    if num_places(connection, row.round_id, spec, now) == 0:
        return TurnedAway("full")
    assign(connection, row, spec, (device_id,), now)
    connection.execute(
        update(rounds)
        .where(rounds.c.round_id == row.round_id)
        .values(num_assigned=rounds.c.num_assigned + 1)
    )
    given = _answer(connection, row, device_id)
    assert isinstance(given, Drawn)
    return replace(given, is_new=True)
