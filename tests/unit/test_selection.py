"""The draw and the buckets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.over_selection import simulate
from homespun.protocol.messages import Bucket
from homespun.protocol.selection import (
    BELIEF,
    HALF_LIFE_S,
    MOST_EVIDENCE,
    Turns,
    cohort_for,
    draw,
    evidence,
    faded,
    in_bucket,
)

POOL = [f"device-{index}" for index in range(20)]


def cohort(pool=POOL, size=5, seed=1, task="words", round_number=1, attempt=1):
    return draw(pool, size, seed=seed, task=task, round_number=round_number, attempt=attempt)


def test_the_order_of_arrival_does_not_matter():
    assert cohort() == cohort(POOL[::-1]) == cohort(POOL[7:] + POOL[:7]) == cohort(set(POOL))


def test_the_cohort_has_the_size_asked_for_and_no_device_twice():
    assert len(set(cohort())) == 5
    assert set(cohort()) <= set(POOL)
    assert len(set(cohort(POOL + POOL, size=20))) == 20


def test_a_small_pool_is_drawn_whole():
    assert sorted(cohort(POOL[:3], size=5)) == sorted(POOL[:3])
    assert cohort([]) == []
    assert cohort(size=0) == []


def test_a_larger_cohort_contains_the_smaller():
    assert cohort(size=9)[:5] == cohort(size=5)


def test_seed_task_round_and_attempt_each_make_another_draw():
    draws = [cohort(), cohort(seed=2), cohort(task="x"), cohort(round_number=2), cohort(attempt=2)]
    assert len({tuple(drawn) for drawn in draws}) == 5


def test_the_draw_is_uniform():
    num_rounds = 2000
    counts = Counter(
        device for index in range(num_rounds) for device in cohort(round_number=index + 1)
    )
    expected = num_rounds * 5 / 20
    # Each device is in with probability 1/4; chi-square over 20 cells, 19 degrees of freedom.
    chi_square = sum((counts[d] - expected) ** 2 / (expected * 0.75) for d in POOL) * 19 / 20
    assert chi_square < 43.8  # exceeded once in a thousand seeds


def test_a_device_has_no_lasting_luck():
    """Who is drawn in one round is not drawn more (or less) often in the next."""
    both = sum(
        POOL[0] in cohort(round_number=r) and POOL[0] in cohort(round_number=r + 1)
        for r in range(1, 2001)
    )
    assert abs(both - 125) < 4 * 125**0.5  # 2000 / 16


def test_buckets_are_disjoint_and_cover_everybody():
    cuts = [0.0, 0.1, 0.5, 0.9, 1.0]
    buckets = [Bucket(salt="s", low=low, high=high) for low, high in pairwise(cuts)]
    devices = [f"device-{index}" for index in range(2000)]
    held = [[in_bucket(bucket, device) for bucket in buckets] for device in devices]
    assert all(sum(row) == 1 for row in held)
    for column, share in enumerate((0.1, 0.4, 0.4, 0.1)):
        count = sum(row[column] for row in held)
        assert abs(count - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


def test_another_salt_is_another_split():
    one, other = Bucket(salt="a", high=0.5), Bucket(salt="b", high=0.5)
    both = sum(in_bucket(one, str(d)) and in_bucket(other, str(d)) for d in range(2000))
    assert abs(both - 500) < 4 * 375**0.5


def test_no_bucket_is_everybody():
    assert in_bucket(None, "device")
    assert in_bucket(Bucket(salt="s"), "device")


# --- how many are drawn -------------------------------------------------------------------------------


def test_the_cohort_is_the_smallest_that_reaches_its_goal():
    rng = np.random.default_rng(1)
    for goal, reported, lost in [(5, 30.0, 10.0), (40, 300.0, 30.0), (100, 5000.0, 1500.0)]:
        size = cohort_for(goal, reported, lost, limit=10 * goal)
        shares = rng.beta(reported, lost, 200_000)
        for num, is_enough in ((size, True), (size - 1, False)):
            share = (rng.binomial(num, shares) >= goal).mean()
            assert (share >= 0.99 - 0.0008) if is_enough else (share < 0.99 + 0.0008)


def test_the_less_is_known_the_more_are_drawn():
    sizes = [cohort_for(20, 3.0 * n, 1.0 * n, limit=1000) for n in (1, 10, 100, 10_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]
    assert cohort_for(20, 3.0, 1.0, limit=40) == 40
    assert cohort_for(20, 1e9, 1e-3, limit=40) == 20


def test_evidence_is_of_the_hour_and_around_midnight():
    day = {hour: (100.0, 100.0 if hour in (23, 0) else 10.0) for hour in range(24)}

    def loss(hour: float) -> float:
        reported, lost = evidence(day, hour)
        return lost / (reported + lost)

    assert loss(0.0) > 0.4 > 0.15 > loss(12.0)
    assert loss(23.9) == pytest.approx(loss(0.1))
    assert evidence({}, 5.0) == BELIEF
    assert sum(evidence({5: (1e6, 1e5)}, 5.5)) == pytest.approx(MOST_EVIDENCE)
    assert faded(8.0, 2 * HALF_LIFE_S) == 2.0
    assert faded(8.0, -5.0) == 8.0


@pytest.mark.parametrize(("goal", "worst"), [(20, 0.32), (100, 0.2)])
def test_rounds_reach_their_goal_all_day(goal, worst):
    """Drop-out swings fourfold; the first day is the warm-up."""
    fixed = simulate("fixed", goal, worst, days=4)
    adaptive = simulate("adaptive", goal, worst, days=4)
    assert adaptive.goal_share >= 0.99 > 0.98 > fixed.goal_share
    if goal == 100:  # fewer reports cannot be had so surely from 130 %
        assert adaptive.drawn_per_report < fixed.drawn_per_report


# --- whose turn it is ---------------------------------------------------------------------------------


def test_turns_follow_the_shares():
    turns, shares = Turns(), [("a", 1.0), ("b", 3.0), ("c", 0.5)]
    first = Counter[str]()
    for _ in range(90):
        task = turns.order(shares, 0.0)[0]
        turns.offer(task, 0.0)
        turns.claim(task, 0.0)
        first[task] += 1
    assert first == {"a": 20, "b": 60, "c": 10}


def test_an_offer_that_is_not_claimed_is_soon_forgotten():
    turns, shares = Turns(), [("a", 1.0), ("b", 1.0)]
    for _ in range(50):  # nobody can do task a
        turns.offer("a", 0.0)
    turns.claim("b", 0.0)
    assert turns.order(shares, 0.0) == ["b", "a"]
    assert turns.order(shares, 30.0) == ["a", "b"]
    turns.keep(["a"])
    assert turns.order(shares, 30.0) == ["b", "a"]
