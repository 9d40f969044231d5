"""Laws of fixed-point sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from homespun.tensors.fixed_point import FixedPoint


@st.composite
def fixed_points(draw) -> FixedPoint:
    bits = draw(st.integers(8, 32))
    max_group = draw(st.integers(1, min(500, (2 ** (bits - 1) - 1) // 2)))
    return FixedPoint(bits, draw(st.floats(1e-6, 1e6)), max_group)


FIXED = fixed_points()
FLOATS = st.floats(-1e6, 1e6, width=32)
SEEDS = st.integers(0, 2**32)
VALUES = st.integers(0, 20).flatmap(lambda n: arrays.arrays(np.float32, n, elements=FLOATS))


def signed(fixed: FixedPoint, words):
    half = 1 << fixed.bits - 1
    return (words.astype(np.int64) + half) % (2 * half) - half


@given(FIXED, VALUES, SEEDS)
def test_each_entry_lands_within_one_step(fixed, update, seed):
    words = fixed.encode(update, np.random.default_rng(seed))
    exact = np.clip(update.astype(np.float64), -fixed.clip, fixed.clip) * fixed.scale
    assert (np.abs(signed(fixed, words) - exact) <= 1.0 + 1e-6).all()
    assert (np.abs(signed(fixed, words)) <= fixed.largest).all()


@given(FIXED, VALUES, SEEDS)
def test_what_is_encoded_passes_the_check(fixed, update, seed):
    words = fixed.encode(update, np.random.default_rng(seed))
    bounded = np.clip(update.astype(np.float64), -fixed.clip, fixed.clip)
    fixed.check(words, norm=float(np.linalg.norm(bounded)))


@given(
    FIXED,
    st.integers(1, 8).flatmap(
        lambda n: st.lists(arrays.arrays(np.float32, n, elements=FLOATS), min_size=1, max_size=8)
    ),
    SEEDS,
)
def test_sums_are_exact_and_have_no_order(fixed, updates, seed):
    updates = updates[: fixed.max_group]
    rng = np.random.default_rng(seed)
    parts = [fixed.encode(update, rng) for update in updates]
    totals = []
    for order in (parts, parts[::-1], [parts[i] for i in rng.permutation(len(parts))]):
        total = fixed.empty_sum(parts[0].size)
        for part in order:
            fixed.add(total, part)
        totals.append(total.tolist())
    assert totals[0] == totals[1] == totals[2]
    exact = sum(signed(fixed, part) for part in parts)  # in 64 bits: nothing can wrap
    np.testing.assert_array_equal(signed(fixed, total), exact)
    np.testing.assert_array_equal(fixed.decode(total), (exact / fixed.scale).astype(np.float32))


@given(
    FIXED,
    st.lists(st.tuples(SEEDS, st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_several_sums_decode_to_the_sum_of_all_integers(fixed, entries, places):
    parts = [
        fixed.encode(np.array([value, -value], np.float32), np.random.default_rng(seed))
        for seed, value in entries
    ]
    groups = [fixed.empty_sum(2) for _ in range(4)]
    sizes = [0] * 4
    exact = np.zeros(2, np.int64)
    for part, place in zip(parts, places, strict=False):
        if sizes[place] < fixed.max_group:
            fixed.add(groups[place], part)
            sizes[place] += 1
            exact += signed(fixed, part)
    np.testing.assert_array_equal(fixed.decode(*groups), (exact / fixed.scale).astype(np.float32))
    canonical = [group & fixed.word.type(2**fixed.bits - 1) for group in groups]
    np.testing.assert_array_equal(fixed.decode(*canonical), fixed.decode(*groups))


@given(FIXED, st.booleans(), SEEDS)
def test_a_full_group_at_the_bound_does_not_wrap(fixed, up, seed):
    bound = np.array([fixed.clip if up else -fixed.clip], np.float32)
    part = fixed.encode(bound, np.random.default_rng(seed))
    total = part * np.array(fixed.max_group, fixed.word)  # the same words max_group times
    assert int(signed(fixed, total)[0]) == int(signed(fixed, part)[0]) * fixed.max_group
