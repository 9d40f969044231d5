"""A lockstep step as a flat program: recorded once, replayed without modules, hooks or autograd.

`record` runs a function of tensors (the author's module, the loss and the backward pass) under `make_fx` for two
numbers of clients. Both recordings must be the same operations, and a size that differs must be a multiple of the
number of clients: the program is then one for any number. Whatever rows and unchanging tensors alone decide (the
first product of a factored layer, counts, masks) becomes a part of its own, which runs once for many steps.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

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
            else torch.split(tensor, [width * n for n in counts])
            for tensor, width in zip(shared, self.widths, strict=True)
        ]
        return list(zip(*columns, strict=True)) if columns else [()] * len(counts)


def record(
    function: Function, arguments: Callable[[int], list[Tensor]], num_rows: int, fixed: set[int]
) -> Program:
    """`arguments(n)`: examples for n clients. The first `num_rows` are rows, one client's after another's; those at
    the positions `fixed` are the same for all clients and steps.

    Raises `Unrecordable`, or whatever PyTorch raises for what cannot be traced (a branch that depends on numbers).
    """
    few, many = (make_fx(function)(*arguments(n)) for n in (FEW, MANY))
    program = _Writer(few, many, num_rows, fixed).program()
    steps = [arguments(n) for n in CHECKED]
    together = [torch.cat(rows) for rows in list(zip(*steps, strict=True))[:num_rows]]
    shared = program.shared(sum(CHECKED), *together, *steps[0][num_rows:])
    for n, given, part in zip(CHECKED, steps, program.parts(shared, CHECKED), strict=True):
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
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-3
    size = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size)


@dataclass(frozen=True)
class _Value:
    """`width`: rows per client, None: no axis of clients. `early`: it may be computed for many steps together.
    `root`: the value that has the memory."""

    name: str
    width: int | None
    early: bool
    root: str


@dataclass(frozen=True)
class _Line:
    name: str
    text: str
    uses: frozenset[str]
    early: bool
    changes: bool
    node: fx.Node


class _Writer:
    """Writes a program from two recordings."""

    def __init__(
        self, few: fx.GraphModule, many: fx.GraphModule, num_rows: int, fixed: set[int]
    ) -> None:
        nodes, others = list(few.graph.nodes), list(many.graph.nodes)
        if [(n.op, n.target) for n in nodes] != [(n.op, n.target) for n in others]:
            raise Unrecordable("another number of clients takes other operations")
        self._twin = dict(zip(nodes, others, strict=True))
        self._values: dict[fx.Node, _Value] = {}
        self._names: dict[str, Any] = {}
        self._lines: list[_Line] = []
        self._changed: set[str] = set()
        self._inputs: list[str] = []
        for node, other in self._twin.items():
            if node.op == "placeholder":
                place = len(self._inputs)
                early = place < num_rows or place in fixed
                width = _width(node, other)
                self._values[node] = _Value(node.name, width, early, node.name)
                self._inputs.append(node.name)
            elif node.op == "get_attr":
                constant = getattr(few, str(node.target))
                if not torch.equal(constant, getattr(many, str(other.target))):
                    raise Unrecordable("a constant depends on the number of clients")
                self._names[node.name] = constant
                self._values[node] = _Value(node.name, None, True, node.name)
            elif node.op == "call_function":
                self._call(node, other)
            else:
                (results,) = node.args
                self._results = [self._values[result].name for result in results]

    def _call(self, node: fx.Node, other: fx.Node) -> None:
        given = [self._values[each] for each in node.all_input_nodes]
        if _does_nothing(node):
            self._values[node] = given[0]
            return
        function, width = node.target, _width(node, other)
        schema = function._schema if isinstance(function, OpOverload) else None
        changes = schema is not None and schema.is_mutable
        view = schema is not None and any(result.alias_info for result in schema.returns)
        early = all(value.early and value.root not in self._changed for value in given)
        # Clients of several steps are told apart by their places along the first axis only.
        axis = width is not None or all(value.width is None for value in given)
        early = early and axis and not changes and width != 0
        if schema is not None and changes:
            self._change(node, schema)
        root = given[0].root if (view or changes) and given else node.name
        self._values[node] = _Value(node.name, width, early, root)
        arguments = [self._text(*pair) for pair in zip(node.args, other.args, strict=True)]
        arguments += [
            f"{name}={self._text(value, other.kwargs[name])}" for name, value in node.kwargs.items()
        ]
        text = f"{self._constant(_fastest(function))}({', '.join(arguments)})"
        uses = frozenset(value.name for value in given)
        self._lines.append(_Line(node.name, text, uses, early, changes, node))

    def _change(self, node: fx.Node, schema: Any) -> None:
        for argument, declared in zip(node.args, schema.arguments, strict=False):
            if declared.is_write and isinstance(argument, fx.Node):
                value = self._values[argument]
                if value.early and value.width is None:
                    raise Unrecordable("something that all steps share is changed in place")
                self._changed.add(value.root)

    def _text(self, one: Any, other: Any) -> str:
        """An argument, of which the two recordings have these values, for any number n of clients."""
        if isinstance(one, fx.Node):
            if self._twin[one] is not other:
                raise Unrecordable("another number of clients takes other operations")
            return self._values[one].name
        if isinstance(one, (list, tuple)):
            return f"[{', '.join(self._text(*pair) for pair in zip(one, other, strict=True))}]"
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
        name = f"constant_{len(self._names)}"
        self._names[name] = value
        return name

    def program(self) -> Program:
        needed, lines = set(self._results), []
        for line in reversed(self._lines):
            if line.changes or line.name in needed:
                needed |= line.uses
                lines.append(line)
        lines.reverse()
        late = set(self._results).union(*(line.uses for line in lines if not line.early))
        shared = [line for line in lines if line.early and line.name in late]
        names = [line.name for line in shared]
        early = [line for line in lines if line.early]
        return Program(
            shared=self._function(self._inputs, early, names),
            each=self._function(
                self._inputs + names, [line for line in lines if not line.early], self._results
            ),
            widths=tuple(self._values[line.node].width for line in shared),
            shared_bytes=sum(
                _bytes(line.node) // FEW for line in shared if self._values[line.node].width
            ),
        )

    def _function(self, inputs: list[str], lines: list[_Line], results: list[str]) -> Function:
        last = {name: line for line in lines for name in (line.name, *line.uses)}
        body = []
        for line in lines:
            body.append(f"    {line.name} = {line.text}")
            over = [name for name, user in last.items() if user is line and name not in results]
            over = [name for name in over if name not in self._names]
            if over:  # as early as autograd gives memory back
                body.append(f"    del {', '.join(over)}")
        source = "\n".join(
            [f"def run({', '.join(('n', *inputs))}):", *body, f"    return [{', '.join(results)}]"]
        )
        space = dict(self._names)
        exec(compile(source, "<recorded step>", "exec"), space)
        function: Function = space["run"]
        return function


def _shape(node: fx.Node) -> Sequence[int] | None:
    meta = node.meta.get("tensor_meta")
    return None if meta is None or not hasattr(meta, "shape") else meta.shape


def _bytes(node: fx.Node) -> int:
    meta = node.meta["tensor_meta"]
    size: int = meta.shape.numel() * meta.dtype.itemsize
    return size


def _width(node: fx.Node, other: fx.Node) -> int | None:
    """Rows per client along the first axis; None: no axis depends on the number of clients; 0: some other does."""
    few, many = _shape(node), _shape(other)
    if few is None or many is None:
        return 0
    if few == many:
        return None
    first = few[0] * MANY == many[0] * FEW and few[1:] == many[1:] and few[0] % FEW == 0
    return few[0] // FEW if first else 0


def _does_nothing(node: fx.Node) -> bool:
    """Whether the result is the first argument once more."""
    if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        return True
    if node.target in (torch.ops.aten.view.default, torch.ops.aten.slice.Tensor):
        (source, *_) = node.args
        return isinstance(source, fx.Node) and _shape(node) == _shape(source)
    return False


def _fastest(function: Any) -> Any:
    """The same operation by the shortest way from Python."""
    if function in _faster:
        return _faster[function]
    if not isinstance(function, OpOverload):
        return function
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


_faster: dict[Any, Callable[..., Tensor]] = {torch.ops.aten._log_softmax.default: _log_softmax}
