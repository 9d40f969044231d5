"""What an operator asks of a release: which devices judge it, in which stages it goes, what may not get worse.

The same record in TOML, JSON and the database. It makes the tasks that put its questions to the devices.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import Annotated

from msgspec import Meta

from homespun.errors import InvalidConfig
from homespun.protocol.messages import (
    Aggregation,
    Bucket,
    Count,
    Criteria,
    Message,
    Name,
    Positive,
    RetryWindow,
    Seconds,
    Sha256,
    TaskKind,
    Watch,
)
from homespun.protocol.tasks import GroupSpec, TaskSpec


class Reports(Message, frozen=True, kw_only=True):
    """How rounds of reports about a release are gathered; each field as in a task.

    `goal`: reports that close a round; `minimum`: fewest that are used at all; `min_group`: fewest that are ever
    decoded together; `groups`: of secure aggregation; `over_selection`: devices drawn per report wanted (null: by
    what is known);
    `pool_target`: waiting devices that end the window early (0: none do); `selection_s`: window before the draw;
    `deadline_s`: from the draw to the end of waiting; `retry`: when devices that were not drawn come back
    (null: steered);
    `criteria`: which devices; `aggregation`: plain only if the server may see single reports.
    """

    goal: Positive = 100
    minimum: Positive = 50
    min_group: Annotated[int, Meta(ge=3, lt=2**16)] = 10
    groups: GroupSpec = GroupSpec()
    over_selection: Annotated[float, Meta(ge=1, le=10)] | None = None
    pool_target: Count = 0
    selection_s: Seconds = 60.0
    deadline_s: Annotated[float, Meta(gt=0, le=1e9)] = 600.0
    retry: RetryWindow | None = None
    criteria: Criteria = Criteria()
    aggregation: Aggregation = Aggregation.SECURE


class EvaluationSpec(Message, frozen=True, kw_only=True):
    """Candidate against incumbent on devices that did not train the candidate.

    `margin`: how much worse in the mean it may be (0: it must be better); `clip`: largest difference that counts on
    one device; `most`: devices after which an open question is a rejection; `reports`: how they are gathered.
    Without a bucket in its criteria it gets the devices that the training left out.
    """

    margin: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Meta(gt=0, le=1)] = 0.1
    most: Positive = 10_000
    reports: Reports = Reports()


class Stage(Message, frozen=True, kw_only=True):
    """Devices that serve a release before all do. `fraction`: their share; `soak_s`: shortest time until the next."""

    fraction: Annotated[float, Meta(gt=0, lt=1)]
    soak_s: Seconds = 86_400.0


class WatchSpec(Message, frozen=True, kw_only=True):
    """How much worse the devices of a stage may be in the mean than those of the control band.

    `primary`: margin of the primary metric, which is in [0, 1]; `latency_s`: of a prediction; `failed`: of the share
    of devices that went back to the model before; `most`: devices of the stage after which an open question is a
    rollback; `reports`: how they are gathered.
    """

    primary: Annotated[float, Meta(gt=0, lt=1)] = 0.02
    latency_s: Annotated[float, Meta(gt=0)] = 0.02
    failed: Annotated[float, Meta(gt=0, lt=1)] = 0.02
    most: Positive = 10_000
    reports: Reports = Reports()


class Limits(Message, frozen=True, kw_only=True):
    """What a model may cost a device. `max_size_bytes`: plan and checkpoint; `max_latency_s`: of a prediction."""

    max_size_bytes: Positive = 100_000_000
    max_latency_s: Annotated[float, Meta(gt=0, le=60)] = 0.1


class Trial(Message, frozen=True, kw_only=True):
    """What a machine with a runtime saw of a model before its release was asked for: the golden predictions.

    `runtime`: its name and version; `latency_s`: median of a prediction; `outputs`: by name, some values of what it
    predicts on zeros.
    """

    runtime: str
    latency_s: Annotated[float, Meta(ge=0)]
    outputs: dict[str, tuple[float, ...]] = {}


class ReleaseRequest(Message, frozen=True, kw_only=True):
    """One release for one slot of a population.

    `slot`: which model of the app; `checkpoint`: what is released; `version`: for people; `evaluation`: the question
    to devices that did not train it; `evaluation_task_id`: a task of the operator's that has put it already (null:
    the server does); `stages`: shares of the devices, growing; `watch`: guardrails of the stages; `alpha`: chance of a
    wrong answer, to each of the two questions; `limits`: of size and time; `trial`: what the operator's machine saw.
    """

    population: Name
    slot: Name
    plan_hash: Sha256
    checkpoint: Sha256
    version: Annotated[str, Meta(min_length=1, max_length=100)]
    evaluation: EvaluationSpec = EvaluationSpec()
    evaluation_task_id: str | None = None
    stages: Annotated[tuple[Stage, ...], Meta(max_length=20)] = (
        Stage(fraction=0.01),
        Stage(fraction=0.1),
        Stage(fraction=0.5),
    )
    watch: WatchSpec = WatchSpec()
    alpha: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    limits: Limits = Limits()
    trial: Trial | None = None

    def validate(self) -> None:
        """Raise `InvalidConfig` for values that cannot go together."""
        shares = [stage.fraction for stage in self.stages]
        if any(later <= earlier for earlier, later in pairwise(shares)):
            raise InvalidConfig(
                "each stage must hold more devices than the one before", got=str(shares)
            )
        if self.watch.latency_s >= self.limits.max_latency_s:
            raise InvalidConfig(
                "the margin of latency allows every latency",
                expected=f"< {self.limits.max_latency_s:g} s",
                got=self.watch.latency_s,
            )
        for reports, most in (
            (self.evaluation.reports, self.evaluation.most),
            (self.watch.reports, self.watch.most),
        ):
            if reports.goal > most:
                raise InvalidConfig(
                    "one round asks more devices than may be asked in all",
                    expected=f"goal <= {most}",
                    got=reports.goal,
                )

    def control(self, stage: int) -> float:
        """Share of the control band: as large as the stage, as far as there is room."""
        fraction = self.stages[stage].fraction
        return min(fraction, 1.0 - fraction)

    @property
    def stage_salt(self) -> str:
        """Chooses the devices: the same for all stages of this version, and for nothing else."""
        return f"{self.population}/{self.slot}/{self.version}"

    def evaluation_task(self, name: Name, incumbent: Sha256) -> TaskSpec:
        """Rounds of paired comparison; no device takes part in two."""
        spec = self.evaluation
        return _task(
            name, self, spec.reports, (self.checkpoint, incumbent), spec.most, clip=spec.clip
        )

    def watch_task(self, name: Name, release_id: str) -> TaskSpec:
        """Rounds in which devices of the stage and of the control band say how their model does, each once."""
        watch = Watch(
            slot=self.slot, release_id=release_id, max_latency_s=self.limits.max_latency_s
        )
        # `most` counts devices of the stage; about as many belong to the control band.
        most = 2 * self.watch.most
        return _task(name, self, self.watch.reports, (self.checkpoint,), most, watch=watch)


def _task(
    name: Name,
    request: ReleaseRequest,
    reports: Reports,
    checkpoints: tuple[Sha256, ...],
    most: int,
    clip: float = 1.0,
    watch: Watch | None = None,
) -> TaskSpec:
    num_rounds = ceil(most / reports.minimum)
    fields = {field: getattr(reports, field) for field in reports.__struct_fields__}
    once = {field: getattr(reports.criteria, field) for field in Criteria.__struct_fields__}
    fields["criteria"] = Criteria(**{**once, "min_separation_rounds": num_rounds})
    return TaskSpec(
        name=name,
        population=request.population,
        kind=TaskKind.EVALUATE,
        plan_hash=request.plan_hash,
        checkpoints=checkpoints,
        num_rounds=num_rounds,
        difference_clip=clip,
        watch=watch,
        **fields,
    )


def disjoint(one: Bucket | None, other: Bucket | None) -> bool:
    """Whether no device can belong to both. Buckets of different salts share devices; None holds all."""
    if one is None or other is None or one.salt != other.salt:
        return False
    return one.high <= other.low or other.high <= one.low


def left_out(bucket: Bucket | None) -> Bucket | None:
    """The devices outside `bucket`, if they are one bucket."""
    if (
        bucket is None
        or (bucket.low > 0 and bucket.high < 1)
        or (bucket.low, bucket.high) == (0, 1)
    ):
        return None
    low, high = (bucket.high, 1.0) if bucket.low == 0 else (0.0, bucket.low)
    return Bucket(salt=bucket.salt, low=low, high=high)
