"""Records of Python: lines of JSON, LEAF's files, Hugging Face data sets, and stored examples of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from homespun.errors import InvalidExample, InvalidInput, NotFound
from homespun.plan.features import Example, encode, num_rows
from homespun.plan.manifest import Manifest
from homespun.simulation.arena import Arena
from homespun.simulation.datasets.arrays import pack
from homespun.simulation.datasets.columns import Column, Columns, as_columns, require, stack

_ROWS_AT_ONCE = 4096


def from_jsonl(path: str | Path, user: str = "user", columns: Columns | None = None) -> Arena:
    """One line is one row, a JSON object, of the client that its field `user` names; held in memory.

    Raises `NotFound` for no such file, `InvalidInput`, with the line, for what is not JSON, lacks a field or does not
    fit.
    """
    wanted = as_columns(columns or {})
    owners, blocks = [], []
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _json(line, where)
        if not isinstance(record, dict):
            raise InvalidInput(f"{where} is not a JSON object", hint="write one object per line")
        require([user, *(column.name for column in wanted.values())], list(record), where)
        owners.append([_owner(record[user], where)])
        blocks.append(
            {name: stack([record[column.name]], column, where) for name, column in wanted.items()}
        )
    return pack(owners, blocks)


def from_huggingface(dataset: Any, user: str = "user", columns: Columns | None = None) -> Arena:
    """A `datasets.Dataset`, or anything with `column_names`, a length and `dataset[begin:end]` -> column -> list.

    Raises `InvalidInput` for a column that is missing or does not fit.
    """
    wanted = as_columns(columns or {})
    needed = [user, *(column.name for column in wanted.values())]
    require(needed, dataset.column_names, "the data set")
    owners, blocks = [], []
    for begin in range(0, len(dataset), _ROWS_AT_ONCE):
        part = dataset[begin : begin + _ROWS_AT_ONCE]
        where = f"the data set, rows from {begin} on"
        owners.append([_owner(key, where) for key in part[user]])
        blocks.append(
            {name: stack(part[column.name], column, where) for name, column in wanted.items()}
        )
    return pack(owners, blocks)


def from_leaf(directory: str | Path, columns: Mapping[str, Column] | None = None) -> Arena:
    """The `.json` files of a folder, in the order of their names, as LEAF writes them (Caldas et al. 2018).

    Each has `users` and `user_data`: user -> {"x": rows, "y": rows}. `columns` gives shapes and types, by default
    single numbers for `y` and flat lists, as long as the first one, for `x`.

    Raises `NotFound` for no such files, `InvalidInput` (with the file and user) for what is not so.
    """
    files = sorted(Path(directory).glob("*.json"))
    if not files:
        raise NotFound(f"there are no .json files in {directory}", hint="name LEAF's data folder")
    wanted = dict(columns or {})
    owners, blocks = [], []
    for file in files:
        content = _json("".join(_lines(file)), str(file))
        try:
            entries = [(user, content["user_data"][user]) for user in content["users"]]
            if not wanted:
                shape = next(
                    (len(e["x"][0]),) if isinstance(e["x"][0], list) else ()
                    for _, e in entries
                    if e["x"]
                )
                wanted = {"x": Column("x", shape), "y": Column("y")}
            for user, entry in entries:
                where = f"{file}, user {user!r}"
                require([column.name for column in wanted.values()], list(entry), where)
                block = {
                    n: stack(entry[column.name], column, where) for n, column in wanted.items()
                }
                lengths = {len(array) for array in block.values()}
                if len(lengths) > 1:
                    raise InvalidInput(f"{where} has inputs of different lengths", got=str(lengths))
                if lengths != {0}:
                    owners.append([_owner(user, where)] * num_rows(block))
                    blocks.append(block)
        except (KeyError, TypeError, IndexError, StopIteration) as error:
            raise InvalidInput(
                f"{file} is not as LEAF writes it: {error!r}",
                hint="it needs users and user_data: user -> x and y",
            ) from error
    return pack(owners, blocks)


def from_examples(
    manifest: Manifest, assets: Mapping[str, bytes], examples: Mapping[str, Sequence[Example]]
) -> Arena:
    """User -> stored examples, encoded as a device does it for the plan; a user without a row is left out.

    Raises `InvalidExample`, with the user, for examples that do not fit; `PlanError` as `plan.features.encode` does.
    """
    owners, blocks = [], []
    for user, stored in examples.items():
        try:
            block = encode(manifest, assets, stored)
        except InvalidExample as error:
            raise InvalidExample(f"user {user!r}: {error.message}", hint=error.hint) from error
        owners.append([user] * num_rows(block))
        blocks.append(block)
    return pack(owners, blocks)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}", hint="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as UTF-8 text: {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{where} is not JSON: {error}", hint="repair or remove it") from error


def _owner(key: Any, where: str) -> Any:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise InvalidInput(
            f"{where} has a user that is neither text nor an integer",
            hint="name the column of users, and remove rows without one",
            got=type(key).__name__,
        )
    return key
