"""Packed words, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import BadFrame, ShapeMismatch
from homespun.tensors.packing import _SEGMENT, pack, packed_size, unpack, word


def bit_by_bit(words, bits: int) -> bytes:
    """The definition: one large number, word i from bit i * bits on."""
    number = sum(int(value) << bits * place for place, value in enumerate(words))
    return number.to_bytes((len(words) * bits + 7) // 8, "little")


@pytest.mark.parametrize(
    ("bits", "words", "data"),
    [
        (12, [0xABC, 0x123], "bc3a12"),
        (12, [0xABC, 0x123, 0xFFF], "bc3a12ff0f"),
        (9, [0x1FF, 0, 1], "ff010400"),
        (16, [0x0102, 0xFFFE], "0201feff"),
        (20, [0x12345], "452301"),
        (32, [0x01020304], "04030201"),
        (8, [1, 255], "01ff"),
        (12, [], ""),
        (32, [], ""),
    ],
)
def test_the_bytes_on_paper(bits, words, data):
    array = np.array(words, word(bits))
    assert bytes(pack(array, bits)).hex() == data
    np.testing.assert_array_equal(unpack(bytes.fromhex(data), len(words), bits), array, strict=True)


@pytest.mark.parametrize("bits", range(8, 33))
def test_every_size_of_word_and_every_number_of_words(bits):
    rng = np.random.default_rng(bits)
    for count in range(20):
        words = rng.integers(0, 2**bits, count).astype(word(bits))
        packed = bytes(pack(words, bits))
        assert packed == bit_by_bit(words, bits)
        assert len(packed) == packed_size(count, bits)
        np.testing.assert_array_equal(unpack(packed, count, bits), words, strict=True)


@pytest.mark.parametrize("bits", [9, 12, 17, 31])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 8])
def test_long_vectors_go_in_segments(bits, beyond):
    count = 2 * _SEGMENT + beyond
    words = np.random.default_rng(bits).integers(0, 2**bits, count).astype(word(bits))
    packed = pack(words, bits)
    edge = bit_by_bit(words[_SEGMENT - 8 : _SEGMENT + 8], bits)
    start = packed_size(_SEGMENT - 8, bits)
    assert packed[start : start + len(edge)] == edge
    np.testing.assert_array_equal(unpack(packed, count, bits), words)


def test_only_the_low_bits_of_a_sum_are_packed():
    assert pack(np.array([0xFABC, 0x5123], "<u2"), 12) == bytes.fromhex("bc3a12")


@pytest.mark.parametrize("bits", [16, 32])
def test_whole_machine_words_are_not_copied(bits):
    words = np.array([1, 2], word(bits))
    packed = pack(words, bits)
    words[0] = 7
    assert packed[0] == 7
    assert np.shares_memory(unpack(packed, 2, bits), words)


@pytest.mark.parametrize("bits", [9, 12, 15, 17, 20, 31])
def test_bits_after_the_last_word_are_refused(bits):
    for count in range(1, 8):
        free = -count * bits % 8
        packed = bytearray(pack(np.zeros(count, word(bits)), bits))
        for place in range(8 - free, 8):
            packed[-1] = 1 << place
            with pytest.raises(BadFrame, match="not zero"):
                unpack(packed, count, bits)


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_another_length_is_refused(bits):
    packed = bytes(pack(np.zeros(3, word(bits)), bits))
    for wrong in (packed[:-1], packed + b"\0", b""):
        with pytest.raises(BadFrame, match="another length"):
            unpack(wrong, 3, bits)


def test_words_of_another_size_are_refused():
    with pytest.raises(ShapeMismatch):
        pack(np.zeros(3, "<u4"), 12)
    with pytest.raises(ShapeMismatch):
        pack(np.zeros(3, "<u2"), 17)
    with pytest.raises(ShapeMismatch):
        pack(np.zeros(3, "<i4"), 32)
