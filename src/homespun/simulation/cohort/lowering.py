"""A recorded step as a kernel: what each of PyTorch's operations is on arrays of fixed shapes.

Views are no operations here: a tensor is the place of its memory and its strides. An operation that is missing raises
`Unsupported`, and another strategy trains the model. A new one is one line in a table, or one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from homespun.simulation.cohort.kernel import INDEX, Array, Kernel, Number
from homespun.simulation.cohort.parameter import Unsupported
from homespun.simulation.cohort.program import Call, Recording

OF_RESULTS = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")
"""Options that say what a result is: here that is known from the result itself."""
SQUARE = 2
REAL = {torch.float32: ir.FloatType(), torch.float64: ir.DoubleType()}


class Lowering:
    """Writes a recording's operations into a kernel. `places`: the array of each of the recording's arguments."""

    def __init__(self, kernel: Kernel, recording: Recording, places: Sequence[Array]) -> None:
        """Raises `Unsupported`."""
        self.kernel, self._recording = kernel, recording
        self.constants: list[Tensor] = []
        self._memory: dict[int, tuple[Number, int]] = {}
        for tensor, array in zip(recording.arguments, places, strict=True):
            _check_elements(tensor)
            self._memory[_memory(tensor)] = array.pointer, int(tensor.storage_offset())

    def write(self) -> None:
        """All operations on which the recording's results depend. Raises `Unsupported`."""
        for call in self._needed():
            name = call.function._schema.name.partition("::")[2]
            if not call.function._schema.is_mutable:
                for result in _tensors(call.results):
                    room = self.kernel.room(result.shape, result.stride(), self._element(result))
                    self._memory[_memory(result)] = room.pointer, 0
            (first, *_) = _tensors(call.results)
            if first.dtype == torch.bool and name.removesuffix("_") not in MASKS:
                raise Unsupported("only comparisons make masks here")
            target = self.array(first)
            options = {name: each for name, each in call.kwargs.items() if name not in OF_RESULTS}
            numbers = ELEMENTWISE.get(name.removesuffix("_"))
            if numbers and set(options) <= {"alpha"}:
                self._each(target, call.args, numbers, **options)
            elif name in COMPARISONS:
                self._compare(target, call.args, COMPARISONS[name])
            elif name in OPERATIONS and not options:
                OPERATIONS[name](self, target, *call.args)
            else:
                raise Unsupported(f"{call.function} is not compiled")

    def array(self, tensor: Tensor) -> Array:
        """Where a tensor of the recording is; one that was there before is a constant."""
        _check_elements(tensor)
        memory, element = _memory(tensor), self._element(tensor)
        if memory not in self._memory:
            if tensor.dtype == torch.bool:
                raise Unsupported("a mask that is no result of the step is not compiled")
            self.constants.append(tensor)
            address = self.kernel.index(tensor.untyped_storage().data_ptr())
            self._memory[memory] = address.inttoptr(ir.PointerType()), 0
        pointer, begin = self._memory[memory]
        offset = self.kernel.index(int(tensor.storage_offset()) - begin)
        pointer = self.kernel.moved(pointer, element, (offset, 1))
        return Array(pointer, element, tuple(tensor.shape), tensor.stride())

    def _element(self, tensor: Tensor) -> ir.Type:
        if tensor.dtype == torch.bool:  # 0 or 1
            return self.kernel.real
        element = INDEX if tensor.dtype == torch.int64 else REAL.get(tensor.dtype)
        if element not in (INDEX, self.kernel.real):
            raise Unsupported(f"tensors of {tensor.dtype} are not compiled")
        return element

    def _needed(self) -> list[Call]:
        """Operations that make what is needed, or change it; no views, which only name it."""
        needed = {_memory(tensor) for tensor in self._recording.results}
        calls = []
        for call in reversed(self._recording.calls):
            results, given = (
                set(map(_memory, _tensors(values))) for values in (call.results, call.args)
            )
            view = not call.function._schema.is_mutable and results & given
            if needed & results and not view:
                needed |= given
                calls.append(call)
        return calls[::-1]

    def _each(
        self,
        target: Array,
        arguments: Sequence[Any],
        operation: Callable[..., Number],
        alpha: Any = 1,
    ) -> None:
        """Numbers among the arguments are the same everywhere."""
        sources = [self.array(each) for each in _tensors(arguments)]
        if INDEX in (target.element, *(source.element for source in sources)):
            raise Unsupported("arithmetic of whole numbers is not compiled")

        def value(*read: Number) -> Number:
            tensors, kind = iter(read), read[0].type
            values = [
                next(tensors) if isinstance(each, Tensor) else self._constant(each, kind)
                for each in arguments
            ]
            if alpha != 1:
                values[1] = self.kernel.at.fmul(values[1], self._constant(alpha, kind))
            return operation(self.kernel, *values)

        self.kernel.each(target, sources, value)

    def _compare(self, target: Array, arguments: Sequence[Any], sign: str) -> None:
        """1 where it is so, else 0."""
        at, sources = self.kernel.at, [self.array(each) for each in _tensors(arguments)]

        def value(*read: Number) -> Number:
            one, other = (
                read if len(read) > 1 else (*read, self._constant(arguments[1], read[0].type))
            )
            if sources[0].element == INDEX:
                return at.uitofp(at.icmp_signed(sign, one, other), self.kernel.alike(one))
            compare = at.fcmp_unordered if sign == "!=" else at.fcmp_ordered
            return at.uitofp(compare(sign, one, other), one.type)

        fraction = isinstance(arguments[1], float) and not arguments[1].is_integer()
        if len({source.element for source in sources}) > 1 or (
            sources[0].element == INDEX and fraction
        ):
            raise Unsupported("comparisons of whole numbers with others are not compiled")
        self.kernel.each(target, sources, value)

    def _constant(self, value: Any, kind: ir.Type) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return self.kernel.number(value, kind)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _check_elements(tensor: Tensor) -> None:
    if not tensor.numel():  # a loop runs at least once
        raise Unsupported("tensors without elements are not compiled")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


# --- operations on the numbers of one place


def _select(kernel: Kernel, value: Number, limit: Number, above: Number, below: Number) -> Number:
    """`above` where the value is larger or NaN."""
    return kernel.at.select(kernel.at.fcmp_unordered(">", value, limit), above, below)


def _relu(kernel: Kernel, value: Number) -> Number:
    zero = kernel.number(0.0, value.type)
    return _select(kernel, value, zero, value, zero)


def _clamp(kernel: Kernel, value: Number, least: Number = None, most: Number = None) -> Number:
    if least is not None:
        value = _select(kernel, value, least, value, least)
    if most is not None:
        value = kernel.at.select(kernel.at.fcmp_ordered(">", value, most), most, value)
    return value


def _where(kernel: Kernel, mask: Number, one: Number, other: Number) -> Number:
    chosen = kernel.at.fcmp_ordered("!=", mask, kernel.number(0.0, mask.type))
    return kernel.at.select(chosen, one, other)


def _sigmoid(kernel: Kernel, value: Number) -> Number:
    one = kernel.number(1.0, value.type)
    return kernel.at.fdiv(one, kernel.at.fadd(one, kernel.exp(kernel.at.fneg(value))))


def _tanh(kernel: Kernel, value: Number) -> Number:
    two = kernel.number(2.0, value.type)
    near = _sigmoid(kernel, kernel.at.fmul(two, value))
    return kernel.at.fsub(kernel.at.fmul(two, near), kernel.number(1.0, value.type))


def _tanh_backward(kernel: Kernel, gradient: Number, result: Number) -> Number:
    square = kernel.at.fmul(result, result)
    return kernel.at.fmul(gradient, kernel.at.fsub(kernel.number(1.0, result.type), square))


def _sigmoid_backward(kernel: Kernel, gradient: Number, result: Number) -> Number:
    rest = kernel.at.fsub(kernel.number(1.0, result.type), result)
    return kernel.at.fmul(gradient, kernel.at.fmul(rest, result))


ELEMENTWISE: dict[str, Callable[..., Number]] = {
    "add": lambda kernel, one, other: kernel.at.fadd(one, other),
    "sub": lambda kernel, one, other: kernel.at.fsub(one, other),
    "mul": lambda kernel, one, other: kernel.at.fmul(one, other),
    "div": lambda kernel, one, other: kernel.at.fdiv(one, other),
    "neg": lambda kernel, value: kernel.at.fneg(value),
    "exp": lambda kernel, value: kernel.exp(value),
    "clone": lambda kernel, value: value,
    "_to_copy": lambda kernel, value: value,
    "copy": lambda kernel, value, other: other,
    "relu": _relu,
    "threshold_backward": lambda kernel, gradient, value, limit: _select(
        kernel, value, limit, gradient, kernel.number(0.0, value.type)
    ),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "logical_and": lambda kernel, one, other: kernel.at.fmul(one, other),
    "where": _where,
    "sigmoid": _sigmoid,
    "sigmoid_backward": _sigmoid_backward,
    "tanh": _tanh,
    "tanh_backward": _tanh_backward,
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
MASKS = (*COMPARISONS, "logical_and")


# --- operations on whole arrays


def _nothing(*_: Any) -> None:
    """What is in a result is written there later."""


def _full(lowering: Lowering, target: Array, *arguments: Any) -> None:
    value = arguments[-1]
    lowering.kernel.each(target, [], lambda kind: lowering.kernel.number(value, kind))


def _zeros(lowering: Lowering, target: Array, *_: Any) -> None:
    _full(lowering, target, 0.0)


def _ones(lowering: Lowering, target: Array, *_: Any) -> None:
    _full(lowering, target, 1.0)


def _sum(
    lowering: Lowering, target: Array, source: Tensor, axes: Any = None, _: bool = False
) -> None:
    count = source.dim()
    over = sorted(axis % count for axis in axes) if axes else list(range(count))
    shape = tuple(size for axis, size in enumerate(source.shape) if axis not in over)
    if len(shape) < len(target.shape):  # summed axes were kept
        kept = [axis for axis in range(count) if axis not in over]
        target = target.ordered(kept)
    lowering.kernel.total(target, lowering.array(source), over)


def _mm(lowering: Lowering, target: Array, left: Tensor, right: Tensor) -> None:
    lowering.kernel.product(target, lowering.array(left), lowering.array(right))


def _log_softmax(lowering: Lowering, target: Array, source: Tensor, axis: int, _: bool) -> None:
    _check_last(source, axis)
    kernel, array = lowering.kernel, lowering.array(source)
    with kernel.loops(array.shape[:-1]) as row:
        top = _largest(kernel, array, row)
        sums = kernel.variable(kernel.real, kernel.number(0.0))
        for last, width in kernel.pieces([array]):
            value = kernel.read(array, [*row, last], width)
            value = kernel.exp(kernel.at.fsub(value, kernel.spread(top, value.type)))
            kernel.increase(sums, kernel.sum(value))
        above = kernel.at.fadd(top, kernel.log(kernel.at.load(sums, typ=kernel.real)))
        for last, width in kernel.pieces([target, array]):
            value = kernel.read(array, [*row, last], width)
            value = kernel.at.fsub(value, kernel.spread(above, value.type))
            kernel.write(target, [*row, last], value)


def _log_softmax_backward(
    lowering: Lowering, target: Array, gradient: Tensor, result: Tensor, axis: int, _: torch.dtype
) -> None:
    _check_last(result, axis)
    kernel, arrays = lowering.kernel, [lowering.array(each) for each in (gradient, result)]
    with kernel.loops(target.shape[:-1]) as row:
        sums = kernel.variable(kernel.real, kernel.number(0.0))
        for last, width in kernel.pieces(arrays[:1]):
            kernel.increase(sums, kernel.sum(kernel.read(arrays[0], [*row, last], width)))
        total = kernel.at.load(sums, typ=kernel.real)
        for last, width in kernel.pieces([target, *arrays]):
            value, log = (kernel.read(array, [*row, last], width) for array in arrays)
            part = kernel.at.fmul(kernel.exp(log), kernel.spread(total, log.type))
            kernel.write(target, [*row, last], kernel.at.fsub(value, part))


def _largest(kernel: Kernel, array: Array, row: list[Number]) -> Number:
    largest = kernel.variable(kernel.real, kernel.number(float("-inf")))
    for last, width in kernel.pieces([array]):
        value = kernel.largest(kernel.read(array, [*row, last], width))
        before = kernel.at.load(largest, typ=kernel.real)
        kernel.at.store(kernel.larger(value, before), largest)
    return kernel.at.load(largest, typ=kernel.real)


def _amax(lowering: Lowering, target: Array, source: Tensor, axes: Sequence[int], *_: bool) -> None:
    _check_last(source, *axes)
    array = lowering.array(source)
    with lowering.kernel.loops(array.shape[:-1]) as row:
        place = [*row, lowering.kernel.index(0)][: len(target.shape)]
        lowering.kernel.write(target, place, _largest(lowering.kernel, array, row))


def _argmax(lowering: Lowering, target: Array, source: Tensor, axis: int, *_: bool) -> None:
    """The first of the largest."""
    _check_last(source, axis)
    kernel, array = lowering.kernel, lowering.array(source)
    count = array.shape[-1]
    with kernel.loops(array.shape[:-1]) as row:
        top = _largest(kernel, array, row)
        found = kernel.variable(INDEX, kernel.index(0))
        with kernel.loop(count) as back:
            last = kernel.at.sub(kernel.index(count - 1), back)
            same = kernel.at.fcmp_ordered("==", kernel.read(array, [*row, last]), top)
            before = kernel.at.load(found, typ=INDEX)
            kernel.at.store(kernel.at.select(same, last, before), found)
        place = [*row, kernel.index(0)][: len(target.shape)]
        kernel.write(target, place, kernel.at.load(found, typ=INDEX))


def _check_last(tensor: Tensor, *axes: int) -> None:
    if [axis % tensor.dim() for axis in axes] != [tensor.dim() - 1]:
        raise Unsupported("only the last axis is compiled")


def _gather(lowering: Lowering, target: Array, source: Tensor, axis: int, index: Tensor) -> None:
    kernel, array, chosen = lowering.kernel, lowering.array(source), lowering.array(index)
    with kernel.loops(chosen.shape) as place:
        there = _at(kernel, array, axis, place, chosen)
        kernel.write(target, place, kernel.read(array, there))


def _scatter_add(
    lowering: Lowering, target: Array, before: Tensor, axis: int, index: Tensor, source: Tensor
) -> None:
    lowering.kernel.each(target, [lowering.array(before)], lambda value: value)
    _scatter_add_here(lowering, target, before, axis, index, source)


def _scatter_add_here(
    lowering: Lowering, target: Array, _: Tensor, axis: int, index: Tensor, source: Tensor
) -> None:
    kernel, array, chosen = lowering.kernel, lowering.array(source), lowering.array(index)
    with kernel.loops(chosen.shape) as place:
        there = _at(kernel, target, axis, place, chosen)
        value = kernel.at.fadd(kernel.read(target, there), kernel.read(array, place))
        kernel.write(target, there, value)


def _at(
    kernel: Kernel, array: Array, axis: int, place: list[Number], chosen: Array
) -> list[Number]:
    axis %= len(array.shape)
    found = kernel.checked(kernel.read(chosen, place), array.shape[axis])
    return [*place[:axis], found, *place[axis + 1 :]]


def _nll_loss(
    lowering: Lowering,
    target: Array,
    source: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
) -> None:
    _check_plain(reduction, weight)
    kernel, array, chosen = lowering.kernel, lowering.array(source), lowering.array(classes)
    with kernel.loops(chosen.shape) as place:
        there, used = _class(kernel, array, place, chosen, ignored)
        value = kernel.at.fneg(kernel.read(array, there))
        kernel.write(target, place, kernel.at.select(used, value, kernel.number(0.0)))


def _nll_loss_backward(
    lowering: Lowering,
    target: Array,
    gradient: Tensor,
    _: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
    __: Tensor,
) -> None:
    _check_plain(reduction, weight)
    kernel, array, chosen = lowering.kernel, lowering.array(gradient), lowering.array(classes)
    kernel.each(target, [], lambda kind: kernel.number(0.0, kind))
    with kernel.loops(chosen.shape) as place:
        there, used = _class(kernel, target, place, chosen, ignored)
        value = kernel.at.fneg(kernel.read(array, place))
        kernel.write(target, there, kernel.at.select(used, value, kernel.number(0.0)))


def _class(
    kernel: Kernel, array: Array, place: list[Number], chosen: Array, ignored: int
) -> tuple[list[Number], Number]:
    """Where the class of a row is, and whether it counts."""
    found = kernel.read(chosen, place)
    used = kernel.at.icmp_signed("!=", found, kernel.index(ignored))
    found = kernel.at.select(used, found, kernel.index(0))
    return [*place, kernel.checked(found, array.shape[-1])], used


def _mse_loss(
    lowering: Lowering, target: Array, one: Tensor, other: Tensor, reduction: int
) -> None:
    _check_plain(reduction)

    def square(one: Number, other: Number) -> Number:
        apart = lowering.kernel.at.fsub(one, other)
        return lowering.kernel.at.fmul(apart, apart)

    lowering.kernel.each(target, [lowering.array(one), lowering.array(other)], square)


def _mse_loss_backward(
    lowering: Lowering, target: Array, gradient: Tensor, one: Tensor, other: Tensor, reduction: int
) -> None:
    _check_plain(reduction)
    kernel = lowering.kernel

    def twice(gradient: Number, one: Number, other: Number) -> Number:
        apart = kernel.at.fsub(one, other)
        return kernel.at.fmul(gradient, kernel.at.fadd(apart, apart))

    kernel.each(target, [lowering.array(each) for each in (gradient, one, other)], twice)


def _binary_cross_entropy(
    lowering: Lowering,
    target: Array,
    value: Tensor,
    wanted: Tensor,
    weight: Tensor | None,
    positive: Tensor | None,
    reduction: int,
) -> None:
    _check_plain(reduction, weight, positive)
    kernel, at = lowering.kernel, lowering.kernel.at

    def loss(value: Number, wanted: Number) -> Number:
        """max(value, 0) - value * wanted + log(1 + exp(-|value|))"""
        zero, one = kernel.number(0.0, value.type), kernel.number(1.0, value.type)
        positive = _select(kernel, value, zero, value, zero)
        size = at.fsub(positive, at.fsub(value, positive))
        rest = kernel.log(at.fadd(one, kernel.exp(at.fneg(size))))
        return at.fadd(at.fsub(positive, at.fmul(value, wanted)), rest)

    kernel.each(target, [lowering.array(value), lowering.array(wanted)], loss)


def _pow(lowering: Lowering, target: Array, source: Tensor, exponent: float) -> None:
    at, array = lowering.kernel.at, lowering.array(source)
    if exponent == 1:
        lowering.kernel.each(target, [array], lambda value: value)
    elif exponent == SQUARE:
        lowering.kernel.each(target, [array], lambda value: at.fmul(value, value))
    else:
        raise Unsupported("powers other than squares are not compiled")


def _embedding(
    lowering: Lowering, target: Array, table: Tensor, index: Tensor, *_: int | bool
) -> None:
    kernel, rows, chosen = lowering.kernel, lowering.array(table), lowering.array(index)
    with kernel.loops(chosen.shape) as place:
        row = kernel.checked(kernel.read(chosen, place), rows.shape[0])
        for last, width in kernel.pieces([target, rows]):
            kernel.write(target, [*place, last], kernel.read(rows, [row, last], width))


def _check_plain(reduction: int, *weights: Tensor | None) -> None:
    if reduction or any(weight is not None for weight in weights):
        raise Unsupported("losses that are reduced or weighted by PyTorch are not compiled")


OPERATIONS: dict[str, Callable[..., None]] = {
    "new_empty_strided": _nothing,
    "empty_like": _nothing,
    "full": _full,
    "scalar_tensor": _full,
    "zeros": _zeros,
    "zeros_like": _zeros,
    "new_zeros": _zeros,
    "ones": _ones,
    "ones_like": _ones,
    "sum": _sum,
    "mm": _mm,
    "amax": _amax,
    "argmax": _argmax,
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "gather": _gather,
    "scatter_add": _scatter_add,
    "scatter_add_": _scatter_add_here,
    "nll_loss_forward": _nll_loss,
    "nll_loss_backward": _nll_loss_backward,
    "mse_loss": _mse_loss,
    "mse_loss_backward": _mse_loss_backward,
    "binary_cross_entropy_with_logits": _binary_cross_entropy,
    "pow": _pow,
    "embedding": _embedding,
}
