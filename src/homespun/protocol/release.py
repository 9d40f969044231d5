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

from homespun.learning.contribution import AUX_SCALE
from homespun.learning.evidence import Gate, Sums, Verdict, overall
from homespun.learning.metrics import ARMS, GUARDRAILS, MetricSum
from homespun.protocol.machine import Machine, Row
from homespun.protocol.messages import Message
from homespun.protocol.release_request import EvaluationSpec, ReleaseRequest

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
        Row(R.CANARY, E.DEPLOY, R.DEPLOYED, "the only stage soaked, guardrails hold"),
        Row(R.CANARY, E.ROLL_BACK, R.ROLLING_BACK, "a guardrail is on the bad side, or a person"),
        Row(R.RAMP, E.START_RAMP, R.RAMP, "soaked, guardrails hold, another stage follows"),
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
    """Is the candidate's mean on a device above the incumbent's, less the margin?

    REJECT: it is below the incumbent's, by however little, unless that is known to be within the margin.
    """
    return Gate(
        -spec.clip,
        spec.clip,
        at_least=-spec.margin,
        worthwhile=0.0,
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
