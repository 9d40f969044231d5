"""The release: a model version on its way to the devices of a slot, a few of them at first.

    evaluation    devices that did not train it run the candidate and the incumbent on the same examples
    stages        a growing share of the devices serves it; an equal share, which does not, is its control

Both are questions to `learning.evidence`, put again after every round of reports. `due` says what the answers, the
clock and the request call for; the server carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from math import ceil
from typing import Annotated

from msgspec import Meta

from homespun.errors import InvalidConfig
from homespun.learning.contribution import AUX_SCALE
from homespun.learning.evidence import Gate, Sums, Verdict, overall
from homespun.learning.metrics import ARMS, GUARDRAILS, MetricSum
from homespun.protocol.machine import Machine, Row
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

# --- The machine ----------------------------------------------------------------------------------------


class ReleaseState(StrEnum):
    TRAINED = "trained"
    CHECKED = "checked"
    EVALUATING = "evaluating"
    PASSED = "passed"
    REJECTED = "rejected"
    CANARY = "canary"
    RAMP = "ramp"
    DEPLOYED = "deployed"
    SUPERSEDED = "superseded"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    HELD = "held"


class ReleaseEvent(StrEnum):
    CHECK = "check"
    EVALUATE = "evaluate"
    PASS = "pass"
    REJECT = "reject"
    START_CANARY = "start_canary"
    START_RAMP = "start_ramp"
    DEPLOY = "deploy"
    SUPERSEDE = "supersede"
    RESTORE = "restore"
    ROLL_BACK = "roll_back"
    ROLLED_BACK = "rolled_back"
    HOLD = "hold"


R, E = ReleaseState, ReleaseEvent

RESUMED_BY = {
    R.CHECKED: E.CHECK,
    R.EVALUATING: E.EVALUATE,
    R.PASSED: E.PASS,
    R.CANARY: E.START_CANARY,
    R.RAMP: E.START_RAMP,
    R.DEPLOYED: E.DEPLOY,
}
"""States in which a release can be held, and the event that led there, which happens again when it is resumed."""

RELEASE: Machine[ReleaseState, ReleaseEvent] = Machine(
    "release",
    R.TRAINED,
    (
        Row(R.TRAINED, E.CHECK, R.CHECKED, "finite, fits its plan, within limits"),
        Row(R.TRAINED, E.REJECT, R.REJECTED, "a static check fails"),
        Row(R.CHECKED, E.EVALUATE, R.EVALUATING),
        Row(R.EVALUATING, E.PASS, R.PASSED, "gate passes, or there is no incumbent"),
        Row(R.EVALUATING, E.REJECT, R.REJECTED, "gate rejects, or devices are used up"),
        Row(R.PASSED, E.START_CANARY, R.CANARY),
        Row(R.PASSED, E.DEPLOY, R.DEPLOYED, "no stages, or nothing to compare with"),
        Row(R.CANARY, E.START_RAMP, R.RAMP, "soaked, guardrails hold"),
        Row(R.CANARY, E.DEPLOY, R.DEPLOYED, "the only stage; soaked, guardrails hold"),
        Row(R.CANARY, E.ROLL_BACK, R.ROLLING_BACK, "a guardrail is on the bad side, or a person"),
        Row(R.RAMP, E.START_RAMP, R.RAMP, "another stage follows; soaked, guardrails hold"),
        Row(R.RAMP, E.DEPLOY, R.DEPLOYED, "last stage soaked, guardrails hold"),
        Row(R.RAMP, E.ROLL_BACK, R.ROLLING_BACK, "a guardrail is on the bad side, or a person"),
        Row(R.DEPLOYED, E.SUPERSEDE, R.SUPERSEDED, "its successor is deployed"),
        Row(R.DEPLOYED, E.ROLL_BACK, R.ROLLING_BACK, "a person"),
        Row(R.SUPERSEDED, E.RESTORE, R.DEPLOYED, "its successor is rolled back"),
        Row(R.ROLLING_BACK, E.ROLLED_BACK, R.ROLLED_BACK, "the older release is published"),
        *(Row(state, E.HOLD, R.HELD, "a person") for state in RESUMED_BY),
        *(Row(R.HELD, event, state, "held there") for state, event in RESUMED_BY.items()),
        Row(R.HELD, E.ROLL_BACK, R.ROLLING_BACK, "a person"),
    ),
)

# --- What is asked for ----------------------------------------------------------------------------------


class Reports(Message, frozen=True, kw_only=True):
    """How rounds of reports about a release are gathered; each field as in a task.

    `goal`: reports that close a round; `minimum`: fewest that are used at all; `min_group`: fewest that are ever
    decoded together; `groups`: of secure aggregation; `over_selection`: devices drawn per report wanted;
    `pool_target`: waiting devices that end the window early (0: none do); `selection_s`: window before the draw;
    `deadline_s`: from the draw to the end of waiting; `retry`: when devices that were not drawn come back;
    `criteria`: which devices; `aggregation`: plain only if the server may see single reports.
    """

    goal: Positive = 100
    minimum: Positive = 50
    min_group: Annotated[int, Meta(ge=3, lt=2**16)] = 10
    groups: GroupSpec = GroupSpec()
    over_selection: Annotated[float, Meta(ge=1, le=10)] = 1.3
    pool_target: Count = 0
    selection_s: Seconds = 60.0
    deadline_s: Annotated[float, Meta(gt=0, le=1e9)] = 600.0
    retry: RetryWindow = RetryWindow(earliest_s=60.0, latest_s=300.0)
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


# --- What the answers mean ------------------------------------------------------------------------------


class Reported(Message, frozen=True, kw_only=True):
    """`num_devices` reports of one number: their total, and the total of their squares."""

    num_devices: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def sums(self) -> Sums:
        return Sums(self.num_devices, self.total, self.squares)


class Finding(Message, frozen=True, kw_only=True):
    """What is known about one question.

    `name`: difference (candidate minus incumbent), or a guardrail; more is better, so seconds and failures are
    negative; `gate`: the question; `reported`: by devices that were asked; `control`: by those that are compared with
    them; `low`, `high`: credible means, or differences to the control's mean, for as often as one looks.
    """

    name: str
    gate: Gate
    reported: Reported
    control: Reported | None
    low: float
    high: float
    verdict: Verdict

    @property
    def mean(self) -> float | None:
        """Of the reports, or the difference to the control's; None while nothing was reported."""
        sides = [side for side in (self.reported, self.control) if side is not None]
        if not all(side.num_devices for side in sides):
            return None
        first, *second = (side.total / side.num_devices for side in sides)
        return first - sum(second)

    @property
    def is_worse(self) -> bool:
        """Whether it is on the bad side by what was reported, and not for want of reports."""
        hoped = self.gate.at_least if self.gate.worthwhile is None else self.gate.worthwhile
        return self.verdict is Verdict.REJECT and self.high < hoped


def evaluation_gate(spec: EvaluationSpec, alpha: float) -> Gate:
    """Is the candidate's mean on a device above the incumbent's, less the margin?"""
    return Gate(
        -spec.clip,
        spec.clip,
        at_least=-spec.margin,
        alpha=alpha,
        most=spec.most,
        step=1 / AUX_SCALE,
    )


def guardrail_gates(request: ReleaseRequest) -> dict[str, Gate]:
    """One question for each guardrail: PASS: not worse than control by the margin; REJECT: worse than control.

    What is both is within the margin and passes.
    """
    spec, slowest = request.watch, request.limits.max_latency_s
    questions = {
        "primary": (0.0, 1.0, spec.primary),
        "latency": (-slowest, 0.0, spec.latency_s),
        "failed": (-1.0, 0.0, spec.failed),
    }
    return {
        name: Gate(
            low,
            high,
            at_least=-margin,
            worthwhile=0.0,
            alpha=request.alpha / len(GUARDRAILS),
            most=spec.most,
            step=1 / AUX_SCALE,
        )
        for name, (low, high, margin) in questions.items()
    }


Metrics = Mapping[str, MetricSum]
"""Totals over all rounds, by name as in `learning.metrics`."""


def judge_evaluation(gate: Gate, metrics: Metrics) -> Finding:
    """What an evaluation shows. Raises `NumericFailure` for sums that no honest devices make."""
    return finding("difference", gate, _reported(metrics, "difference", 1.0))


def judge_stage(gates: Mapping[str, Gate], metrics: Metrics) -> tuple[Finding, ...]:
    """What the watch over a release shows, one finding for each guardrail. Raises `NumericFailure`."""
    return tuple(
        finding(
            name,
            gate,
            *(
                _reported(metrics, f"{arm}.{name}", 1.0 if name == "primary" else -1.0)
                for arm in ARMS
            ),
        )
        for name, gate in gates.items()
    )


@lru_cache(maxsize=512)
def finding(name: str, gate: Gate, reported: Reported, control: Reported | None = None) -> Finding:
    """The gate's answer with the interval that explains it."""
    sums = (reported.sums, None if control is None else control.sums)
    low, high = gate.interval(*sums)
    return Finding(
        name=name,
        gate=gate,
        reported=reported,
        control=control,
        low=low,
        high=high,
        verdict=gate.judge(*sums),
    )


def _reported(metrics: Metrics, name: str, sign: float) -> Reported:
    nothing = MetricSum(0.0, 0.0)
    total, squares = metrics.get(name, nothing), metrics.get(f"{name}_squared", nothing)
    return Reported(
        num_devices=round(total.count), total=sign * total.sum, squares=max(0.0, squares.sum)
    )


@dataclass(frozen=True)
class Situation:
    """What `due` needs to know. `stage`: index of the stage it is in; `since`: when that began, Unix seconds;
    `findings`: of the evaluation, or of the guardrails; empty: not known yet.
    """

    state: ReleaseState
    request: ReleaseRequest
    has_incumbent: bool
    stage: int
    since: float
    findings: tuple[Finding, ...] = ()


def due(view: Situation, now: float) -> ReleaseEvent | None:
    """The event that the evidence and the clock call for, or None: wait. TRAINED is for who can read the model."""
    verdict = overall(found.verdict for found in view.findings)
    stages = view.request.stages
    match view.state:
        case R.CHECKED:
            return E.EVALUATE
        case R.EVALUATING if not view.has_incumbent:
            return E.PASS
        case R.EVALUATING:
            return {Verdict.PASS: E.PASS, Verdict.REJECT: E.REJECT}.get(verdict)
        case R.PASSED:
            return E.START_CANARY if stages and view.has_incumbent else E.DEPLOY
        case R.CANARY | R.RAMP:
            if verdict is Verdict.REJECT:
                return E.ROLL_BACK
            if verdict is Verdict.CONTINUE or now < view.since + stages[view.stage].soak_s:
                return None
            return E.START_RAMP if view.stage + 1 < len(stages) else E.DEPLOY
        case R.ROLLING_BACK:
            return E.ROLLED_BACK
        case _:
            return None
