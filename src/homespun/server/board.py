"""The board: what a check-in is answered with, kept in memory and written anew whenever a round or release moves.

A check-in therefore costs no database work, and thirty or thirty thousand devices that wait cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from homespun.protocol.messages import (
    CheckInReply,
    Offer,
    ReleaseNotice,
    RetryWindow,
)
from homespun.protocol.selection import in_bucket
from homespun.protocol.views import TaskState
from homespun.server.aggregation import contribution_codec, report_size, round_checkpoints
from homespun.server.blobs import Blobs
from homespun.server.library import Library
from homespun.server.store import Store
from homespun.server.store.records import RoundRecord, TaskRecord


@dataclass(frozen=True)
class Standing:
    """Of one population: open offers with their plan format, newest releases, and when to come back."""

    offers: tuple[tuple[int, Offer], ...] = ()
    releases: tuple[ReleaseNotice, ...] = ()
    retry: RetryWindow | None = None


class Board:
    """`retry`: for populations that have no task."""

    def __init__(
        self, store: Store, library: Library, blobs: Blobs, default_retry: RetryWindow
    ) -> None:
        self._store = store
        self._library = library
        self._blobs = blobs
        self._default_retry = default_retry
        self._standings: dict[str, Standing] = {}

    def refresh(self, now: float) -> None:
        """Read everything again; the new board replaces the old one in one step."""
        offers: dict[str, list[tuple[int, Offer]]] = {}
        for record in self._store.rounds.live(now):
            if record.view.is_admitting:
                offers.setdefault(record.task.spec.population, []).append(self._offer(record))
        releases: dict[str, list[ReleaseNotice]] = {}
        for population, notice in self._store.releases.notices():
            releases.setdefault(population, []).append(notice)
        retries = _retries(self._store.tasks.all())
        self._standings = {
            population: Standing(
                tuple(offers.get(population, ())),
                tuple(releases.get(population, ())),
                retries.get(population),
            )
            for population in {*offers, *releases, *retries}
        }

    def standing(self, population: str) -> Standing:
        return self._standings.get(population, Standing())

    def reply(self, population: str, device_id: str, formats: tuple[int, ...]) -> CheckInReply:
        """The offers that this device could take; those whose round has been open longest come first."""
        standing = self.standing(population)
        return CheckInReply(
            offers=tuple(
                offer
                for plan_format, offer in standing.offers
                if plan_format in formats and in_bucket(offer.criteria.bucket, device_id)
            ),
            releases=standing.releases,
            retry=standing.retry or self._default_retry,
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


def _retries(tasks: list[TaskRecord]) -> dict[str, RetryWindow]:
    """Per population: the earliest window of its active tasks; without any, that of its last one."""
    active: dict[str, RetryWindow] = {}
    last: dict[str, RetryWindow] = {}
    for task in tasks:
        population, retry = task.spec.population, task.spec.retry
        last[population] = retry
        if task.state is TaskState.ACTIVE:
            known = active.get(population, retry)
            active[population] = min(known, retry, key=lambda window: window.earliest_s)
    return last | active
