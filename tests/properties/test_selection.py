"""Laws of the draw and the buckets."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from homespun.protocol.messages import Bucket
from homespun.protocol.selection import draw, in_bucket

DEVICES = st.text("0123456789abcdef", min_size=1, max_size=32)
POOLS = st.lists(DEVICES, max_size=30, unique=True)
ROUND = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**53 - 1),
        "task": st.text("abcxyz-.", min_size=1, max_size=8),
        "round_number": st.integers(1, 1000),
        "attempt": st.integers(1, 5),
    }
)


@given(POOLS, st.integers(0, 40), ROUND, st.randoms(use_true_random=False))
def test_the_same_pool_gives_the_same_cohort(pool, size, which, random):
    cohort = draw(pool, size, **which)
    shuffled = pool + pool[:3]  # a device may have claimed twice
    random.shuffle(shuffled)
    assert draw(shuffled, size, **which) == cohort
    assert len(cohort) == len(set(cohort)) == min(size, len(pool))
    assert set(cohort) <= set(pool)


@given(POOLS, DEVICES, st.integers(0, 40), ROUND)
def test_a_newcomer_displaces_at_most_one(pool, newcomer, size, which):
    before, after = draw(pool, size, **which), draw([*pool, newcomer], size, **which)
    assert len(set(before) - set(after)) <= 1
    assert set(after) - set(before) <= {newcomer}


@given(st.text(max_size=8), DEVICES, st.lists(st.floats(0, 1), max_size=6))
def test_a_partition_holds_every_device_exactly_once(salt, device, cuts):
    edges = sorted({0.0, *cuts, 1.0})
    buckets = [Bucket(salt=salt, low=low, high=high) for low, high in pairwise(edges)]
    assert sum(in_bucket(bucket, device) for bucket in buckets) == 1
