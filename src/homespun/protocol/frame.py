"""The report body: a contribution as bytes, little-endian.

    offset  size      field
    0       4         magic "HSP1"
    4       1         bits of a main word (16 or 32)
    5       1         zero
    6       2         a, number of auxiliary words
    8       4         d, number of main words
    12      8 a       auxiliary vector, uint64
    12+8a   d bits/8  main vector

The length follows from the header, so a body that is cut short or too long is recognised at once.
"""

from __future__ import annotations

import struct

import numpy as np

from homespun.errors import BadFrame
from homespun.learning.contribution import Contribution

MAGIC = b"HSP1"
_HEADER = struct.Struct("<4sBBHI")


def frame_size(bits: int, num_aux: int, dimension: int) -> int:
    """Bytes of a report body."""
    return _HEADER.size + 8 * num_aux + dimension * bits // 8


def frame_parts(contribution: Contribution) -> tuple[bytes, bytes, memoryview]:
    """Contribution to the pieces of a body; the last one is a view, so that a large sum is not copied."""
    main, aux = contribution.main, contribution.aux
    header = _HEADER.pack(MAGIC, 8 * main.dtype.itemsize, 0, aux.size, main.size)
    return header, aux.astype("<u8").tobytes(), main.data.cast("B")


def encode_contribution(contribution: Contribution) -> bytes:
    """Contribution to body."""
    return b"".join(frame_parts(contribution))


def decode_contribution(body: bytes | bytearray | memoryview) -> Contribution:
    """Body to contribution; the arrays are views of `body`. Raises `BadFrame`."""
    if len(body) < _HEADER.size:
        raise BadFrame("report is cut short", expected=_HEADER.size, got=len(body))
    magic, bits, zero, num_aux, dimension = _HEADER.unpack_from(body)
    if magic != MAGIC or bits not in (16, 32) or zero != 0:
        raise BadFrame(
            "not a report of this version", expected=MAGIC.decode(), got=repr(bytes(magic))
        )
    expected = frame_size(bits, num_aux, dimension)
    if len(body) != expected:
        problem = "cut short" if len(body) < expected else "too long"
        raise BadFrame(f"report is {problem}", expected=expected, got=len(body))
    aux = np.frombuffer(body, "<u8", num_aux, _HEADER.size)
    main = np.frombuffer(body, f"<u{bits // 8}", dimension, _HEADER.size + 8 * num_aux)
    return Contribution(main, aux)
