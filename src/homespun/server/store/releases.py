"""Releases: rows of the release table, and the signed manifest that devices fetch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, func, insert, select, update

from homespun.errors import Conflict
from homespun.protocol.messages import ReleaseManifest, ReleaseNotice, SignedRelease
from homespun.protocol.release import RELEASE, ReleaseEvent, ReleaseState
from homespun.protocol.views import Evidence
from homespun.server.store.catalogue import grant, require_checkpoints
from homespun.server.store.database import Database
from homespun.server.store.enrolment import require_population
from homespun.server.store.events import add_event
from homespun.server.store.records import ReleaseRecord, ReleaseRequest
from homespun.server.store.schema import releases

ON_THE_WAY = (
    ReleaseState.TRAINED,
    ReleaseState.CHECKED,
    ReleaseState.EVALUATING,
    ReleaseState.PASSED,
    ReleaseState.CANARY,
    ReleaseState.RAMP,
)


class Releases:
    """Named transactions about releases."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, request: ReleaseRequest, release_id: str, now: float) -> ReleaseRecord:
        """A new release, TRAINED. Repeating a request returns the release that it made.

        Raises `NotFound`, `InvalidConfig`, or `Conflict` when the version is taken or another release of the
        slot is on its way.
        """
        wanted = msgspec.structs.asdict(request)
        slot = (releases.c.population == request.population) & (releases.c.slot == request.slot)
        with self._database.write() as connection:
            require_population(connection, request.population)
            require_checkpoints(connection, request.plan_hash, (request.checkpoint,))
            taken = connection.execute(
                select(releases).where(slot, releases.c.version == request.version)
            ).first()
            if taken is not None:
                if all(getattr(taken, name) == value for name, value in wanted.items()):
                    return _record(taken)
                raise Conflict(
                    f"version {request.version} of slot {request.slot} was something else",
                    hint="choose another version",
                )
            other = connection.execute(
                select(releases.c.version).where(slot, releases.c.state.in_(ON_THE_WAY))
            ).scalar()
            if other is not None:
                raise Conflict(
                    f"release {other} of slot {request.slot} is still on its way",
                    hint="wait for it: homespun model ls",
                )
            connection.execute(
                insert(releases).values(
                    release_id=release_id,
                    state=ReleaseState.TRAINED,
                    reason="",
                    created_at=now,
                    **wanted,
                )
            )
            return _get(connection, release_id)

    def move(
        self,
        release_id: str,
        event: ReleaseEvent,
        now: float,
        reason: str = "",
        evidence: Evidence | None = None,
    ) -> ReleaseRecord:
        """One row of the table. Raises `Conflict` when it does not apply."""
        changes: dict[str, object] = {"reason": reason}
        if evidence is not None:
            changes["evidence"] = msgspec.json.encode(evidence).decode()
        with self._database.write() as connection:
            return _moved(connection, _get(connection, release_id), event, now, **changes)

    def deploy(
        self, release_id: str, now: float, sign: Callable[[ReleaseManifest], SignedRelease]
    ) -> ReleaseRecord:
        """PASSED -> DEPLOYED: a manifest with the next sequence number; its predecessor is superseded."""
        with self._database.write() as connection:
            release = _get(connection, release_id)
            slot = (releases.c.population == release.population) & (releases.c.slot == release.slot)
            newest = connection.execute(select(func.max(releases.c.sequence)).where(slot)).scalar()
            for row in connection.execute(
                select(releases).where(slot, releases.c.state == ReleaseState.DEPLOYED)
            ).all():
                _moved(connection, _record(row), ReleaseEvent.SUPERSEDE, now)
            manifest = ReleaseManifest(
                population=release.population,
                slot=release.slot,
                sequence=(newest or 0) + 1,
                version=release.version,
                plan_hash=release.plan_hash,
                checkpoint=release.checkpoint,
                issued_at=now,
            )
            grant(connection, release.population, (release.plan_hash, release.checkpoint))
            return _moved(
                connection,
                release,
                ReleaseEvent.DEPLOY,
                now,
                sequence=manifest.sequence,
                signed=msgspec.json.encode(sign(manifest)),
            )

    def get(self, release_id: str) -> ReleaseRecord:
        with self._database.read() as connection:
            return _get(connection, release_id)

    def all(self) -> list[ReleaseRecord]:
        """All releases, oldest first."""
        query = select(releases).order_by(releases.c.created_at, releases.c.version)
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def on_the_way(self) -> list[ReleaseRecord]:
        """Releases that are neither deployed nor at an end."""
        query = select(releases).where(releases.c.state.in_(ON_THE_WAY))
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query)]

    def deployed(self, population: str, slot: str) -> ReleaseRecord | None:
        """What the slot serves."""
        query = select(releases).where(
            releases.c.population == population,
            releases.c.slot == slot,
            releases.c.state == ReleaseState.DEPLOYED,
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
            return None if row is None else _record(row)

    def notices(self) -> list[tuple[str, ReleaseNotice]]:
        """The newest sequence number of every (population, slot)."""
        query = (
            select(
                releases.c.population, releases.c.slot, func.max(releases.c.sequence).label("top")
            )
            .where(releases.c.sequence.is_not(None))
            .group_by(releases.c.population, releases.c.slot)
            .order_by(releases.c.population, releases.c.slot)
        )
        with self._database.read() as connection:
            return [
                (row.population, ReleaseNotice(slot=row.slot, sequence=row.top))
                for row in connection.execute(query)
            ]


def _moved(
    connection: Connection,
    release: ReleaseRecord,
    event: ReleaseEvent,
    now: float,
    **changes: object,
) -> ReleaseRecord:
    state = RELEASE.next(release.state, event)
    connection.execute(
        update(releases)
        .where(releases.c.release_id == release.release_id)
        .values(state=state, **changes)
    )
    text = f"{release.population}/{release.slot} {release.version}"
    add_event(connection, f"release.{state}", now, text)
    return _get(connection, release.release_id)


def _get(connection: Connection, release_id: str) -> ReleaseRecord:
    query = select(releases).where(releases.c.release_id == release_id).with_for_update()
    return _record(connection.execute(query).one())


def _record(row: Row[Any]) -> ReleaseRecord:
    return ReleaseRecord(
        release_id=row.release_id,
        population=row.population,
        slot=row.slot,
        version=row.version,
        state=ReleaseState(row.state),
        sequence=row.sequence,
        plan_hash=row.plan_hash,
        checkpoint=row.checkpoint,
        evaluation_task_id=row.evaluation_task_id,
        margin=row.margin,
        reason=row.reason,
        evidence=row.evidence and msgspec.json.decode(row.evidence, type=Evidence),
        signed=row.signed,
        created_at=row.created_at,
    )
