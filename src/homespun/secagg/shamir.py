"""Shamir's secret sharing over GF(2^16): any t shares give the secret, fewer say nothing about it.

A secret is bytes, read as little-endian 16-bit elements; each element has a polynomial of its own, and the
share of the holder at coordinate x (1..65535) is the value of all of them at x. The field is polynomials over
GF(2) modulo x^16 + x^12 + x^3 + x + 1 (0x1100B), where 2 generates all non-zero elements, so products are sums
in a table of logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from homespun.errors import BadShare

Elements = npt.NDArray[np.uint16]

POLYNOMIAL = 0x1100B
_ORDER = 2**16 - 1
_ZERO = 2 * _ORDER  # "logarithm" of 0: whatever is added to it, the table says 0
_AT_ONCE = 32  # secrets: their t x t differences stay in the cache


def _tables() -> tuple[Elements, npt.NDArray[np.int32]]:
    power = np.zeros(2 * _ZERO, np.uint16)
    logarithm = np.full(_ORDER + 1, _ZERO, np.int32)
    value = 1
    for exponent in range(_ORDER):
        power[exponent] = power[exponent + _ORDER] = value
        logarithm[value] = exponent
        value <<= 1
        if value > _ORDER:
            value ^= POLYNOMIAL
    return power, logarithm


_POWER, _LOG = _tables()


def num_random_bytes(secret_size: int, threshold: int) -> int:
    """Random bytes that `split` needs."""
    return secret_size * (threshold - 1)


def split(
    secret: bytes, threshold: int, coordinates: Sequence[int], random: bytes
) -> tuple[bytes, ...]:
    """One share, as long as the secret, per coordinate.

    `random`: the coefficients of degree 1, 2, ..., threshold - 1, each as long as the secret.
    """
    elements = np.frombuffer(secret, "<u2")
    coefficients = np.frombuffer(random, "<u2").reshape(threshold - 1, elements.size)
    log_x = _LOG[np.array(coordinates)][:, None]
    values: npt.NDArray[Any] = np.zeros((len(coordinates), elements.size), np.uint16)
    for coefficient in coefficients[::-1]:  # Horner's rule, all shares and elements at once
        values = _POWER[_LOG[values ^ coefficient] + log_x]
    return tuple(row.tobytes() for row in (values ^ elements).astype("<u2"))


def combine(coordinates: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret from exactly threshold shares, one per coordinate.

    Raises `BadShare` for coordinates that are not distinct or shares of different lengths; a share that is simply
    wrong gives a wrong secret, so callers check the secret against what was committed to.
    """
    return combine_all([coordinates], [shares])[0]


def combine_all(
    coordinates: Sequence[Sequence[int]], shares: Sequence[Sequence[bytes]]
) -> list[bytes]:
    """Secrets of one size and threshold t, each from t coordinates and shares as in `combine`, many at once."""
    for mine, given in zip(coordinates, shares, strict=True):
        if len(set(mine)) != len(given) or len({len(share) for share in given}) != 1:
            raise BadShare("shares do not belong together", got=len(given))
    secrets: list[bytes] = []
    for start in range(0, len(shares), _AT_ONCE):
        x = np.array(coordinates[start : start + _AT_ONCE], np.uint16)
        together = b"".join(chain.from_iterable(shares[start : start + _AT_ONCE]))
        values = np.frombuffer(together, "<u2").reshape(*x.shape, -1)
        # Logarithms of the Lagrange coefficients at 0: the product of x_j / (x_j - x_i) over all other j. Where
        # j is i, the "logarithm" of the difference 0 is a multiple of the order and so changes nothing.
        log_x, differences = _LOG[x], _LOG[x[:, :, None] ^ x[:, None, :]].sum(axis=2)
        weights = (log_x.sum(axis=1, keepdims=True) - log_x - differences) % _ORDER
        terms = _POWER[_LOG[values] + weights[:, :, None]]
        secrets += [row.astype("<u2").tobytes() for row in np.bitwise_xor.reduce(terms, axis=1)]
    return secrets
