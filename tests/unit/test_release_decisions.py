"""What a release is asked, and what is decided from the answers: by the functions that the server uses."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from benchmarks.release_gate import (
    EVALUATION,
    GUARDS,
    REQUEST,
    WATCHED,
    WORLDS,
    equal_releases,
    ever,
    needed,
    running,
    stage_sees,
)
from homespun.errors import InvalidConfig, NumericFailure
from homespun.learning.evidence import Sums, Verdict
from homespun.learning.metrics import ARMS, GUARDRAILS, MetricSum, watched_names
from homespun.protocol.messages import Bucket
from homespun.protocol.release import (
    ReleaseEvent,
    ReleaseState,
    Situation,
    due,
    evaluation_gate,
    guardrail_gates,
    judge_evaluation,
    judge_stage,
)
from homespun.protocol.release_request import (
    EvaluationSpec,
    Limits,
    ReleaseRequest,
    Reports,
    Stage,
    WatchSpec,
    disjoint,
    left_out,
)
from homespun.rng import stream

S, E = ReleaseState, ReleaseEvent
STATED = 100 * REQUEST.alpha / 2
SOAK_S = 3600.0


def request(**fields) -> ReleaseRequest:
    return msgspec.structs.replace(REQUEST, **fields)


def paired(values) -> dict[str, MetricSum]:
    values = np.asarray(values, np.float64)
    return {
        "difference": MetricSum(float(values.sum()), float(values.size)),
        "difference_squared": MetricSum(float(np.square(values).sum()), float(values.size)),
    }


def watched(stage: dict[str, float], control: dict[str, float], devices=(14, 14)):
    """Every device of an arm says the same."""
    totals = {}
    for arm, says, number in zip(ARMS, (stage, control), devices, strict=True):
        for name in GUARDRAILS:
            totals[f"{arm}.{name}"] = MetricSum(number * says[name], number)
            totals[f"{arm}.{name}_squared"] = MetricSum(number * says[name] ** 2, number)
    return totals


FINE = {"primary": 0.3, "latency": 0.005, "failed": 0.0}
FEW = WatchSpec(primary=0.5, latency_s=0.05, failed=0.5, reports=Reports(goal=10, minimum=10))
"""Margins that 40 devices can say something about."""


# --- How often it is wrong ----------------------------------------------------------------------------


def test_of_a_thousand_equal_candidates_hardly_any_is_promoted_or_taken_back():
    """Whoever stops at the first look that would do, after every single report."""
    wrong = equal_releases(1000, 400)
    assert set(wrong) == {"found better", "found worse", "taken back"}
    assert all(rate <= STATED for rate in wrong.values())


@pytest.mark.parametrize("world", WORLDS)
def test_nor_whatever_the_differences_of_the_devices_are_like(world):
    values = WORLDS[world](stream(7, "release", world), (1000, 400))
    assert ever(np.asarray(EVALUATION.shows_more(running(values)))) <= STATED
    assert ever(np.asarray(EVALUATION.shows_less(running(values)))) <= STATED


@pytest.mark.parametrize("name", GUARDRAILS)
def test_what_is_as_bad_as_the_margin_hardly_ever_passes(name):
    gate = GUARDS[name]
    rng = stream(7, "as bad", name)
    theirs = WATCHED[name](rng, (300, 400)).clip(gate.low - gate.at_least, None)
    ours = WATCHED[name](rng, (300, 400)).clip(gate.low - gate.at_least, None) + gate.at_least
    assert ever(stage_sees(gate, ours, theirs, worse=False)) <= STATED / len(GUARDRAILS)


def test_the_simulations_ask_the_gate_itself():
    """Where they skip a question, because it could not be answered so, the answer is what they say."""
    rng = stream(7, "the same")
    gate = GUARDS["failed"]
    ours, theirs = (-(rng.random((30, 60)) < share).astype(float) for share in (0.4, 0.05))
    for worse, ask in ((True, gate.shows_less), (False, gate.shows_more)):
        at_once = np.asarray(ask(running(ours), running(theirs)))
        assert (stage_sees(gate, ours, theirs, worse=worse) == at_once).all()
    assert stage_sees(gate, ours, theirs, worse=True).any()


def test_the_desk_decides_as_the_simulations_do():
    rng, gate = stream(7, "desk"), GUARDS["failed"]
    ours, theirs = ((rng.random(50) < share).astype(float) for share in (0.5, 0.05))
    seen = stage_sees(gate, -ours[None], -theirs[None], worse=True)[0]
    for number in (1, 5, 10, 15, 20, 25, 30, 40, 50):
        totals = {}
        for arm, values in zip(ARMS, (ours, theirs), strict=True):
            ones = float(values[:number].sum())
            for name in watched_names():
                value = ones if name.startswith(f"{arm}.failed") else 0.0
                if name.startswith(arm):
                    totals[name] = MetricSum(value, float(number))
        by_name = {found.name: found for found in judge_stage(GUARDS, totals)}
        assert (by_name["failed"].verdict is Verdict.REJECT) == seen[number - 1]


# --- How much it needs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("points", "most"), [(5, 30), (2, 90), (1, 240)])
def test_a_true_improvement_passes(points, most):
    values = stream(7, "power").normal(points / 100, 0.03, (300, 2 * most)).clip(-0.1, 0.1)
    devices = needed(np.asarray(EVALUATION.shows_more(running(values, 10))))
    assert np.median(devices) <= most


def test_fourteen_devices_on_each_side_can_promote_and_take_back():
    gates = guardrail_gates(request(watch=FEW))
    verdicts = {f.name: f.verdict for f in judge_stage(gates, watched(FINE, FINE))}
    assert verdicts == dict.fromkeys(GUARDRAILS, Verdict.PASS)
    fails = {**FINE, "failed": 1.0}
    verdicts = {f.name: f.verdict for f in judge_stage(gates, watched(fails, FINE, (7, 7)))}
    assert verdicts["failed"] is Verdict.REJECT
    slow = {**FINE, "latency": 0.1}
    verdicts = {f.name: f.verdict for f in judge_stage(gates, watched(slow, FINE, (14, 14)))}
    assert verdicts["latency"] is Verdict.REJECT


def test_twelve_devices_can_tell_a_worse_candidate():
    gate = evaluation_gate(EvaluationSpec(), 0.05)
    assert judge_evaluation(gate, paired([-0.09] * 12)).verdict is Verdict.REJECT
    assert judge_evaluation(gate, paired([0.09] * 12)).verdict is Verdict.PASS


# --- What is decided ----------------------------------------------------------------------------------


def situation(state: ReleaseState, metrics=None, now_in_stage: float = 0.0, **fields) -> Situation:
    asked = request(
        stages=(Stage(fraction=0.2, soak_s=SOAK_S), Stage(fraction=0.6, soak_s=SOAK_S)), watch=FEW
    )
    findings = () if metrics is None else judge_stage(guardrail_gates(asked), metrics)
    known = {"has_incumbent": True, "stage": 0, "since": 1000.0 - now_in_stage, **fields}
    return Situation(state=state, request=asked, findings=findings, **known)


GOOD, OPEN = watched(FINE, FINE), watched(FINE, FINE, (3, 3))
BAD = watched({**FINE, "failed": 1.0}, FINE)


@pytest.mark.parametrize(
    ("case", "event"),
    [
        (situation(S.CHECKED), E.EVALUATE),
        (situation(S.EVALUATING), None),
        (situation(S.EVALUATING, has_incumbent=False), E.PASS),
        (situation(S.PASSED), E.START_CANARY),
        (situation(S.PASSED, has_incumbent=False), E.DEPLOY),
        (situation(S.CANARY), None),
        (situation(S.CANARY, GOOD), None),
        (situation(S.CANARY, OPEN, SOAK_S), None),
        (situation(S.CANARY, GOOD, SOAK_S), E.START_RAMP),
        (situation(S.CANARY, BAD), E.ROLL_BACK),
        (situation(S.RAMP, GOOD, SOAK_S, stage=1), E.DEPLOY),
        (situation(S.RAMP, BAD, SOAK_S, stage=1), E.ROLL_BACK),
        (situation(S.ROLLING_BACK), E.ROLLED_BACK),
        (situation(S.HELD, BAD, SOAK_S), None),
        (situation(S.DEPLOYED), None),
    ],
    ids=lambda value: str(value.state) if isinstance(value, Situation) else str(value),
)
def test_what_is_due(case, event):
    assert due(case, 1000.0) == event


def test_without_stages_what_passed_is_deployed():
    bare = replace(situation(S.PASSED), request=request(stages=()))
    assert due(bare, 1000.0) is E.DEPLOY


def test_the_evaluation_decides():
    gate = evaluation_gate(EvaluationSpec(most=40), 0.05)
    for values, event in (([0.05] * 40, E.PASS), ([-0.05] * 40, E.REJECT), ([0.0] * 20, None)):
        found = judge_evaluation(gate, paired(values))
        case = replace(situation(S.EVALUATING), findings=(found,))
        assert due(case, 1000.0) == event
    lenient = evaluation_gate(EvaluationSpec(margin=0.03, most=40), 0.05)
    assert judge_evaluation(lenient, paired([-0.09] * 12)).verdict is Verdict.REJECT
    assert judge_evaluation(lenient, paired([-0.001] * 39)).verdict is Verdict.PASS
    used_up = judge_evaluation(gate, paired([0.0] * 40))
    assert (used_up.verdict, used_up.is_worse) == (Verdict.REJECT, False)


def test_a_finding_says_what_it_rests_on():
    (found, *_) = judge_stage(guardrail_gates(request(watch=FEW)), GOOD)
    assert found.name == "primary"
    assert found.reported.sums == Sums(14, 14 * 0.3, 14 * 0.3**2)
    assert found.mean == pytest.approx(0.0)
    assert found.low < 0 < found.high
    nothing = judge_stage(guardrail_gates(REQUEST), {})
    assert [each.mean for each in nothing] == [None] * 3
    assert {each.verdict for each in nothing} == {Verdict.CONTINUE}
    data = msgspec.json.encode(found)
    assert msgspec.json.decode(data, type=type(found)) == found
    with pytest.raises(NumericFailure):
        judge_evaluation(EVALUATION, paired([0.5] * 10))  # not clipped


# --- What is asked for --------------------------------------------------------------------------------


def test_stages_have_a_control_band_as_large_as_there_is_room():
    asked = request(stages=(Stage(fraction=0.01), Stage(fraction=0.5), Stage(fraction=0.8)))
    assert [asked.control(stage) for stage in range(3)] == pytest.approx([0.01, 0.5, 0.2])
    assert asked.stage_salt == "phones/default/1"


def test_its_tasks_let_nobody_report_twice():
    asked = request(
        evaluation=EvaluationSpec(clip=0.2, most=95, reports=Reports(goal=20, minimum=10)),
        limits=Limits(max_latency_s=0.05),
    )
    task = asked.evaluation_task("evaluate-r", "1" * 64)
    assert (task.num_rounds, task.criteria.min_separation_rounds) == (10, 10)
    assert (task.checkpoints, task.difference_clip) == (("0" * 64, "1" * 64), 0.2)
    watch = asked.watch_task("watch-r", "r")
    assert watch.watch is not None
    assert (watch.watch.slot, watch.watch.release_id) == ("default", "r")
    assert watch.watch.max_latency_s == 0.05
    assert watch.criteria.min_separation_rounds == watch.num_rounds
    for spec in (task, watch):
        spec.validate()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"stages": (Stage(fraction=0.5), Stage(fraction=0.1))}, "more devices"),
        ({"watch": WatchSpec(latency_s=0.2)}, "latency"),
        ({"evaluation": EvaluationSpec(most=10)}, "may be asked"),
        ({"watch": WatchSpec(most=10)}, "may be asked"),
    ],
)
def test_requests_that_make_no_sense_are_refused(fields, part):
    with pytest.raises(InvalidConfig, match=part):
        request(**fields).validate()
    REQUEST.validate()


def test_who_trained_does_not_judge():
    low, high = Bucket(salt="s", high=0.8), Bucket(salt="s", low=0.8)
    assert disjoint(low, high)
    assert not disjoint(low, Bucket(salt="s", low=0.7))
    assert not disjoint(low, Bucket(salt="t", low=0.8))
    assert not disjoint(None, high)
    assert left_out(low) == high
    assert left_out(high) == Bucket(salt="s", low=0.0, high=0.8)
    assert left_out(Bucket(salt="s", low=0.2, high=0.8)) is None
    assert left_out(Bucket(salt="s")) is None
    assert left_out(None) is None
