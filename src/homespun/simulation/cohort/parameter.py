"""A parameter of many clients that an unchanged module uses like one client's.

The module runs once for all clients of a chunk, their rows merged: [a * B, ...], one client after another. Operations
without parameters need not know. Those with one arrive here (`__torch_function__`) and use each client's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from homespun.simulation.cohort.slots import Dense, Factored


class Unsupported(Exception):  # noqa: N818
    """The cohort strategy cannot run this operation; another strategy must."""


class CohortParameter(Tensor):
    """Has the shape of one client's parameter and no numbers; `slot` has those of all clients.

    `token` is a leaf without meaning: it makes autograd keep operations whose inputs are only data.
    """

    slot: Dense | Factored
    token: Tensor
    flipped: bool

    @staticmethod
    def of(slot: Dense | Factored, token: Tensor, flipped: bool = False) -> CohortParameter:
        shape = slot.shape[::-1] if flipped else slot.shape
        parameter: CohortParameter = Tensor._make_subclass(
            CohortParameter, token.detach().expand(shape)
        )
        parameter.slot, parameter.token, parameter.flipped = slot, token, flipped
        return parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _handlers.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _harmless:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _alone(func, args, kwargs)


def _alone(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Any operation at all, if the chunk is one client: autograd's own gradient."""

    def plain(value: Any) -> Any:
        if isinstance(value, CohortParameter):
            slot = value.slot
            if slot.clients != 1 or isinstance(slot, Factored):
                raise Unsupported(f"{getattr(func, '__name__', func)} with a parameter")
            tensor = slot.only()
            return tensor.t() if value.flipped else tensor
        if isinstance(value, (list, tuple)):
            return type(value)(plain(each) for each in value)
        return value

    return func(*plain(args), **{name: plain(value) for name, value in kwargs.items()})


class _Product(torch.autograd.Function):
    """rows @ W^T + bias, or rows @ W + bias if flipped."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, token: Tensor, weight: Any, bias: Any, flip: bool
    ) -> Tensor:
        grouped = rows.reshape(weight.active, -1, rows.shape[-1])
        ctx.given = grouped, weight, bias, flip
        result: Tensor = weight.product(grouped, flip, bias)
        return result.view(*rows.shape[:-1], result.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, flip = ctx.given
        ctx.given = None
        gradient = grads[0]
        grouped = gradient.reshape(weight.active, -1, gradient.shape[-1])
        pair = (rows, grouped) if flip else (grouped, rows)
        weight.record("pairs" if flip or ctx.needs_input_grad[0] else "data", *pair)
        if bias is not None:
            bias.record("dense", grouped.sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        back = weight.product(grouped, not flip)
        return back.view(*gradient.shape[:-1], back.shape[2]), None, None, None, None


class _Lookup(torch.autograd.Function):
    """The rows of an embedding."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, token: Tensor, table: Any, skip: int | None) -> Tensor:
        grouped = index.reshape(table.active, -1)
        ctx.given = grouped, table, skip
        found: Tensor = table.lookup(grouped)
        return found.view(*index.shape, found.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        index, table, skip = ctx.given
        values = grads[0].reshape(*index.shape, -1)
        if skip is not None:
            values = values * (index != skip)[:, :, None]
        table.record("rows", index, values)
        return None, None, None, None


class _Convolution(torch.autograd.Function):
    """Each client's rows with its own kernels: a loop over clients, each of whose convolutions fits a cache."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, token: Tensor, weight: Any, bias: Any, options: tuple[Any, ...]
    ) -> Tensor:
        active = weight.active
        parts = rows.chunk(active)
        kernels = weight.here.unbind()
        offsets = [None] * active if bias is None else bias.here.unbind()
        ctx.given = parts, kernels, weight, bias, options
        results = [
            torch.conv2d(part, kernel, offset, *options)
            for part, kernel, offset in zip(parts, kernels, offsets, strict=True)
        ]
        return _together(results).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts, kernels, weight, bias, (stride, padding, dilation, groups) = ctx.given
        ctx.given = None
        mask = [ctx.needs_input_grad[0], True, False]
        backs, gradients = [], []
        for part, kernel, gradient in zip(parts, kernels, grads[0].chunk(len(parts)), strict=True):
            back, own, _ = torch.ops.aten.convolution_backward(
                gradient, part, kernel, None, stride, padding, dilation, False, [0, 0], groups, mask
            )
            backs.append(back)
            gradients.append(own)
        weight.record("dense", torch.stack(gradients))
        if bias is not None:
            bias.record(
                "dense", grads[0].reshape(len(parts), -1, *grads[0].shape[1:]).sum((1, 3, 4))
            )
        return _together(backs) if mask[0] else None, None, None, None, None


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _OneChannel(torch.autograd.Function):
    """A convolution of data with one channel, as products with their patches.

    One product for all clients, whose results have channels last. Convolution itself takes such data for channels
    first, and several times longer together with the change of layout.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, token: Tensor, weight: Any, bias: Any, stride: Any, padding: Any
    ) -> Tensor:
        active, (channels, _, high, wide) = weight.active, weight.shape
        padded = functional.pad(rows, (padding[1], padding[1], padding[0], padding[0]))
        windows = padded[:, 0].unfold(1, high, stride[0]).unfold(2, wide, stride[1])
        shape = windows.shape[:3]  # rows and columns of the result
        grouped = windows.reshape(active, -1, *windows.shape[1:])
        patches = grouped.permute(0, 4, 5, 1, 2, 3).reshape(active, high * wide, -1)
        ctx.given = patches, weight, bias
        kernels = weight.here.reshape(active, channels, -1).transpose(1, 2)
        result = torch.bmm(patches.transpose(1, 2), kernels)
        if bias is not None:
            result += bias.here[:, None]
        return result.view(*shape, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        patches, weight, bias = ctx.given
        ctx.given = None
        active = weight.active
        gradient = grads[0].permute(0, 2, 3, 1).reshape(active, -1, weight.shape[0])
        own = torch.bmm(patches, gradient).transpose(1, 2)
        weight.record("dense", own.reshape(active, *weight.shape))
        if bias is not None:
            bias.record("dense", gradient.sum(1))
        return None, None, None, None, None, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    if isinstance(input, CohortParameter) or not isinstance(weight, CohortParameter):
        return NotImplemented
    own = bias.slot if isinstance(bias, CohortParameter) else None
    result = _product(input, weight, own, weight.flipped)
    return result if bias is None or own is not None else result + bias


def _matmul(left: Tensor, right: Tensor) -> Any:
    if isinstance(left, CohortParameter) or not isinstance(right, CohortParameter):
        return NotImplemented
    return _product(left, right, None, not right.flipped)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or isinstance(left, CohortParameter):
        return NotImplemented
    if not isinstance(right, CohortParameter):
        return NotImplemented
    own = bias.slot if isinstance(bias, CohortParameter) and bias.dim() == 1 else None
    result = _product(left, right, own, not right.flipped)
    return result if own is not None else result + bias


def _product(rows: Tensor, weight: CohortParameter, bias: Any, flip: bool) -> Any:
    if weight.dim() != 2 or rows.dim() < 2:
        return NotImplemented
    return _Product.apply(rows, weight.token, weight.slot, bias, flip)  # type: ignore[no-untyped-call]


def _transposed(parameter: CohortParameter, *dims: int, **named: int) -> Any:
    swapped = [dim % 2 for dim in (*dims, *named.values())]
    if len(parameter.slot.shape) != 2 or (swapped and sorted(swapped) != [0, 1]):
        return NotImplemented
    return CohortParameter.of(parameter.slot, parameter.token, not parameter.flipped)


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or not isinstance(weight, CohortParameter):
        raise Unsupported("embedding with max_norm or scale_grad_by_freq")
    if weight.flipped or isinstance(weight.slot, Factored):
        return NotImplemented
    skip = None if padding_idx is None else padding_idx % weight.slot.shape[0]
    return _Lookup.apply(input, weight.token, weight.slot, skip)  # type: ignore[no-untyped-call]


def _conv2d(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(weight, CohortParameter) or input.dim() != 4:
        return NotImplemented
    if isinstance(padding, str) or (bias is not None and not isinstance(bias, CohortParameter)):
        return NotImplemented
    pairs = tuple((n, n) if isinstance(n, int) else tuple(n) for n in (stride, padding, dilation))
    own = bias.slot if isinstance(bias, CohortParameter) else None
    if weight.shape[1] == groups == 1 and pairs[2] == (1, 1) and not input.requires_grad:
        return _OneChannel.apply(input, weight.token, weight.slot, own, *pairs[:2])  # type: ignore[no-untyped-call]
    rows = input.contiguous(memory_format=torch.channels_last)
    options = (*pairs, groups)
    return _Convolution.apply(rows, weight.token, weight.slot, own, options)  # type: ignore[no-untyped-call]


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    result = functional.layer_norm(input, normalized_shape, None, None, eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    result = functional.group_norm(input, num_groups, None, None, eps).movedim(1, -1)
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result.movedim(-1, 1)


def _elementwise(operation: Callable[..., Tensor], reflected: bool = False) -> Callable[..., Any]:
    """Rows [a * B, ...] with a parameter that is broadcast over them."""

    def handler(left: Any, right: Any, **options: Any) -> Any:
        if reflected:
            left, right = right, left
        mine = [isinstance(side, CohortParameter) for side in (left, right)]
        parameter, rows = (left, right) if mine[0] else (right, left)
        slot = parameter.slot
        if slot.clients == 1 or all(mine) or not isinstance(rows, Tensor):
            return NotImplemented
        if isinstance(slot, Factored) or parameter.flipped or rows.dim() <= len(slot.shape):
            raise Unsupported("a parameter that is not broadcast over rows")
        if rows.shape[0] % slot.active:
            raise Unsupported("a parameter combined with something that is not rows")
        grouped = rows.reshape(slot.active, -1, *rows.shape[1:])
        ones = [1] * (grouped.dim() - 1 - len(slot.shape))
        own = slot.now().reshape(slot.active, *ones, *slot.shape)
        sides = (own, grouped) if mine[0] else (grouped, own)
        return operation(*sides, **options).flatten(0, 1)

    return handler


_handlers: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.conv2d: _conv2d,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: lambda right, left: _matmul(left, right),
    **dict.fromkeys((torch.t, Tensor.t, torch.transpose, Tensor.transpose), _transposed),
    **dict.fromkeys((Tensor.T.__get__, Tensor.mT.__get__), _transposed),  # type: ignore[attr-defined]
}
for _name in ("add", "sub", "mul", "div"):
    _operation = getattr(torch, _name)
    _handlers |= dict.fromkeys((_operation, getattr(Tensor, _name)), _elementwise(_operation))
for _name in ("add", "sub", "mul", "truediv"):
    _operation = getattr(torch, _name.replace("true", ""))
    _handlers[getattr(Tensor, f"__{_name}__")] = _elementwise(_operation)
    _handlers[getattr(Tensor, f"__r{_name}__")] = _elementwise(_operation, reflected=True)

_harmless: set[Any] = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point),
    *(Tensor.is_complex, Tensor.__len__, Tensor.data_ptr, torch.is_floating_point),
    *(
        getattr(Tensor, name).__get__
        for name in "shape dtype device layout ndim requires_grad is_cuda is_sparse is_nested grad is_leaf".split()
    ),
}
