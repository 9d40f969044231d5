"""What one lockstep step sees: rows of the arena, gathered for all active clients at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from homespun.simulation.arena import Arena
from homespun.simulation.batches import Batches

GATHERED_BYTES = 64 * 2**20
"""Rows of as many steps as fit are gathered by one operation."""


@dataclass(frozen=True)
class Block:
    """Steps that are gathered together, with `counts` active clients: their batches and weights one behind another."""

    batch: Mapping[str, Tensor]
    weight: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Step:
    """`batch`: name -> [active * B, ...], B rows of the chunk's first client, then B of the second, ...;
    `weight` [active * B]: 1 where a row is present, else 0. It is the step number `place` of its block."""

    batch: Mapping[str, Tensor]
    weight: Tensor
    active: int
    block: Block
    place: int


def spans(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Begin and end of parts of at most `most` of `count`, at least one: as few as can be, as equal as can be."""
    size = -(-count // -(-count // most))
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))


class TooSlow(Exception):  # noqa: N818
    """The steps went on for longer than they were given."""


@dataclass(frozen=True)
class Steps:
    """The steps of the clients `first` to `last` of `batches`, in order; `until`: no step begins later than that.

    Who wants only the rows' numbers takes `batches`: nothing is gathered before one goes through the steps.
    """

    rows: Rows
    batches: Batches
    first: int
    last: int
    until: float

    @property
    def num_clients(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[Step]:
        """Raises `TooSlow`."""
        for step in self._steps():
            if time.perf_counter() > self.until:
                raise TooSlow
            yield step

    def _steps(self) -> Iterator[Step]:
        rows, batches, first, last = self.rows, self.batches, self.first, self.last
        active = np.clip(batches.active - first, 0, last - first)
        counts: list[int] = active[active > 0].tolist()
        size = batches.rows.shape[2]
        most = GATHERED_BYTES // max(rows.row_bytes * size, 1)
        begin = 0
        while begin < len(counts):
            end, clients = begin + 1, counts[begin]
            while end < len(counts) and clients + counts[end] <= most:
                clients += counts[end]
                end += 1
            spans = [(step, slice(first, first + counts[step])) for step in range(begin, end)]
            batch = rows.at(np.concatenate([batches.rows[span].reshape(-1) for span in spans]))
            present = np.concatenate([batches.present[span].reshape(-1) for span in spans])
            weight = torch.from_numpy(present).to(rows.device, rows.dtype)
            block = Block(batch, weight, counts[begin:end])
            sizes = [count * size for count in block.counts]
            weights = weight.split_with_sizes(sizes)
            columns = [tensor.split_with_sizes(sizes) for tensor in batch.values()]
            for place, (count, *parts) in enumerate(zip(block.counts, *columns, strict=True)):
                yield Step(
                    dict(zip(batch, parts, strict=True)), weights[place], count, block, place
                )
            begin = end


class Rows:
    """The arena's rows as the model wants them: floats of `dtype` (times the input's scale), integers as int64."""

    def __init__(
        self, arena: Arena, scales: Mapping[str, float], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self.scales = device, dtype, scales
        self.inputs = dict(arena.inputs)
        self.row_bytes = sum(int(np.prod(array.shape[1:])) * 8 for array in self.inputs.values())
        # An accelerator keeps the rows in its own memory: a step then moves indexes only.
        self._resident: dict[str, Tensor] = {}
        if device.type != "cpu":
            self._resident = {name: _tensor(a).to(device) for name, a in self.inputs.items()}

    def at(self, index: np.ndarray) -> dict[str, Tensor]:
        """Rows of the arena: int64 [n] -> name -> [n, ...]."""
        if self._resident:
            rows = torch.from_numpy(index).to(self.device)
            gathered = {name: tensor[rows] for name, tensor in self._resident.items()}
        else:
            gathered = {
                name: _tensor(np.take(array, index, axis=0, mode="clip"))
                for name, array in self.inputs.items()
            }
        return {name: self._converted(name, tensor) for name, tensor in gathered.items()}

    def steps(
        self, batches: Batches, first: int = 0, last: int | None = None, until: float = inf
    ) -> Steps:
        """The steps of the clients `first` to `last` of `batches`: see `Steps`."""
        return Steps(self, batches, first, len(batches.clients) if last is None else last, until)

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.scales:
            return tensor.to(self.dtype).mul_(self.scales[name])
        if tensor.dtype == torch.bool:
            return tensor
        return tensor.to(self.dtype if tensor.dtype.is_floating_point else torch.int64)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype in (np.uint16, np.uint32):  # PyTorch can hold these but not index with them
        array = array.astype(np.int32 if array.dtype == np.uint16 else np.int64)
    array = np.ascontiguousarray(array)
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a memory-mapped array
        return torch.from_numpy(array)
