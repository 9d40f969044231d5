"""Groups of secure aggregation: which devices are summed together, and how far they are.

What a group knows (keys, shares, the running sum of masked reports) is one private blob. Its address, the receipts of
the reports in the sum and the counts change in one transaction (`record`), so what a device was told is never lost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from homespun.protocol.group import (
    COLLECTING,
    GROUP,
    LIVE,
    SUMMED,
    GroupEvent,
    GroupState,
    GroupView,
    due,
)
from homespun.protocol.messages import ReportState
from homespun.protocol.round import RoundState
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import GroupSummary
from homespun.server.store.assignments import num_places, num_unbound
from homespun.server.store.database import Database
from homespun.server.store.events import add_event
from homespun.server.store.records import (
    GroupChange,
    GroupRecord,
    Refused,
    decode_spec,
    or_never,
    task_record,
)
from homespun.server.store.reports import acknowledge, not_expected, receipt_id
from homespun.server.store.schema import assignments, groups, receipts, rounds, tasks
from homespun.types import Hash

_EXPECTED_OF = {  # what a step's answers are counted in, and who may give one
    GroupState.ADVERTISE_KEYS: ("num_devices", "num_devices"),
    GroupState.SHARE_KEYS: ("num_shared", "num_devices"),
    GroupState.MASK_INPUT: ("num_masked", "num_shared"),
    GroupState.AGREE: ("num_agreed", "num_masked"),
    GroupState.UNMASK: ("num_unmasked", "num_agreed"),
}
_WITH_ROUND = (
    select(
        groups,
        rounds.c.number.label("round_number"),
        rounds.c.attempt,
        rounds.c.base,
        rounds.c.state.label("round_state"),
        *(column.label(f"task_{column.name}") for column in tasks.c),
    )
    .join(rounds, rounds.c.round_id == groups.c.round_id)
    .join(tasks, tasks.c.task_id == rounds.c.task_id)
)


class Groups:
    """Named transactions about groups."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def forming(self, round_id: int, now: float) -> int | None:
        """The group of a running round that has room, begun if there is none; None after the round's deadline."""
        with self._database.write() as connection:
            row = connection.execute(
                select(rounds.c.state, rounds.c.deadline_at, tasks.c.spec)
                .join(tasks, tasks.c.task_id == rounds.c.task_id)
                .where(rounds.c.round_id == round_id)
            ).one()
            deadline_at = or_never(row.deadline_at)
            if row.state != RoundState.RUNNING or now >= deadline_at:
                return None
            known = connection.execute(
                select(groups.c.group_id).where(
                    groups.c.round_id == round_id,
                    groups.c.state == GroupState.ADVERTISE_KEYS,
                    groups.c.num_devices < decode_spec(row.spec).max_group,
                )
            ).scalar()
            if known is not None:
                return int(known)
            before = select(func.count()).where(groups.c.round_id == round_id)
            zeros = {name: 0 for name, _ in _EXPECTED_OF.values()}
            begun = connection.execute(
                insert(groups).values(
                    round_id=round_id,
                    number=connection.execute(before).scalar_one() + 1,
                    state=GroupState.ADVERTISE_KEYS,
                    deadline_at=deadline_at,
                    reason="",
                    **zeros,
                )
            )
            assert begun.inserted_primary_key is not None
            return int(begun.inserted_primary_key[0])

    def live(self, now: float) -> list[GroupRecord]:
        """Groups that are not over, oldest first."""
        query = _WITH_ROUND.where(groups.c.state.in_(LIVE)).order_by(groups.c.group_id)
        with self._database.read() as connection:
            return [_record(connection, row, now) for row in connection.execute(query)]

    def get(self, group_id: int, now: float) -> GroupRecord:
        """A group, over or not."""
        with self._database.read() as connection:
            query = _WITH_ROUND.where(groups.c.group_id == group_id)
            return _record(connection, connection.execute(query).one(), now)

    def record(
        self, group_id: int, previous: Hash | None, snapshot: Hash, change: GroupChange
    ) -> Refused | None:
        """A group commit: answers, and perhaps the end of a step, turned `previous` into `snapshot`.

        All or nothing. Refused when the report of one that joined or reported is not expected any more, when one
        that joined is in a group already, or, naming none, when the group is over or its stored snapshot is not
        `previous`. When the step after which survivors are fixed ends here, the members that did not report are LATE.
        """
        with self._database.write() as connection:
            row = _locked(connection, group_id)
            if row.snapshot != previous or row.state not in LIVE:
                return Refused(frozenset())
            joining = {receipt_id(ticket) for ticket in change.joined}
            settled = not_expected(connection, {*joining, *change.digests})
            if settled := settled | _in_a_group(connection, change.joined):
                return Refused(settled)
            if change.joined:
                connection.execute(
                    update(assignments)
                    .where(assignments.c.assignment_id.in_(change.joined))
                    .values(group_id=group_id)
                )
            if change.digests:
                acknowledge(connection, change.digests)
            values = {"state": change.state, "snapshot": snapshot, **asdict(change.counts)}
            if change.deadline_at is not None:
                values["deadline_at"] = change.deadline_at
            _set(connection, group_id, **values)
            if row.state == GroupState.MASK_INPUT and change.state == GroupState.AGREE:
                _settle(connection, group_id, ReportState.LATE, "dropped out of its group")
                _count_reports(connection, row.round_id)
            return None

    def open(self, group_id: int, previous: Hash, total: Hash, now: float) -> bool:
        """UNMASK -> OPENED: the sum without masks is `total`, and what could open it is forgotten."""
        with self._database.write() as connection:
            row = _locked(connection, group_id)
            if row.snapshot != previous or row.state != GroupState.UNMASK:
                return False
            _set(connection, group_id, state=GroupState.OPENED, total=total, snapshot=None)
            lost, late = row.num_devices - row.num_shared, row.num_shared - row.num_masked
            text = f"group {row.number}: {row.num_masked} reports of {row.num_devices} devices"
            if lost or late:
                text += f"; {lost} lost before, {late} after sharing keys"
            _event(connection, row, "group.opened", now, text)
            return True

    def void(self, group_id: int, reason: str, now: float) -> None:
        """The group came to nothing: its members may join another one, while the round lasts."""
        with self._database.write() as connection:
            row = _locked(connection, group_id)
            if row.state not in LIVE:
                return
            state = GROUP.next(GroupState(row.state), GroupEvent.GIVE_UP)
            _set(connection, group_id, state=state, reason=reason, snapshot=None)
            if row.round_state == RoundState.RUNNING:
                back = _receipts_of(connection, group_id)
                connection.execute(
                    update(receipts)
                    .where(
                        receipts.c.receipt_id.in_(back),
                        receipts.c.state == ReportState.ACKNOWLEDGED,
                    )
                    .values(state=ReportState.EXPECTED, digest=None)
                )
                connection.execute(
                    update(assignments)
                    .where(assignments.c.group_id == group_id)
                    .values(group_id=None)
                )
            else:
                _settle(connection, group_id, ReportState.VOID, reason)
            _count_reports(connection, row.round_id)
            _event(connection, row, "group.void", now, f"group {row.number}: {reason}")


def group_summaries(connection: Connection, round_id: int) -> tuple[GroupSummary, ...]:
    """All groups of a round, in order."""
    names = GroupSummary.__struct_fields__
    query = select(*(groups.c[name] for name in names)).where(groups.c.round_id == round_id)
    rows = connection.execute(query.order_by(groups.c.number))
    return tuple(GroupSummary(**(row._asdict() | {"state": GroupState(row.state)})) for row in rows)


def opened_sums(connection: Connection, round_id: int) -> tuple[Hash, ...]:
    """The sums of a round's opened groups, in order."""
    query = select(groups.c.total).where(
        groups.c.round_id == round_id, groups.c.state == GroupState.OPENED
    )
    return tuple(connection.scalars(query.order_by(groups.c.number)))


def count_groups(connection: Connection, row: Row[Any], now: float) -> dict[str, int]:
    """What the round's view says about its groups: `num_open`, `num_collecting`, `num_unopened`."""
    views = [
        _view(connection, group, now)
        for group in connection.execute(
            _WITH_ROUND.where(groups.c.round_id == row.round_id, groups.c.state.in_(LIVE))
        )
    ]
    return {
        "num_open": num_unbound(connection, row.round_id, now),
        "num_collecting": sum(
            view.state in COLLECTING
            or (view.state is GroupState.ADVERTISE_KEYS and due(view, now) is not None)
            for view in views
        ),
        "num_unopened": sum(view.state is not GroupState.ADVERTISE_KEYS for view in views),
    }


def end_groups(
    connection: Connection, round_id: int, reason: str, states: Collection[GroupState] = LIVE
) -> None:
    """The round ended or lets nobody in any more: its groups in `states` come to nothing."""
    connection.execute(
        update(groups)
        .where(groups.c.round_id == round_id, groups.c.state.in_(states))
        .values(state=GroupState.VOID, reason=reason)
    )


def forget_groups(connection: Connection, round_id: int) -> None:
    """What the groups of a round knew is in no use any more."""
    connection.execute(
        update(groups).where(groups.c.round_id == round_id).values(snapshot=None, total=None)
    )


def _locked(connection: Connection, group_id: int) -> Row[Any]:
    query = _WITH_ROUND.where(groups.c.group_id == group_id).with_for_update()
    return connection.execute(query).one()


def _set(connection: Connection, group_id: int, **values: object) -> None:
    connection.execute(update(groups).where(groups.c.group_id == group_id).values(**values))


def _event(connection: Connection, row: Row[Any], kind: str, now: float, text: str) -> None:
    add_event(
        connection,
        kind,
        now,
        text,
        task_id=row.task_task_id,
        round_number=row.round_number,
        attempt=row.attempt,
    )


def _receipts_of(connection: Connection, group_id: int) -> list[Hash]:
    query = select(assignments.c.assignment_id).where(assignments.c.group_id == group_id)
    return [receipt_id(ticket) for ticket in connection.scalars(query)]


def _in_a_group(connection: Connection, tickets: Collection[str]) -> frozenset[Hash]:
    """The receipts of those that joined one already."""
    query = select(assignments.c.assignment_id).where(
        assignments.c.assignment_id.in_(tickets), assignments.c.group_id.is_not(None)
    )
    return frozenset(receipt_id(ticket) for ticket in connection.scalars(query))


def _settle(connection: Connection, group_id: int, state: ReportState, reason: str) -> None:
    """Members' open reports end as `state`; LATE is for those that never came, VOID for all."""
    unsettled = [ReportState.EXPECTED]
    if state is ReportState.VOID:
        unsettled.append(ReportState.ACKNOWLEDGED)
    connection.execute(
        update(receipts)
        .where(
            receipts.c.receipt_id.in_(_receipts_of(connection, group_id)),
            receipts.c.state.in_(unsettled),
        )
        .values(state=state, reason=reason)
    )


def _count_reports(connection: Connection, round_id: int) -> None:
    """A round's reports are those whose group has fixed its survivors."""
    counted = select(func.coalesce(func.sum(groups.c.num_masked), 0)).where(
        groups.c.round_id == round_id, groups.c.state.in_(SUMMED)
    )
    connection.execute(
        update(rounds)
        .where(rounds.c.round_id == round_id)
        .values(num_reported=counted.scalar_subquery())
    )


def _view(connection: Connection, row: Row[Any], now: float) -> GroupView:
    spec, state = decode_spec(row.task_spec), GroupState(row.state)
    if state not in LIVE:
        return GroupView(state, 0, 0, row.deadline_at)
    answered, expected = _EXPECTED_OF[state]
    view = GroupView(state, getattr(row, expected), getattr(row, answered), row.deadline_at)
    return (
        _forming(connection, row, spec, view, now) if state is GroupState.ADVERTISE_KEYS else view
    )


def _forming(
    connection: Connection, row: Row[Any], spec: TaskSpec, view: GroupView, now: float
) -> GroupView:
    coming = 0  # reports that other groups hold or may still bring
    others = select(groups).where(groups.c.round_id == row.round_id)
    for other in connection.execute(others):
        state = GroupState(other.state)
        if state in COLLECTING:
            coming += getattr(other, _EXPECTED_OF[state][1])
        elif state in SUMMED:
            coming += other.num_masked
    coming_yet = num_unbound(connection, row.round_id, now)
    if spec.is_async:
        coming_yet += num_places(connection, row.round_id, spec, now)
    return replace(
        view,
        n_min=spec.min_group,
        target=spec.max_group,
        wanted=spec.goal - coming,
        num_unbound=coming_yet,
    )


def _record(connection: Connection, row: Row[Any], now: float) -> GroupRecord:
    return GroupRecord(
        group_id=row.group_id,
        round_id=row.round_id,
        task=task_record(row, "task_"),
        round_number=row.round_number,
        attempt=row.attempt,
        base=row.base,
        snapshot=row.snapshot,
        view=_view(connection, row, now),
    )
