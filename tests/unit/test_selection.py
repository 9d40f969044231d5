"""The draw and the buckets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from homespun.protocol.messages import Bucket
from homespun.protocol.selection import draw, in_bucket

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
