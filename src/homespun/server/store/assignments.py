"""Assignments: places given to devices, and taken along when a round ends without them.

A place is given in one round attempt, its *origin*, which says what the device trains from. While its report is
expected it may be *carried*: when the next attempt is planned, the place moves there with its receipt, in the same
transaction, so it always belongs to exactly one attempt and ends with it. A device has one place of a task at most.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from homespun.protocol.group import GroupState
from homespun.protocol.messages import ReportState
from homespun.protocol.round import may_carry
from homespun.protocol.tasks import TaskSpec
from homespun.server.store.reports import not_expected, receipt_id
from homespun.server.store.schema import assignments, groups, receipts, rounds

_AT_ONCE = 10_000  # values in one statement; databases allow about three times as many


def assign(
    connection: Connection, row: Row[Any], spec: TaskSpec, devices: Collection[str], now: float
) -> None:
    """Give each device a place in the round attempt `row`, its first, or one for which it left another."""
    if not devices:
        return
    _leave_others(connection, row.round_id, devices)
    tickets = {secrets.token_hex(16): device for device in devices}
    connection.execute(
        insert(assignments),
        [
            {
                "assignment_id": ticket,
                "round_id": row.round_id,
                "origin_id": row.round_id,
                "device_id": device,
                "expires_at": now + spec.assignment_s,
            }
            for ticket, device in tickets.items()
        ],
    )
    # Sorted by hash: the order of rows does not say which receipt is whose.
    connection.execute(
        insert(receipts),
        [
            {
                "receipt_id": hashed,
                "round_id": row.round_id,
                "state": ReportState.EXPECTED,
                "reason": "",
            }
            for hashed in sorted(receipt_id(ticket) for ticket in tickets)
        ],
    )


def _leave_others(connection: Connection, round_id: int, devices: Collection[str]) -> None:
    """A place that these devices still have here is one that they forgot: only one of theirs may ever count."""
    query = select(assignments.c.assignment_id).where(
        assignments.c.round_id == round_id,
        assignments.c.device_id.in_(devices),
    )
    forgotten = list(connection.scalars(query))
    connection.execute(
        update(receipts)
        .where(
            receipts.c.receipt_id.in_([receipt_id(ticket) for ticket in forgotten]),
            receipts.c.state == ReportState.EXPECTED,
        )
        .values(state=ReportState.VOID, reason="the device took part anew")
    )
    connection.execute(delete(assignments).where(assignments.c.assignment_id.in_(forgotten)))


def num_unbound(connection: Connection, round_id: int, now: float) -> int:
    """Devices that are waited for: their report is expected, their time not over, and they are in no group."""
    query = select(assignments.c.assignment_id).where(
        assignments.c.round_id == round_id,
        assignments.c.group_id.is_(None),
        assignments.c.expires_at > now,
    )
    return len(_expected(connection, list(connection.scalars(query))))


def num_places(connection: Connection, round_id: int, spec: TaskSpec, now: float) -> int:
    """Devices that an async round may still let in: who waits in a forming group keeps its place until it closes."""
    forming = select(func.coalesce(func.sum(groups.c.num_devices), 0)).where(
        groups.c.round_id == round_id, groups.c.state == GroupState.ADVERTISE_KEYS
    )
    waiting = int(connection.execute(forming).scalar_one())
    return max(0, spec.concurrency - waiting - num_unbound(connection, round_id, now))


def fall_behind(connection: Connection, row: Row[Any], spec: TaskSpec, now: float) -> int:
    """The fence of round `row` falls: who may not be carried into the next is LATE, the others leave their group.

    Returns how many are late.
    """
    late: list[str] = []
    kept: list[str] = []
    follows = row.number < spec.num_rounds
    for ticket, origin, expires_at in _placed(connection, row.round_id):
        stays = follows and expires_at > now
        carries = stays and may_carry(origin, row.number + 1, spec.max_staleness)
        (kept if carries else late).append(ticket)
    reason = "the round had closed"
    if spec.max_staleness and follows:
        reason += ", and it is too late for the next"
    for tickets in _slices(late):
        connection.execute(
            update(receipts)
            .where(receipts.c.receipt_id.in_([receipt_id(ticket) for ticket in tickets]))
            .values(state=ReportState.LATE, reason=reason)
        )
    for tickets in _slices(kept):
        connection.execute(
            update(assignments)
            .where(assignments.c.assignment_id.in_(tickets))
            .values(group_id=None)
        )
    return len(late)


def carry(connection: Connection, row: Row[Any], spec: TaskSpec, target_id: int) -> int:
    """Move who is still expected from round attempt `row`, which ends, to the one that was planned after it.

    Returns how many.
    """
    number = connection.execute(
        select(rounds.c.number).where(rounds.c.round_id == target_id)
    ).scalar_one()
    moving = [
        ticket
        for ticket, origin, _ in _placed(connection, row.round_id)
        if may_carry(origin, number, spec.max_staleness)
    ]
    for tickets in _slices(moving):
        connection.execute(
            update(assignments)
            .where(assignments.c.assignment_id.in_(tickets))
            .values(round_id=target_id, group_id=None)
        )
        connection.execute(
            update(receipts)
            .where(receipts.c.receipt_id.in_([receipt_id(ticket) for ticket in tickets]))
            .values(round_id=target_id, is_carried=True)
        )
    connection.execute(
        update(rounds).where(rounds.c.round_id == target_id).values(num_carried=len(moving))
    )
    return len(moving)


def _placed(connection: Connection, round_id: int) -> list[tuple[str, int, float]]:
    """(assignment, number of the round that it was given in, when its time is over) of all expected reports."""
    query = (
        select(assignments.c.assignment_id, rounds.c.number, assignments.c.expires_at)
        .join(rounds, rounds.c.round_id == assignments.c.origin_id)
        .where(assignments.c.round_id == round_id)
    )
    rows = [tuple(row) for row in connection.execute(query)]
    expected = _expected(connection, [row[0] for row in rows])
    return [row for row in rows if row[0] in expected]


def _expected(connection: Connection, tickets: list[str]) -> set[str]:
    hashed = {receipt_id(ticket): ticket for ticket in tickets}
    return set(tickets) - {hashed[settled] for settled in not_expected(connection, hashed)}


def _slices(tickets: list[str]) -> list[list[str]]:
    return [tickets[start : start + _AT_ONCE] for start in range(0, len(tickets), _AT_ONCE)]
