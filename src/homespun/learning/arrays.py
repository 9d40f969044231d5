"""The few things that NumPy's arrays and PyTorch's tensors do not do by the same word."""

from __future__ import annotations

from typing import Any

import numpy as np

from homespun.types import AnyArray

Array = Any
"""A NumPy array or a PyTorch tensor."""


def as_numpy(array: Array) -> AnyArray:
    """The values in NumPy, of their own type; a tensor on a GPU is fetched."""
    return array.numpy(force=True) if hasattr(array, "numpy") else np.asarray(array)


def like(model: Array, values: AnyArray) -> Array:
    """`values` as an array of the kind, the type and the device of `model`."""
    if hasattr(model, "new_tensor"):
        return model.new_tensor(values)
    return np.asarray(values, model.dtype)


def in_order(rows: Array) -> Array:
    """[n, d] with every column's values in rising order."""
    return np.sort(rows, axis=0) if isinstance(rows, np.ndarray) else rows.sort(0)[0]
