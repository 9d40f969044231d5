"""Trees of named arrays, and the one vector they flatten to.

The order of a flattened vector is the order of the plan's parameters, never that of a mapping, so that
every device and the server mean the same entry by the same index.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from homespun.errors import NumericFailure, ShapeMismatch
from homespun.types import FloatArray, Tree

Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""Parameter names with their shapes, in flattening order."""


def dimension(shapes: Shapes) -> int:
    """Number of entries of the flattened vector."""
    return sum(prod(shape) for _, shape in shapes)


def check_shapes(tree: Tree, shapes: Shapes) -> None:
    """Raise `ShapeMismatch` unless `tree` holds exactly these float32 arrays."""
    expected = dict(shapes)
    if missing := sorted(expected.keys() - tree.keys()):
        raise ShapeMismatch(
            f"parameter {missing[0]!r} is missing", expected=len(expected), got=len(tree)
        )
    if extra := sorted(tree.keys() - expected.keys()):
        raise ShapeMismatch(
            f"parameter {extra[0]!r} does not belong here", expected=len(expected), got=len(tree)
        )
    for name, shape in shapes:
        array = tree[name]
        if array.shape != tuple(shape) or array.dtype != np.float32:
            raise ShapeMismatch(
                f"parameter {name!r} has the wrong shape or type",
                expected=f"float32{list(shape)}",
                got=f"{array.dtype}{list(array.shape)}",
            )


def check_finite(tree: Tree) -> None:
    """Raise `NumericFailure` naming the first parameter that holds a NaN or an infinity."""
    for name, array in tree.items():
        if not np.isfinite(array).all():
            raise NumericFailure(
                f"parameter {name!r} is not finite", hint="lower the learning rate or clip"
            )


def flatten(tree: Tree, shapes: Shapes) -> FloatArray:
    """Concatenate the arrays into one float32 vector `[dimension]`."""
    check_shapes(tree, shapes)
    if not shapes:
        return np.zeros(0, np.float32)
    return np.concatenate([tree[name].reshape(-1) for name, _ in shapes])


def unflatten(vector: FloatArray, shapes: Shapes) -> dict[str, FloatArray]:
    """Cut a vector `[dimension]` into views, one per parameter."""
    if vector.shape != (dimension(shapes),):
        raise ShapeMismatch(
            "vector length differs from the plan's", expected=dimension(shapes), got=vector.size
        )
    tree: dict[str, FloatArray] = {}
    start = 0
    for name, shape in shapes:
        stop = start + prod(shape)
        tree[name] = vector[start:stop].reshape(shape)
        start = stop
    return tree


def subtract(left: Tree, right: Tree) -> dict[str, FloatArray]:
    """`left - right`, name by name: an update is local parameters minus the checkpoint's."""
    return as_arrays({name: left[name] - right[name] for name in left})


def as_arrays(tree: Tree) -> dict[str, FloatArray]:
    """The same numbers, all as arrays: arithmetic on an array without dimensions gives a scalar."""
    return {name: np.asarray(array) for name, array in tree.items()}


def norm(tree: Tree) -> float:
    """L2 norm of the whole tree, accumulated in float64."""
    return float(np.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in tree.values())))
