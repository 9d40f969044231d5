"""Releases: from a checkpoint to what devices serve, every step with its reason, every promotion with evidence.

    TRAINED -> CHECKED -> EVALUATING -> PASSED -> DEPLOYED (its predecessor SUPERSEDED)     or REJECTED

Evidence is a finished evaluation task over (candidate, incumbent, ...) on devices that did not train the
candidate. The first release of a slot has no incumbent and needs none.
"""

from __future__ import annotations

import secrets
from math import sqrt

import structlog

from homespun.errors import Conflict, InvalidConfig, NumericFailure, ShapeMismatch
from homespun.learning.metrics import MetricSum
from homespun.protocol.messages import TaskKind
from homespun.protocol.release import ReleaseEvent, ReleaseState
from homespun.protocol.views import Evidence, TaskState
from homespun.server.keys import Keys
from homespun.server.library import Library
from homespun.server.store import Store
from homespun.server.store.records import ReleaseRecord, ReleaseRequest, TaskRecord

log = structlog.get_logger()


class ReleaseDesk:
    """Takes requests and moves releases as far as they can go now."""

    def __init__(self, store: Store, library: Library, keys: Keys) -> None:
        self._store = store
        self._library = library
        self._keys = keys

    def create(self, request: ReleaseRequest, now: float) -> ReleaseRecord:
        """Begin a release and take it as far as it goes.

        Raises `NotFound`, `Conflict`, or `InvalidConfig` when the evidence cannot speak for this release.
        """
        self._check_evidence(request)
        release = self._store.releases.add(request, secrets.token_hex(16), now)
        return self._advance(release, now)

    def advance(self, now: float) -> list[ReleaseRecord]:
        """Move every release that is on its way; those that moved."""
        before = self._store.releases.on_the_way()
        after = [self._advance(release, now) for release in before]
        return [new for old, new in zip(before, after, strict=True) if new.state != old.state]

    def _check_evidence(self, request: ReleaseRequest) -> None:
        incumbent = self._store.releases.deployed(request.population, request.slot)
        if request.evaluation_task_id is None:
            if incumbent is not None and incumbent.version != request.version:
                raise InvalidConfig(
                    f"slot {request.slot} already serves {incumbent.version}: evidence is needed",
                    hint="evaluate the candidate against it and name that task",
                )
            return
        spec = self._store.tasks.get(request.evaluation_task_id).spec
        if spec.kind is not TaskKind.EVALUATE or spec.population != request.population:
            raise InvalidConfig(
                f"task {spec.name} is no evaluation on population {request.population}"
            )
        if spec.plan_hash != request.plan_hash or spec.checkpoints[0] != request.checkpoint:
            raise InvalidConfig(
                f"task {spec.name} did not evaluate this checkpoint first",
                expected=request.checkpoint,
                got=spec.checkpoints[0],
            )
        if len(spec.checkpoints) < 2:
            raise InvalidConfig(
                f"task {spec.name} compares with nothing", hint="evaluate (candidate, incumbent)"
            )

    def _advance(self, release: ReleaseRecord, now: float) -> ReleaseRecord:
        while True:
            try:
                moved = self._step(release, now)
            except Conflict:
                latest = self._store.releases.get(release.release_id)
                if latest.state == release.state:
                    raise
                release = latest  # the scheduler and a request look at once: go on from there
                continue
            if moved is None:
                return release
            log.info(
                "release",
                population=moved.population,
                slot=moved.slot,
                version=moved.version,
                state=str(moved.state),
                reason=moved.reason,
            )
            release = moved

    def _step(self, release: ReleaseRecord, now: float) -> ReleaseRecord | None:
        """One row of the release table, or None: it waits, or is at an end."""
        move, release_id = self._store.releases.move, release.release_id
        match release.state:
            case ReleaseState.TRAINED:
                try:
                    manifest = self._library.manifest(release.plan_hash)
                    manifest.check_checkpoint(self._library.checkpoint(release.checkpoint))
                except (ShapeMismatch, NumericFailure) as error:
                    return move(release_id, ReleaseEvent.REJECT, now, error.message)
                return move(release_id, ReleaseEvent.CHECK, now)
            case ReleaseState.CHECKED:
                return move(release_id, ReleaseEvent.EVALUATE, now)
            case ReleaseState.EVALUATING:
                return self._judge(release, now)
            case ReleaseState.PASSED:
                return self._store.releases.deploy(release_id, now, self._keys.sign_release)
            case _:
                return None

    def _judge(self, release: ReleaseRecord, now: float) -> ReleaseRecord | None:
        move, release_id = self._store.releases.move, release.release_id
        incumbent = self._store.releases.deployed(release.population, release.slot)
        if release.evaluation_task_id is None:
            if incumbent is not None:
                return move(release_id, ReleaseEvent.REJECT, now, "there is no evidence")
            return move(release_id, ReleaseEvent.PASS, now, "the first release of its slot")
        task = self._store.tasks.get(release.evaluation_task_id)
        if task.state is TaskState.ACTIVE:
            return None
        if task.state is not TaskState.FINISHED:
            reason = f"its evaluation {task.spec.name} was {task.state}"
            return move(release_id, ReleaseEvent.REJECT, now, reason)
        if incumbent is not None and incumbent.checkpoint != task.spec.checkpoints[1]:
            reason = f"compared with {task.spec.checkpoints[1][:12]}, which is not what is served"
            return move(release_id, ReleaseEvent.REJECT, now, reason)
        evidence = self._evidence(task, now)
        better = evidence.mean_difference > -release.margin
        event = ReleaseEvent.PASS if better else ReleaseEvent.REJECT
        reason = "" if better else f"worse than the incumbent by more than {release.margin:g}"
        return move(release_id, event, now, reason, evidence)

    def _evidence(self, task: TaskRecord, now: float) -> Evidence:
        totals: dict[str, MetricSum] = {}
        for summary in self._store.rounds.summaries(now, task.task_id):
            for name, value in summary.metrics.items():
                more = MetricSum(value.sum, value.count)
                totals[name] = totals.get(name, MetricSum(0.0, 0.0)) + more
        primary = self._library.manifest(task.spec.plan_hash).metrics[0]
        mean, error = mean_and_error(totals["difference"], totals["difference_squared"])
        return Evidence(
            task_id=task.task_id,
            metric=primary,
            num_devices=round(totals["difference"].count),
            mean_difference=mean,
            standard_error=error,
            wins=round(totals["wins"].sum),
            candidate=totals[f"0.{primary}"].mean,
            incumbent=totals[f"1.{primary}"].mean,
        )


def mean_and_error(values: MetricSum, squares: MetricSum) -> tuple[float, float]:
    """Mean and its standard error from sum, sum of squares and count (0 when there are fewer than two)."""
    count = values.count
    if count < 2:
        return values.mean, 0.0
    variance = max(0.0, squares.sum - count * values.mean**2) / (count - 1)
    return values.mean, sqrt(variance / count)
