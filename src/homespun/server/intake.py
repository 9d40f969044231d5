"""Intake: contributions become part of a running sum, in batches that are durable before anyone is told.

    body -> checked -> queue -> (20 ms or 64 uploads) -> added, snapshot of the sum synced, rows committed -> receipts

Per open round there is one sum and one worker, so memory grows with the models and the open rounds, never with
the cohort, and the snapshot is written from the sum itself without a copy. The database decides: a batch whose
rows are refused was never added, and the sum is read again from the last snapshot.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.protocol.frame import decode_contribution, frame_parts
from homespun.server.aggregation import round_scope
from homespun.server.batches import Batches
from homespun.server.blobs import Blobs, discard
from homespun.server.settings import Settings
from homespun.server.store import Store
from homespun.server.store.records import Recorded
from homespun.types import Hash


@dataclass(frozen=True, eq=False)
class _Upload:
    """A checked contribution."""

    receipt_id: Hash
    digest: Hash
    contribution: Contribution


@dataclass
class _Sum:
    """The running sum of one round. `total` is None when it has to be read from `snapshot` first."""

    round_id: int
    codec: ContributionCodec
    batches: Batches[_Upload, bool]
    total: Contribution | None = None
    snapshot: Hash | None = None


class Intake:
    """`on_due` is called when a batch may have brought a round to its goal."""

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
        running = self._sums.get(round_id) or self._begin(round_id, codec)
        return await running.batches.add(_Upload(receipt_id, digest, contribution))

    def keep(self, round_ids: Collection[int]) -> None:
        """Drop the sums of all other rounds from memory."""
        for round_id in self._sums.keys() - set(round_ids):
            del self._sums[round_id]

    async def drain(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*(running.batches.drain() for running in self._sums.values()))

    def _begin(self, round_id: int, codec: ContributionCodec) -> _Sum:
        async def commit(batch: list[_Upload]) -> list[bool]:
            accepted, due = await asyncio.to_thread(self._commit, running, batch)
            if due:
                self._on_due()
            return [upload in accepted for upload in batch]

        running = _Sum(round_id, codec, Batches(commit, self._settings))
        self._sums[round_id] = running
        return running

    def _commit(self, running: _Sum, batch: list[_Upload]) -> tuple[list[_Upload], bool]:
        """Make a batch durable, leaving out what the store refuses. Runs in a worker thread."""
        # Of two uploads for one assignment the first counts; the other then finds the receipt settled.
        fresh = {upload.receipt_id: upload for upload in reversed(batch)}
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
                    discard(scope, previous)
                return list(fresh.values()), outcome.due
            running.total = None
            discard(scope, snapshot)
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


@dataclass(frozen=True, eq=False)
class _Turn:
    """A body that waits for `size` bytes."""

    population: str
    size: int
    granted: asyncio.Future[None]


class ByteBudget:
    """Bounds the bytes of bodies in memory.

    What becomes free goes to the population that holds the fewest bytes, so that none waits for more than what it finds
    under way; within a population whoever comes first is served first, however much it asks for.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._held: Counter[str] = Counter()
        self._queue: list[_Turn] = []

    @asynccontextmanager
    async def hold(self, size: int, population: str = "") -> AsyncIterator[None]:
        """Wait until `size` bytes are free; more than the whole budget waits for all of it."""
        turn = _Turn(population, min(size, self._size), asyncio.get_running_loop().create_future())
        self._queue.append(turn)
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.cancelled():
                self._queue.remove(turn)
                self._grant()  # it may have been in the way
            else:
                self._give_back(turn)
            raise
        try:
            yield
        finally:
            self._give_back(turn)

    def _give_back(self, turn: _Turn) -> None:
        self._free += turn.size
        self._held[turn.population] -= turn.size
        self._held = +self._held  # populations that hold nothing are forgotten
        self._grant()

    def _grant(self) -> None:
        """Serve who is next, and wait for that one rather than let smaller bodies pass."""
        while waiting := [turn for turn in self._queue if not turn.granted.cancelled()]:
            turn = min(waiting, key=lambda each: self._held[each.population])
            if turn.size > self._free:
                return
            self._queue.remove(turn)
            self._free -= turn.size
            self._held[turn.population] += turn.size
            turn.granted.set_result(None)
