"""One column of a table becomes one input: values of Python, checked and stacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from homespun.errors import InvalidInput
from homespun.types import AnyArray


@dataclass(frozen=True)
class Column:
    """`name` in the table; `shape` of one row, () for a number; `dtype` of the input, else the column's own.

    Bytes are little-endian numbers of `dtype`, uint8 unless given. Lists have the row's shape or are flat.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidInput` for a dtype that is not one of numbers."""
        try:
            known = self.dtype is None or np.dtype(self.dtype).kind in "biuf"
        except TypeError:
            known = False
        if not known:
            raise InvalidInput(
                f"column {self.name!r} has no dtype {self.dtype!r}",
                hint="give a NumPy type of numbers such as uint8 or float32",
            )

    @property
    def size(self) -> int:
        """Numbers per row."""
        return math.prod(self.shape)


Columns = Mapping[str, "str | Column"]
"""Input -> the column, by name if its rows are single numbers."""


def as_columns(columns: Columns) -> dict[str, Column]:
    """Raises `InvalidInput` if there is none."""
    if not columns:
        raise InvalidInput("no columns", hint="give columns={'x': 'name of a column', ...}")
    return {
        name: column if isinstance(column, Column) else Column(column)
        for name, column in columns.items()
    }


def require(wanted: Sequence[str], present: Sequence[str], source: str) -> None:
    """Raises `InvalidInput` for a column that is not there."""
    for name in wanted:
        if name not in present:
            raise InvalidInput(
                f"{source} has no column {name!r}, it has {sorted(present)}",
                hint="name the columns as the source does",
            )


def shaped(flat: AnyArray, column: Column, source: str) -> AnyArray:
    """[num_rows, *shape] of numbers, as the column's dtype, without loss. Raises `InvalidInput` if they do not fit."""
    if flat.dtype.kind not in "biuf":
        raise InvalidInput(
            f"{source}: column {column.name!r} is not of numbers",
            hint="turn it into numbers first; for text use from_text",
            got=str(flat.dtype),
        )
    if column.dtype is not None and np.dtype(column.dtype) != flat.dtype:
        with np.errstate(all="ignore"):
            cast = flat.astype(column.dtype)
        if cast.dtype.kind in "biu" and not np.array_equal(cast, flat):
            raise InvalidInput(
                f"{source}: column {column.name!r} has numbers that {column.dtype} cannot hold",
                hint="give the column a wider dtype",
            )
        flat = cast
    return flat.reshape(-1, *column.shape)


def from_bytes(values: Sequence[bytes], column: Column, source: str) -> AnyArray:
    """[num_rows, *shape]. Raises `InvalidInput` for a row of another length."""
    dtype = np.dtype(column.dtype or "uint8").newbyteorder("<")
    for row, value in enumerate(values):
        if len(value) != column.size * dtype.itemsize:
            raise InvalidInput(
                f"{source}: column {column.name!r}, row {row} is not {dtype.name}{list(column.shape)}",
                hint="give Column(name, shape=..., dtype=...) as the bytes are",
                expected=column.size * dtype.itemsize,
                got=len(value),
            )
    stacked = np.frombuffer(b"".join(values), dtype).astype(dtype.newbyteorder("="))
    return stacked.reshape(-1, *column.shape)


def stack(values: Sequence[Any], column: Column, source: str) -> AnyArray:
    """[num_rows, *shape] of numbers, (nested or flat) lists, arrays or bytes, one per row.

    Raises `InvalidInput`, naming the row, for one that is missing or of another shape.
    """
    if values and all(isinstance(value, bytes) for value in values):
        return from_bytes(values, column, source)
    rows = []
    for row, value in enumerate(values):
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.asarray(None)
        if array.dtype.kind not in "biuf" or array.shape not in {column.shape, (column.size,)}:
            raise InvalidInput(
                f"{source}: column {column.name!r}, row {row} is not numbers of shape {list(column.shape)}",
                hint="give Column(name, shape=...) as the rows are, and remove rows without a value",
                got=f"{type(value).__name__} {list(array.shape)}",
            )
        rows.append(array.reshape(column.shape))
    return shaped(np.stack(rows) if rows else np.empty((0, *column.shape)), column, source)
