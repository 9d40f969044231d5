"""Parquet tables, read one batch of rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from homespun.errors import InvalidInput, NotFound
from homespun.simulation import partition
from homespun.simulation.arena import Arena, assemble
from homespun.simulation.datasets.columns import (
    Column,
    Columns,
    as_columns,
    from_bytes,
    require,
    shaped,
)
from homespun.types import AnyArray


def from_parquet(
    path: str | Path,
    user: str = "user",
    columns: Columns | None = None,
    where: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
) -> Arena:
    """One row of the table is one row of the client that its column `user` names.

    Columns of numbers, of bytes (fixed-size or not) and of lists, with the shape their `Column` gives; `where`: only
    rows whose columns equal these values. Memory holds one batch besides the arena, which `directory` maps to files.

    Raises `NotFound` for no such file, `InvalidInput` for one that is not Parquet, lacks a column, a value or the
    rows asked for, has rows of several shapes or numbers that are not finite, or when pyarrow is not installed.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
        compute = importlib.import_module("pyarrow.compute")
    except ImportError as error:
        raise InvalidInput(
            f"reading {path} needs pyarrow, which is not installed",
            hint='pip install "homespun[parquet]"',
        ) from error
    wanted, conditions = as_columns(columns or {}), dict(where or {})
    if not Path(path).is_file():
        raise NotFound(f"there is no file {path}", hint="check the path")
    try:
        with parquet.ParquetFile(path) as table:
            needed = [user, *conditions, *(column.name for column in wanted.values())]
            require(needed, table.schema_arrow.names, str(path))

            def batches(names: list[str]) -> Iterator[Any]:
                for batch in table.iter_batches(columns=list(dict.fromkeys([*names, *conditions]))):
                    kept = batch
                    for name, value in conditions.items():
                        kept = kept.filter(compute.equal(kept.column(name), value))
                    yield kept

            users = arrow.chunked_array(
                [batch.column(user) for batch in batches([user])],
                type=table.schema_arrow.field(user).type,
            )
            if not len(users):
                raise InvalidInput(f"{path} has no rows where {conditions}", hint="check where=")
            if users.null_count:
                raise InvalidInput(f"{path}: column {user!r} has rows without a value")
            if arrow.types.is_dictionary(users.type):
                users = users.cast(users.type.value_type)
            # Names are sorted once per distinct user, not per row.
            distinct = users.dictionary_encode().combine_chunks()
            if isinstance(distinct, arrow.ChunkedArray):
                distinct = distinct.chunk(0)
            codes, names = partition.by_key(distinct.dictionary.to_pylist())
            blocks = (
                {
                    name: _values(arrow, batch.column(column.name), column, str(path))
                    for name, column in wanted.items()
                }
                for batch in batches([column.name for column in wanted.values()])
            )
            owners = codes[np.asarray(distinct.indices)]
            return assemble(owners, names.tolist(), blocks, directory)
    except (arrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as asked: {error}") from error


def _values(arrow: Any, array: Any, column: Column, source: str) -> AnyArray:
    """[num_rows, *shape] of one batch's column."""
    kinds = arrow.types
    left = list(column.shape)
    rows = array
    while not array.null_count and (
        kinds.is_list(array.type)
        or kinds.is_large_list(array.type)
        or kinds.is_fixed_size_list(array.type)
    ):
        inner = array.type.value_type
        nested = (
            kinds.is_list(inner) or kinds.is_large_list(inner) or kinds.is_fixed_size_list(inner)
        )
        size = left.pop(0) if nested and left else int(np.prod(left))
        if not nested:
            left = []
        if not (np.asarray(array.value_lengths()) == size).all():
            raise InvalidInput(
                f"{source}: column {column.name!r} has rows that are not of shape {list(column.shape)}",
                hint="give Column(name, shape=...) as the rows are",
            )
        array = array.flatten()
    if array.null_count:
        raise InvalidInput(
            f"{source}: column {column.name!r} has rows without a value",
            hint="remove or fill them first",
        )
    if kinds.is_fixed_size_binary(array.type) or kinds.is_binary(array.type):
        return from_bytes(array.to_pylist(), column, source)
    flat = array.to_numpy(zero_copy_only=False)
    if len(flat) != len(rows) * column.size:
        raise InvalidInput(
            f"{source}: column {column.name!r} has rows that are not of shape {list(column.shape)}",
            hint="give Column(name, shape=...) as the rows are",
            expected=column.size,
            got=str(rows.type),
        )
    return shaped(flat, column, source)
