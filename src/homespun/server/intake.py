"""Intake: contributions become part of a running sum, in groups that are durable before anyone is told.

    body -> checked -> queue -> (20 ms or 64 uploads) -> added, snapshot of the sum synced, rows committed -> receipts

Per open round there is one sum and one worker, so memory grows with the models and the open rounds, never with
the cohort, and the snapshot is written from the sum itself without a copy. The database decides: a group whose
rows are refused was never added, and the sum is read again from the last snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from homespun.errors import HomespunError
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.protocol.frame import decode_contribution, frame_parts
from homespun.server.aggregation import round_scope
from homespun.server.blobs import Blobs
from homespun.server.settings import Settings
from homespun.server.store import Store
from homespun.server.store.records import Recorded
from homespun.types import Hash

log = structlog.get_logger()


@dataclass(frozen=True, eq=False)
class _Upload:
    """A checked contribution that waits for its group; `done` becomes True when durable, False when refused."""

    receipt_id: Hash
    digest: Hash
    contribution: Contribution
    done: asyncio.Future[bool]


@dataclass
class _Sum:
    """The running sum of one round. `total` is None when it has to be read from `snapshot` first."""

    round_id: int
    codec: ContributionCodec
    queue: deque[_Upload] = field(default_factory=deque)
    full: asyncio.Event = field(default_factory=asyncio.Event)
    worker: asyncio.Task[None] | None = None
    total: Contribution | None = None
    snapshot: Hash | None = None


class Intake:
    """`on_due` is called when a group may have brought a round to its goal."""

    def __init__(
        self, store: Store, private: Blobs, settings: Settings, on_due: Callable[[], None]
    ) -> None:
        self._store = store
        self._private = private
        self._settings = settings
        self._on_due = on_due
        self._sums: dict[int, _Sum] = {}

    async def add(
        self,
        round_id: int,
        codec: ContributionCodec,
        receipt_id: Hash,
        digest: Hash,
        contribution: Contribution,
    ) -> bool:
        """Add a checked contribution to its round. True: in the sum, durably. False: not expected any more.

        Raises `StorageFailure` when it could not be made durable; then it is not in the sum.
        """
        running = self._sums.setdefault(round_id, _Sum(round_id, codec))
        upload = _Upload(
            receipt_id, digest, contribution, asyncio.get_running_loop().create_future()
        )
        running.queue.append(upload)
        if len(running.queue) >= self._settings.group_size:
            running.full.set()
        if running.worker is None:
            running.worker = asyncio.create_task(self._work(running))
        return await upload.done

    def keep(self, round_ids: Collection[int]) -> None:
        """Drop the sums of all other rounds from memory."""
        for round_id in self._sums.keys() - set(round_ids):
            del self._sums[round_id]

    async def drain(self) -> None:
        """Wait for the groups that are under way."""
        workers = [running.worker for running in self._sums.values() if running.worker is not None]
        await asyncio.gather(*workers)

    async def _work(self, running: _Sum) -> None:
        while running.queue:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.group_s):
                    await running.full.wait()
            size = min(len(running.queue), self._settings.group_size)
            group = [running.queue.popleft() for _ in range(size)]
            if len(running.queue) < self._settings.group_size:
                running.full.clear()
            try:
                accepted, due = await asyncio.to_thread(self._commit, running, group)
            except HomespunError as error:
                log.warning("reports not taken", round_id=running.round_id, reason=error.message)
                _fail(group, error)
            except Exception as error:  # the worker must go on; every upload learns of it
                log.exception("reports not taken", round_id=running.round_id)
                _fail(group, error)
            else:
                for upload in group:
                    if not upload.done.done():
                        upload.done.set_result(upload in accepted)
                if due:
                    self._on_due()
        running.worker = None

    def _commit(self, running: _Sum, group: list[_Upload]) -> tuple[list[_Upload], bool]:
        """Make a group durable, leaving out what the store refuses. Runs in a worker thread."""
        # Of two uploads for one assignment the first counts; the other then finds the receipt settled.
        fresh = {upload.receipt_id: upload for upload in reversed(group)}
        while fresh:
            try:
                if running.total is None:
                    self._load(running)
                assert running.total is not None
                for upload in fresh.values():
                    running.codec.add(running.total, upload.contribution)
                scope = round_scope(self._private, running.round_id)
                snapshot = scope.put(*frame_parts(running.total))
                outcome = self._store.reports.record(
                    running.round_id,
                    running.snapshot,
                    snapshot,
                    {upload.receipt_id: upload.digest for upload in fresh.values()},
                )
            except BaseException:
                running.total = None
                raise
            if isinstance(outcome, Recorded):
                previous, running.snapshot = running.snapshot, snapshot
                if previous is not None:
                    _discard(scope, previous)
                return list(fresh.values()), outcome.due
            running.total = None
            _discard(scope, snapshot)
            for refused in outcome.receipt_ids:
                del fresh[refused]
        return [], False

    def _load(self, running: _Sum) -> None:
        running.snapshot = self._store.reports.snapshot(running.round_id)
        if running.snapshot is None:
            running.total = running.codec.empty()
        else:
            scope = round_scope(self._private, running.round_id)
            running.total = decode_contribution(scope.get(running.snapshot))


class ByteBudget:
    """Bounds the bytes of bodies in memory; who comes first is served first, however much it asks for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait until `size` bytes are free; more than the whole budget waits for all of it."""
        size = min(size, self._size)
        if self._queue or size > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(size)
                else:
                    with contextlib.suppress(ValueError):
                        self._queue.remove((size, turn))
                raise
        else:
            self._free -= size
        try:
            yield
        finally:
            self._give_back(size)

    def _give_back(self, size: int) -> None:
        self._free += size
        while self._queue and self._queue[0][0] <= self._free:
            wanted, turn = self._queue.popleft()
            if not turn.done():
                self._free -= wanted
                turn.set_result(None)


def _fail(group: list[_Upload], error: Exception) -> None:
    for upload in group:
        if not upload.done.done():
            upload.done.set_exception(error)


def _discard(scope: Blobs, snapshot: Hash) -> None:
    """Forget a snapshot that nothing refers to; what cannot be deleted now goes with the round."""
    with contextlib.suppress(HomespunError):
        scope.delete(snapshot)
