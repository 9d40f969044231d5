"""The rotation, against the definition."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from homespun.tensors.rotation import block_size, rotate, rotate_back


def by_definition(vector, seed: int):
    """Matrices in float64, and the keystream from the block cipher itself."""
    result, size = np.array(vector, np.float64), block_size(len(vector))
    index = np.arange(size)
    hadamard = (-1.0) ** np.bitwise_count(index[:, None] & index)
    for block, start in enumerate(dict.fromkeys([0, len(vector) - size])):
        key = hashlib.sha256(f"homespun-rotation/{seed}/{block}".encode()).digest()[:16]
        cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        stream = b"".join(cipher.update(i.to_bytes(16, "big")) for i in range(size // 128 + 1))
        signs = np.array([1 - 2 * (stream[i // 8] >> i % 8 & 1) for i in range(size)])
        part = result[start : start + size]
        part[:] = hadamard @ (signs * part) / size**0.5
    return result


def test_the_vector_of_the_specification():
    """docs/protocol.md shows these numbers."""
    assert rotate(np.array([1, 2, 3, 4, 5], np.float32), 7).tolist() == [0.0, 1.5, 5.5, 1.5, -4.5]


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 1000])
def test_the_transform_is_the_one_of_the_definition(dimension):
    vector = np.random.default_rng(dimension).normal(size=dimension).astype(np.float32)
    rotated = rotate(vector, dimension)
    np.testing.assert_allclose(rotated, by_definition(vector, dimension), atol=1e-5)
    assert rotated.dtype == np.float32


def test_nothing_stays_nothing():
    assert rotate(np.zeros(0, np.float32), 1).shape == (0,)
    assert rotate_back(np.zeros(0, np.float32), 1).shape == (0,)


def test_the_block_is_the_largest_power_of_two_within():
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 1023: 512, 1024: 1024, 1_100_000: 2**20}
    assert {dimension: block_size(dimension) for dimension in sizes} == sizes


def test_the_argument_is_left_alone():
    vector = np.arange(5, dtype=np.float32)
    rotate_back(rotate(vector, 3), 3)
    assert vector.tolist() == [0, 1, 2, 3, 4]


def test_another_seed_is_another_rotation():
    vector = np.ones(100, np.float32)
    assert (rotate(vector, 1) != rotate(vector, 2)).any()
    assert (rotate(vector, 1) == rotate(vector, 1)).all()


@pytest.mark.parametrize("dimension", [4096, 5000, 8191])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_large_entry_becomes_many_small_ones(dimension, place):
    """Every entry has at most the deviation that the clip bound is made for."""
    vector = np.zeros(dimension, np.float32)
    vector[{"first": 0, "middle": dimension // 2, "last": dimension - 1}[place]] = 1.0
    for seed in range(20):
        assert np.abs(rotate(vector, seed)).max() <= 6 / block_size(dimension) ** 0.5


def test_the_longest_vector_does_not_overflow():
    vector = np.full(1 << 12, 1e36, np.float32)
    assert np.isfinite(rotate_back(rotate(vector, 0), 0)).all()
