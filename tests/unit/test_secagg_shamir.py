"""Shamir's secret sharing, against the schoolbook definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homespun.errors import BadShare
from homespun.rng import stream
from homespun.secagg.shamir import POLYNOMIAL, combine, num_random_bytes, split

ELEMENTS = st.integers(0, 2**16 - 1)


def slow_product(a: int, b: int) -> int:
    """Carry-less multiplication, then the remainder modulo the polynomial, bit by bit."""
    product = 0
    for bit in range(16):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(31, 15, -1):
        if product >> bit & 1:
            product ^= POLYNOMIAL << (bit - 16)
    return product


def slow_power(a: int, exponent: int) -> int:
    result = 1
    for _ in range(exponent):
        result = slow_product(result, a)
    return result


def slow_inverse(a: int) -> int:
    result, square = 1, a  # a^(2^16 - 2)
    for _ in range(15):
        square = slow_product(square, square)
        result = slow_product(result, square)
    return result


def slow_share(secret: bytes, threshold: int, x: int, random: bytes) -> bytes:
    words = np.frombuffer(secret + random, "<u2").reshape(threshold, -1).tolist()
    values = [0] * len(words[0])
    for degree, coefficients in enumerate(words):
        factor = slow_power(x, degree)
        values = [
            value ^ slow_product(c, factor) for value, c in zip(values, coefficients, strict=True)
        ]
    return b"".join(value.to_bytes(2, "little") for value in values)


def slow_secret(coordinates: tuple[int, ...], shares: list[bytes]) -> bytes:
    values = [0] * (len(shares[0]) // 2)
    for i, x in enumerate(coordinates):
        weight = 1
        for j, other in enumerate(coordinates):
            if i != j:
                weight = slow_product(weight, slow_product(other, slow_inverse(other ^ x)))
        for element, word in enumerate(np.frombuffer(shares[i], "<u2").tolist()):
            values[element] ^= slow_product(weight, word)
    return b"".join(value.to_bytes(2, "little") for value in values)


def product(a: int, x: int) -> int:
    """A line through the origin: the share at x of the secret 0 is a x."""
    (share,) = split(b"\0\0", 2, [x], a.to_bytes(2, "little"))
    return int.from_bytes(share, "little")


@given(ELEMENTS, st.integers(1, 2**16 - 1))
def test_products(a, x):
    assert product(a, x) == slow_product(a, x)


def test_two_generates_every_element():
    powers = {1}
    value = 2
    while value != 1:
        powers.add(value)
        value = slow_product(value, 2)
    assert len(powers) == 2**16 - 1


def test_products_with_the_ends():
    assert [product(0, 1), product(0, 65535), product(65535, 1)] == [0, 0, 65535]
    assert product(0x8000, 2) == 0x100B


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_shares_and_secrets_are_those_of_the_definition(data):
    threshold = data.draw(st.integers(2, 5))
    coordinates = tuple(
        data.draw(st.lists(st.integers(1, 2**16 - 1), min_size=5, max_size=6, unique=True))
    )
    secret = data.draw(st.binary(min_size=4, max_size=4))
    size = num_random_bytes(4, threshold)
    random = data.draw(st.binary(min_size=size, max_size=size))
    shares = split(secret, threshold, coordinates, random)
    assert list(shares) == [slow_share(secret, threshold, x, random) for x in coordinates]
    chosen = coordinates[:threshold]
    assert combine(chosen, shares[:threshold]) == slow_secret(chosen, list(shares[:threshold]))
    assert combine(chosen, shares[:threshold]) == secret


def test_every_threshold_of_holders_opens_and_fewer_do_not():
    random = stream(1, "shamir").bytes(num_random_bytes(32, 3))
    secret = bytes(range(32))
    shares = split(secret, 3, range(1, 6), random)
    for holders in combinations(range(5), 3):
        assert combine(tuple(h + 1 for h in holders), [shares[h] for h in holders]) == secret
    for pair in combinations(range(5), 2):
        assert combine(tuple(h + 1 for h in pair), [shares[h] for h in pair]) != secret


def test_many_holders():
    random = stream(2, "shamir").bytes(num_random_bytes(64, 124))
    secret = bytes(range(64))
    shares = split(secret, 124, range(5, 199), random)
    assert combine(tuple(range(75, 199)), shares[70:]) == secret


@pytest.mark.parametrize(
    ("coordinates", "shares"),
    [
        ((1, 1), [b"ab", b"cd"]),
        ((1, 2), [b"ab", b"cdef"]),
        ((1, 2, 3), [b"ab", b"cd"]),
        ((), []),
    ],
)
def test_shares_that_do_not_belong_together(coordinates, shares):
    with pytest.raises(BadShare):
        combine(coordinates, shares)
