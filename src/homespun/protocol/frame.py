"""The report body: a contribution, or with secure aggregation a masked input, as bytes, little-endian.

    size         field
    4            magic: "HSP1" contribution, "HSM1" masked input
    1            bits of a main word (8 to 32)
    1            zero
    2            a, number of auxiliary words
    4            d, number of main words
    64           signature (masked input only)
    8 a          auxiliary vector, uint64
    d bits / 8   main vector, packed (`tensors.packing`), rounded up to whole bytes

The length follows from the header, so a body that is cut short or too long is recognised at once, and equal
vectors make equal bytes. A running sum is stored in the same form: its words are reduced modulo 2^bits, which is
all that they mean.
"""

from __future__ import annotations

import struct

import numpy as np

from homespun.errors import BadFrame, ShapeMismatch
from homespun.learning.contribution import Contribution
from homespun.secagg.messages import MaskedInput
from homespun.tensors.packing import pack, packed_size, unpack, word

MAGIC = b"HSP1"
MASKED_MAGIC = b"HSM1"
_HEADER = struct.Struct("<4sBBHI")
_SIGNATURE = 64


def frame_size(bits: int, num_aux: int, dimension: int) -> int:
    """Bytes of a report body."""
    return _HEADER.size + 8 * num_aux + packed_size(dimension, bits)


def masked_frame_size(bits: int, num_aux: int, dimension: int) -> int:
    """Bytes of a masked input's body."""
    return frame_size(bits, num_aux, dimension) + _SIGNATURE


def frame_parts(contribution: Contribution) -> tuple[bytes, bytes, memoryview]:
    """Contribution to the pieces of a body; words of 16 and 32 bits are a view, not a copy."""
    main, aux, bits = contribution.main, contribution.aux, contribution.bits
    header = _HEADER.pack(MAGIC, bits, 0, aux.size, main.size)
    return header, aux.astype("<u8").tobytes(), pack(main, bits)


def encode_contribution(contribution: Contribution) -> bytes:
    """Contribution to body."""
    return b"".join(frame_parts(contribution))


def decode_contribution(body: bytes | bytearray | memoryview) -> Contribution:
    """Body to contribution; words of 16 and 32 bits are views of `body`. Raises `BadFrame`."""
    bits, num_aux, dimension = _layout(body, MAGIC, 0)
    stop = _HEADER.size + 8 * num_aux
    aux = np.frombuffer(body, "<u8", num_aux, _HEADER.size)
    return Contribution(unpack(memoryview(body)[stop:], dimension, bits), aux, bits)


def encode_masked_input(answer: MaskedInput, bits: int) -> bytes:
    """A masked input of words modulo 2^bits to body."""
    main = np.frombuffer(answer.main, word(bits))
    header = _HEADER.pack(MASKED_MAGIC, bits, 0, len(answer.aux) // 8, main.size)
    return b"".join((header, answer.signature, answer.aux, pack(main, bits)))


def decode_masked_input(
    body: bytes | bytearray | memoryview, bits: int, num_aux: int, dimension: int
) -> MaskedInput:
    """Body to masked input. Raises `BadFrame`, or `ShapeMismatch` unless it has this layout."""
    layout, expected = _layout(body, MASKED_MAGIC, _SIGNATURE), (bits, num_aux, dimension)
    if layout != expected:
        raise ShapeMismatch("not the group's layout", expected=str(expected), got=str(layout))
    view, start = memoryview(body)[_HEADER.size :], _SIGNATURE + 8 * num_aux
    return MaskedInput(
        signature=bytes(view[:_SIGNATURE]),
        aux=bytes(view[_SIGNATURE:start]),
        main=unpack(view[start:], dimension, bits).tobytes(),
    )


def _layout(body: bytes | bytearray | memoryview, magic: bytes, extra: int) -> tuple[int, int, int]:
    """(bits, a, d) of the header. Raises `BadFrame` if it is malformed or the length is another."""
    if len(body) < _HEADER.size:
        raise BadFrame("report is cut short", expected=_HEADER.size, got=len(body))
    found, bits, zero, num_aux, dimension = _HEADER.unpack_from(body)
    if found != magic or bits not in range(8, 33) or zero != 0:
        raise BadFrame("not a report of this version", expected=magic.decode(), got=repr(found))
    expected = frame_size(bits, num_aux, dimension) + extra
    if len(body) != expected:
        problem = "cut short" if len(body) < expected else "too long"
        raise BadFrame(f"report is {problem}", expected=expected, got=len(body))
    return bits, num_aux, dimension
