"""Trees, the vector they flatten to, and their canonical bytes."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from homespun.errors import BadFrame, NumericFailure, ShapeMismatch
from homespun.tensors import codec, tree

SHAPES = (("w", (2, 3)), ("b", ()), ("none", (0, 4)))


def sample() -> dict[str, np.ndarray]:
    return {
        "b": np.array(7.0, np.float32),
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
    }


def safetensors_bytes(dtype: str, shape: list[int], size: int) -> bytes:
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


# --- trees --------------------------------------------------------------------------------------------


def test_flattening_follows_the_shapes_not_the_mapping():
    assert tree.flatten(sample(), SHAPES).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert tree.dimension(SHAPES) == 7


def test_unflatten_undoes_flatten():
    back = tree.unflatten(tree.flatten(sample(), SHAPES), SHAPES)
    assert list(back) == ["w", "b", "none"]
    for name, array in sample().items():
        np.testing.assert_array_equal(back[name], array, strict=True)


def test_an_empty_tree_is_an_empty_vector():
    assert tree.flatten({}, ()).shape == (0,)
    assert tree.unflatten(np.zeros(0, np.float32), ()) == {}
    assert tree.norm({}) == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": None}, "'w' is missing"),
        ({"x": np.zeros(1, np.float32)}, "'x' does not belong here"),
        ({"w": np.zeros((3, 2), np.float32)}, "'w' has the wrong shape"),
        ({"w": np.zeros((2, 3), np.float64)}, "'w' has the wrong shape or type"),
        ({"b": np.zeros(1, np.float32)}, "'b' has the wrong shape"),
    ],
)
def test_check_shapes_names_what_is_wrong(change, says):
    wrong = {name: a for name, a in {**sample(), **change}.items() if a is not None}
    with pytest.raises(ShapeMismatch, match=says):
        tree.check_shapes(wrong, SHAPES)


def test_unflatten_refuses_another_length():
    for length in (6, 8):
        with pytest.raises(ShapeMismatch) as failure:
            tree.unflatten(np.zeros(length, np.float32), SHAPES)
        assert failure.value.details == {"expected": 7, "got": length}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_parameter(value):
    tree.check_finite(sample())
    with pytest.raises(NumericFailure, match="'w' is not finite"):
        tree.check_finite({**sample(), "w": np.array([[0.0, value]], np.float32)})


def test_the_norm_is_of_the_whole_tree_and_in_float64():
    assert tree.norm({"a": np.array([3.0], np.float32), "b": np.array(4.0, np.float32)}) == 5.0
    assert tree.norm({"a": np.full(4, 1e30, np.float32)}) == pytest.approx(2e30)


def test_an_update_is_local_minus_checkpoint_and_stays_arrays():
    update = tree.subtract(sample(), {k: np.ones_like(a) for k, a in sample().items()})
    assert update["w"].tolist() == [[-1, 0, 1], [2, 3, 4]]
    assert isinstance(update["b"], np.ndarray)
    assert update["b"] == 6.0
    tree.check_shapes(update, SHAPES)


# --- bytes --------------------------------------------------------------------------------------------


def test_equal_trees_have_equal_bytes_whatever_their_layout():
    straight = codec.encode_tree(sample())
    mixed: dict[str, Any] = {name: np.asfortranarray(sample()[name]) for name in ("none", "w", "b")}
    mixed["b"] = np.float32(7.0)  # what arithmetic on a parameter without dimensions leaves
    assert codec.encode_tree(mixed) == straight
    assert codec.digest(straight) == codec.digest(bytearray(straight))


def test_one_changed_bit_is_another_address():
    data = codec.encode_tree(sample())
    assert codec.digest(data[:-1] + bytes([data[-1] ^ 1])) != codec.digest(data)


def test_decode_undoes_encode():
    back = codec.decode_tree(codec.encode_tree(sample()))
    tree.check_shapes(back, SHAPES)
    for name, array in sample().items():
        np.testing.assert_array_equal(back[name], array, strict=True)
    assert codec.decode_tree(codec.encode_tree({})) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a checkpoint",
        codec.encode_tree(sample())[:-1],
        codec.encode_tree(sample()) + b"\0",
        safetensors_bytes("F64", [1], 8),
        safetensors_bytes("I32", [1], 4),
        safetensors_bytes("BF16", [2], 4),
        safetensors_bytes("F8_E4M3", [4], 4),
        safetensors_bytes("F32", [3], 4),
        struct.pack("<Q", 2**63) + b"{}",
    ],
    ids="empty text short long float64 int32 bfloat16 float8 shape header".split(),
)
def test_other_bytes_are_a_bad_frame(data):
    with pytest.raises(BadFrame):
        codec.decode_tree(data)


def test_the_float32_sample_is_accepted():
    assert codec.decode_tree(safetensors_bytes("F32", [1], 4))["a"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("0123456789abcdef" * 4, True),
        ("0123456789ABCDEF" * 4, False),
        ("0" * 63, False),
        ("0" * 65, False),
        ("0" * 63 + "\n", False),
        ("../" + "0" * 61, False),
        ("", False),
    ],
)
def test_the_form_of_an_address(text, answer):
    assert codec.is_hash(text) is answer
