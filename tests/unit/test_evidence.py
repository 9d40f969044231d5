"""The release gate: its answers, and how often they are wrong when it is asked all the time."""

from __future__ import annotations

from dataclasses import asdict
from math import comb, exp, log

import numpy as np
import pytest

from benchmarks.release_gate import (
    BOUND,
    LIMIT,
    WORLDS,
    canary_could_see,
    canary_sees,
    ever,
    gate_sees,
    naive_sees,
    needed,
    normal,
)
from homespun.errors import InvalidConfig, NumericFailure
from homespun.learning.evidence import Gate, Sums, Verdict, log_wealth, overall
from homespun.rng import stream

RELEASES = 1000
STATED = 2.5  # per cent, for each kind of error


def sums(values):
    return Sums(len(values), float(np.sum(values)), float(np.square(values).sum()))


def equal(world, num_devices=500, name="gate"):
    return WORLDS[world](stream(7, name, world), (RELEASES, num_devices))


# --- How often it is wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_an_equal_candidate_is_hardly_ever_promoted_or_rejected(world):
    """Looking after every report, and stopping at the first look that would do: no cleverer stopping exists."""
    values = equal(world)
    assert abs(values.mean()) < 4 * 0.1 / values.size**0.5  # it is equal
    assert ever(gate_sees(values)) <= STATED
    assert ever(gate_sees(-values)) <= STATED


@pytest.mark.parametrize("world", WORLDS)
def test_a_candidate_as_bad_as_the_margin_is_hardly_ever_promoted(world):
    margin = 0.01
    worse = 0.9 * equal(world) - margin  # within the bounds
    assert ever(gate_sees(worse, -margin)) <= STATED
    assert ever(gate_sees(-worse, margin)) <= STATED


def test_a_t_test_after_every_report_promotes_equal_candidates():
    """What the gate is for; it also shows that these simulations notice a gate that is wrong."""
    assert ever(naive_sees(equal("normal"))) > 5 * STATED
    assert ever(naive_sees(equal("skewed"))) > 10 * STATED
    assert ever(naive_sees(equal("rare loss"))) > 30 * STATED


def test_the_error_is_not_bought_with_blindness():
    """On reports of two values nothing is given away but what the last bet overshoots and the end of time."""
    assert ever(gate_sees(equal("coin", 1200))) > STATED / 4


def test_an_adversary_who_chooses_the_next_report_gains_nothing():
    """Whoever sees all evidence so far picks the next report's distribution, of mean 0: calm reports that drift up,
    or large rare ones when these would help most."""
    rng, num_devices = stream(7, "adversary"), 400
    values = np.zeros((RELEASES, num_devices))
    for device in range(num_devices):
        total = values.sum(axis=1)
        calm = rng.choice([-0.005, 0.005], RELEASES)
        risky = np.where(rng.random(RELEASES) < 0.05, -0.095, 0.005)  # mean 0
        wild = rng.choice([-BOUND, BOUND], RELEASES)
        values[:, device] = np.where(total < 0, wild, np.where(total < 0.05, risky, calm))
    assert ever(gate_sees(values)) <= STATED
    assert ever(gate_sees(-values)) <= STATED
    assert ever(naive_sees(values)) > STATED


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_bets_are_fair(share):
    """Expected wealth, exactly: 1 when reports have two values, the lower one the worst."""
    mean, number = share * 1.0, 30
    expected = sum(
        comb(number, ones)
        * share**ones
        * (1 - share) ** (number - ones)
        * exp(log_wealth(number, float(ones), float(ones), mean))
        for ones in range(number + 1)
    )
    assert expected == pytest.approx(1)


@pytest.mark.parametrize("world", WORLDS)
def test_an_equal_canary_is_hardly_ever_rolled_back(world):
    """Looking after every report, as above; nor is it found better."""
    ours, theirs = equal(world, name="canary"), equal(world, name="control")
    assert ever(canary_could_see(theirs, ours)) <= STATED
    assert ever(canary_could_see(ours, theirs)) <= STATED


def test_a_canary_as_bad_as_the_margin_is_hardly_ever_promoted():
    ours, theirs = equal("coin", name="canary"), equal("coin", name="control")
    assert ever(canary_could_see(0.9 * ours - 0.01, 0.9 * theirs, (-0.01, 0))) <= STATED


def test_the_canary_gate_sees_no_more_than_that():
    ours, theirs = (normal(stream(7, "both", band), (50, 200)) for band in range(2))
    ours = (ours + 0.02).clip(-BOUND, BOUND)
    at_once, at_most = canary_sees(ours, theirs), canary_could_see(ours, theirs)[:, 9::10]
    assert not (at_once & ~at_most).any()
    assert 0 < at_once.sum() < at_most.sum()


# --- How much it needs ------------------------------------------------------------------------------


@pytest.mark.parametrize(("points", "most"), [(5, 30), (2, 90), (1, 240)])
def test_a_true_improvement_is_seen(points, most):
    values = normal(stream(7, "power"), (400, 2 * most)) + points / 100
    devices = needed(gate_sees(np.minimum(values, BOUND), every=10))
    assert np.median(devices) <= most
    assert np.quantile(devices, 0.9) < 2 * most


def test_a_worse_canary_is_seen():
    theirs = normal(stream(7, "theirs"), (100, 200))
    ours = np.maximum(normal(stream(7, "ours"), (100, 200)) - 0.02, -BOUND)
    assert np.median(needed(canary_sees(theirs, ours))) <= 130


def test_reports_that_agree_need_few_devices():
    assert Gate(-0.1, 0.1).judge(sums([0.05] * 17)) is Verdict.PASS
    assert Gate(-0.1, 0.1, at_least=-0.05).judge(sums([0.0] * 17)) is Verdict.PASS


# --- What it answers --------------------------------------------------------------------------------


def test_it_answers_what_the_simulations_ask():
    for points in (-2.0, -0.5, 0.5, 2.0):
        values = normal(stream(7, "same", str(points)), (1, 200)) + points / 100
        values = values.clip(-BOUND, BOUND)
        for until in (10, 50, 100, 200):
            low, high = Gate(-BOUND, BOUND).interval(sums(values[0, :until]))
            assert (low > 0) == gate_sees(values)[0, until - 1]
            assert (high < 0) == gate_sees(-values)[0, until - 1]
    assert log(2 / Gate(-BOUND, BOUND).alpha) == LIMIT


def test_better_worse_and_open():
    gate, rng = Gate(-0.1, 0.1), stream(7, "answers")
    better, equal_, worse = (
        sums((0.03 * rng.standard_normal(200) + x).clip(-0.1, 0.1)) for x in (0.02, 0, -0.02)
    )
    assert [gate.judge(each) for each in (better, equal_, worse)] == [
        Verdict.PASS,
        Verdict.CONTINUE,
        Verdict.REJECT,
    ]
    assert gate.judge(Sums()) is Verdict.CONTINUE
    assert gate.interval(Sums()) == (-0.1, 0.1)


def test_a_margin_lets_an_equal_candidate_pass():
    none = sums([0.0] * 200)
    assert Gate(-0.1, 0.1).judge(none) is Verdict.CONTINUE
    assert Gate(-0.1, 0.1, at_least=-0.01).judge(none) is Verdict.PASS


def test_hopes_end_when_no_worthwhile_improvement_is_left():
    none = sums([0.0] * 200)
    assert Gate(-0.1, 0.1, worthwhile=0.01).judge(none) is Verdict.REJECT
    assert Gate(-0.1, 0.1, worthwhile=0.001).judge(none) is Verdict.CONTINUE
    # Better, if by little: that is what was asked.
    assert Gate(-0.1, 0.1, worthwhile=0.05).judge(sums([0.02] * 200)) is Verdict.PASS


def test_an_open_question_ends_as_a_rejection():
    none = sums([0.0] * 200)
    assert Gate(-0.1, 0.1, most=201).judge(none) is Verdict.CONTINUE
    assert Gate(-0.1, 0.1, most=200).judge(none) is Verdict.REJECT
    assert Gate(-0.1, 0.1, most=200).judge(sums([0.05] * 200)) is Verdict.PASS  # not open


def test_what_is_less_is_better_is_reported_negated():
    """Crashes: a canary with 30 in 300 against 3 in 300."""
    crashes = Gate(-1.0, 0.0)
    bad, fine = Sums(300, -30.0, 30.0), Sums(300, -3.0, 3.0)
    assert crashes.judge(bad, fine) is Verdict.REJECT
    assert crashes.judge(fine, bad) is Verdict.PASS
    assert crashes.judge(fine, fine) is Verdict.CONTINUE
    assert crashes.judge(bad, Sums()) is Verdict.CONTINUE  # nothing to compare with yet


def test_rounding_on_the_way_costs_next_to_nothing():
    values = normal(stream(7, "rounding"), (1, 500))[0]
    exact, rounded = (Gate(-0.1, 0.1, step=step).interval(sums(values)) for step in (0, 2**-16))
    assert rounded[0] < exact[0]
    assert rounded[1] > exact[1]
    assert rounded[1] - rounded[0] < 1.02 * (exact[1] - exact[0])


def test_rounding_may_lead_over_the_edge():
    over = sums([-0.12] * 5)  # -0.1 in steps of 0.03, rounded down
    low, high = Gate(-0.1, 0.1, step=0.03).interval(over)
    assert low == pytest.approx(-0.13)
    assert -0.12 < high < 0.13
    with pytest.raises(NumericFailure):
        Gate(-0.1, 0.1).interval(over)


def test_gate_and_sums_are_plain_data():
    gate, total = Gate(-0.1, 0.1, at_least=-0.01, worthwhile=0.0), sums([0.01] * 30)
    assert Gate(**asdict(gate)) == gate
    assert Gate(**asdict(gate)).interval(Sums(**asdict(total))) == gate.interval(total)


def test_guardrails_together():
    yes, no, wait = Verdict.PASS, Verdict.REJECT, Verdict.CONTINUE
    assert overall([yes, yes]) is yes
    assert overall([yes, wait]) is wait
    assert overall([yes, wait, no]) is no
    assert overall([]) is wait


@pytest.mark.parametrize(
    "impossible",
    [
        Sums(10, 1.1, 0.2), Sums(10, -1.1, 0.2), Sums(0, 0.1, 0.1), Sums(-1),
        Sums(1, float("nan"), 0.0), Sums(1, 0.0, float("nan")),
    ],
)  # fmt: skip
def test_sums_that_cannot_be_are_refused(impossible):
    with pytest.raises(NumericFailure, match="bounds"):
        Gate(-0.1, 0.1).interval(impossible)


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 0.1}, {"high": float("inf")}, {"low": float("nan")}, {"alpha": 0.0}, {"alpha": 1.0}, {"most": 0},
        {"worthwhile": -0.01}, {"step": -1.0},
    ],
)  # fmt: skip
def test_a_gate_that_cannot_answer_is_refused(wrong):
    with pytest.raises(InvalidConfig, match="gate"):
        Gate(**{"low": -0.1, "high": 0.1, **wrong})
