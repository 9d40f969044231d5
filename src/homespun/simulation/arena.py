"""The packed arena: all clients' rows in one array per input, and where each client's begin.

No object exists per client: a million clients are one offsets array more. Arrays are narrow (uint8 pixels, uint16 or
int32 tokens) and may be memory-mapped.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from homespun import rng
from homespun.errors import Conflict, InvalidConfig, InvalidInput, NotFound, ShapeMismatch
from homespun.types import AnyArray

Offsets = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]

FORMAT = 1
_HEADER = "arena.json"


@dataclass(frozen=True)
class Arena:
    """`inputs`: name -> [num_rows, ...]; client c has the rows `offsets[c]` to `offsets[c + 1]`, [num_clients + 1];
    `clients`: their names, if they have any.
    """

    inputs: Mapping[str, AnyArray]
    offsets: Offsets
    clients: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Raises `ShapeMismatch` if inputs and offsets do not belong together."""
        ends = int(self.offsets[-1]) if len(self.offsets) else -1
        for name, array in self.inputs.items():
            if len(array) != ends:
                raise ShapeMismatch(
                    f"input {name!r} has another number of rows", expected=ends, got=len(array)
                )
        if not len(self.offsets) or self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ShapeMismatch("offsets must begin at 0 and never fall", got=str(self.offsets[:3]))
        if self.clients is not None and len(self.clients) != self.num_clients:
            raise ShapeMismatch(
                "not one name per client", expected=self.num_clients, got=len(self.clients)
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process go the names of memory-mapped files, not their rows."""
        inputs = {name: _File.of(array) or array for name, array in self.inputs.items()}
        return _unpickled, (inputs, self.offsets, self.clients)

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> npt.NDArray[np.int64]:
        """[num_clients]"""
        return np.diff(self.offsets)

    def read_here_and_there(self) -> None:
        """Tell the system that few clients' rows of many are read next, so that it reads no more of a memory-mapped
        file than these: reading ahead takes ten times as long and fills memory."""
        for array in self.inputs.values():
            if (mapped := _map_of(array)) is not None and hasattr(mmap, "MADV_RANDOM"):
                mapped.madvise(mmap.MADV_RANDOM)

    def rows(self, client: int) -> dict[str, AnyArray]:
        """Views of one client's rows."""
        begin, end = self.offsets[client], self.offsets[client + 1]
        return {name: array[begin:end] for name, array in self.inputs.items()}

    def subset(self, clients: Sequence[int] | Indices) -> Arena:
        """A new arena in memory with copies of the rows of `clients`, in their order.

        Raises `InvalidInput` for clients that the arena does not have.
        """
        chosen = np.asarray(clients, np.int64).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.num_clients:
            raise InvalidInput(
                "a client of the subset is not in the arena",
                hint=f"clients are 0 to {self.num_clients - 1}",
                got=f"{chosen.min()} to {chosen.max()}",
            )
        counts = self.num_rows[chosen]
        offsets = _offsets(counts)
        rows = np.repeat(self.offsets[chosen] - offsets[:-1], counts) + np.arange(offsets[-1])
        names = self.clients
        return Arena(
            {name: np.asarray(array[rows]) for name, array in self.inputs.items()},
            offsets,
            None if names is None else tuple(names[client] for client in chosen.tolist()),
        )

    def held_out(self, share: float, seed: int) -> tuple[Indices, Indices]:
        """Indices of the training clients and of the held-out clients, about `share` of all.

        The side depends on the seed and the client's name (its index, if it has none) alone, so a client stays on its
        side when others join or leave. One SHA-256 per client: under a second for 100,000.

        Raises `InvalidConfig` unless 0 <= share <= 1.
        """
        if not 0 <= share <= 1:
            raise InvalidConfig("the share of held-out clients must be from 0 to 1", got=share)
        names = range(self.num_clients) if self.clients is None else self.clients
        out = np.array([rng.unit_interval(seed, "held out", n) < share for n in names], np.bool_)
        return np.flatnonzero(~out), np.flatnonzero(out)

    def save(self, directory: str | Path) -> None:
        """One `.npy` file per input, `offsets.npy`, `clients.npy` if there are names, and a header, which comes last:
        a folder that was not finished does not open.

        Raises `Conflict` if the folder has an arena, `InvalidInput` for names of inputs that cannot be names of files.
        """
        folder = _new_folder(directory)
        for name, array in self.inputs.items():
            np.save(_input_file(folder, name), array, allow_pickle=False)
        _finish(folder, list(self.inputs), self.offsets, self.clients)

    @classmethod
    def open(cls, directory: str | Path) -> Arena:
        """The arena of `directory`, its inputs memory-mapped and read-only.

        Raises `NotFound` if there is none, `InvalidInput` if it is damaged or of another format.
        """
        folder = Path(directory)
        try:
            header = json.loads((folder / _HEADER).read_bytes())
            form, inputs, named = header["format"], list(header["inputs"]), header["named"]
        except FileNotFoundError as error:
            raise NotFound(
                f"there is no arena in {folder}", hint="make one with Arena.save"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder / _HEADER, error) from error
        if form != FORMAT:
            raise InvalidInput(
                f"{folder} has an arena of another format", hint=_AGAIN, expected=FORMAT, got=form
            )
        try:
            return cls(
                {name: _load(_input_file(folder, name), "r") for name in inputs},
                _load(folder / "offsets.npy").astype(np.int64),
                tuple(_load(folder / "clients.npy").tolist()) if named else None,
            )
        except ShapeMismatch as error:
            raise _damaged(folder, error) from error


def _map_of(array: AnyArray) -> mmap.mmap | None:
    """The map that the whole array is, if it is one."""
    base: object = array.base
    return base if isinstance(array, np.memmap) and isinstance(base, mmap.mmap) else None


@dataclass(frozen=True)
class _File:
    """Where another process finds a memory-mapped array."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, array: AnyArray) -> _File | None:
        """None for an array that is not just what a file holds."""
        if not isinstance(array, np.memmap) or _map_of(array) is None:
            return None  # a part of a map does not know where it begins
        if array.filename is None or array.mode == "c" or not array.flags.c_contiguous:
            return None
        path = str(Path(array.filename).resolve())
        return cls(path, array.dtype, array.shape, array.offset)

    def open(self) -> AnyArray:
        """Raises `NotFound`."""
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise NotFound(
                f"{self.path} is not here as it is where the simulation was started: {error}",
                hint="machines that train together need an arena's files under the same path, or its rows: "
                "data.subset(range(data.num_clients))",
            ) from error


def _unpickled(
    inputs: Mapping[str, AnyArray | _File], offsets: Offsets, clients: Sequence[str] | None
) -> Arena:
    arrays = {n: a.open() if isinstance(a, _File) else a for n, a in inputs.items()}
    return Arena(arrays, offsets, clients)


def assemble(
    codes: Sequence[int] | Indices,
    names: Sequence[str],
    blocks: Iterable[Mapping[str, AnyArray]],
    directory: str | Path | None = None,
) -> Arena:
    """Rows in any order become an arena, one block at a time; a client's rows keep their order.

    `codes` [num_rows]: the owner of each row, an index of `names`, in the order of the blocks; each block: input ->
    array [rows of the block, ...]. With `directory` the arrays are files, memory-mapped, and memory holds one block
    and 16 bytes per row.

    Raises `InvalidInput` for no rows, an owner without a name, numbers that are not finite, or blocks that do not
    fit each other or `codes`; `Conflict` if the folder has an arena.
    """
    owners = np.asarray(codes, np.int64)
    if owners.ndim != 1 or not len(owners):
        raise InvalidInput("there are no rows", hint="check the source and its filter")
    if not 0 <= owners.min() <= owners.max() < len(names):
        raise InvalidInput("a row's owner has no name", expected=len(names), got=int(owners.max()))
    destination = np.empty(len(owners), np.int64)
    destination[np.argsort(owners, kind="stable")] = np.arange(len(owners))
    offsets = _offsets(np.bincount(owners, minlength=len(names)))
    folder = None if directory is None else _new_folder(directory)
    inputs: dict[str, AnyArray] = {}
    begin = 0
    for number, block in enumerate(blocks):
        if not number:
            inputs = {name: _empty(folder, name, a, len(owners)) for name, a in block.items()}
        end = begin + _checked_length(inputs, block, begin)
        if end > len(owners):
            raise InvalidInput("more rows than owners", expected=len(owners), got=end)
        for name, array in block.items():
            inputs[name][destination[begin:end]] = array
        begin = end
    if begin != len(owners):
        raise InvalidInput("fewer rows than owners", expected=len(owners), got=begin)
    if folder is None:
        return Arena(inputs, offsets, tuple(str(name) for name in names))
    for array in inputs.values():
        if isinstance(array, np.memmap):
            array.flush()
    _finish(folder, list(inputs), offsets, names)
    return Arena.open(folder)


def _checked_length(
    inputs: Mapping[str, AnyArray], block: Mapping[str, AnyArray], begin: int
) -> int:
    """The number of rows of `block`, whose first is row `begin` of the source."""
    if not block or set(block) != set(inputs):
        raise InvalidInput(
            f"the rows from {begin} on have other inputs",
            expected=str(sorted(inputs)),
            got=str(sorted(block)),
        )
    lengths = {name: len(array) for name, array in block.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidInput("inputs have different numbers of rows", got=str(lengths))
    for name, array in block.items():
        target = inputs[name]
        if (array.dtype, array.shape[1:]) != (target.dtype, target.shape[1:]):
            raise InvalidInput(
                f"input {name!r}: the rows from {begin} on are of another type or shape",
                hint="all rows of an input have one type and one shape",
                expected=f"{target.dtype}{list(target.shape[1:])}",
                got=f"{array.dtype}{list(array.shape[1:])}",
            )
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            raise InvalidInput(
                f"input {name!r}: row {begin + int(np.argmin(finite))} is not finite",
                hint="remove or repair the rows with missing or infinite numbers",
            )
    return next(iter(lengths.values()))


def _empty(folder: Path | None, name: str, like: AnyArray, num_rows: int) -> AnyArray:
    """Room for `num_rows` rows such as those of `like`."""
    if like.dtype.kind not in "biufc":
        raise InvalidInput(
            f"input {name!r} is not of numbers",
            hint="give numbers; for text use from_text",
            got=str(like.dtype),
        )
    shape = (num_rows, *like.shape[1:])
    if folder is None:
        return np.empty(shape, like.dtype)
    file = _input_file(folder, name)
    return np.lib.format.open_memmap(file, "w+", dtype=like.dtype, shape=shape)


def _offsets(counts: npt.NDArray[np.int64]) -> Offsets:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _input_file(folder: Path, name: str) -> Path:
    if not str(name).isidentifier():
        raise InvalidInput(
            f"{name!r} cannot be the name of an input that is saved",
            hint="use letters, digits and underscores",
        )
    return folder / f"input.{name}.npy"


def _new_folder(directory: str | Path) -> Path:
    folder = Path(directory)
    if (folder / _HEADER).exists():
        # Its files may be mapped by somebody: to write over them would change, or crash, their arena.
        raise Conflict(f"{folder} has an arena", hint="remove it or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder


def _finish(
    folder: Path, inputs: Sequence[str], offsets: Offsets, clients: Sequence[str] | None
) -> None:
    np.save(folder / "offsets.npy", offsets)
    if clients is not None:
        np.save(folder / "clients.npy", np.asarray(clients, np.str_))
    header = {"format": FORMAT, "inputs": list(inputs), "named": clients is not None}
    (folder / _HEADER).write_text(json.dumps(header))


def _load(file: Path, mmap_mode: Literal["r"] | None = None) -> AnyArray:
    try:
        loaded: AnyArray = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
        return loaded
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, error) from error


def _damaged(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput(f"{path} is missing or damaged: {error}", hint=_AGAIN)


_AGAIN = "make the arena again from its source and save it"
