"""Arithmetic on small arrays of fixed shapes, written as machine code by LLVM.

PyTorch's operations cost microseconds each, which is most of a small model's step. Here sizes and strides are constants
of the code, sums stay in registers, and a client's parameters stay in the cache. NaN and infinity stay what they are:
a model that is not finite must be noticed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import e, factorial, inf, log, log2, prod
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

INDEX, BYTE, POINTER = ir.IntType(64), ir.IntType(8), ir.PointerType()
REASSOCIATED = ("reassoc", "contract")
"""Sums in any order, fused with their products. No other liberty: without `nnan` and `ninf` NaN stays NaN."""
FUSED = ("contract",)
ALIGNED = 64
"""Bytes: a line of the cache, and the widest register."""

Number = Any
"""An `ir.Value`: a number, or the numbers of several lanes."""


@dataclass(frozen=True)
class Array:
    """Numbers of one type in memory; strides in numbers, as those of a tensor."""

    pointer: Number
    element: ir.Type
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def packed(cls, pointer: Number, element: ir.Type, shape: Sequence[int]) -> Array:
        strides = [prod(shape[place + 1 :]) for place in range(len(shape))]
        return cls(pointer, element, tuple(shape), tuple(strides))

    def broadcast(self, shape: Sequence[int]) -> Array:
        missing = len(shape) - len(self.shape)
        pairs = zip(self.shape, self.strides, strict=True)
        strides = [0] * missing + [0 if size == 1 else stride for size, stride in pairs]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def ordered(self, axes: Sequence[int]) -> Array:
        shape, strides = ([each[axis] for axis in axes] for each in (self.shape, self.strides))
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def without_first(self) -> Array:
        return replace(self, shape=self.shape[1:], strides=self.strides[1:])

    def line(self, kernel: Kernel, *place: Number) -> Array:
        """Along the last axis, at a place of the others."""
        terms = zip(place, self.strides, strict=False)
        pointer = kernel.moved(self.pointer, self.element, *terms)
        return Array(pointer, self.element, self.shape[-1:], self.strides[-1:])


class Kernel:
    """A function that is being written. `real`: the type of its numbers, float or double.

    Its parameters, in order, are named in `parameters`; a pointer overlaps no other that is written to.
    """

    def __init__(self, real: ir.Type, parameters: dict[str, ir.Type]) -> None:
        self.real = real
        self.lanes = _machine().vector_bytes // _bytes(real)
        self._module = ir.Module()
        parameters = {"rooms": POINTER} | parameters
        kind = ir.FunctionType(INDEX, list(parameters.values()))
        self._function = ir.Function(self._module, kind, "run")
        for argument in self._function.args:
            if argument.type == POINTER:
                argument.add_attribute("noalias")
        self.given = dict(zip(parameters, self._function.args, strict=True))
        self._entry = self._function.append_basic_block()
        self.at = ir.IRBuilder(self._function.append_basic_block())
        self._first = self.at.block
        self._bytes = 0
        self._wrong = self.variable(INDEX, self.index(0))

    def compiled(self, kept: object = None) -> Callable[..., int]:
        """The function, from numbers and addresses to whether an index was out of range. It keeps `kept` in memory."""
        self.at.ret(self.at.load(self._wrong, typ=INDEX))
        ir.IRBuilder(self._entry).branch(self._first)
        kinds = {POINTER: ctypes.c_void_p, INDEX: ctypes.c_int64}
        types = [kinds.get(a.type, ctypes.c_double) for a in self._function.args]
        return _Compiled(str(self._module), types, self._bytes, kept)

    # --- numbers and places

    @staticmethod
    def index(value: int) -> Number:
        return ir.Constant(INDEX, value)

    def number(self, value: float, like: ir.Type | None = None) -> Number:
        """A constant, in as many lanes as the type `like` has."""
        element, lanes = _parts(like or self.real)
        constant = ir.Constant(element, (float if element == self.real else int)(value))
        return constant if lanes == 1 else ir.Constant(like, [constant] * lanes)

    def spread(self, value: Number, kind: ir.Type) -> Number:
        """A number in each lane of a type."""
        if value.type == kind:
            return value
        vector = self.at.insert_element(ir.Constant(kind, ir.Undefined), value, self._lane(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [self._lane(0)] * kind.count)
        return self.at.shuffle_vector(vector, ir.Constant(kind, ir.Undefined), lanes)

    @staticmethod
    def _lane(place: int) -> Number:
        return ir.Constant(ir.IntType(32), place)

    def kind(self, width: int) -> ir.Type:
        return _lanes(self.real, width)

    def alike(self, value: Number) -> ir.Type:
        """Real numbers in as many lanes."""
        return self.kind(_parts(value.type)[1])

    def variable(self, kind: ir.Type, value: Number) -> Number:
        with self.at.goto_block(self._entry):
            place = self.at.alloca(kind)
        self.at.store(value, place)
        return place

    def room(
        self, shape: Sequence[int], strides: Sequence[int] | None, element: ir.Type | None = None
    ) -> Array:
        """Memory for an array, packed if it is given no strides; what was written stays until the next call."""
        element = element or self.real
        array = Array.packed(None, element, shape)
        if strides is not None:
            array = replace(array, strides=tuple(strides))
        pairs = zip(array.shape, array.strides, strict=True)
        count = 1 + sum((size - 1) * stride for size, stride in pairs)
        with self.at.goto_block(self._entry):
            pointer = self.moved(self.given["rooms"], BYTE, (self.index(self._bytes), 1))
        self._bytes += -(-count * _bytes(element) // ALIGNED) * ALIGNED
        return replace(array, pointer=pointer)

    def moved(self, pointer: Number, element: ir.Type, *terms: tuple[Number, int]) -> Number:
        """An address: `pointer` and, for each term, place times stride."""
        offset = self.index(0)
        for place, stride in terms:
            if stride:
                offset = self.at.add(offset, self.at.mul(place, self.index(stride)))
        return self.at.gep(pointer, [offset], source_etype=element)

    def read(self, array: Array, place: Sequence[Number], width: int = 1) -> Number:
        """The number there, or with `width` that and those beside it in the last axis."""
        pointer = self.moved(array.pointer, array.element, *zip(place, array.strides, strict=True))
        kind = _lanes(array.element, width)
        if width > 1 and not array.strides[-1]:
            value = self.at.load(pointer, align=_bytes(array.element), typ=array.element)
            return self.spread(value, kind)
        return self.at.load(pointer, align=_bytes(array.element), typ=kind)

    def write(self, array: Array, place: Sequence[Number], value: Number) -> None:
        if _parts(value.type)[0] != array.element:
            raise TypeError(f"{value.type} is not {array.element}")
        pointer = self.moved(array.pointer, array.element, *zip(place, array.strides, strict=True))
        self.at.store(value, pointer, align=_bytes(array.element))

    def checked(self, index: Number, limit: int) -> Number:
        """An index that came with the data; 0 instead of one out of range, of which the caller hears."""
        wrong = self.at.icmp_unsigned(">=", index, self.index(limit))
        seen = self.at.or_(self.at.load(self._wrong, typ=INDEX), self.at.zext(wrong, INDEX))
        self.at.store(seen, self._wrong)
        return self.at.select(wrong, self.index(0), index)

    # --- loops

    @contextmanager
    def loop(self, count: int | Number) -> Iterator[Number]:
        """What is written inside runs `count` times, for 0, 1, ..., of which there is at least one."""
        if count == 1:
            yield self.index(0)
            return
        before, body, after = self.at.block, *(self.at.append_basic_block() for _ in range(2))
        self.at.branch(body)
        self.at.position_at_end(body)
        place = self.at.phi(INDEX)
        place.add_incoming(self.index(0), before)
        yield place
        following = self.at.add(place, self.index(1), flags=("nuw", "nsw"))
        place.add_incoming(following, self.at.block)
        limit = self.index(count) if isinstance(count, int) else count
        self.at.cbranch(self.at.icmp_signed("<", following, limit), body, after)
        self.at.position_at_end(after)

    @contextmanager
    def loops(self, shape: Sequence[int]) -> Iterator[list[Number]]:
        """One loop in another; the places of all of them."""
        if not shape:
            yield []
            return
        with self.loop(shape[0]) as place, self.loops(shape[1:]) as inner:
            yield [place, *inner]

    def pieces(self, arrays: Sequence[Array]) -> Iterator[tuple[Number, int]]:
        """Along the last axis of arrays of one shape: where a piece begins and how wide it is."""
        size = arrays[0].shape[-1]
        contiguous = arrays[0].strides[-1] == 1 and all(a.strides[-1] in (0, 1) for a in arrays)
        lanes = self.lanes if contiguous else 1
        yield from self._tiles(size, lanes)

    def _tiles(self, size: int, most: int) -> Iterator[tuple[Number, int]]:
        """Tiles of `most`, and what is left: where each begins and how wide it is."""
        for begin, count, width in ((0, size // most, most), (size // most * most, 1, size % most)):
            if count and width:
                with self.loop(count) as place:
                    yield self._plus(self.at.mul(place, self.index(width)), begin), width

    def _plus(self, place: Number, more: int) -> Number:
        return self.at.add(place, self.index(more)) if more else place

    # --- operations on arrays

    def each(
        self, target: Array, sources: Sequence[Array], operation: Callable[..., Number]
    ) -> None:
        """target[i] = operation(*(source[i] for source in sources)), sources being broadcast."""
        arrays = _collapsed([target, *(source.broadcast(target.shape) for source in sources)])
        with self.loops(arrays[0].shape[:-1]) as outer:
            for last, width in self.pieces(arrays):
                place = [*outer, last]
                values = [self.read(array, place, width) for array in arrays[1:]]
                value = operation(*values) if values else operation(self.kind(width))
                self.write(arrays[0], place, value)

    def total(self, target: Array, source: Array, axes: Sequence[int]) -> None:
        """`target`, of the shape that is left without `axes`, = the sum of `source` over them."""
        kept = [axis for axis in range(len(source.shape)) if axis not in axes]
        source = source.ordered([*axes, *kept])
        over = source.shape[: len(axes)]
        if not kept:
            target, source = (_with_axis(array) for array in (target, source))
        with self.loops(target.shape[:-1]) as outer:
            fixed = replace(source, shape=target.shape, strides=source.strides[len(axes) :])
            for last, width in self.pieces([target, fixed]):
                sums = self._zero(width)
                with self.loops(over) as inner:
                    value = self.read(source, [*inner, *outer, last], width)
                    self.increase(sums, value)
                self.write(target, [*outer, last], self.at.load(sums, typ=self.kind(width)))

    def product(
        self,
        target: Array,
        left: Array,
        right: Array,
        onto: Array | None = None,
        factor: Number = None,
    ) -> None:
        """target [m, n] = onto [m, n] + factor * (left [m, k] @ right [k, n]); `onto` may be the target."""
        if onto is not None:
            onto = onto.broadcast(target.shape)
        if left.strides[1] == right.strides[0] == 1 and left.shape[1] > 1:
            self._by_dots(target, left, right, onto, factor)
            return
        if target.strides[1] != 1 and target.strides[0] == left.strides[0] == 1:
            # The transpose of it all has its lanes in a row.
            target, left, right = (a.ordered([1, 0]) for a in (target, right, left))
            onto = onto and onto.ordered([1, 0])
        self._by_columns(target, left, right, onto, factor)

    def _by_columns(
        self, target: Array, left: Array, right: Array, onto: Array | None, factor: Number
    ) -> None:
        """Lanes are columns: a number of the left side meets many of the right side at once."""
        (m, n), k, sums = target.shape, left.shape[1], _machine().sums
        lanes = self.lanes if target.strides[1] == right.strides[1] == 1 else 1
        across = min(-(-n // lanes), max(2, sums // m))
        for column, wide in self._tiles(n, lanes * across):
            spans = [(at, min(lanes, wide - at)) for at in range(0, wide, lanes)]
            for row, high in self._tiles(m, _even(m, sums // across)):
                parts = {
                    (down, at): self._zero(width) for down in range(high) for at, width in spans
                }
                with self.loop(k) as depth:
                    given = [self.read(left, [self._plus(row, d), depth]) for d in range(high)]
                    for at, width in spans:
                        met = self.read(right, [depth, self._plus(column, at)], width)
                        for down in range(high):
                            self.increase(parts[down, at], self._times(given[down], met))
                for (down, at), part in parts.items():
                    place = [self._plus(row, down), self._plus(column, at)]
                    value = self.at.load(part, typ=self.kind(min(lanes, wide - at)))
                    self._settle(target, place, value, onto, factor)

    def _by_dots(
        self, target: Array, left: Array, right: Array, onto: Array | None, factor: Number
    ) -> None:
        """Lanes are places of the sum, along which both sides lie in memory."""
        (m, n), k = target.shape, left.shape[1]
        lanes = min(k, self.lanes)
        turned = right.ordered([1, 0])
        across = _machine().dots
        for column, wide in self._tiles(n, _even(n, across)):
            for row, high in self._tiles(m, _even(m, across)):
                parts = {
                    (down, at): self._zero(lanes) for down in range(high) for at in range(wide)
                }
                for depth, width in self._tiles(k, lanes):
                    given = [
                        self._padded(self.read(left, [self._plus(row, d), depth], width), lanes)
                        for d in range(high)
                    ]
                    for at in range(wide):
                        met = self.read(turned, [self._plus(column, at), depth], width)
                        for down in range(high):
                            product = self._times(given[down], self._padded(met, lanes))
                            self.increase(parts[down, at], product)
                for (down, at), part in parts.items():
                    place = [self._plus(row, down), self._plus(column, at)]
                    value = self.sum(self.at.load(part, typ=self.kind(lanes)))
                    self._settle(target, place, value, onto, factor)

    def _settle(
        self,
        target: Array,
        place: Sequence[Number],
        value: Number,
        onto: Array | None,
        factor: Number,
    ) -> None:
        if factor is not None:
            value = self._times(factor, value)
        if onto is not None:
            _, width = _parts(value.type)
            value = self.at.fadd(self.read(onto, place, width), value, flags=REASSOCIATED)
        self.write(target, place, value)

    # --- arithmetic of one place, or of several lanes

    def _zero(self, width: int) -> Number:
        return self.variable(self.kind(width), self.number(0.0, self.kind(width)))

    def _times(self, one: Number, other: Number) -> Number:
        return self.at.fmul(self.spread(one, other.type), other, flags=REASSOCIATED)

    def increase(self, variable: Number, value: Number) -> None:
        before = self.at.load(variable, typ=value.type)
        self.at.store(self.at.fadd(before, value, flags=REASSOCIATED), variable)

    def _padded(self, value: Number, lanes: int) -> Number:
        """With zeros in the lanes that are missing."""
        _, width = _parts(value.type)
        if width == lanes:
            return value
        if width == 1:
            zeros = self.number(0.0, self.kind(lanes))
            return self.at.insert_element(zeros, value, self._lane(0))
        places = [self._lane(min(place, width)) for place in range(lanes)]
        order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), places)
        return self.at.shuffle_vector(value, self.number(0.0, value.type), order)

    def sum(self, value: Number) -> Number:
        """Of all lanes."""
        return self._reduced(value, "fadd", self.number(0.0))

    def converted(self, value: Number, element: ir.Type, signed: bool = True) -> Number:
        """As numbers of another type; whole numbers are `signed` or not."""
        kind, lanes = _parts(value.type)
        if kind == element:
            return value
        wanted = _lanes(element, lanes)
        if isinstance(kind, ir.IntType):
            if isinstance(element, ir.IntType):
                return (self.at.sext if signed else self.at.zext)(value, wanted)
            return (self.at.sitofp if signed else self.at.uitofp)(value, wanted)
        wider = _bytes(element) > _bytes(kind)
        return (self.at.fpext if wider else self.at.fptrunc)(value, wanted)

    def largest(self, value: Number) -> Number:
        """Of all lanes; NaN only if there is nothing else."""
        return self._reduced(value, "fmax")

    def _reduced(self, value: Number, operation: str, *first: Number) -> Number:
        _, lanes = _parts(value.type)
        if lanes == 1:
            return value
        name = f"llvm.vector.reduce.{operation}.v{lanes}{self._suffix}"
        kind = ir.FunctionType(self.real, [*(each.type for each in first), value.type])
        function = self._module.globals.get(name) or ir.Function(self._module, kind, name)
        return self.at.call(function, [*first, value], fastmath=REASSOCIATED)

    def larger(self, one: Number, other: Number) -> Number:
        """NaN if `other` is."""
        return self.at.select(self.at.fcmp_ordered(">", one, other), one, other)

    def exp(self, value: Number) -> Number:
        """Within some units in the last place; 0 below the smallest normal number, infinite above half the largest."""
        kind = value.type
        digits, bias, whole = self._format(kind)
        low, high = (self.number(power * log(2), kind) for power in (1 - bias, bias))
        below, above = self.at.fcmp_ordered("<", value, low), self.at.fcmp_ordered(">", value, high)
        # Adding 1.5 * 2^digits leaves the nearest whole number in the last bits.
        magic = self.number(1.5 * 2.0**digits, kind)
        shifted = self.at.fadd(self.at.fmul(value, self.number(log2(e), kind)), magic)
        power = self.at.fsub(shifted, magic)
        for part in _LOG_2[self._suffix]:
            value = self.at.fsub(value, self.at.fmul(power, self.number(part, kind)), flags=FUSED)
        result = self.number(0.0, kind)
        for term in reversed(range(8 if digits < 52 else 14)):
            product = self.at.fmul(result, value, flags=FUSED)
            result = self.at.fadd(product, self.number(1 / factorial(term), kind), flags=FUSED)
        exponent = self.at.add(self.at.bitcast(shifted, whole), self.number(bias, whole))
        scale = self.at.shl(exponent, self.number(digits, whole))
        result = self.at.fmul(result, self.at.bitcast(scale, kind))
        result = self.at.select(above, self.number(inf, kind), result)
        return self.at.select(below, self.number(0.0, kind), result)

    def log(self, value: Number) -> Number:
        """Of a normal positive number; NaN and infinity give NaN."""
        kind = value.type
        digits, _, whole = self._format(kind)
        bits = self.at.bitcast(value, whole)
        # value = near * 2^power, where near is from sqrt(1/2) to sqrt(2)
        half = self.at.bitcast(self.number(0.5**0.5, kind), whole)
        power = self.at.ashr(self.at.sub(bits, half), self.number(digits, whole))
        near = self.at.sub(bits, self.at.shl(power, self.number(digits, whole)))
        near, one = self.at.bitcast(near, kind), self.number(1.0, kind)
        ratio = self.at.fdiv(self.at.fsub(near, one), self.at.fadd(near, one))
        square = self.at.fmul(ratio, ratio)
        series = self.number(0.0, kind)
        for term in reversed(range(5 if digits < 52 else 12)):  # 2 artanh(ratio)
            product = self.at.fmul(series, square, flags=FUSED)
            series = self.at.fadd(product, self.number(2 / (2 * term + 1), kind), flags=FUSED)
        result = self.at.fmul(self.at.sitofp(power, kind), self.number(log(2), kind))
        result = self.at.fadd(result, self.at.fmul(series, ratio))
        return self.at.fadd(result, self.at.fsub(value, value))

    @property
    def _suffix(self) -> str:
        return "f32" if self.real == ir.FloatType() else "f64"

    def _format(self, kind: ir.Type) -> tuple[int, int, ir.Type]:
        """Binary digits, bias of the exponent, and the whole numbers of the same lanes (IEEE 754)."""
        digits, bias, bits = (23, 127, 32) if self._suffix == "f32" else (52, 1023, 64)
        return digits, bias, _lanes(ir.IntType(bits), _parts(kind)[1])


_LOG_2 = {
    "f32": (0.693359375, -2.12194440e-4),
    "f64": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
"""log(2) as a sum, whose first part times a power of a number is exact."""


def _parts(kind: ir.Type) -> tuple[ir.Type, int]:
    """The type of one number, and the number of lanes."""
    return (kind.element, kind.count) if isinstance(kind, ir.VectorType) else (kind, 1)


def _lanes(element: ir.Type, count: int) -> ir.Type:
    return element if count == 1 else ir.VectorType(element, count)


def _bytes(element: ir.Type) -> int:
    bits = {ir.HalfType(): 16, ir.FloatType(): 32, ir.DoubleType(): 64}
    return int(bits.get(element) or element.width) // 8


def _even(size: int, most: int) -> int:
    """The size of as few equal tiles as can be."""
    return -(-size // -(-size // most))


def _with_axis(array: Array) -> Array:
    return replace(array, shape=(*array.shape, 1), strides=(*array.strides, 1))


def _collapsed(arrays: Sequence[Array]) -> list[Array]:
    """The same numbers in the same order with as few axes as can be, at least one."""
    axes: list[list[int]] = []  # size, then each array's stride
    for size, *strides in zip(arrays[0].shape, *(array.strides for array in arrays), strict=True):
        if size == 1:
            continue
        if axes and all(b == size * s for b, s in zip(axes[-1][1:], strides, strict=True)):
            axes[-1] = [axes[-1][0] * size, *strides]
        else:
            axes.append([size, *strides])
    sizes, *columns = zip(*axes, strict=True) if axes else ((1,), *([(1,)] * len(arrays)))
    return [
        replace(array, shape=sizes, strides=strides)
        for array, strides in zip(arrays, columns, strict=True)
    ]


@dataclass(frozen=True)
class _Machine:
    """The processor. `vector_bytes`: of a register of many lanes; `sums`: of a product's tile that stay in registers;
    `dots`: sides of a tile of dot products."""

    features: str
    vector_bytes: int
    sums: int
    dots: int

    def target(self) -> llvm.TargetMachine:
        return llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=self.features, opt=3, jit=True
        )


@cache
def _machine() -> _Machine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):  # LLVM prefers half of its registers otherwise
        return _Machine(features.flatten() + ",-prefer-256-bit", 64, 20, 4)
    return _Machine(features.flatten(), 32 if features.get("avx2") else 16, 8, 3)


class _Compiled:
    """A function in memory, with all that it needs there; several threads may call it at once."""

    def __init__(self, text: str, types: list[Any], room: int, kept: object) -> None:
        self._room, self._kept = room, kept
        self._rooms: list[Any] = []  # that no call writes to at present
        machine = _machine().target()  # which the engine takes over
        module = llvm.parse_assembly(text)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        address = self._engine.get_function_address("run")
        self._function = ctypes.CFUNCTYPE(ctypes.c_int64, *types)(address)

    def __call__(self, *arguments: int | float) -> int:
        try:
            memory = self._rooms.pop()
        except IndexError:
            memory = ctypes.create_string_buffer(self._room + ALIGNED)
        address = -(-ctypes.addressof(memory) // ALIGNED) * ALIGNED
        result: int = self._function(address, *arguments)
        self._rooms.append(memory)
        return result
