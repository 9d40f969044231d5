"""The paces and turns of all populations: what `protocol.pacing` and `protocol.selection` keep, here in memory.

Counts only; a restart takes them up as they were at most a minute before. Requests come from several threads.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection

from homespun.protocol.messages import Offer, RetryWindow
from homespun.protocol.pacing import BIN_S, Pace, demand, in_bin
from homespun.protocol.selection import Turns
from homespun.protocol.tasks import TaskSpec
from homespun.server.store import Store


class Paces:
    """Of every population that checked in."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._paces: dict[str, Pace] = defaultdict(Pace, store.pacing.all())
        self._turns = Turns()
        self._settled_at = 0.0

    def arrive(self, population: str, now: float) -> None:
        with self._lock:
            self._paces[population].arrive(now)

    def demand(self, population: str, tasks: Collection[tuple[TaskSpec, int]]) -> float:
        """Check-ins per bin that these tasks need. `tasks`: with the number of devices that each wants.

        Only check-ins of the devices in a task's bucket can lead to a claim.
        """
        with self._lock:
            claims = self._paces[population].claims
        total = 0.0
        for spec, num_wanted in tasks:
            bucket = spec.criteria.bucket
            share = 1.0 if bucket is None else bucket.high - bucket.low
            total += demand(max(spec.pool_target, num_wanted), spec.selection_s, *claims) / share
        return total

    def window(
        self, population: str, wanted: float, now: float, *, may_claim: bool = False
    ) -> RetryWindow:
        """When a device comes back, promised. `may_claim`: only if it does not take up an offer."""
        with self._lock:
            pace = self._paces[population]
            claimed, not_claimed = pace.claims
            share = not_claimed / (claimed + not_claimed) if may_claim else 1.0
            return in_bin(float(pace.promise(now, wanted, share=share)[0]))

    def order(
        self, population: str, offers: Collection[Offer], shares: dict[str, float], now: float
    ) -> tuple[Offer, ...]:
        """The offers to a device that checked in, that of the task furthest behind its share first."""
        if not offers:
            return ()
        by_task = {offer.task_id: offer for offer in offers}
        with self._lock:
            # A task that was stopped this moment has no share any more.
            order = self._turns.order([(task, shares.get(task, 1.0)) for task in by_task], now)
            self._turns.offer(order[0], now)
            self._paces[population].offer()
        return tuple(by_task[task] for task in order)

    def claim(self, population: str, task_id: str, now: float) -> None:
        """A device claimed a place in this task's round, for the first time."""
        with self._lock:
            self._paces[population].claim()
            self._turns.claim(task_id, now)

    def full(self, task_id: str, now: float) -> None:
        """A device that claimed a place in this task's round found none."""
        with self._lock:
            self._turns.full(task_id, now)

    def keep(self, task_ids: Collection[str]) -> None:
        """Forget the turns of all other tasks."""
        with self._lock:
            self._turns.keep(task_ids)

    def settle(self, now: float) -> None:
        """Once a minute: count what became of the devices that were drawn, and `save`."""
        if abs(now - self._settled_at) >= BIN_S:
            self._settled_at = now
            self._store.rates.tally(now)
            self.save()

    def save(self) -> None:
        """Make durable what was promised."""
        with self._lock:
            records = {name: pace.saved() for name, pace in self._paces.items()}
        self._store.pacing.save(records)
