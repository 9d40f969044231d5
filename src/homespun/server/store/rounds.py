"""Rounds: every row of the transition table as one named transaction.

A transition checks the stored state against the table first, so that of two that race one wins and the other
raises `Conflict` and changes nothing. What follows from a transition (receipts, the next round, the task's state)
is in the same transaction.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from homespun.errors import Conflict
from homespun.protocol.group import GroupState
from homespun.protocol.messages import Aggregation, ReportState, TaskKind
from homespun.protocol.round import ROUND, RoundEvent, RoundState, RoundView
from homespun.protocol.selection import draw
from homespun.protocol.views import RoundSummary, TaskState
from homespun.server.store.assignments import assign, carry, fall_behind
from homespun.server.store.catalogue import grant, insert_checkpoint
from homespun.server.store.database import Database
from homespun.server.store.events import add_event
from homespun.server.store.groups import (
    count_groups,
    end_groups,
    forget_groups,
    group_summaries,
    opened_sums,
)
from homespun.server.store.rates import num_wanted, tally
from homespun.server.store.records import (
    RoundRecord,
    RoundResult,
    Trained,
    decode_spec,
    or_never,
    task_record,
)
from homespun.server.store.reports import num_expected
from homespun.server.store.schema import assignments, claims, receipts, rounds, tasks
from homespun.types import Hash

ROUND_AND_TASK = select(rounds, *(column.label(f"task_{column.name}") for column in tasks.c)).join(
    tasks, tasks.c.task_id == rounds.c.task_id
)
"""Rounds with the columns of their task, prefixed."""

MAX_FAILURES = 5
"""Abandoned attempts in a row that halt a task."""

LIVE = (
    RoundState.PLANNED,
    RoundState.OPEN,
    RoundState.RUNNING,
    RoundState.CLOSING,
    RoundState.UNMASKING,
    RoundState.AGGREGATED,
    RoundState.COMMITTED,
)


class Rounds:
    """Named transactions about rounds."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def live(self, now: float) -> list[RoundRecord]:
        """Rounds that are not over, those that opened first in front."""
        query = ROUND_AND_TASK.where(rounds.c.state.in_(LIVE)).order_by(
            rounds.c.opened_at, rounds.c.round_id
        )
        with self._database.read() as connection:
            return [_record(connection, row, now) for row in connection.execute(query)]

    def summaries(
        self, now: float, task_id: str | None = None, limit: int | None = None
    ) -> list[RoundSummary]:
        """Rounds of a task in order, or the newest `limit` of all tasks, newest first."""
        query = ROUND_AND_TASK
        if task_id is not None:
            query = query.where(rounds.c.task_id == task_id).order_by(rounds.c.round_id)
        else:
            query = query.order_by(rounds.c.round_id.desc()).limit(limit)
        with self._database.read() as connection:
            return [_summary(connection, row, now) for row in connection.execute(query)]

    def ancestry(self, task_id: str, origin: int, number: int) -> tuple[Hash, ...]:
        """The checkpoints that rounds `origin` to `number` of a training task started from, oldest first."""
        query = (
            select(rounds.c.number, rounds.c.base)
            .where(rounds.c.task_id == task_id, rounds.c.number.between(origin, number))
            .distinct()  # attempts at the same round have the same base
            .order_by(rounds.c.number)
        )
        with self._database.read() as connection:
            return tuple(row.base for row in connection.execute(query))

    def open(self, round_id: int, now: float) -> None:
        """PLANNED -> OPEN: devices may gather."""
        with self._database.write() as connection:
            row = _moved(connection, round_id, RoundEvent.OPEN)
            spec = decode_spec(row.task_spec)
            _set(
                connection,
                round_id,
                opened_at=now,
                select_at=now + spec.selection_s,
                num_wanted=num_wanted(connection, row.task_id, spec, row.num_carried, now),
            )
            _event(connection, row, "round.opened", now)

    def select(self, round_id: int, now: float) -> None:
        """OPEN -> RUNNING: draw the cohort from those that wait now; an async round lets devices in from here on."""
        with self._database.write() as connection:
            row = _moved(connection, round_id, RoundEvent.SELECT)
            spec = decode_spec(row.task_spec)
            if spec.is_async:
                _set(connection, round_id, selected_at=now)
                return
            waiting = select(claims.c.device_id).where(
                claims.c.round_id == round_id, claims.c.expires_at > now
            )
            pool = list(connection.scalars(waiting))
            if len(pool) < spec.minimum:
                raise Conflict("too few devices wait", expected=spec.minimum, got=len(pool))
            cohort = draw(
                pool,
                row.num_wanted or spec.cohort_size,
                seed=spec.seed,
                task=spec.name,
                round_number=row.number,
                attempt=row.attempt,
            )
            assign(connection, row, spec, cohort, now)
            _set(
                connection,
                round_id,
                selected_at=now,
                deadline_at=now + spec.deadline_s,
                num_assigned=len(cohort),
            )
            _event(connection, row, "round.selected", now, f"{len(cohort)} of {len(pool)} devices")

    def close(self, round_id: int, now: float) -> None:
        """RUNNING -> CLOSING: the fence falls; what is not in now is late, unless the task lets it be carried on."""
        with self._database.write() as connection:
            row = _moved(connection, round_id, RoundEvent.CLOSE)
            num_late = fall_behind(connection, row, decode_spec(row.task_spec), now)
            end_groups(connection, round_id, "the round had closed", (GroupState.ADVERTISE_KEYS,))
            _set(connection, round_id, closed_at=now, num_late=num_late)
            _event(connection, row, "round.closed", now, f"{row.num_reported} reports")

    def unmask(self, round_id: int) -> None:
        """CLOSING -> UNMASKING: whatever its groups bring is all there will be."""
        with self._database.write() as connection:
            _moved(connection, round_id, RoundEvent.UNMASK)

    def aggregate(self, round_id: int, trained: Trained) -> None:
        """CLOSING or UNMASKING -> AGGREGATED: the result is stored, not yet public."""
        with self._database.write() as connection:
            _moved(connection, round_id, RoundEvent.AGGREGATE)
            _set(
                connection,
                round_id,
                checkpoint=trained.checkpoint,
                chain=trained.chain,
                optimizer_state=trained.optimizer_state,
                result=msgspec.json.encode(trained.result).decode(),
            )

    def commit(self, round_id: int, now: float, size_bytes: int) -> None:
        """AGGREGATED -> COMMITTED: the head moves, receipts are INCLUDED, the next round is planned.

        `size_bytes`: of the round's checkpoint, if it made one. Raises `Conflict` when the head is no longer the base.
        """
        with self._database.write() as connection:
            row = _moved(connection, round_id, RoundEvent.COMMIT)
            spec = decode_spec(row.task_spec)
            task: dict[str, object] = {"rounds_committed": row.number, "failures": 0}
            head = row.task_head
            if spec.kind is TaskKind.TRAIN:
                if row.task_head != row.base:
                    raise Conflict("the head has moved", expected=row.base, got=row.task_head)
                head = row.checkpoint
                task |= {
                    "head": head,
                    "chain": row.chain,
                    "optimizer_state": row.optimizer_state,
                }
                insert_checkpoint(connection, head, spec.plan_hash, size_bytes, now)
                grant(connection, spec.population, (head,))
            _set(connection, round_id, committed_at=now)
            included = (
                update(receipts)
                .where(
                    receipts.c.round_id == round_id,
                    receipts.c.state == ReportState.ACKNOWLEDGED,
                )
                .values(state=ReportState.INCLUDED)
            )
            connection.execute(included)
            _event(connection, row, "round.committed", now, f"{row.num_reported} reports")
            if row.number < spec.num_rounds:
                _follow(connection, row, row.number + 1, 1, head, now)
            else:
                task["state"] = TaskState.FINISHED
                add_event(connection, "task.finished", now, spec.name, task_id=row.task_id)
            connection.execute(update(tasks).where(tasks.c.task_id == row.task_id).values(task))

    def abandon(self, round_id: int, now: float, reason: str) -> None:
        """-> ABANDONED: receipts are void; a new attempt is planned, or the task halted."""
        with self._database.write() as connection:
            row = _moved(connection, round_id, RoundEvent.ABANDON)
            failures = row.task_failures + 1
            task: dict[str, object] = {"failures": failures}
            if failures < MAX_FAILURES:
                _follow(connection, row, row.number, row.attempt + 1, row.task_head, now)
            if row.deadline_at is not None:
                tally(connection, row, now)
            end_round(connection, round_id, RoundState.ABANDONED, reason)
            _event(connection, row, "round.abandoned", now, reason)
            if failures >= MAX_FAILURES:
                why = f"{failures} attempts in a row were abandoned; the last: {reason}"
                task |= {"state": TaskState.HALTED, "reason": why}
                add_event(connection, "task.halted", now, why, task_id=row.task_id)
            connection.execute(update(tasks).where(tasks.c.task_id == row.task_id).values(task))

    def scrub(self, round_id: int) -> None:
        """COMMITTED -> SCRUBBED: nothing that names a device remains."""
        with self._database.write() as connection:
            _moved(connection, round_id, RoundEvent.SCRUB)
            _forget_devices(connection, round_id)


def plan_round(connection: Connection, task_id: str, number: int, attempt: int, base: Hash) -> int:
    """A new round attempt, PLANNED; its id. For training, its base is the task's head."""
    planned = connection.execute(
        insert(rounds).values(
            task_id=task_id,
            number=number,
            attempt=attempt,
            state=RoundState.PLANNED,
            base=base,
            num_assigned=0,
            num_carried=0,
            num_reported=0,
            num_late=0,
            reason="",
        )
    )
    assert planned.inserted_primary_key is not None
    return int(planned.inserted_primary_key[0])


def _follow(
    connection: Connection, row: Row[Any], number: int, attempt: int, base: Hash, now: float
) -> None:
    """Plan the attempt that comes after `row`, and take along who is still expected."""
    following = plan_round(connection, row.task_id, number, attempt, base)
    num_carried = carry(connection, row, decode_spec(row.task_spec), following)
    if num_carried:
        text = f"{num_carried} may still join round {number}.{attempt}"
        _event(connection, row, "round.carried", now, text)


def end_round(connection: Connection, round_id: int, state: RoundState, reason: str) -> None:
    """A round came to nothing: every receipt that is still open is void, devices are forgotten."""
    unsettled = (ReportState.EXPECTED, ReportState.ACKNOWLEDGED)
    connection.execute(
        update(receipts)
        .where(receipts.c.round_id == round_id, receipts.c.state.in_(unsettled))
        .values(state=ReportState.VOID, reason=reason)
    )
    end_groups(connection, round_id, reason)
    _set(
        connection,
        round_id,
        state=state,
        reason=reason,
        checkpoint=None,
        chain=None,
        optimizer_state=None,
        result=None,
    )
    _forget_devices(connection, round_id)


def _forget_devices(connection: Connection, round_id: int) -> None:
    connection.execute(delete(claims).where(claims.c.round_id == round_id))
    connection.execute(delete(assignments).where(assignments.c.round_id == round_id))
    forget_groups(connection, round_id)
    _set(connection, round_id, sum_snapshot=None)


def _moved(connection: Connection, round_id: int, event: RoundEvent) -> Row[Any]:
    """Take `event` in the transition table. Returns the round, with its task, as it was before."""
    query = ROUND_AND_TASK.where(rounds.c.round_id == round_id).with_for_update()
    row = connection.execute(query).one()
    _set(connection, round_id, state=ROUND.next(RoundState(row.state), event))
    return row


def _set(connection: Connection, round_id: int, **values: object) -> None:
    connection.execute(update(rounds).where(rounds.c.round_id == round_id).values(**values))


def _event(connection: Connection, row: Row[Any], kind: str, now: float, text: str = "") -> None:
    add_event(
        connection,
        kind,
        now,
        text,
        task_id=row.task_id,
        round_number=row.number,
        attempt=row.attempt,
    )


def num_waiting(connection: Connection, round_id: int, now: float) -> int:
    """Devices whose claim has not lapsed."""
    query = select(func.count()).where(claims.c.round_id == round_id, claims.c.expires_at > now)
    return connection.execute(query).scalar_one()


def _record(connection: Connection, row: Row[Any], now: float) -> RoundRecord:
    state = RoundState(row.state)
    task = task_record(row, "task_")
    secure = task.spec.aggregation is Aggregation.SECURE
    if state is RoundState.RUNNING and not secure:
        counts = {"num_open": num_expected(connection, row.round_id)}
    elif state in (RoundState.RUNNING, RoundState.UNMASKING):
        counts = count_groups(connection, row, now)
    else:
        counts = {"num_open": 0}
    plain_sum = () if row.sum_snapshot is None else (row.sum_snapshot,)
    return RoundRecord(
        round_id=row.round_id,
        task=task,
        number=row.number,
        attempt=row.attempt,
        base=row.base,
        num_wanted=row.num_wanted or task.spec.cohort_size,
        sums=opened_sums(connection, row.round_id) if secure else plain_sum,
        checkpoint=row.checkpoint,
        view=RoundView(
            state=state,
            goal=task.spec.goal,
            minimum=task.spec.minimum,
            pool_target=task.spec.pool_size(row.num_wanted),
            select_at=row.select_at or 0.0,
            deadline_at=or_never(row.deadline_at),
            num_waiting=(
                num_waiting(connection, row.round_id, now) if state is RoundState.OPEN else 0
            ),
            num_assigned=row.num_assigned,
            num_reported=row.num_reported,
            secure=secure,
            is_async=task.spec.is_async,
            **counts,
        ),
    )


def _summary(connection: Connection, row: Row[Any], now: float) -> RoundSummary:
    spec = decode_spec(row.task_spec)
    waiting = num_waiting(connection, row.round_id, now) if row.state == RoundState.OPEN else 0
    # Only of a committed round: figures of a few devices leave the server no sooner than their model.
    result = (
        msgspec.json.decode(row.result, type=RoundResult)
        if row.committed_at is not None
        else RoundResult()
    )
    return RoundSummary(
        task_id=row.task_id,
        task_name=spec.name,
        kind=spec.kind,
        round_number=row.number,
        attempt=row.attempt,
        state=RoundState(row.state),
        opened_at=row.opened_at,
        selected_at=row.selected_at,
        closed_at=row.closed_at,
        committed_at=row.committed_at,
        deadline_at=row.deadline_at,
        num_waiting=waiting,
        num_assigned=row.num_assigned,
        num_carried=row.num_carried,
        num_reported=row.num_reported,
        num_late=row.num_late,
        goal=spec.goal,
        base_checkpoint=row.base,
        checkpoint=row.checkpoint if row.committed_at is not None else None,
        reason=row.reason,
        weight=result.weight,
        clipped_share=result.clipped_share,
        metrics=result.metrics,
        groups=group_summaries(connection, row.round_id),
    )
