"""Fixed point: exact, unbiased, and it never wraps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from homespun.errors import InvalidConfig, NumericFailure, ShapeMismatch
from homespun.tensors.fixed_point import _SEGMENT, FixedPoint


class Up:
    """Rounds as far up as stochastic rounding can."""

    def random(self, size: int) -> np.ndarray:
        return np.full(size, np.nextafter(1.0, 0.0))


class Down:
    """Rounds down."""

    def random(self, size: int) -> np.ndarray:
        return np.zeros(size)


UP: Any = Up()
DOWN: Any = Down()


def signed(words, bits: int) -> list[int]:
    """Two's complement of the low `bits`, in Python's integers."""
    half = 1 << bits - 1
    return [(int(value) + half) % (2 * half) - half for value in words]


def test_the_scale_of_a_small_word_on_paper():
    fixed = FixedPoint(bits=16, clip=2.0, max_group=100)
    assert fixed.largest == 327  # floor(32767 / 100)
    assert fixed.scale == 163.0  # (327 - 1) / 2


def test_encoding_on_paper():
    fixed = FixedPoint(bits=16, clip=2.0, max_group=100)
    values = np.array([0.0, 1.0, -1.0, 2.0, -2.0, 5.0, -5.0], np.float32)
    words = fixed.encode(values, DOWN)
    assert words.tolist() == [0, 163, 65536 - 163, 326, 65536 - 326, 326, 65536 - 326]
    assert words.dtype == np.dtype("<u2")
    assert fixed.decode(words).tolist() == [0.0, 1.0, -1.0, 2.0, -2.0, 2.0, -2.0]


def test_words_of_twelve_bits_on_paper():
    fixed = FixedPoint(bits=12, clip=2.0, max_group=10)
    assert (fixed.largest, fixed.scale) == (204, 101.5)  # floor(2047 / 10), (204 - 1) / 2
    words = fixed.encode(np.array([2.0, -2.0, 0.0], np.float32), DOWN)
    assert words.tolist() == [203, 4096 - 203, 0]
    assert words.dtype == np.dtype("<u2")
    total = fixed.empty_sum(3)
    for _ in range(10):
        fixed.add(total, words)
    assert total.tolist() == [
        2030,
        10 * (4096 - 203),
        0,
    ]  # beyond 12 bits: what lies above is dropped
    assert fixed.decode(total).tolist() == [20.0, -20.0, 0.0]
    assert fixed.decode(total & 4095).tolist() == [20.0, -20.0, 0.0]


@pytest.mark.parametrize("bits", [8, 12, 16, 31, 32])
def test_several_sums_are_more_than_one_could_hold(bits):
    fixed = FixedPoint(bits=bits, clip=1.0, max_group=1)
    full = fixed.encode(np.array([1.0, -1.0], np.float32), DOWN)
    decoded = fixed.decode(*[full] * 1000)
    np.testing.assert_allclose(decoded, [1000.0, -1000.0])


def test_rounding_goes_to_the_neighbours_only():
    fixed = FixedPoint(bits=32, clip=1.0, max_group=2**24)  # 126 steps per unit
    assert fixed.scale == 126.0
    words = fixed.encode(np.full(1000, 0.3, np.float32), np.random.default_rng(0))
    assert set(words.tolist()) == {37, 38}  # 0.3 * 126 = 37.8


@pytest.mark.parametrize("bits", [9, 12, 16, 24, 32])
def test_rounding_is_unbiased(bits):
    fixed = FixedPoint(bits=bits, clip=1.0, max_group=2 ** (bits - 8))  # 126 steps per unit
    num_draws, rng = 20_000, np.random.default_rng(3)
    for value in (0.3, -0.3, 0.001, -0.999, 0.5, 1.0, -1.0):
        words = fixed.encode(np.full(num_draws, value, np.float32), rng)
        mean = fixed.decode(words).astype(np.float64).mean()
        # A rounding error lies within one step, so its deviation is at most half a step.
        assert abs(mean - np.float32(value)) < 4 * 0.5 / fixed.scale / num_draws**0.5 + 1e-9


@pytest.mark.parametrize("rounding", [UP, DOWN])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("clip", [1.0, 0.1, 3.7, 1e-3, 1e4])
@pytest.mark.parametrize("bits", [8, 11, 12, 16, 17, 32])
def test_the_extreme_group_does_not_wrap(bits, clip, sign, rounding):
    largest_group = (2 ** (bits - 1) - 1) // 2
    for max_group in {min(n, largest_group) for n in (1, 2, 3, 7, 100, 1000, 16_383)}:
        fixed = FixedPoint(bits=bits, clip=clip, max_group=max_group)
        word = fixed.encode(np.array([sign * clip], np.float32), rounding)
        total = fixed.empty_sum(1)
        for _ in range(max_group):
            fixed.add(total, word)
        assert signed(total, bits) == [max_group * value for value in signed(word, bits)]
        # One rounding step each, and float32 inside the clip bound.
        assert abs(fixed.decode(total)[0] - sign * max_group * clip) <= max_group * (
            1.001 / fixed.scale + 1e-6 * clip
        )


@pytest.mark.parametrize("bits", [12, 16, 20, 32])
def test_check_lets_the_largest_pass_and_nothing_above(bits):
    fixed = FixedPoint(bits=bits, clip=1.0, max_group=100)
    for entry in (fixed.largest, -fixed.largest, 0):
        fixed.check(np.array([entry % 2**bits], fixed.word), norm=1.0)
    for entry in (fixed.largest + 1, -fixed.largest - 1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))):
        with pytest.raises(NumericFailure, match="entry exceeds"):
            fixed.check(np.array([entry % 2**bits], fixed.word), norm=1e9)


def test_check_bounds_the_length_too():
    fixed = FixedPoint(bits=32, clip=1.0, max_group=100)
    two = fixed.encode(np.array([1.0, 1.0], np.float32), DOWN)
    fixed.check(two, norm=1.4143)  # sqrt(2)
    with pytest.raises(NumericFailure, match="longer than the clip bound"):
        fixed.check(two, norm=1.4142)
    fixed.check(fixed.empty_sum(0), norm=0.0)


def test_large_vectors_are_encoded_and_checked_in_segments():
    fixed = FixedPoint(bits=32, clip=1.0, max_group=3)
    values = np.zeros(_SEGMENT + 5, np.float32)
    values[[0, _SEGMENT - 1, _SEGMENT, _SEGMENT + 4]] = (0.5, -0.5, 0.25, -0.25)
    words = fixed.encode(values, np.random.default_rng(0))
    np.testing.assert_allclose(fixed.decode(words), values, atol=2 / fixed.scale)
    fixed.check(words, norm=0.8)  # sqrt(0.625) = 0.79
    with pytest.raises(NumericFailure, match="longer"):
        fixed.check(words, norm=0.78)
    words[-1] = 2**31
    with pytest.raises(NumericFailure):
        fixed.check(words, norm=0.8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_leaves(value):
    with pytest.raises(NumericFailure, match="not finite"):
        FixedPoint(32, 1.0, 3).encode(np.array([0.0, value], np.float32), DOWN)


@pytest.mark.parametrize(
    ("bits", "clip", "max_group"),
    [
        (7, 1.0, 3),
        (33, 1.0, 3),
        (8, 1.0, 64),
        (64, 1.0, 3),
        (True, 1.0, 3),
        (32, 0.0, 3),
        (32, -1.0, 3),
        (32, np.nan, 3),
        (32, np.inf, 3),
        (32, 1e-320, 3),  # the scale would be infinite
        (32, 1.0, 0),
        (16, 1.0, 16_384),  # one step per device would be left, which rounding takes
        (32, 1.0, 2**30),
    ],
)
def test_what_leaves_no_room_is_refused(bits, clip, max_group):
    with pytest.raises(InvalidConfig):
        FixedPoint(bits, clip, max_group)


def test_the_largest_groups_that_fit():
    assert FixedPoint(16, 1.0, 16_383).largest == 2
    assert FixedPoint(32, 1.0, 2**30 - 1).largest == 2


@pytest.mark.parametrize("other", [np.zeros(2, np.uint32), np.zeros(3, np.uint16), np.zeros(1)])
def test_only_equal_vectors_are_added(other):
    total = np.arange(3, dtype=np.uint32)
    with pytest.raises(ShapeMismatch):
        FixedPoint(32, 1.0, 3).add(total, other)
    assert total.tolist() == [0, 1, 2]
