"""Laws of the report body: there and back, and nothing else is accepted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homespun.errors import BadFrame
from homespun.learning.contribution import Contribution
from homespun.protocol.frame import (
    decode_contribution,
    decode_masked_input,
    encode_contribution,
    encode_masked_input,
    frame_size,
    masked_frame_size,
)
from homespun.secagg.messages import MaskedInput
from homespun.tensors.packing import word


@st.composite
def contributions(draw) -> Contribution:
    bits = draw(st.integers(8, 32))
    main = draw(st.lists(st.integers(0, 2**bits - 1), max_size=12))
    aux = draw(st.lists(st.integers(0, 2**64 - 1), max_size=8))
    return Contribution(np.array(main, word(bits)), np.array(aux, np.uint64), bits)


@given(contributions())
def test_there_and_back(contribution):
    body = encode_contribution(contribution)
    assert len(body) == frame_size(contribution.bits, contribution.aux.size, contribution.main.size)
    read = decode_contribution(body)
    np.testing.assert_array_equal(read.main, contribution.main, strict=True)
    np.testing.assert_array_equal(read.aux, contribution.aux, strict=True)
    assert read.bits == contribution.bits
    assert encode_contribution(read) == body


@given(contributions(), st.binary(min_size=64, max_size=64), st.binary(max_size=20))
def test_a_masked_input_there_and_back(contribution, signature, extra):
    main, aux, bits = contribution.main, contribution.aux, contribution.bits
    answer = MaskedInput(main=main.tobytes(), aux=aux.tobytes(), signature=signature)
    body = encode_masked_input(answer, bits)
    assert len(body) == masked_frame_size(bits, aux.size, main.size)
    assert decode_masked_input(body, bits, aux.size, main.size) == answer
    if extra:
        with pytest.raises(BadFrame):
            decode_masked_input(body + extra, bits, aux.size, main.size)
    with pytest.raises(BadFrame):
        decode_masked_input(body[: -len(extra) - 1], bits, aux.size, main.size)
    with pytest.raises(BadFrame):
        decode_contribution(body)


@given(contributions(), st.data())
def test_any_other_length_is_refused(contribution, data):
    body = encode_contribution(contribution)
    cut = data.draw(st.integers(0, len(body) - 1))
    extra = data.draw(st.binary(min_size=1, max_size=20))
    for wrong in (body[:cut], body + extra):
        with pytest.raises(BadFrame):
            decode_contribution(wrong)


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda rest: b"HSP1" + rest))
def test_arbitrary_bytes_are_read_exactly_or_refused(body):
    try:
        read = decode_contribution(body)
    except BadFrame:
        return
    assert encode_contribution(read) == body
