"""Laws of evidence from sums."""

from __future__ import annotations

from math import isclose, log

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from homespun.learning.evidence import SHARES, Distances, Gate, Sums, log_joint_wealth, log_wealth

GATE = Gate(-0.1, 0.1)
STEP = 2.0**-16
REPORTS = st.lists(st.floats(-0.1, 0.1), max_size=40)
MEANS = st.floats(0.001, 0.2)

laws = settings(deadline=None, max_examples=50)
slow_laws = settings(deadline=None, max_examples=8)  # an interval of a difference takes some 0.1 s


def sums(reports):
    values = np.array(reports, np.float64)
    return Sums(values.size, float(values.sum()), float(np.square(values).sum()))


def distances(reports, **which) -> Distances:
    return GATE.distances(sums(reports), **which)


def wealth_of_every_report(distances_from_worst, mean):
    """The definition: the product of what each single report returns, averaged over the shares."""
    ratios = np.array(distances_from_worst, np.float64)[:, None] / mean - 1
    return float(np.log(np.mean(np.prod(1 + SHARES * ratios, axis=0))))


@laws
@given(REPORTS, MEANS)
def test_no_reports_with_these_sums_make_less(reports, mean):
    found = float(log_wealth(*distances(reports, upward=True), mean))
    assert found <= wealth_of_every_report([x + 0.1 for x in reports], mean) + 1e-6


@laws
@given(st.integers(0, 30), st.integers(0, 30), st.floats(0.01, 0.2), MEANS)
def test_reports_of_two_values_make_just_this(many_worst, others, value, mean):
    reports = [0.0] * many_worst + [value] * others
    found = float(log_wealth(len(reports), sum(reports), sum(x * x for x in reports), mean))
    assert isclose(found, wealth_of_every_report(reports, mean), rel_tol=1e-9, abs_tol=1e-9)


@laws
@given(REPORTS, st.lists(MEANS, min_size=3, max_size=3).map(sorted))
def test_wealth_falls_with_the_mean_and_is_convex(reports, means):
    low, middle, high = means
    at = distances(reports, upward=True)
    left, centre, right = (float(log_wealth(*at, mean)) for mean in (low, middle, high))
    assert left >= centre - 1e-9
    assert centre >= right - 1e-9
    weight = (middle - low) / (high - low) if high > low else 0.0
    assert centre <= (1 - weight) * left + weight * right + 1e-6


@laws
@given(REPORTS, st.floats(0, 0.01), MEANS)
def test_a_total_of_squares_that_is_too_large_only_weakens(reports, excess, mean):
    count, total, squares = distances(reports, upward=True)
    more = log_wealth(count, total, squares + excess, mean)
    assert more <= log_wealth(count, total, squares, mean) + 1e-9


@laws
@given(REPORTS, st.randoms(use_true_random=False), st.integers(1, 40))
def test_order_and_grouping_do_not_matter(reports, random, size):
    # As they travel: whole steps, whose sums are exact in any order.
    steps = [int(x / STEP) * STEP for x in reports]
    shuffled = random.sample(steps, len(steps))
    groups = [sums(shuffled[start : start + size]) for start in range(0, len(steps), size)]
    together = sum(groups, Sums())
    assert together == sums(steps)
    assert GATE.interval(together) == GATE.interval(sums(steps))


@laws
@given(REPORTS)
def test_the_interval_holds_the_mean_and_stays_within_the_bounds(reports):
    low, high = GATE.interval(sums(reports))
    mean = float(np.mean(reports)) if reports else 0.0
    assert -0.1 - 1e-9 <= low <= mean + 1e-7
    assert mean - 1e-7 <= high <= 0.1 + 1e-9


@laws
@given(REPORTS)
def test_negated_reports_give_the_negated_interval(reports):
    low, high = GATE.interval(sums(reports))
    mirrored = GATE.interval(sums([-x for x in reports]))
    assert np.allclose(mirrored, (-high, -low), atol=1e-7)


@laws
@given(REPORTS, st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_to_be_surer_is_to_say_less(reports, one, other):
    surer, bolder = (Gate(-0.1, 0.1, alpha=alpha) for alpha in sorted((one, other)))
    wide, narrow = surer.interval(sums(reports)), bolder.interval(sums(reports))
    assert wide[0] <= narrow[0] + 1e-7
    assert narrow[1] <= wide[1] + 1e-7


@laws
@given(REPORTS, st.integers(0, 2**32), MEANS)
def test_rounding_on_the_way_cannot_make_evidence(reports, seed, mean):
    """With reports and squares rounded up or down to coarse steps, still no more than the rounded reports make."""
    step, rng = 0.01, np.random.default_rng(seed)
    values = np.array(reports, np.float64)
    rounded = np.floor(values / step + rng.random(values.size)) * step
    squares = np.floor(np.square(values) / step + rng.random(values.size)) * step
    got = Sums(values.size, float(rounded.sum()), float(squares.sum()))
    for upward, sign in ((True, 1), (False, -1)):
        at = Gate(-0.1, 0.1, step=step).distances(got, upward=upward)
        most = wealth_of_every_report(sign * rounded + 0.1 + step, mean)
        assert float(log_wealth(*at, mean)) <= most + 1e-6


@laws
@given(REPORTS, REPORTS, st.floats(-0.19, 0.19))
def test_no_pair_of_means_with_this_difference_is_worth_less(ours, theirs, difference):
    sides = distances(ours, upward=True), distances(theirs, upward=False)
    found = float(log_joint_wealth(*sides, 0.2, difference))
    means = np.linspace(max(0, difference), min(0.2, 0.2 + difference), 401)[1:-1]
    on_grid = log_wealth(*sides[0], means) + log_wealth(*sides[1], 0.2 + difference - means)
    assert found <= on_grid.min() + 1e-6


@laws
@given(REPORTS, st.floats(0, 0.19))
def test_without_reports_our_mean_may_be_anything(theirs, difference):
    """Theirs is then compared with what leaves it the most room: the far end."""
    nobody, them = distances([], upward=True), distances(theirs, upward=False)
    alone = float(log_wealth(*them, 0.2))
    assert isclose(float(log_joint_wealth(nobody, them, 0.2, difference)), alone, abs_tol=1e-3)


@slow_laws
@given(REPORTS, REPORTS)
def test_groups_in_exchanged_roles_give_the_negated_interval(ours, theirs):
    low, high = GATE.interval(sums(ours), sums(theirs))
    assert np.allclose(GATE.interval(sums(theirs), sums(ours)), (-high, -low), atol=1e-6)
    if ours and theirs:
        assert low - 1e-6 <= np.mean(ours) - np.mean(theirs) <= high + 1e-6


@laws
@given(REPORTS, st.floats(0.01, 0.2))
def test_the_low_end_is_where_wealth_meets_the_limit(reports, alpha):
    low, _ = Gate(-0.1, 0.1, alpha=alpha).interval(sums(reports))
    at = distances(reports, upward=True)
    limit = log(2 / alpha)
    if low > -0.1:
        assert log_wealth(*at, low + 0.1) >= limit - 1e-9
    assert log_wealth(*at, low + 0.1 + 1e-7) <= limit  # 1e-7 > 0.2 / 18^6
