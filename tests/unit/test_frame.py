"""The report body, byte by byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from homespun.errors import BadFrame, ShapeMismatch
from homespun.learning.contribution import Contribution
from homespun.protocol.frame import (
    decode_contribution,
    decode_masked_input,
    encode_contribution,
    encode_masked_input,
    frame_parts,
    frame_size,
    masked_frame_size,
)
from homespun.secagg.messages import MaskedInput

SMALL = Contribution(np.array([1, 65535], "<u2"), np.array([2, 2**64 - 1], np.uint64), 16)
BODY = bytes.fromhex(
    "48535031"  # HSP1
    "10 00 0200 02000000"  # 16 bits, zero, 2 auxiliary words, 2 main words
    "0200000000000000 ffffffffffffffff"
    "0100 ffff"
)


def test_the_bytes_on_paper():
    assert encode_contribution(SMALL) == BODY
    assert len(BODY) == frame_size(16, 2, 2) == 12 + 16 + 4


def test_reading_gives_back_what_was_written():
    read = decode_contribution(BODY)
    np.testing.assert_array_equal(read.main, SMALL.main, strict=True)
    np.testing.assert_array_equal(read.aux, SMALL.aux, strict=True)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind):
    assert decode_contribution(kind(BODY)).main.tolist() == [1, 65535]


def test_an_evaluation_has_no_main_words():
    only = Contribution(np.zeros(0, "<u4"), np.array([7], np.uint64), 32)
    body = encode_contribution(only)
    assert len(body) == frame_size(32, 1, 0) == 20
    read = decode_contribution(body)
    assert (read.main.shape, read.main.dtype, read.aux.tolist()) == ((0,), np.dtype("<u4"), [7])


def test_words_of_twelve_bits_are_packed():
    packed = Contribution(np.array([0xABC, 0xF123, 0xFFF], "<u2"), SMALL.aux, 12)
    body = encode_contribution(packed)
    assert body[12 + 16 :].hex() == "bc3a12ff0f"  # what lies above 12 bits means nothing
    assert len(body) == frame_size(12, 2, 3) == 12 + 16 + 5
    read = decode_contribution(body)
    assert (read.main.tolist(), read.bits) == ([0xABC, 0x123, 0xFFF], 12)
    with pytest.raises(BadFrame, match="not zero"):
        decode_contribution(body[:-1] + b"\x1f")


def test_a_snapshot_of_a_large_sum_is_not_copied():
    assert np.shares_memory(np.frombuffer(frame_parts(SMALL)[2], "<u2"), SMALL.main)


def test_a_sum_comes_back_to_be_added_to():
    for bits in (12, 16):
        body = bytearray(encode_contribution(replace(SMALL, bits=bits)))
        read = decode_contribution(body)
        assert read.main.flags.writeable
        assert read.aux.flags.writeable


# --- masked input -------------------------------------------------------------------------------------

ANSWER = MaskedInput(
    main=np.array([0xABC, 0x123, 0xFFF], "<u2").tobytes(),
    aux=np.array([2, 2**64 - 1], "<u8").tobytes(),
    signature=bytes(range(64)),
)
MASKED = bytes.fromhex(
    "48534d31"  # HSM1
    "0c 00 0200 03000000"  # 12 bits, zero, 2 auxiliary words, 3 main words
    + bytes(range(64)).hex()
    + "0200000000000000 ffffffffffffffff bc3a12ff0f"
)


def test_the_bytes_of_a_masked_input_on_paper():
    assert encode_masked_input(ANSWER, 12) == MASKED
    assert len(MASKED) == masked_frame_size(12, 2, 3) == 12 + 64 + 16 + 5
    for kind in (bytes, bytearray, memoryview):
        assert decode_masked_input(kind(MASKED), 12, 2, 3) == ANSWER


@pytest.mark.parametrize("layout", [(11, 2, 3), (12, 1, 3), (12, 2, 4), (16, 2, 3)])
def test_a_masked_input_of_another_layout_is_refused(layout):
    with pytest.raises(ShapeMismatch, match="layout"):
        decode_masked_input(MASKED, *layout)


@pytest.mark.parametrize(
    "wrong", [MASKED[:-1], MASKED + b"\0", MASKED[:50], b"", b"HSP1" + MASKED[4:]]
)
def test_a_malformed_masked_input_is_refused(wrong):
    with pytest.raises(BadFrame):
        decode_masked_input(wrong, 12, 2, 3)


def test_the_two_kinds_of_body_are_not_mistaken():
    with pytest.raises(BadFrame):
        decode_contribution(MASKED)
    with pytest.raises(BadFrame):
        decode_masked_input(BODY, 16, 2, 2)


def test_every_truncation_is_refused():
    for length in range(len(BODY)):
        with pytest.raises(BadFrame, match="cut short"):
            decode_contribution(BODY[:length])


@pytest.mark.parametrize("extra", [1, 2, 8, 1000])
def test_every_extension_is_refused(extra):
    with pytest.raises(BadFrame, match="too long") as failure:
        decode_contribution(BODY + bytes(extra))
    assert failure.value.details == {"expected": 32, "got": 32 + extra}


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, 0x49),
        (3, 0x32),
        (4, 7),
        (4, 33),
        (4, 64),
        (4, 0),
        (5, 1),
        (6, 3),
        (7, 1),
        (8, 1),
        (11, 255),
    ],
)
def test_another_header_is_refused(offset, value):
    body = bytearray(BODY)
    body[offset] = value
    with pytest.raises(BadFrame):
        decode_contribution(body)


def test_a_huge_length_costs_nothing_to_refuse():
    with pytest.raises(BadFrame) as failure:
        decode_contribution(BODY[:8] + b"\xff\xff\xff\xff" + BODY[12:])
    assert failure.value.details["expected"] == 12 + 16 + 2 * (2**32 - 1)
