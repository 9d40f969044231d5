"""Rotation: spreads an update evenly over its entries, so that few bits each describe it well.

A random sign for every entry, then the Walsh-Hadamard transform: what was one large entry becomes many small
ones, each close to normally distributed with standard deviation |x| / sqrt(B). Lengths and sums stay what they
were, and turning back is the same in reverse. The seed is public: a rotation hides nothing.

The transform needs a power of two. Instead of padding d entries to the next one, B is the largest power of
two that is at most d, and two blocks of B entries are rotated, which overlap unless B = d:

    x[:B]  <- transform(signs(seed, 0) * x[:B])
    x[d-B:] <- transform(signs(seed, 1) * x[d-B:])        only if B < d

    transform(x)[i] = 1/sqrt(B) * sum over j of (-1)^(number of common one bits of i and j) * x[j]
    signs(seed, block)[i] = -1 where bit i of the keystream is set, bit 0 of byte 0 first; else 1
    keystream = AES-128-CTR, key = first 16 bytes of SHA-256("homespun-rotation/<seed>/<block>"), decimal
                numbers in ASCII; first counter block zero, incremented as a big-endian number

Sources: Ailon and Chazelle 2009, "The fast Johnson-Lindenstrauss transform" (random signs); Suresh et al. 2017,
"Distributed mean estimation with limited communication", section 3. Results agree with another
implementation's to the rounding of float32, as the order of additions is free.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from homespun.types import FloatArray


def block_size(dimension: int) -> int:
    """B: the largest power of two that is at most `dimension` (at least 1)."""
    return 1 << max(dimension.bit_length() - 1, 0)


def rotate(vector: FloatArray, seed: int) -> FloatArray:
    """The rotated vector, float32 `[d]` from float32 `[d]`. `seed`: an integer >= 0; d may be 0."""
    rotated, block = vector.astype(np.float32), block_size(vector.size)
    for index, start in enumerate(_starts(vector.size)):
        part = rotated[start : start + block]
        part[:] = _transform(_signs(seed, index, part.size) * part)
    return rotated


def rotate_back(vector: FloatArray, seed: int) -> FloatArray:
    """The inverse: `rotate_back(rotate(x, seed), seed)` is `x`, but for rounding."""
    turned, block = vector.astype(np.float32), block_size(vector.size)
    for index, start in reversed(list(enumerate(_starts(vector.size)))):
        part = turned[start : start + block]
        part[:] = _transform(part) * _signs(seed, index, part.size)
    return turned


def _starts(dimension: int) -> list[int]:
    rest = dimension - block_size(dimension)
    return [0, rest] if rest > 0 else [0]


def _signs(seed: int, index: int, size: int) -> FloatArray:
    key = hashlib.sha256(f"homespun-rotation/{seed}/{index}".encode()).digest()[:16]
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16)))
    keystream = cipher.encryptor().update(bytes(-(-size // 8)))
    negative = np.unpackbits(np.frombuffer(keystream, np.uint8), count=size, bitorder="little")
    return np.float32(1) - np.float32(2) * negative


def _transform(vector: FloatArray) -> FloatArray:
    # Every stage takes neighbours and leaves their sum in the first half, their difference in the second. That
    # turns the index by one bit, so after log2(B) stages all entries are back in their places, and every stage
    # is the same two passes over memory. Scaled first: no intermediate value exceeds the vector's length.
    now = vector * np.float32(vector.size**-0.5) if vector.size else vector
    following, half = np.empty_like(now), now.size // 2
    for _ in range(now.size.bit_length() - 1):
        np.add(now[0::2], now[1::2], out=following[:half])
        np.subtract(now[0::2], now[1::2], out=following[half:])
        now, following = following, now
    return now
