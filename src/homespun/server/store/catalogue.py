"""Plans and checkpoints: what there is, whose it is, and which population may download it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import Connection, insert, select

from homespun.errors import InvalidConfig, NotFound
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import CheckpointView
from homespun.server.store.database import Database
from homespun.server.store.records import decode_spec
from homespun.server.store.schema import checkpoints, grants, plans, rounds, tasks
from homespun.types import Hash


class Catalogue:
    """Named transactions about plans and checkpoints. The bytes are in the blob store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_plan(
        self, plan_hash: Hash, name: str, size_bytes: int, manifest: bytes, now: float
    ) -> None:
        """Idempotent."""
        with self._database.write() as connection:
            if _row(connection, plan_hash) is None:
                connection.execute(
                    insert(plans).values(
                        hash=plan_hash,
                        name=name,
                        size_bytes=size_bytes,
                        manifest=manifest,
                        created_at=now,
                    )
                )

    def manifest(self, plan_hash: Hash) -> bytes:
        """Raises `NotFound`."""
        with self._database.read() as connection:
            row = _row(connection, plan_hash)
        if row is None:
            raise NotFound(
                f"there is no plan {plan_hash[:12]}", hint="push it first: homespun plan push"
            )
        return bytes(row)

    def add_checkpoint(
        self, checkpoint: Hash, plan_hash: Hash, size_bytes: int, now: float
    ) -> None:
        """Idempotent. Raises `NotFound` for an unknown plan."""
        self.manifest(plan_hash)
        with self._database.write() as connection:
            insert_checkpoint(connection, checkpoint, plan_hash, size_bytes, now)

    def has_checkpoint(self, checkpoint: Hash) -> bool:
        query = select(checkpoints.c.hash).where(checkpoints.c.hash == checkpoint)
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def models(self) -> list[CheckpointView]:
        """Pushed checkpoints, and one entry for every committed round that made one."""
        made = rounds.join(tasks, tasks.c.task_id == rounds.c.task_id)
        query = (
            select(
                checkpoints,
                rounds.c.base,
                rounds.c.chain,
                rounds.c.number,
                rounds.c.committed_at,
                tasks.c.name,
            )
            .outerjoin(
                made,
                (rounds.c.checkpoint == checkpoints.c.hash)
                & (tasks.c.plan_hash == checkpoints.c.plan_hash)
                & rounds.c.committed_at.is_not(None),
            )
            .order_by(checkpoints.c.created_at, rounds.c.round_id)
        )
        with self._database.read() as connection:
            return [
                CheckpointView(
                    hash=row.hash,
                    plan_hash=row.plan_hash,
                    parent=row.base,
                    chain=row.chain or "",
                    task_name=row.name,
                    round_number=row.number,
                    created_at=row.committed_at or row.created_at,
                    size_bytes=row.size_bytes,
                )
                for row in connection.execute(query)
            ]

    def trained_by(self, checkpoint: Hash) -> list[TaskSpec]:
        """The training tasks that led to this checkpoint, the last one first; none if it was pushed."""
        found: dict[str, TaskSpec] = {}
        newest = {checkpoint}
        with self._database.read() as connection:
            while newest:
                query = (
                    select(tasks.c.task_id, tasks.c.spec)
                    .distinct()
                    .join(rounds, rounds.c.task_id == tasks.c.task_id)
                    .where(rounds.c.checkpoint.in_(newest), rounds.c.committed_at.is_not(None))
                )
                rows = [row for row in connection.execute(query) if row.task_id not in found]
                specs = {row.task_id: decode_spec(row.spec) for row in rows}
                found |= specs
                newest = {spec.checkpoints[0] for spec in specs.values()}
        return list(found.values())

    def may_download(self, populations: Collection[str], address: Hash) -> bool:
        """Whether one of `populations` was granted this blob."""
        query = select(grants.c.hash).where(
            grants.c.hash == address, grants.c.population.in_(populations)
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None


def insert_checkpoint(
    connection: Connection, checkpoint: Hash, plan_hash: Hash, size_bytes: int, now: float
) -> None:
    """Idempotent."""
    query = select(checkpoints.c.hash).where(
        checkpoints.c.hash == checkpoint, checkpoints.c.plan_hash == plan_hash
    )
    if connection.execute(query).first() is None:
        connection.execute(
            insert(checkpoints).values(
                hash=checkpoint, plan_hash=plan_hash, size_bytes=size_bytes, created_at=now
            )
        )


def grant(connection: Connection, population: str, addresses: Iterable[Hash]) -> None:
    """Let the population's devices download these blobs."""
    wanted = set(addresses)
    query = select(grants.c.hash).where(
        grants.c.population == population, grants.c.hash.in_(wanted)
    )
    for address in sorted(wanted - set(connection.scalars(query))):
        connection.execute(insert(grants).values(population=population, hash=address))


def require_checkpoints(
    connection: Connection, plan_hash: Hash, addresses: Collection[Hash]
) -> None:
    """Raise `NotFound` or `InvalidConfig` unless all of these are checkpoints of the plan."""
    if _row(connection, plan_hash) is None:
        raise NotFound(
            f"there is no plan {plan_hash[:12]}", hint="push it first: homespun plan push"
        )
    query = select(checkpoints).where(checkpoints.c.hash.in_(addresses))
    owners: dict[Hash, set[Hash]] = {}
    for row in connection.execute(query):
        owners.setdefault(row.hash, set()).add(row.plan_hash)
    for address in addresses:
        if address not in owners:
            raise NotFound(
                f"there is no checkpoint {address[:12]}", hint="push it first: homespun model push"
            )
        if plan_hash not in owners[address]:
            raise InvalidConfig(
                f"checkpoint {address[:12]} belongs to another plan",
                expected=plan_hash,
                got=min(owners[address]),
            )


def _row(connection: Connection, plan_hash: Hash) -> bytes | None:
    query = select(plans.c.manifest).where(plans.c.hash == plan_hash)
    return connection.execute(query).scalar()
