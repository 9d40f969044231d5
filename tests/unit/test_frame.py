"""The report body, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import BadFrame
from homespun.learning.contribution import Contribution
from homespun.protocol.frame import decode_contribution, encode_contribution, frame_size

SMALL = Contribution(np.array([1, 65535], "<u2"), np.array([2, 2**64 - 1], np.uint64))
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
    only = Contribution(np.zeros(0, "<u4"), np.array([7], np.uint64))
    body = encode_contribution(only)
    assert len(body) == frame_size(32, 1, 0) == 20
    read = decode_contribution(body)
    assert (read.main.shape, read.main.dtype, read.aux.tolist()) == ((0,), np.dtype("<u4"), [7])


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
    [(0, 0x49), (3, 0x32), (4, 8), (4, 64), (4, 0), (5, 1), (6, 3), (7, 1), (8, 1), (11, 255)],
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
