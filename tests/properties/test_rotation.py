"""Laws of the rotation: it turns, and turns back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from homespun.tensors.rotation import rotate, rotate_back

VECTORS = st.integers(0, 70).flatmap(
    lambda size: arrays.arrays(np.float32, size, elements=st.floats(-1e3, 1e3, width=32))
)
SEEDS = st.integers(0, 2**53 - 1)


def length(vector) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


@given(VECTORS, SEEDS)
def test_back_again(vector, seed):
    slack = 1e-6 * length(vector) + 1e-30
    np.testing.assert_allclose(rotate_back(rotate(vector, seed), seed), vector, atol=slack)
    np.testing.assert_allclose(rotate(rotate_back(vector, seed), seed), vector, atol=slack)


@given(VECTORS, SEEDS)
def test_no_vector_becomes_longer_or_shorter(vector, seed):
    assert abs(length(rotate(vector, seed)) - length(vector)) <= 1e-6 * length(vector) + 1e-30


@given(st.integers(0, 3000), SEEDS)
def test_sums_turn_with_their_parts(dimension, seed):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, dimension)).astype(np.float32)
    together = rotate(left, seed) + rotate(right, seed)
    np.testing.assert_allclose(rotate(left + right, seed), together, atol=1e-4)
