"""A lockstep step as a flat program: recorded once, replayed without modules, hooks or autograd.

`record` runs a function of tensors (the author's module, the loss and the backward pass) for two numbers of clients
and notes each operation that arrives below autograd. Both recordings must be the same operations, and a size that
differs must be a multiple of the number of clients: the program is then one for any number. Whatever rows and
unchanging tensors alone decide (the first product of a factored layer, counts, masks) becomes a part of its own,
which runs once for many steps.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FEW, MANY = 3, 5
"""Clients of the two recordings; neither number is a multiple of the other."""
CHECKED = (4, 2)
"""Clients of the two steps on which a program must give what its function gives."""
NARROW = 64
"""Rows of so few numbers are normalised faster by operations on the whole tensor than row by row."""

Function = Callable[..., Sequence[Tensor]]


class Unrecordable(Exception):  # noqa: N818
    """The function does not do the same for every number of clients."""


@dataclass(frozen=True)
class Program:
    """`shared(n, *arguments)` once for steps whose clients are n together; then for each step of n clients
    `each(n, *arguments, *part)`, with its part of what is shared. `widths`: rows per client of each shared tensor,
    None: it has no axis of clients; `shared_bytes`: per client.
    """

    shared: Function
    each: Function
    widths: tuple[int | None, ...]
    shared_bytes: int

    def parts(self, shared: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """The part of each step, where the steps have so many clients."""
        columns = [
            [tensor] * len(counts)
            if width is None
            else tensor.split_with_sizes([width * n for n in counts])
            for tensor, width in zip(shared, self.widths, strict=True)
        ]
        return list(zip(*columns, strict=True)) if columns else [()] * len(counts)


def record(
    function: Function,
    arguments: Callable[[int], list[Tensor]],
    num_rows: int,
    fixed: set[int],
    alone: bool = False,
) -> Program:
    """`arguments(n)`: examples for n clients. The first `num_rows` are rows, one client's after another's; those at
    the positions `fixed` are the same for all clients and steps. `alone`: there is never more than one client, and no
    rows to share.

    Raises `Unrecordable`.
    """
    few, many = (
        _with_one_exponential(Recording.of(function, arguments(n)))
        for n in ((1, 1) if alone else (FEW, MANY))
    )
    program = _Writer(few, many, 0 if alone else num_rows, fixed).program()
    counts = (1, 1) if alone else CHECKED
    steps = [arguments(n) for n in counts]
    together = [torch.cat(rows) for rows in list(zip(*steps, strict=True))[:num_rows]]
    shared = program.shared(sum(counts), *together, *steps[0][num_rows:])
    for n, given, part in zip(counts, steps, program.parts(shared, counts), strict=True):
        expected = function(*given)
        for one, other in zip(program.each(n, *given, *part), expected, strict=True):
            if not _close(one, other):
                raise Unrecordable("the recording gives something else than what was recorded")
    return program


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not other.numel():
        return True
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-3
    largest = torch.linalg.vector_norm(other, float("inf"))
    return bool(torch.dist(one, other, float("inf")) <= tolerance * largest)


@dataclass(frozen=True)
class Call:
    """An operation below autograd; `several`: it gives a list of tensors."""

    function: OpOverload
    args: Sequence[Any]
    kwargs: dict[str, Any]
    results: list[Tensor | None]
    several: bool


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what PyTorch does otherwise imports its whole compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        several = isinstance(result, (list, tuple))
        results = list(result) if several else [result]
        if not all(each is None or isinstance(each, Tensor) for each in results):
            raise Unrecordable(f"{func} makes numbers, on which the rest may depend")
        self.calls.append(Call(func, args, kwargs or {}, results, several))
        return result


@dataclass(frozen=True)
class Recording:
    """What a function did with its arguments. All tensors are held, so that an `id` is one tensor's for good."""

    arguments: list[Tensor]
    calls: list[Call]
    results: Sequence[Tensor]

    @classmethod
    def of(cls, function: Function, arguments: list[Tensor]) -> Recording:
        with _Recorder() as recorder:
            results = function(*arguments)
        return cls(arguments, recorder.calls, results)

    def uses(self, meant: Callable[[Tensor], bool]) -> list[int]:
        """Places of the calls that are given such a tensor."""
        return [
            place
            for place, call in enumerate(self.calls)
            if any(
                isinstance(it, Tensor) and meant(it) for it in tree_leaves((call.args, call.kwargs))
            )
        ]


@dataclass(frozen=True)
class _Value:
    """`width`: rows per client, None: no axis of clients, 0: another axis. `early`: it may be computed for many steps
    together. `root`: the value that has the memory. `size`: bytes for `FEW` clients."""

    name: str
    width: int | None
    early: bool
    root: str
    size: int = 0


@dataclass(frozen=True)
class _Line:
    results: tuple[_Value, ...]
    text: str
    uses: frozenset[str]
    changes: bool

    @property
    def names(self) -> list[str]:
        return [result.name for result in self.results]

    @property
    def early(self) -> bool:
        return all(result.early for result in self.results)


class _Writer:
    """Writes a program from two recordings."""

    def __init__(self, few: Recording, many: Recording, num_rows: int, fixed: set[int]) -> None:
        self._few: dict[int, _Value] = {}
        self._many: dict[int, _Value] = {}
        self._space: dict[str, Any] = {}
        self._lines: list[_Line] = []
        self._changed: set[str] = set()
        for place, (one, other) in enumerate(zip(few.arguments, many.arguments, strict=True)):
            early = place < num_rows or place in fixed
            name = f"given_{place}"
            self._enter(one, other, _Value(name, _width(one, other), early, name))
        self._inputs = [value.name for value in self._few.values()]
        if [call.function for call in few.calls] != [call.function for call in many.calls]:
            raise Unrecordable("another number of clients takes other operations")
        for call, twin in zip(few.calls, many.calls, strict=True):
            self._call(call, twin)
        self._results = [
            self._value(one, other).name
            for one, other in zip(few.results, many.results, strict=True)
        ]

    def _enter(self, one: Tensor, other: Tensor, value: _Value) -> None:
        self._few[id(one)] = self._many[id(other)] = value

    def _value(self, one: Tensor, other: Tensor) -> _Value:
        """Of a tensor; one that was there before is a constant."""
        if id(one) not in self._few and id(other) not in self._many:
            if one.shape != other.shape or not torch.equal(one, other):
                raise Unrecordable("a constant depends on the number of clients")
            name = self._constant(one.detach())
            self._enter(one, other, _Value(name, None, True, name))
        if self._few.get(id(one)) is not self._many.get(id(other)):
            raise Unrecordable("another number of clients takes other operations")
        return self._few[id(one)]

    def _call(self, call: Call, twin: Call) -> None:
        given: list[_Value] = []
        arguments = [self._text(*pair, given) for pair in zip(call.args, twin.args, strict=True)]
        arguments += [
            f"{name}={self._text(value, twin.kwargs[name], given)}"
            for name, value in call.kwargs.items()
        ]
        if _does_nothing(call):
            self._few[id(call.results[0])] = self._many[id(twin.results[0])] = given[0]
            return
        schema = call.function._schema
        early = all(value.early and value.root not in self._changed for value in given)
        if schema.is_mutable:
            early = False
            self._change(call)
        view = any(result.alias_info for result in schema.returns)
        made = []
        for place, (one, other) in enumerate(zip(call.results, twin.results, strict=True)):
            name = f"v{len(self._lines)}_{place}"
            if one is None or other is None:
                made.append(_Value(name, None, early, name))
                continue
            width = _width(one, other)
            # Clients of several steps are told apart by their places along the first axis only.
            axis = width != 0 if width is not None else all(v.width is None for v in given)
            root = given[0].root if given and view else name
            early = early and axis
            made.append(_Value(name, width, early, root, one.numel() * one.itemsize))
        made = [replace(value, early=early) for value in made]
        for value, one, other in zip(made, call.results, twin.results, strict=True):
            if one is not None and other is not None:
                self._enter(one, other, value)
        names = ", ".join(value.name for value in made) + "," * call.several
        text = f"{names} = {self._constant(_fastest(call.function))}({', '.join(arguments)})"
        uses = frozenset(value.name for value in given)
        self._lines.append(_Line(tuple(made), text, uses, schema.is_mutable))

    def _change(self, call: Call) -> None:
        for argument, declared in zip(call.args, call.function._schema.arguments, strict=False):
            if declared.is_write and isinstance(argument, Tensor):
                value = self._few[id(argument)]
                if value.early and value.width is None:
                    raise Unrecordable("something that all steps share is changed in place")
                self._changed.add(value.root)

    def _text(self, one: Any, other: Any, given: list[_Value]) -> str:
        """An argument, of which the two recordings have these values, for any number n of clients."""
        if isinstance(one, Tensor):
            given.append(self._value(one, other))
            return given[-1].name
        if isinstance(one, (list, tuple)):
            pairs = zip(one, other, strict=True)
            return f"[{', '.join(self._text(*pair, given) for pair in pairs)}]"
        if type(one) is int and one != other:
            if one * MANY != other * FEW or one % FEW:
                raise Unrecordable("a size is no multiple of the number of clients")
            return f"{one // FEW} * n"
        if one != other:
            raise Unrecordable("an argument depends on the number of clients")
        plain = (
            one is None or isinstance(one, (int, str)) or (isinstance(one, float) and isfinite(one))
        )
        return repr(one) if plain else self._constant(one)

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self._space)}"
        self._space[name] = value
        return name

    def program(self) -> Program:
        needed, lines = set(self._results), []
        for line in reversed(self._lines):
            if line.changes or needed.intersection(line.names):
                needed |= line.uses
                lines.append(line)
        lines.reverse()
        early = [line for line in lines if line.early]
        late = [line for line in lines if not line.early]
        wanted = set(self._results).union(*(line.uses for line in late))
        shared = [value for line in early for value in line.results if value.name in wanted]
        names = [value.name for value in shared]
        return Program(
            shared=self._function(self._inputs, early, names),
            each=self._function(self._inputs + names, late, self._results),
            widths=tuple(value.width for value in shared),
            shared_bytes=sum(value.size // FEW for value in shared if value.width),
        )

    def _function(self, inputs: list[str], lines: list[_Line], results: list[str]) -> Function:
        last = {name: line for line in lines for name in (*line.names, *line.uses)}
        over: dict[int, list[str]] = {}
        for name, line in last.items():
            if name not in results and name not in self._space:
                over.setdefault(id(line), []).append(name)
        body = []
        for line in lines:
            body.append(f"    {line.text}")
            if id(line) in over:  # memory is given back as early as autograd does it
                body.append(f"    del {', '.join(over[id(line)])}")
        source = "\n".join(
            [f"def run({', '.join(('n', *inputs))}):", *body, f"    return [{', '.join(results)}]"]
        )
        space = dict(self._space)
        exec(compile(source, "<recorded step>", "exec"), space)
        function: Function = space["run"]
        return function


def _width(one: Tensor, other: Tensor) -> int | None:
    """Rows per client along the first axis; None: no axis depends on the number of clients; 0: some other does."""
    few, many = one.shape, other.shape
    if few == many:
        return None
    first = len(few) > 0 and few[0] * MANY == many[0] * FEW and few[0] % FEW == 0
    return few[0] // FEW if first and few[1:] == many[1:] else 0


def _with_one_exponential(recording: Recording) -> Recording:
    """The same with a softmax for each `exp_(log_softmax(rows))` of many classes, where of the logarithms only a
    `gather` was used before, as in `losses.cross_entropy`: two exponentials cost as much as a product."""
    calls: list[Call | None] = list(recording.calls)
    for first, call in enumerate(recording.calls):
        if call.function is not torch.ops.aten._log_softmax.default:
            continue
        (rows, axis, _), (logarithms,) = call.args, call.results
        second, third, *_ = *recording.uses(lambda it: it is logarithms), first, first  # noqa: B023
        gather, exp = recording.calls[second], recording.calls[third]
        if (
            gather.function is not torch.ops.aten.gather.default
            or exp.function is not torch.ops.aten.exp_.default
            or not axis == gather.args[1] == -1
            or rows.shape[-1] <= NARROW
            or any(c.function._schema.is_mutable for c in recording.calls[first:second])
        ):
            continue
        kept = [*recording.arguments, *recording.results]
        same = recording.uses(lambda it: _memory(it) == _memory(rows))  # noqa: B023
        here = max(same) <= second and all(_memory(it) != _memory(rows) for it in kept)
        both = [logarithms, *gather.results]
        calls[first] = calls[third] = None
        calls[second] = Call(_SOFTMAX, (rows, gather.args[2], here), {}, both, several=True)
    return replace(recording, calls=[call for call in calls if call is not None])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _does_nothing(call: Call) -> bool:
    """Whether the result is the first argument once more."""
    if call.function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        return True
    same = (torch.ops.aten.view.default, torch.ops.aten.slice.Tensor)
    (result, *_) = call.results
    return call.function in same and result is not None and call.args[0].shape == result.shape


def _fastest(function: OpOverload) -> Callable[..., Any]:
    """The same operation by the shortest way from Python."""
    if function in _faster:
        return _faster[function]
    name = function._schema.name.partition("::")[2]
    builtin = getattr(torch, name, None)
    if isinstance(builtin, types.BuiltinFunctionType):
        return builtin
    method = getattr(Tensor, name, None)
    return method if isinstance(method, types.MethodDescriptorType) else function


def _log_softmax(rows: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if rows.is_cuda or rows.shape[dim] > NARROW or dim not in (-1, rows.dim() - 1):
        return torch._log_softmax(rows, dim, half_to_float)
    shifted = rows - rows.amax(dim, keepdim=True)
    return shifted.sub_(shifted.exp().sum(dim, keepdim=True).log_())


def _softmax(rows: Tensor, index: Tensor, here: bool) -> tuple[Tensor, Tensor]:
    """softmax(rows), in the memory of `rows` if it is `here`, and log_softmax(rows).gather(-1, index)."""
    chosen = rows.gather(-1, index).sub_(rows.amax(-1, keepdim=True))
    result = torch.softmax(rows, -1, out=rows if here else None)
    # The largest of a row is 1 / sum(exp(row - top)), whose logarithm is exact where that of a small one is not.
    return result, chosen.add_(result.amax(-1, keepdim=True).log_())


def _rnn_layer(*arguments: Any) -> Any:
    """What the backward pass needs is kept only where gradients are enabled."""
    with torch.enable_grad():
        return torch.ops.aten.mkldnn_rnn_layer.default(*arguments)


_library = torch.library.Library("homespun", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("softmax(Tensor rows, Tensor index, bool here) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_SOFTMAX = torch.ops.homespun.softmax.default
_faster: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._log_softmax.default: _log_softmax,
    torch.ops.aten.mkldnn_rnn_layer.default: _rnn_layer,
    _SOFTMAX: _softmax,
}
