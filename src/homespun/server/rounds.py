"""The scheduler: asks `protocol.round.due` of every live round and carries out what is due.

Everything it knows is in the database, and every step is one transaction, so it can be killed at any instant and
goes on from there. It looks when something happened that may make a step due (a claim filled the pool, a report
reached the goal), and now and then for deadlines. Waiters are woken after the transaction, never before.
"""

from __future__ import annotations

import asyncio

import structlog

from homespun.clock import Clock
from homespun.errors import Conflict, HomespunError, NumericFailure
from homespun.protocol.messages import TaskKind
from homespun.protocol.round import RoundEvent, due
from homespun.server.aggregation import aggregate, task_scope
from homespun.server.blobs import Blobs
from homespun.server.board import Board
from homespun.server.groups import GroupDesk
from homespun.server.intake import Intake
from homespun.server.library import Library
from homespun.server.notify import EVENTS, SCHEDULER, Notices, population_topic, round_topic
from homespun.server.paces import Paces
from homespun.server.releases import ReleaseDesk
from homespun.server.store import Store
from homespun.server.store.records import RoundRecord

log = structlog.get_logger()


class Scheduler:
    """Moves rounds and releases. `settle` is one look; `run` looks for ever."""

    def __init__(
        self,
        *,
        store: Store,
        library: Library,
        blobs: Blobs,
        private: Blobs,
        board: Board,
        desk: ReleaseDesk,
        intake: Intake,
        groups: GroupDesk,
        paces: Paces,
        notices: Notices,
        clock: Clock,
    ) -> None:
        self._store = store
        self._library = library
        self._blobs = blobs
        self._private = private
        self._board = board
        self._desk = desk
        self._intake = intake
        self._groups = groups
        self._paces = paces
        self._notices = notices
        self._clock = clock
        self._turn = asyncio.Lock()
        self._complaints: dict[int, str] = {}
        self._live: set[int] = set()

    async def run(self, tick_s: float) -> None:
        """Look whenever the bell rings, and every `tick_s` seconds for deadlines."""
        with self._notices.listen(SCHEDULER) as bell:
            while not bell.closed:
                try:
                    await self.settle()
                except Exception as error:  # one bad look must not end the looking
                    log.exception("the scheduler failed", error=type(error).__name__)
                await bell.wait(tick_s)

    async def settle(self) -> None:
        """Carry out everything that is due now, then tell those who wait."""
        async with self._turn:
            await self._groups.settle()
            topics = await asyncio.to_thread(self._advance)
            if topics:
                await self.publish(*topics)
            await asyncio.to_thread(self._paces.settle, self._clock.now())

    async def publish(self, *topics: str) -> None:
        """Something in the database changed: write the board anew, then wake who waits for it."""
        live = await asyncio.to_thread(self._look_again)
        self._intake.keep(live)
        self._groups.keep(live)
        self._notices.ring(*topics, EVENTS)

    def _look_again(self) -> set[int]:
        now = self._clock.now()
        self._board.refresh(now)
        live = {record.round_id for record in self._store.rounds.live(now)}
        ended, self._live = self._live - live, live
        if ended:
            self._store.database.forget()
        for name in self._private.scopes():
            kind, _, number = name.partition("-")
            if kind == "round" and int(number) not in live:
                self._private.scope(name).clear()
        return live

    def _advance(self) -> set[str]:
        """Runs in a worker thread. The topics to ring."""
        topics: set[str] = set()
        progress = True
        while progress:
            progress = False
            now = self._clock.now()
            for record in self._store.rounds.live(now):
                event = due(record.view, now)
                if event is not None and self._attempt(record, event, now):
                    progress = True
                    topics |= {
                        population_topic(record.task.spec.population),
                        round_topic(record.task.task_id, record.number),
                    }
            for release in self._desk.advance(now):
                progress = True
                topics |= self._desk.topics(release)
        return topics

    def _attempt(self, record: RoundRecord, event: RoundEvent, now: float) -> bool:
        """Carry out an event; False when it did not happen: another was faster, or it is tried again later."""
        try:
            done = self._apply(record, event, now)
        except Conflict as error:
            log.info("a step was overtaken", round_id=record.round_id, reason=error.message)
            return False
        except HomespunError as error:
            if self._complaints.get(record.round_id) != error.message:  # not once per tick
                log.warning("a round cannot go on", round_id=record.round_id, reason=str(error))
            self._complaints[record.round_id] = error.message
            return False
        except Exception:  # a mistake of ours in one round must not keep the others from going on
            log.exception("a round cannot go on", round_id=record.round_id)
            return False
        self._complaints.pop(record.round_id, None)
        spec = record.task.spec
        log.info(
            "round",
            task=spec.name,
            number=record.number,
            attempt=record.attempt,
            step=str(done),
            waiting=record.view.num_waiting,
            reported=record.view.num_reported,
        )
        return True

    def _apply(self, record: RoundRecord, event: RoundEvent, now: float) -> RoundEvent:
        """One transaction of the store. Returns the event that took place, which may be an abandonment."""
        rounds, round_id = self._store.rounds, record.round_id
        match event:
            case RoundEvent.OPEN:
                rounds.open(round_id, now)
            case RoundEvent.SELECT:
                rounds.select(round_id, now)
            case RoundEvent.CLOSE:
                rounds.close(round_id, now)
            case RoundEvent.UNMASK:
                rounds.unmask(round_id)
            case RoundEvent.ABANDON:
                view = record.view
                reason = f"{view.num_reported} reports; at least {view.minimum} are needed"
                rounds.abandon(round_id, now, reason)
            case RoundEvent.AGGREGATE:
                try:
                    trained = aggregate(record, self._library, self._blobs, self._private)
                except NumericFailure as error:
                    rounds.abandon(round_id, now, error.message)
                    return RoundEvent.ABANDON
                rounds.aggregate(round_id, trained)
            case RoundEvent.COMMIT:
                return self._commit(record, now)
            case RoundEvent.SCRUB:
                rounds.scrub(round_id)
            case _:
                raise Conflict(f"nothing carries out {event}")
        return event

    def _commit(self, record: RoundRecord, now: float) -> RoundEvent:
        rounds, task = self._store.rounds, record.task
        if task.spec.kind is TaskKind.TRAIN and task.head != record.base:
            rounds.abandon(record.round_id, now, "the head has moved")
            return RoundEvent.ABANDON
        size = 0 if record.checkpoint is None else self._blobs.size(record.checkpoint)
        rounds.commit(record.round_id, now, size)
        scope, state = task_scope(self._private, task.task_id), task.optimizer_state
        if state is not None and self._store.tasks.get(task.task_id).optimizer_state != state:
            scope.delete(state)  # the step that needed it is done
        return RoundEvent.COMMIT
