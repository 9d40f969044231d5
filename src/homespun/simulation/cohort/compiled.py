"""The compiled strategy: one client after another, all its steps as machine code that is made for the model.

Rows come straight from the arena, a client's parameters stay in the processor's cache, and nothing is done in Python
for a client or a step. For models whose steps take less time than PyTorch needs to start their operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from homespun.simulation.cohort import reference
from homespun.simulation.cohort.cohort import Cohort, Recordable, Records
from homespun.simulation.cohort.gather import Rows, Steps, spans
from homespun.simulation.cohort.kernel import BYTE, INDEX, POINTER, Array, Kernel, Number
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.lowering import REAL, Lowering
from homespun.simulation.cohort.objective import Objective, Totals
from homespun.simulation.cohort.parameter import Unsupported
from homespun.simulation.cohort.program import Recording
from homespun.simulation.cohort.slots import PRODUCTS
from homespun.types import AnyArray

Function = Callable[..., int]

TRANSPOSED_OUTPUTS, TRANSPOSED_SIZE = 32, 8192
"""A transposed matrix is added to in rows of at least so many numbers: fewer would leave registers half empty. And it
is read in columns, for which all of it must be in the nearest cache."""
PREPARED = 8
"""Calls for each thread that are prepared at a time: each has a vector as long as the model, or one per client."""
PARAMETERS: dict[str, ir.Type] = {
    "clients": INDEX,
    "num_steps": POINTER,  # of each client
    "rows": POINTER,  # of the arena, [steps, clients, batch]
    "present": POINTER,  # whether the row counts, likewise
    "start": POINTER,  # from where a client starts; its stride is 0 where all start at the same
    "start_stride": INDEX,
    "moves": INDEX,  # whether a step is more than w <- w - rate * gradient:
    "shrink": ir.DoubleType(),  # w <- shrink * w - rate * gradient + drift
    "drift": POINTER,
    "drift_stride": INDEX,
    "rate": ir.DoubleType(),
    "weights": POINTER,  # of each client
    "target": POINTER,  # weight * (w - start) is added there
    "target_stride": INDEX,
    "sums": POINTER,  # double: sum and count of each measure
}
"""Of the kernel; the arena's inputs follow."""


class Compiled:
    """Trains clients `size` at a time, several such parts at once; used as `Cohort` is.

    There are as many threads as PyTorch may use in an operation. Parts and the order in which they are added do not
    depend on it, and so no bit of the result does.
    """

    chunk = sys.maxsize  # all of them at once

    def __init__(self, objective: Objective, size: int) -> None:
        self.objective, self.size = objective, size

    @torch.no_grad()
    def run(
        self,
        steps: Steps,
        local: Local,
        totals: Totals,
        mean: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The clients' updates [m, d]; with `mean` [d] and `weights` [m], their weighted sum is added to `mean`.

        Raises `Unsupported` where the model does what is not compiled, or the rule wants whole gradients.
        """
        if not steps.batches.num_steps[steps.first : steps.last].any():
            still = local.model.new_zeros(steps.num_clients, len(local.model))
            return still if mean is None else None
        updates = []
        made = self._made(steps, local, totals.names)
        parts = self._parts(steps, local, weights)
        for call, wrong in self._called(made, parts):
            part, update = call.part, made.restored(call.target)
            if wrong:  # an index was out of range: PyTorch says which, or has a meaning for it
                update = reference.updates(self.objective, part.steps, part.local, totals)
                update = update if part.weights is None else part.weights @ update
            else:
                for index in range(len(totals.names)):
                    totals.add(index, *call.sums[2 * index : 2 * index + 2])
            if mean is None:
                updates.append(update)
            else:
                mean += update
        return torch.cat(updates) if mean is None else None

    def _parts(self, steps: Steps, local: Local, weights: Tensor | None) -> list[_Part]:
        return [
            _Part(
                replace(steps, first=steps.first + begin, last=steps.first + end),
                local.part(begin, end),
                None if weights is None else weights[begin:end].contiguous(),
            )
            for begin, end in spans(steps.num_clients, self.size)
        ]

    def _called(self, made: _Made, parts: Sequence[_Part]) -> Iterator[tuple[_Call, bool]]:
        """Each part's call and what it gives, in their order."""
        threads = torch.get_num_threads()
        for begin in range(0, len(parts), PREPARED * threads):
            calls = [made.call(part) for part in parts[begin : begin + PREPARED * threads]]
            run = map if threads == 1 or len(calls) == 1 else self._threads.map
            yield from zip(calls, run(_Call.run, calls), strict=True)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(torch.get_num_threads(), "homespun-compiled")

    def _made(self, steps: Steps, local: Local, names: tuple[str, ...]) -> _Made:
        if not local.linear:
            raise Unsupported("compiled steps have no memory and no clipping")
        contiguous = all(array.flags.c_contiguous for array in steps.rows.inputs.values())
        if local.model.is_cuda or not contiguous:
            raise Unsupported("compiled steps read rows that lie in this machine's memory")
        key = ("compiled", steps.batches.rows.shape[2], names)
        if key not in self.objective.programs:
            self.objective.programs[key] = self._compiled(steps, names)
        made: _Made = self.objective.programs[key]
        return made

    def _compiled(self, steps: Steps, names: tuple[str, ...]) -> _Made:
        """Of the first step, which is recorded for one client; all others are the same."""
        step = next(iter(replace(steps, last=steps.first + 1)))
        recordable = Cohort(self.objective, 1).recordable(step, names, plain=True)
        arguments, num_rows = recordable.arguments(1), recordable.num_rows
        recording = Recording.of(recordable.function, arguments)
        turned = _worth_transposing(recordable.records, self.objective.shapes)
        if turned:
            for place, name in enumerate(self.objective.shapes, num_rows):
                if name in turned:
                    arguments[place] = arguments[place].mT.contiguous().mT
            recording = Recording.of(recordable.function, arguments)
        writer = _Writer(steps.rows, self.objective.shapes, recordable, recording)
        order = _order(arguments[num_rows:]) if turned else None
        return _Made(writer.written(len(names)), 2 * len(names), order)


@dataclass(frozen=True)
class _Part:
    """Some clients. `weights` [m]: of their updates, whose sum is wanted instead of each."""

    steps: Steps
    local: Local
    weights: Tensor | None


@dataclass(frozen=True)
class _Call:
    """A part's training, ready to be run. `target`: gets its updates [m, d], or their weighted sum [d]; `sums`: gets
    sum and count of each measure; `kept`: whose memory the arguments point to, too."""

    part: _Part
    function: Function
    arguments: Sequence[int | float]
    target: Tensor
    sums: Tensor
    kept: Sequence[object]

    def run(self) -> bool:
        """Whether an index was out of range, and so nothing that was written means anything."""
        return bool(self.function(*self.arguments))


@dataclass(frozen=True)
class _Made:
    """`num_sums`: of a call, two for each measure; `order`: where each number of the kernel's state is in the flat
    vector, if not at the same place."""

    function: Function
    num_sums: int
    order: Tensor | None

    def call(self, part: _Part) -> _Call:
        steps, local, model = part.steps, part.local, part.local.model
        clients, chosen = steps.num_clients, slice(steps.first, steps.last)
        num_steps = np.ascontiguousarray(steps.batches.num_steps[chosen])
        rows = np.ascontiguousarray(steps.batches.rows[:, chosen])
        present = np.ascontiguousarray(steps.batches.present[:, chosen])
        start, drift = self.arranged(local.start), local.drift()
        moves = drift is not None or local.shrink != 1
        if moves:
            drift = self.arranged(torch.zeros_like(model) if drift is None else drift)
        share = model.new_ones(clients) if part.weights is None else part.weights
        target = model.new_zeros(*([clients] if part.weights is None else []), len(model))
        sums = torch.zeros(self.num_sums, dtype=torch.float64)
        arguments = (
            clients,
            _address(num_steps),
            _address(rows),
            _address(present),
            start.data_ptr(),
            _stride(start),
            moves,
            local.shrink,
            0 if drift is None else drift.data_ptr(),
            0 if drift is None else _stride(drift),
            local.optimizer.learning_rate * local.scale,
            share.data_ptr(),
            target.data_ptr(),
            _stride(target),
            sums.data_ptr(),
            *map(_address, steps.rows.inputs.values()),
        )
        kept = (num_steps, rows, present, start, drift, share)
        return _Call(part, self.function, arguments, target, sums, kept)

    def arranged(self, vector: Tensor) -> Tensor:
        """[d] or [m, d], from the flat order to the kernel's."""
        return vector.contiguous() if self.order is None else vector.index_select(-1, self.order)

    def restored(self, vector: Tensor) -> Tensor:
        return vector if self.order is None else vector.index_select(-1, self._back)

    @cached_property
    def _back(self) -> Tensor:
        assert self.order is not None
        return torch.argsort(self.order)


def _worth_transposing(records: Records, shapes: Mapping[str, torch.Size]) -> set[str]:
    """Matrices of products with data only: then no step needs rows of the matrix, and columns fill whole registers."""
    kinds: dict[str, set[str]] = {}
    for name, kind, _ in records:
        kinds.setdefault(name, set()).add(kind)
    return {
        name
        for name, kind in kinds.items()
        if kind == {"data"}
        and shapes[name][0] >= TRANSPOSED_OUTPUTS
        and shapes[name].numel() <= TRANSPOSED_SIZE
    }


def _order(parameters: Sequence[Tensor]) -> Tensor:
    """For tensors one behind another: the place, in the order of their elements, of each number in memory."""
    places, begin = [], 0
    for tensor in parameters:
        place = torch.arange(begin, begin + tensor.numel()).view(tensor.shape)
        places.append((place if tensor.is_contiguous() else place.mT).reshape(-1))
        begin += tensor.numel()
    return torch.cat(places)


def _address(array: AnyArray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _stride(vectors: Tensor) -> int:
    """From a client's vector to the next one's."""
    return vectors.stride(0) if vectors.dim() > 1 else 0


def _element(dtype: np.dtype[np.generic]) -> ir.Type:
    """Numbers of an array in memory."""
    if dtype.kind in "iu":
        return ir.IntType(8 * dtype.itemsize)
    floats = {2: ir.HalfType(), 4: ir.FloatType(), 8: ir.DoubleType()}
    if dtype.kind == "f" and dtype.itemsize in floats:
        return floats[dtype.itemsize]
    raise Unsupported(f"inputs of {dtype} are not compiled")


class _Writer:
    """Writes the kernel: all clients, all their steps, around the recorded operations of one."""

    def __init__(
        self, rows: Rows, names: Iterable[str], recordable: Recordable, recording: Recording
    ) -> None:
        self.rows, self.recording, self.records = rows, recording, recordable.records
        self.kernel = Kernel(
            REAL[rows.dtype], PARAMETERS | {f"input {name}": POINTER for name in rows.inputs}
        )
        self.given, self.at = self.kernel.given, self.kernel.at
        data = recording.arguments[: recordable.num_rows]
        *self.inputs, self.weight = (
            self.kernel.room(
                each.shape, None, self.kernel.real if each.is_floating_point() else INDEX
            )
            for each in data
        )
        # One client's parameters [1, *shape] lie one behind another, as in the flat vector.
        tensors = recording.arguments[recordable.num_rows :]
        self.dimension = sum(tensor.numel() for tensor in tensors)
        self.state = self.kernel.room([self.dimension], None)
        self.parameters, places, begin = dict[str, Array](), list[Array](), 0
        for name, tensor in zip(names, tensors, strict=True):
            offset = self.kernel.index(begin)
            pointer = self.kernel.moved(self.state.pointer, self.kernel.real, (offset, 1))
            places.append(Array(pointer, self.kernel.real, tuple(tensor.shape), tensor.stride()))
            self.parameters[name] = places[-1].without_first()
            begin += tensor.numel()
        self.lowering = Lowering(self.kernel, recording, [*self.inputs, self.weight, *places])

    def written(self, measures: int) -> Function:
        """Raises `Unsupported`."""
        kernel, at = self.kernel, self.at
        with kernel.loop(self.given["clients"]) as client:
            start, target = (self._vector(name, client) for name in ("start", "target"))
            kernel.each(self.state, [start], lambda value: value)
            count = self._one("num_steps", INDEX, client)
            with (
                at.if_then(at.icmp_signed(">", count, kernel.index(0))),
                kernel.loop(count) as step,
            ):
                self._load(client, step)
                self.lowering.write()
                self._count(self.recording.results[: 2 * measures])
                self._descend(client, self.recording.results[2 * measures :])
            share = self._one("weights", kernel.real, client)

            def moved(before: Number, now: Number, start: Number) -> Number:
                change = at.fmul(kernel.spread(share, now.type), at.fsub(now, start))
                return at.fadd(before, change)

            kernel.each(target, [target, self.state, start], moved)
        return kernel.compiled(self.lowering.constants)

    def _one(self, name: str, element: ir.Type, place: Number) -> Number:
        return self.kernel.read(Array(self.given[name], element, (1,), (1,)), [place])

    def _vector(self, name: str, client: Number) -> Array:
        offset = self.at.mul(client, self.given[f"{name}_stride"])
        pointer = self.kernel.moved(self.given[name], self.kernel.real, (offset, 1))
        return Array.packed(pointer, self.kernel.real, [self.dimension])

    def _load(self, client: Number, step: Number) -> None:
        """The batch's rows, as `Rows` makes them of the arena's."""
        kernel, at = self.kernel, self.at
        (size,) = self.weight.shape
        batch = at.mul(at.add(at.mul(step, self.given["clients"]), client), kernel.index(size))
        with kernel.loop(size) as place:
            there = at.add(batch, place)
            present = at.uitofp(self._one("present", BYTE, there), kernel.real)
            kernel.write(self.weight, [place], present)
            row = self._one("rows", INDEX, there)
            for room, (name, array) in zip(self.inputs, self.rows.inputs.items(), strict=True):
                shape = room.shape[1:] or (1,)
                element, width = _element(array.dtype), prod(shape)
                source = kernel.moved(self.given[f"input {name}"], element, (row, width))
                target = kernel.moved(room.pointer, room.element, (place, width))
                scale, signed = self.rows.scales.get(name), array.dtype.kind == "i"

                def convert(value: Number) -> Number:
                    value = kernel.converted(value, room.element, signed)  # noqa: B023
                    if scale is None:  # noqa: B023
                        return value
                    return at.fmul(value, kernel.number(scale, value.type))  # noqa: B023

                kernel.each(
                    Array.packed(target, room.element, shape),
                    [Array.packed(source, element, shape)],
                    convert,
                )

    def _count(self, results: Sequence[Tensor]) -> None:
        """Sums and counts of the measures are added to those of the steps before."""
        kernel, at, double = self.kernel, self.at, ir.DoubleType()
        for index, tensor in enumerate(results):
            value = kernel.read(self.lowering.array(tensor), [kernel.index(0)])
            place = kernel.moved(self.given["sums"], double, (kernel.index(index), 1))
            before = at.load(place, typ=double)
            at.store(at.fadd(before, kernel.converted(value, double)), place)

    def _descend(self, client: Number, results: Sequence[Tensor]) -> None:
        """The parameters after a step: see `slots` for what is said of gradients."""
        kernel, at = self.kernel, self.at
        with at.if_then(at.icmp_signed("!=", self.given["moves"], kernel.index(0))):
            shrink = kernel.converted(self.given["shrink"], kernel.real)

            def drawn(now: Number, drift: Number) -> Number:
                return at.fadd(at.fmul(kernel.spread(shrink, now.type), now), drift)

            kernel.each(self.state, [self.state, self._vector("drift", client)], drawn)
        rate = at.fneg(kernel.converted(self.given["rate"], kernel.real))

        def stepped(now: Number, gradient: Number) -> Number:
            return at.fadd(now, at.fmul(kernel.spread(rate, now.type), gradient))

        arrays = iter([self.lowering.array(tensor) for tensor in results])
        for name, kind, number in self.records:
            parameter = self.parameters[name]
            given = [next(arrays) for _ in range(number)]
            if kind == "dense":
                (gradient,) = given  # of a lone client it may have no axis of clients
                lone = len(gradient.shape) == len(parameter.shape)
                gradient = gradient if lone else gradient.without_first()
                kernel.each(parameter, [parameter, gradient], stepped)
                continue
            left, right = (array.without_first() for array in given)
            if kind in PRODUCTS:
                kernel.product(parameter, left.ordered([1, 0]), right, parameter, rate)
            else:
                with kernel.loops(left.shape) as place:
                    row = kernel.checked(kernel.read(left, place), parameter.shape[0])
                    line = parameter.line(kernel, row)
                    kernel.each(line, [line, right.line(kernel, *place)], stepped)
