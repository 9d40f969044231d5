"""Groups of secure aggregation: which one a device belongs to, what is asked of it next, and when steps end.

    answer -> queue -> (20 ms or 64 answers) -> taken, snapshot synced, rows committed -> what is asked next

Every group has one worker that takes answers in batches and ends steps. A device that asks while others are awaited
waits for its group's notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import structlog

from homespun.clock import Clock
from homespun.errors import Expired, HomespunError, WrongStep
from homespun.protocol.group import LIVE, due
from homespun.protocol.messages import Carried, GroupReply, ReportState, Settled
from homespun.protocol.round import RoundState
from homespun.secagg.messages import AdvertiseKeys, Terms
from homespun.server.aggregation import (
    contribution_codec,
    encoding,
    group_terms,
    round_scope,
)
from homespun.server.batches import Batches
from homespun.server.blobs import Blobs
from homespun.server.group import AGAIN, Answer, Arrival, LiveGroup
from homespun.server.library import Library
from homespun.server.notify import SCHEDULER, Notices, group_topic, round_topic
from homespun.server.settings import Settings
from homespun.server.store import Store
from homespun.server.store.records import Expectation, GroupRecord, TaskRecord
from homespun.types import Hash

log = structlog.get_logger()

_JOIN_TRIES = 5
"""A group may fill up or close while a device is joining it; then the next one is tried."""


class GroupDesk:
    """All groups of all rounds."""

    def __init__(
        self,
        *,
        store: Store,
        library: Library,
        private: Blobs,
        settings: Settings,
        notices: Notices,
        clock: Clock,
    ) -> None:
        self._store = store
        self._library = library
        self._private = private
        self._settings = settings
        self._notices = notices
        self._clock = clock
        self._live: dict[int, tuple[LiveGroup, Batches[Arrival | None, None]]] = {}
        self._opening = asyncio.Lock()

    async def ask(self, expected: Expectation, identity: bytes) -> GroupReply | None:
        """What is asked next of the device `identity`; None when its group is over or goes on without it."""
        if expected.receipt.state not in (ReportState.EXPECTED, ReportState.ACKNOWLEDGED):
            return Settled(receipt=expected.receipt)
        if expected.group_id is not None:
            found = await self._find(expected.group_id)
            return None if found is None else found[0].ask(identity)
        now, spec = self._clock.now(), expected.task.spec
        if spec.max_staleness and now >= expected.expires_at:
            await asyncio.to_thread(self._store.reports.expire, expected.receipt.assignment_id)
            return None
        if expected.state is not RoundState.RUNNING or now >= expected.deadline_at:
            return AGAIN  # the round is about to close, or the next one to begin
        return await asyncio.to_thread(self._invite, expected)

    async def answer(
        self, expected: Expectation, identity: bytes, answer: Answer, digest: Hash = ""
    ) -> None:
        """Take an answer; it is durable on return, unless its group is over, which changes nothing.

        `digest`: of the body of a masked input. Raises a `SecureAggregationError` or `NotAllowed` for an answer that
        does not fit, `Expired` for one that comes too late, `StorageFailure`.
        """
        arrival = Arrival(expected.receipt.assignment_id, identity, answer, digest)
        if expected.group_id is None:
            open_still = expected.receipt.state is ReportState.EXPECTED
            if open_still and isinstance(answer, AdvertiseKeys):
                if self._clock.now() >= expected.expires_at:
                    raise _too_late()
                await self._join(expected.round_id, arrival)
        else:
            found = await self._find(expected.group_id)
            if found is not None:
                await found[1].add(arrival)

    async def settle(self) -> None:
        """End the steps whose time is over, and those that this makes due."""
        failed: set[int] = set()
        while records := [
            record
            for record in await asyncio.to_thread(self._store.groups.live, self._clock.now())
            if record.group_id not in failed and due(record.view, self._clock.now()) is not None
        ]:
            for record in records:
                try:
                    found = await self._find(record.group_id)
                    if found is not None:
                        await found[1].add(None)  # nobody answered, but the step is over
                except Exception:  # its trouble must not keep other groups and rounds from going on
                    log.exception("a group cannot go on", round_id=record.round_id)
                    failed.add(record.group_id)

    def keep(self, round_ids: Collection[int]) -> None:
        """Drop the groups of all other rounds; who waits for one of them looks again."""
        for group_id, (group, _) in list(self._live.items()):
            if group.record.round_id not in round_ids:
                self._end(group_id)

    async def drain(self) -> None:
        """Wait for the answers that are under way."""
        await asyncio.gather(*(batches.drain() for _, batches in list(self._live.values())))

    async def _join(self, round_id: int, arrival: Arrival) -> None:
        refusal: HomespunError | None = None
        for _ in range(_JOIN_TRIES):
            now = self._clock.now()
            forming = await asyncio.to_thread(self._store.groups.forming, round_id, now)
            found = None if forming is None else await self._find(forming)
            if found is not None:
                try:
                    await found[1].add(arrival)
                    return
                except Expired:
                    return  # settled, or in another group since we looked: what is asked next tells
                except WrongStep as error:
                    refusal = error
        raise refusal or _too_late()

    async def _find(self, group_id: int) -> tuple[LiveGroup, Batches[Arrival | None, None]] | None:
        """A group that is not over and its queue; read from the store after a restart."""
        if group_id in self._live:
            return self._live[group_id]
        async with self._opening:  # once, however many ask at the same time
            if group_id not in self._live:
                now = self._clock.now()
                record = await asyncio.to_thread(self._store.groups.get, group_id, now)
                if record.view.state not in LIVE:
                    return None
                group = await asyncio.to_thread(self._open, record)

                async def work(arrivals: list[Arrival | None]) -> list[HomespunError | None]:
                    return await self._work(group, arrivals)

                self._live[group_id] = group, Batches(work, self._settings)
            return self._live[group_id]

    def _open(self, record: GroupRecord) -> LiveGroup:
        terms = self._terms(record.task, record.base, record.round_number, record.attempt)
        scope = round_scope(self._private, record.round_id)
        return LiveGroup(record, terms, self._store, scope, self._clock)

    def _invite(self, expected: Expectation) -> Terms | Carried:
        """The terms of the round that a device is in now, and what it needs to keep them if it comes from another."""
        task, number, attempt = expected.task, expected.number, expected.attempt
        terms = self._terms(task, expected.base, number, attempt)
        if not expected.is_carried:
            return terms
        manifest = self._library.manifest(task.spec.plan_hash)
        return Carried(
            terms=terms,
            encoding=encoding(task.spec, manifest, number, attempt),
            ancestry=self._store.rounds.ancestry(task.task_id, expected.origin, number),
        )

    def _terms(self, task: TaskRecord, base: Hash, number: int, attempt: int) -> Terms:
        manifest = self._library.manifest(task.spec.plan_hash)
        codec = contribution_codec(task.spec, manifest, number, attempt)
        return group_terms(task, base, number, attempt, codec)

    async def _work(
        self, group: LiveGroup, arrivals: list[Arrival | None]
    ) -> list[HomespunError | None]:
        """Take what came, then end the step if it is complete."""
        answers = [arrival for arrival in arrivals if arrival is not None]
        refused = await asyncio.to_thread(group.take, answers)
        moved, over = await asyncio.to_thread(group.end_steps)
        record = group.record
        if over:
            self._end(record.group_id)
        elif moved:
            self._notices.ring(group_topic(record.group_id))
        if over or moved:
            topic = round_topic(record.task.task_id, record.round_number)
            self._notices.ring(topic, SCHEDULER)
        return [None if arrival is None else refused.get(arrival) for arrival in arrivals]

    def _end(self, group_id: int) -> None:
        self._live.pop(group_id, None)
        self._notices.ring(group_topic(group_id))


def _too_late() -> Expired:
    return Expired("the round takes no more devices", state=ReportState.LATE)
