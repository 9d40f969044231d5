"""Laws of packing: there and back, one encoding only."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from homespun.errors import BadFrame
from homespun.tensors.packing import pack, packed_size, unpack, word


@given(st.integers(8, 32), st.lists(st.integers(0, 2**32 - 1), max_size=70))
def test_there_and_back(bits, values):
    words = np.array(values, np.uint64).astype(word(bits))
    packed = bytes(pack(words, bits))
    assert len(packed) == packed_size(words.size, bits)
    canonical = words & word(bits).type(2**bits - 1)
    np.testing.assert_array_equal(unpack(packed, words.size, bits), canonical, strict=True)


@given(st.integers(8, 32), st.integers(0, 20), st.data())
def test_what_is_read_was_written_so(bits, count, data):
    size = packed_size(count, bits)
    packed = data.draw(st.binary(min_size=size, max_size=size))
    try:
        words = unpack(packed, count, bits)
    except BadFrame:
        return
    assert pack(words, bits) == packed
