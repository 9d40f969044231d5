"""Packing: words of b bits as a stream of bits without gaps, little-endian.

Word i is bits [i b, (i+1) b) of the stream, its least significant bit first; bit n of the stream is bit n mod 8
of byte n div 8. The bits that are left over in the last byte are zero, so there is one encoding of a vector.

Eight words are b bytes, and each begins at the same bit of the same byte in every such group. So all first words
of the groups are one strided vector over the bytes, all second ones another, and eight shifts of whole vectors
pack or unpack everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from homespun.errors import BadFrame, ShapeMismatch

Words: TypeAlias = npt.NDArray[Any]
"""Unsigned machine words `[d]`: uint16 or uint32."""

_SEGMENT = (
    1 << 16
)  # words at a time, in whole groups, so that their 64-bit copies stay in the cache


def word(bits: int) -> np.dtype[Any]:
    """The machine word for numbers modulo 2^bits, 1 <= bits <= 32."""
    return np.dtype("<u2" if bits <= 16 else "<u4")


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` words."""
    return -(-count * bits // 8)


def pack(words: Words, bits: int) -> memoryview:
    """Words `[d]` modulo 2^bits, 8 <= bits <= 32, to bytes; a view of `words` if they fill their machine words.

    Raises `ShapeMismatch` for words of another size than `word(bits)`.
    """
    if words.dtype != word(bits):
        raise ShapeMismatch("not the words to pack", expected=str(word(bits)), got=str(words.dtype))
    if bits == 8 * words.itemsize:
        return words.data.cast("B")
    packed = memoryview(bytearray(packed_size(words.size, bits)))
    for start in range(0, words.size, _SEGMENT):
        part = words[start : start + _SEGMENT]
        groups = -(-part.size // 8)
        columns, buffer = np.zeros((groups, 8), np.uint64), bytearray(groups * bits + 8)
        columns.reshape(-1)[: part.size] = part & (2**bits - 1)
        for column, (lane, shift) in zip(columns.T, _lanes(buffer, groups, bits), strict=True):
            lane |= column << shift
        size, first = packed_size(part.size, bits), packed_size(start, bits)
        packed[first : first + size] = memoryview(buffer)[:size]
    return packed


def unpack(data: bytes | bytearray | memoryview, count: int, bits: int) -> Words:
    """Bytes to `count` words; a view of `data` if words fill their machine words.

    Raises `BadFrame` unless `data` is exactly what `pack` makes of them.
    """
    if len(data) != packed_size(count, bits):
        raise BadFrame(
            "packed words of another length", expected=packed_size(count, bits), got=len(data)
        )
    if count * bits % 8 and data[-1] >> (count * bits % 8):
        raise BadFrame("the bits after the last word are not zero", hint="pack words without gaps")
    kind = word(bits)
    if bits == 8 * kind.itemsize:
        return np.frombuffer(data, kind)
    words = np.empty(count, kind)
    for start in range(0, count, _SEGMENT):
        part = words[start : start + _SEGMENT]
        groups = -(-part.size // 8)
        columns, buffer = np.empty((groups, 8), kind), bytearray(groups * bits + 8)
        size, first = packed_size(part.size, bits), packed_size(start, bits)
        buffer[:size] = memoryview(data)[first : first + size]
        for column, (lane, shift) in zip(columns.T, _lanes(buffer, groups, bits), strict=True):
            column[:] = lane >> shift & (2**bits - 1)
        part[:] = columns.reshape(-1)[: part.size]
    return words


def _lanes(buffer: bytearray, groups: int, bits: int) -> Iterator[tuple[Words, int]]:
    """For each of eight words: 64 bits of every group that hold it, and how far up in them it begins.

    A lane's own elements do not overlap, being `bits` >= 8 bytes apart; `buffer` is 8 bytes longer than the groups.
    """
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        yield np.ndarray(groups, "<u8", buffer, first, (bits,)), shift
