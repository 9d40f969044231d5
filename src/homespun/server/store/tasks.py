"""Tasks: created with their first round planned, stopped with their open round cancelled."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from homespun.errors import Conflict, NotFound
from homespun.protocol.messages import encode
from homespun.protocol.round import ROUND, RoundEvent, RoundState
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import TaskState
from homespun.server.store.catalogue import grant, require_checkpoints
from homespun.server.store.database import Database
from homespun.server.store.enrolment import require_population
from homespun.server.store.events import add_event
from homespun.server.store.records import TaskRecord, task_record
from homespun.server.store.rounds import end_round, plan_round
from homespun.server.store.schema import rounds, tasks
from homespun.types import Hash

CANCELLABLE = tuple(row.source for row in ROUND.rows if row.event is RoundEvent.CANCEL)


class Tasks:
    """Named transactions about tasks; their rounds are in `Rounds`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, spec: TaskSpec, task_id: str, chain: Hash, now: float) -> TaskRecord:
        """Create a task, see `create_task`."""
        with self._database.write() as connection:
            return create_task(connection, spec, task_id, chain, now)

    def get(self, task_id: str) -> TaskRecord:
        """Raises `NotFound`."""
        with self._database.read() as connection:
            return _task(connection, task_id)

    def all(self) -> list[TaskRecord]:
        """All tasks, oldest first."""
        with self._database.read() as connection:
            query = select(tasks).order_by(tasks.c.created_at, tasks.c.name)
            return [task_record(row) for row in connection.execute(query)]

    def stop(self, task_id: str, now: float) -> TaskRecord:
        """Stop an active task, see `stop_task`."""
        with self._database.write() as connection:
            return stop_task(connection, task_id, now)


def create_task(
    connection: Connection, spec: TaskSpec, task_id: str, chain: Hash, now: float
) -> TaskRecord:
    """Create a task, let its population see what it needs, and plan its first round.

    `chain`: the hash chain at the initial checkpoint. Repeating the description of a task that is active
    returns that task. Raises `NotFound`, `InvalidConfig`, or `Conflict` when another active task of the
    population has this name.
    """
    text = encode(spec).decode()
    require_population(connection, spec.population)
    require_checkpoints(connection, spec.plan_hash, spec.checkpoints)
    namesake = connection.execute(
        select(tasks).where(
            tasks.c.population == spec.population,
            tasks.c.name == spec.name,
            tasks.c.state == TaskState.ACTIVE,
        )
    ).first()
    if namesake is not None and namesake.spec == text:
        return task_record(namesake)
    if namesake is not None:
        raise Conflict(
            f"population {spec.population} has another active task named {spec.name}",
            hint="stop it first, or choose another name",
            task_id=namesake.task_id,
        )
    connection.execute(
        insert(tasks).values(
            task_id=task_id,
            name=spec.name,
            population=spec.population,
            plan_hash=spec.plan_hash,
            spec=text,
            state=TaskState.ACTIVE,
            reason="",
            created_at=now,
            head=spec.checkpoints[0],
            chain=chain,
            rounds_committed=0,
            failures=0,
        )
    )
    grant(connection, spec.population, (spec.plan_hash, *spec.checkpoints))
    plan_round(connection, task_id, 1, 1, spec.checkpoints[0])
    add_event(connection, "task.created", now, spec.name, task_id=task_id)
    return _task(connection, task_id)


def stop_task(connection: Connection, task_id: str, now: float) -> TaskRecord:
    """Stop an active task; its live round is cancelled, what it was sent is void. Idempotent."""
    task = _task(connection, task_id)
    if task.state is not TaskState.ACTIVE:
        return task
    live = connection.execute(
        select(rounds).where(rounds.c.task_id == task_id, rounds.c.state.in_(CANCELLABLE))
    ).first()
    if live is not None:
        reason = "the task was stopped"
        cancelled = ROUND.next(RoundState(live.state), RoundEvent.CANCEL)
        end_round(connection, live.round_id, cancelled, reason)
    connection.execute(
        update(tasks).where(tasks.c.task_id == task_id).values(state=TaskState.STOPPED)
    )
    add_event(connection, "task.stopped", now, task.spec.name, task_id=task_id)
    return _task(connection, task_id)


def _task(connection: Connection, task_id: str) -> TaskRecord:
    row = connection.execute(select(tasks).where(tasks.c.task_id == task_id)).first()
    if row is None:
        raise NotFound(f"there is no task {task_id}", hint="list them: homespun task ls")
    return task_record(row)
