"""Releases: every row of the release table as one transaction, with what it publishes and the tasks that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, func, insert, select, update

from homespun.errors import Conflict, NotFound
from homespun.learning.metrics import MetricSum
from homespun.protocol.messages import ReleaseManifest, ReleaseNotice, SignedRelease, encode
from homespun.protocol.release import (
    RELEASE,
    RESUMED_BY,
    Finding,
    ReleaseEvent,
    ReleaseState,
)
from homespun.protocol.release_request import (
    ReleaseRequest,
)
from homespun.protocol.views import ReleaseStep, TaskState
from homespun.server.store.catalogue import grant, require_checkpoints
from homespun.server.store.database import Database
from homespun.server.store.enrolment import require_population
from homespun.server.store.events import add_event
from homespun.server.store.records import (
    NewTask,
    ReleaseRecord,
    RoundResult,
    TaskRecord,
    task_record,
)
from homespun.server.store.schema import manifests, release_steps, releases, rounds, tasks
from homespun.server.store.tasks import create_task, stop_task

S, E = ReleaseState, ReleaseEvent
OVER = (S.REJECTED, S.DEPLOYED, S.SUPERSEDED, S.ROLLED_BACK)
"""Where another release of the slot may begin; all else is on its way."""

Sign = Callable[[ReleaseManifest], SignedRelease]


class Releases:
    """Named transactions about releases."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, request: ReleaseRequest, release_id: str, now: float) -> ReleaseRecord:
        """A new release, TRAINED. Repeating a request returns the release that it made.

        Raises `NotFound`, `InvalidConfig`, or `Conflict` when the version is taken or another release of the
        slot is on its way.
        """
        text = encode(request).decode()
        slot = (releases.c.population == request.population) & (releases.c.slot == request.slot)
        with self._database.write() as connection:
            require_population(connection, request.population)
            require_checkpoints(connection, request.plan_hash, (request.checkpoint,))
            taken = connection.execute(
                select(releases).where(slot, releases.c.version == request.version)
            ).first()
            if taken is not None:
                if taken.request == text:
                    return _get(connection, taken.release_id)
                raise Conflict(
                    f"version {request.version} of slot {request.slot} was something else",
                    hint="choose another version",
                )
            _require_rest(connection, request.population, request.slot)
            incumbent = connection.execute(
                select(releases).where(slot, releases.c.state == S.DEPLOYED)
            ).first()
            if incumbent is not None:  # one plan runs both, or they could not be compared
                served = _request(incumbent.request).checkpoint
                require_checkpoints(connection, request.plan_hash, (served,))
            connection.execute(
                insert(releases).values(
                    release_id=release_id,
                    population=request.population,
                    slot=request.slot,
                    version=request.version,
                    request=text,
                    state=S.TRAINED,
                    stage=0,
                    since=now,
                    incumbent_id=incumbent and incumbent.release_id,
                    reason="",
                    created_at=now,
                )
            )
            return _get(connection, release_id)

    def has(self, population: str, slot: str, version: str) -> bool:
        """Whether this version was ever begun."""
        query = select(releases.c.release_id).where(
            releases.c.population == population,
            releases.c.slot == slot,
            releases.c.version == version,
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def move(
        self,
        release: ReleaseRecord,
        event: ReleaseEvent,
        now: float,
        sign: Sign,
        *,
        reason: str = "",
        findings: tuple[Finding, ...] = (),
        task: NewTask | None = None,
    ) -> ReleaseRecord:
        """One row of the table: with its evidence, what it publishes, and the one task that goes on from here.

        Raises `Conflict` when it does not apply, or the release is not any more as it was looked at.
        """
        with self._database.write() as connection:
            latest = _get(connection, release.release_id)
            if (latest.state, latest.stage) != (release.state, release.stage):
                raise Conflict(
                    f"release {release.request.version} has moved on", state=str(latest.state)
                )
            if latest.state is S.DEPLOYED:
                _require_rest(connection, release.request.population, release.request.slot)
            if event is E.DEPLOY and latest.incumbent_id and latest.state is not S.HELD:
                _take(connection, _get(connection, latest.incumbent_id), E.SUPERSEDE, now)
            moved = _take(connection, latest, event, now, reason, findings)
            if event is E.ROLLED_BACK and latest.incumbent_id:
                older = _get(connection, latest.incumbent_id)
                if older.state is S.SUPERSEDED:
                    older = _take(connection, older, E.RESTORE, now)
                _publish(connection, older, 1.0, 0.0, now, sign)
            if moved.state in (S.CANARY, S.RAMP):
                stage = moved.request.stages[moved.stage]
                band = moved.request.control(moved.stage)
                _publish(connection, moved, stage.fraction, band, now, sign)
            if moved.state is S.DEPLOYED:
                _publish(connection, moved, 1.0, 0.0, now, sign)
            for old in _tasks(connection, moved, TaskState.ACTIVE):
                if task is None or old.spec.name != task.spec.name:
                    stop_task(connection, old.task_id, now)
            if task is not None:
                create_task(connection, task.spec, task.task_id, task.chain, now)
            return _get(connection, release.release_id)

    def get(self, release_id: str) -> ReleaseRecord:
        """Raises `NotFound`."""
        with self._database.read() as connection:
            return _get(connection, release_id)

    def all(self) -> list[ReleaseRecord]:
        """All releases, oldest first."""
        order = (releases.c.created_at, releases.c.version)
        with self._database.read() as connection:
            found = connection.scalars(select(releases.c.release_id).order_by(*order)).all()
            return [_get(connection, release_id) for release_id in found]

    def on_the_way(self) -> list[ReleaseRecord]:
        """Releases that are neither deployed nor at an end."""
        query = select(releases.c.release_id).where(releases.c.state.not_in(OVER))
        with self._database.read() as connection:
            found = connection.scalars(query).all()
            return [_get(connection, release_id) for release_id in found]

    def deployed(self, population: str, slot: str) -> ReleaseRecord | None:
        """What the slot serves."""
        query = select(releases.c.release_id).where(
            releases.c.population == population,
            releases.c.slot == slot,
            releases.c.state == S.DEPLOYED,
        )
        with self._database.read() as connection:
            found = connection.execute(query).scalar()
            return None if found is None else _get(connection, found)

    def history(self, release_id: str) -> tuple[ReleaseRecord, tuple[ReleaseStep, ...]]:
        """A release and how it came where it is, oldest first; the last step is the one into its state."""
        query = (
            select(release_steps)
            .where(release_steps.c.release_id == release_id)
            .order_by(release_steps.c.step_id)
        )
        with self._database.read() as connection:
            release = _get(connection, release_id)
            return release, tuple(
                ReleaseStep(
                    at=row.at,
                    state=ReleaseState(row.state),
                    stage=row.stage,
                    reason=row.reason,
                    findings=msgspec.json.decode(row.findings, type=tuple[Finding, ...]),
                )
                for row in connection.execute(query)
            )

    def tasks(self, release: ReleaseRecord, name: str | None = None) -> list[TaskRecord]:
        """The tasks that the server made for this release, or those named `name`, oldest first."""
        with self._database.read() as connection:
            found = _tasks(connection, release)
        return [task for task in found if name in (None, task.spec.name)]

    def metrics(self, task_ids: Iterable[str]) -> dict[str, MetricSum]:
        """Totals over all committed rounds of these tasks."""
        query = select(rounds.c.result).where(
            rounds.c.task_id.in_(task_ids), rounds.c.committed_at.is_not(None)
        )
        totals: dict[str, MetricSum] = {}
        with self._database.read() as connection:
            for text in connection.scalars(query):
                for name, value in msgspec.json.decode(text, type=RoundResult).metrics.items():
                    more = MetricSum(value.sum, value.count)
                    totals[name] = totals.get(name, MetricSum(0.0, 0.0)) + more
        return totals

    def signed(self, population: str, slot: str, *, for_all: bool) -> bytes | None:
        """The newest manifest, JSON of SignedRelease; `for_all`: the newest that every device takes."""
        query = (
            select(manifests.c.signed)
            .where(manifests.c.population == population, manifests.c.slot == slot)
            .where(manifests.c.fraction >= (1.0 if for_all else 0.0))
            .order_by(manifests.c.sequence.desc())
        )
        with self._database.read() as connection:
            found = connection.execute(query.limit(1)).scalar()
            return None if found is None else bytes(found)

    def notices(self) -> list[tuple[str, ReleaseNotice]]:
        """The newest sequence number of every (population, slot)."""
        place = (manifests.c.population, manifests.c.slot)
        query = (
            select(*place, func.max(manifests.c.sequence).label("top"))
            .group_by(*place)
            .order_by(*place)
        )
        with self._database.read() as connection:
            return [
                (row.population, ReleaseNotice(slot=row.slot, sequence=row.top))
                for row in connection.execute(query)
            ]


def _require_rest(connection: Connection, population: str, slot: str) -> None:
    """Raise `Conflict` while a release of the slot is on its way."""
    query = select(releases.c.version, releases.c.state).where(
        releases.c.population == population,
        releases.c.slot == slot,
        releases.c.state.not_in(OVER),
    )
    other = connection.execute(query).first()
    if other is not None:
        raise Conflict(
            f"release {other.version} of slot {slot} is still on its way: {other.state}",
            hint="wait for it, or take it back: homespun model rollback",
        )


def _take(
    connection: Connection,
    release: ReleaseRecord,
    event: ReleaseEvent,
    now: float,
    reason: str = "",
    findings: tuple[Finding, ...] = (),
) -> ReleaseRecord:
    """One row of the table, written down with its reason and evidence."""
    state, held = RELEASE.next(release.state, event), release.held_from
    if release.state is S.HELD and event is not E.ROLL_BACK and state is not held:
        raise Conflict(f"release {release.request.version} was held {held}, not {state}")
    another = event is E.START_RAMP and release.state is not S.HELD
    place = {"state": state, "stage": release.stage + another}
    connection.execute(
        update(releases)
        .where(releases.c.release_id == release.release_id)
        .values(
            **place,
            held_from=release.state if event is E.HOLD else held if state is S.HELD else None,
            since=now,
            reason=reason,
        )
    )
    connection.execute(
        insert(release_steps).values(
            release_id=release.release_id,
            at=now,
            **place,
            reason=reason,
            findings=msgspec.json.encode(findings).decode(),
        )
    )
    request = release.request
    text = f"{request.population}/{request.slot} {request.version}"
    add_event(connection, f"release.{state}", now, text + (f": {reason}" if reason else ""))
    return _get(connection, release.release_id)


def _publish(
    connection: Connection,
    release: ReleaseRecord,
    fraction: float,
    control: float,
    now: float,
    sign: Sign,
) -> None:
    """A manifest with the slot's next number, unless the newest says just this."""
    request = release.request
    newest = connection.execute(
        select(manifests)
        .where(manifests.c.population == request.population, manifests.c.slot == request.slot)
        .order_by(manifests.c.sequence.desc())
        .limit(1)
    ).first()
    if newest is not None and (newest.release_id, newest.fraction) == (
        release.release_id,
        fraction,
    ):
        return
    manifest = ReleaseManifest(
        population=request.population,
        slot=request.slot,
        sequence=1 if newest is None else newest.sequence + 1,
        release_id=release.release_id,
        version=request.version,
        plan_hash=request.plan_hash,
        checkpoint=request.checkpoint,
        fraction=fraction,
        control=control,
        stage_salt=request.stage_salt,
        issued_at=now,
    )
    grant(connection, request.population, (request.plan_hash, request.checkpoint))
    connection.execute(
        insert(manifests).values(
            population=request.population,
            slot=request.slot,
            sequence=manifest.sequence,
            release_id=release.release_id,
            fraction=fraction,
            signed=msgspec.json.encode(sign(manifest)),
        )
    )


def _tasks(
    connection: Connection, release: ReleaseRecord, state: TaskState | None = None
) -> list[TaskRecord]:
    query = (
        select(tasks)
        .where(tasks.c.population == release.request.population)
        .where(tasks.c.name.in_((release.evaluation_name, release.watch_name)))
        .order_by(tasks.c.created_at)
    )
    if state is not None:
        query = query.where(tasks.c.state == state)
    return [task_record(row) for row in connection.execute(query)]


def _get(connection: Connection, release_id: str) -> ReleaseRecord:
    query = select(releases).where(releases.c.release_id == release_id).with_for_update()
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"there is no release {release_id}", hint="list them: homespun model ls")
    return _record(connection, row)


def _record(connection: Connection, row: Row[Any]) -> ReleaseRecord:
    newest = connection.execute(
        select(manifests.c.sequence, manifests.c.fraction)
        .where(manifests.c.release_id == row.release_id)
        .order_by(manifests.c.sequence.desc())
    ).first()
    older = connection.execute(
        select(releases.c.request).where(releases.c.release_id == row.incumbent_id)
    ).scalar()
    return ReleaseRecord(
        release_id=row.release_id,
        request=_request(row.request),
        state=ReleaseState(row.state),
        held_from=None if row.held_from is None else ReleaseState(row.held_from),
        stage=row.stage,
        since=row.since,
        incumbent_id=row.incumbent_id,
        incumbent_checkpoint=None if older is None else _request(older).checkpoint,
        reason=row.reason,
        sequence=None if newest is None else newest.sequence,
        fraction=None if newest is None else newest.fraction,
        created_at=row.created_at,
    )


def _request(text: str) -> ReleaseRequest:
    return msgspec.json.decode(text, type=ReleaseRequest)


def resuming(release: ReleaseRecord) -> ReleaseEvent:
    """The event that takes a held release to where it was. Raises `Conflict` when it is not held."""
    if release.held_from is None:
        raise Conflict(f"release {release.request.version} is not held", state=str(release.state))
    return RESUMED_BY[release.held_from]
