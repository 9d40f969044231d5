"""The board: what a check-in is answered with, kept in memory and written anew whenever a round or release moves.

A check-in therefore costs no database work, and thirty or thirty thousand devices that wait cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from homespun.protocol.messages import (
    CheckInReply,
    Offer,
    ReleaseNotice,
    RetryWindow,
)
from homespun.protocol.pacing import IDLE_DEMAND
from homespun.protocol.selection import in_bucket
from homespun.protocol.views import TaskState
from homespun.server.aggregation import contribution_codec, report_size, round_checkpoints
from homespun.server.blobs import Blobs
from homespun.server.library import Library
from homespun.server.paces import Paces
from homespun.server.store import Store
from homespun.server.store.records import RoundRecord, TaskRecord


@dataclass(frozen=True)
class Standing:
    """Of one population: open offers with their plan format, newest releases, and when devices come back.

    `shares`: of its active tasks; `retry`: for every device, or None: whenever its pace says; `demand`: check-ins per
    bin of that pace.
    """

    offers: tuple[tuple[int, Offer], ...] = ()
    releases: tuple[ReleaseNotice, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    retry: RetryWindow | None = None
    demand: float = IDLE_DEMAND


class Board:
    """`retry`: for populations that have no task, if it is fixed."""

    def __init__(
        self,
        store: Store,
        library: Library,
        blobs: Blobs,
        paces: Paces,
        retry: RetryWindow | None,
    ) -> None:
        self._store = store
        self._library = library
        self._blobs = blobs
        self._paces = paces
        self._retry = retry
        self._standings: dict[str, Standing] = {}

    def refresh(self, now: float) -> None:
        """Read everything again; the new board replaces the old one in one step."""
        offers: dict[str, list[tuple[int, Offer]]] = {}
        num_wanted: dict[str, int] = {}
        for record in self._store.rounds.live(now):
            num_wanted[record.task.task_id] = _num_wanted(record)
            if record.view.is_admitting:
                offers.setdefault(record.task.spec.population, []).append(self._offer(record))
        releases: dict[str, list[ReleaseNotice]] = {}
        for population, notice in self._store.releases.notices():
            releases.setdefault(population, []).append(notice)
        tasks: dict[str, list[TaskRecord]] = {}
        for task in self._store.tasks.all():
            tasks.setdefault(task.spec.population, []).append(task)
        self._standings = {
            population: self._standing(
                population,
                tuple(offers.get(population, ())),
                tuple(releases.get(population, ())),
                tasks.get(population, []),
                num_wanted,
            )
            for population in {*offers, *releases, *tasks}
        }
        self._paces.keep({task for each in self._standings.values() for task in each.shares})

    def _standing(
        self,
        population: str,
        offers: tuple[tuple[int, Offer], ...],
        releases: tuple[ReleaseNotice, ...],
        tasks: list[TaskRecord],
        num_wanted: dict[str, int],
    ) -> Standing:
        """`tasks`: all of the population, oldest first; without an active one the last says when to come back."""
        active = [task for task in tasks if task.state is TaskState.ACTIVE]
        windows = [task.spec.retry for task in active or tasks[-1:] if task.spec.retry is not None]
        fixed = windows or ([] if active or self._retry is None else [self._retry])
        wanted = self._paces.demand(
            population,
            [(t.spec, num_wanted.get(t.task_id, t.spec.cohort_size)) for t in active],
        )
        return Standing(
            offers,
            releases,
            {task.task_id: task.spec.share for task in active},
            min(fixed, key=lambda window: window.earliest_s, default=None),
            max(wanted, IDLE_DEMAND),
        )

    def standing(self, population: str) -> Standing:
        return self._standings.get(population) or Standing(retry=self._retry)

    def offers(self, population: str, device_id: str, formats: tuple[int, ...]) -> list[Offer]:
        """The offers that this device could take; those whose round has been open longest come first."""
        return [
            offer
            for plan_format, offer in self.standing(population).offers
            if plan_format in formats and in_bucket(offer.criteria.bucket, device_id)
        ]

    def reply(self, population: str, offers: list[Offer], now: float) -> CheckInReply:
        """The answer to a check-in, once and for all: whose turn it is and when to come back are counted here."""
        standing = self.standing(population)
        open_still = [offer for offer in offers if offer.task_id in standing.shares]
        return CheckInReply(
            offers=self._paces.order(population, open_still, standing.shares, now),
            releases=standing.releases,
            retry=self.retry(population, now, may_claim=bool(open_still)),
        )

    def retry(self, population: str, now: float, *, may_claim: bool = False) -> RetryWindow:
        """When a device comes back; `may_claim`: only if it does not take up an offer."""
        standing = self.standing(population)
        return standing.retry or self._paces.window(
            population, standing.demand, now, may_claim=may_claim
        )

    def _offer(self, record: RoundRecord) -> tuple[int, Offer]:
        spec = record.task.spec
        manifest = self._library.manifest(spec.plan_hash)
        codec = contribution_codec(spec, manifest, record.number, record.attempt)
        checkpoints = round_checkpoints(spec, record.base)
        offer = Offer(
            task_id=record.task.task_id,
            task_name=spec.name,
            kind=spec.kind,
            round_number=record.number,
            attempt=record.attempt,
            plan_hash=spec.plan_hash,
            criteria=spec.criteria,
            aggregation=spec.aggregation,
            min_group=spec.min_group,
            download_bytes=sum(self._blobs.size(h) for h in (spec.plan_hash, *checkpoints)),
            upload_bytes=report_size(spec, codec),
            watch=spec.watch,
            mode=spec.mode,
            max_staleness=spec.max_staleness,
        )
        return manifest.format, offer


def _num_wanted(record: RoundRecord) -> int:
    """Devices that a round could use in its selection window; one that is async lets in as many as it has places."""
    spec = record.task.spec
    if spec.is_async:
        return max(spec.goal, spec.concurrency - record.view.num_open)
    return record.num_wanted
