"""The release: an immutable published model version, and its staged exposure."""

from __future__ import annotations

from enum import StrEnum

from homespun.protocol.machine import Machine, Row


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
    ROLL_BACK = "roll_back"
    ROLLED_BACK = "rolled_back"
    HOLD = "hold"


R, E = ReleaseState, ReleaseEvent
_LIVE = (R.TRAINED, R.CHECKED, R.EVALUATING, R.PASSED, R.CANARY, R.RAMP, R.DEPLOYED)

RELEASE: Machine[ReleaseState, ReleaseEvent] = Machine(
    "release",
    R.TRAINED,
    (
        Row(R.TRAINED, E.CHECK, R.CHECKED, "finite, loads, within limits, golden predictions"),
        Row(R.TRAINED, E.REJECT, R.REJECTED, "a static check fails"),
        Row(R.CHECKED, E.EVALUATE, R.EVALUATING),
        Row(R.EVALUATING, E.PASS, R.PASSED, "not worse than the incumbent on other devices"),
        Row(R.EVALUATING, E.REJECT, R.REJECTED, "worse than the incumbent"),
        Row(R.PASSED, E.START_CANARY, R.CANARY),
        Row(R.PASSED, E.DEPLOY, R.DEPLOYED, "no stages configured"),
        Row(R.CANARY, E.START_RAMP, R.RAMP, "soaked, guardrails hold"),
        Row(R.CANARY, E.ROLL_BACK, R.ROLLING_BACK, "a guardrail is on the bad side"),
        Row(R.RAMP, E.DEPLOY, R.DEPLOYED, "last stage soaked, guardrails hold"),
        Row(R.RAMP, E.ROLL_BACK, R.ROLLING_BACK, "a guardrail is on the bad side"),
        Row(R.DEPLOYED, E.SUPERSEDE, R.SUPERSEDED, "its successor is deployed"),
        Row(R.DEPLOYED, E.ROLL_BACK, R.ROLLING_BACK, "a person or a guardrail"),
        Row(R.ROLLING_BACK, E.ROLLED_BACK, R.ROLLED_BACK, "the older checkpoint is published"),
        *(Row(state, E.HOLD, R.HELD) for state in _LIVE),
    ),
)
