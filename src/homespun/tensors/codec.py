"""Canonical bytes: a checkpoint is a safetensors file, its address is the SHA-256 of those bytes."""

from __future__ import annotations

import hashlib

import numpy as np
import safetensors
import safetensors.numpy

from homespun.errors import BadFrame
from homespun.types import FloatArray, Hash, Tree


def digest(data: bytes | bytearray | memoryview) -> Hash:
    """The content address of `data`."""
    return hashlib.sha256(data).hexdigest()


def is_hash(text: str) -> bool:
    """Whether `text` has the form of a content address."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def encode_tree(tree: Tree) -> bytes:
    """Safetensors bytes, the same for equal trees whatever their order of insertion."""
    # np.array, because arithmetic on a parameter without dimensions gives a scalar, not an array.
    arrays = {name: np.array(tree[name], order="C") for name in sorted(tree)}
    return bytes(safetensors.numpy.save(arrays))


def decode_tree(data: bytes) -> dict[str, FloatArray]:
    """Read safetensors bytes. Raises `BadFrame` when they are damaged or not float32."""
    try:
        tree: dict[str, FloatArray] = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BadFrame(
            f"not a safetensors checkpoint: {error}", hint="download it again"
        ) from error
    for name, array in tree.items():
        if array.dtype != "float32":
            raise BadFrame(
                f"parameter {name!r} is {array.dtype}", expected="float32", got=str(array.dtype)
            )
    return tree
