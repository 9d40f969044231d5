"""Reports: which are expected, which are in the sum, what became of each.

The row of a contribution and the snapshot of the sum that holds it change in one transaction (`record`), so a
contribution that was acknowledged is in the sum exactly once, whenever the server dies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from sqlalchemy import Connection, bindparam, func, select, update

from homespun.errors import NotAllowed, NotFound
from homespun.protocol.messages import Receipt, ReportState
from homespun.protocol.round import RoundState
from homespun.server.store.database import Database
from homespun.server.store.records import (
    Expectation,
    Recorded,
    Refused,
    decode_spec,
    or_never,
    task_record,
)
from homespun.server.store.schema import assignments, receipts, rounds, tasks
from homespun.types import Hash

_CONTEXT = b"homespun-receipt-v1\n"
_ORIGIN = rounds.alias("origin")
_EXPECTATION = (  # written once: every request about a report asks it
    select(
        receipts,
        rounds.c.number,
        rounds.c.attempt,
        rounds.c.base,
        rounds.c.state.label("round_state"),
        rounds.c.deadline_at,
        rounds.c.checkpoint,
        assignments.c.device_id,
        assignments.c.group_id,
        assignments.c.expires_at,
        _ORIGIN.c.round_id.label("origin_id"),
        _ORIGIN.c.number.label("origin"),
        *(column.label(f"task_{column.name}") for column in tasks.c),
    )
    .join(rounds, rounds.c.round_id == receipts.c.round_id)
    .join(tasks, tasks.c.task_id == rounds.c.task_id)
    .outerjoin(assignments, assignments.c.assignment_id == bindparam("ticket"))
    .outerjoin(_ORIGIN, _ORIGIN.c.round_id == assignments.c.origin_id)
    .where(receipts.c.receipt_id == bindparam("receipt"))
)
_AT_ONCE = 10_000  # values in one statement; databases allow about three times as many


def receipt_id(assignment_id: str) -> Hash:
    """What remains of an assignment id when the round is over."""
    return hashlib.sha256(_CONTEXT + assignment_id.encode()).hexdigest()


def not_expected(connection: Connection, receipt_ids: Collection[Hash]) -> frozenset[Hash]:
    """Those of the receipts that are settled already."""
    settled, asked = set(receipt_ids), list(receipt_ids)
    for start in range(0, len(asked), _AT_ONCE):
        expected = select(receipts.c.receipt_id).where(
            receipts.c.receipt_id.in_(asked[start : start + _AT_ONCE]),
            receipts.c.state == ReportState.EXPECTED,
        )
        settled -= set(connection.scalars(expected))
    return frozenset(settled)


def acknowledge(connection: Connection, digests: Mapping[Hash, Hash]) -> None:
    """EXPECTED -> ACKNOWLEDGED. `digests`: receipt id -> digest of the report's body."""
    connection.execute(
        update(receipts)
        .where(receipts.c.receipt_id == bindparam("id"))
        .values(state=ReportState.ACKNOWLEDGED, digest=bindparam("body")),
        [{"id": receipt, "body": digest} for receipt, digest in digests.items()],
    )


def num_expected(connection: Connection, round_id: int) -> int:
    """Devices of a round that have neither reported nor given up."""
    query = select(func.count()).where(
        receipts.c.round_id == round_id, receipts.c.state == ReportState.EXPECTED
    )
    return connection.execute(query).scalar_one()


class Reports:
    """Named transactions about reports."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def expectation(self, assignment_id: str, device_id: str) -> Expectation:
        """What is known of an assignment.

        Raises `NotFound`, or `NotAllowed` while it is known to be another device's. After the round nothing says
        whose it was; whoever knows the id may ask.
        """
        with self._database.read() as connection:
            names = {"ticket": assignment_id, "receipt": receipt_id(assignment_id)}
            row = connection.execute(_EXPECTATION, names).first()
        if row is None:
            raise NotFound("there is no such assignment", assignment_id=assignment_id[:64])
        if row.device_id not in (None, device_id):
            raise NotAllowed("this assignment is another device's")
        state = ReportState(row.state)
        return Expectation(
            round_id=row.round_id,
            task=task_record(row, "task_"),
            number=row.number,
            attempt=row.attempt,
            base=row.base,
            state=RoundState(row.round_state),
            deadline_at=or_never(row.deadline_at),
            expires_at=or_never(row.expires_at),
            origin=row.number if row.origin is None else row.origin,
            is_carried=row.origin_id not in (None, row.round_id),
            group_id=row.group_id,
            receipt=Receipt(
                assignment_id=assignment_id,
                state=state,
                digest=row.digest,
                checkpoint=row.checkpoint if state is ReportState.INCLUDED else None,
                reason=row.reason,
            ),
            has_heard=row.has_heard,
        )

    def tell(self, assignment_id: str) -> None:
        """Its device hears now that it is late: it was alive, and no loss."""
        with self._database.write() as connection:
            connection.execute(
                update(receipts)
                .where(receipts.c.receipt_id == receipt_id(assignment_id))
                .values(has_heard=True)
            )

    def snapshot(self, round_id: int) -> Hash | None:
        """The sum as of the last group that became durable; None: no report yet."""
        query = select(rounds.c.sum_snapshot).where(rounds.c.round_id == round_id)
        with self._database.read() as connection:
            snapshot: Hash | None = connection.execute(query).scalar_one()
        return snapshot

    def record(
        self, round_id: int, previous: Hash | None, snapshot: Hash, digests: Mapping[Hash, Hash]
    ) -> Recorded | Refused:
        """A group commit: receipt id -> digest of the reports that turned `previous` into `snapshot`.

        All or nothing. Refused when one of them is not expected any more, when the fence has fallen, or when
        the stored sum is not `previous`.
        """
        with self._database.write() as connection:
            row = connection.execute(
                select(rounds.c.state, rounds.c.sum_snapshot, rounds.c.num_reported, tasks.c.spec)
                .join(tasks, tasks.c.task_id == rounds.c.task_id)
                .where(rounds.c.round_id == round_id)
                .with_for_update()
            ).one()
            if row.state != RoundState.RUNNING:
                return Refused(frozenset(digests))
            if row.sum_snapshot != previous:
                return Refused(frozenset())
            if settled := not_expected(connection, digests):
                return Refused(settled)
            acknowledge(connection, digests)
            num_reported = row.num_reported + len(digests)
            connection.execute(
                update(rounds)
                .where(rounds.c.round_id == round_id)
                .values(sum_snapshot=snapshot, num_reported=num_reported)
            )
            num_open = num_expected(connection, round_id)
            return Recorded(due=num_reported >= decode_spec(row.spec).goal or num_open == 0)

    def void(self, assignment_id: str, reason: str) -> None:
        """No report will come, or none that can be used. Changes nothing once there is one or an end."""
        self._settle(assignment_id, ReportState.VOID, reason)

    def expire(self, assignment_id: str) -> None:
        """The report would come too late for every round. Changes nothing once there is one or an end."""
        self._settle(assignment_id, ReportState.LATE, "the time of the assignment was over")

    def _settle(self, assignment_id: str, state: ReportState, reason: str) -> None:
        with self._database.write() as connection:
            connection.execute(
                update(receipts)
                .where(
                    receipts.c.receipt_id == receipt_id(assignment_id),
                    receipts.c.state == ReportState.EXPECTED,
                )
                .values(state=state, reason=reason)
            )
