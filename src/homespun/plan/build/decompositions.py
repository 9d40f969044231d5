"""How PyTorch's backward operators are written with operators that ONNX has.

Most come with PyTorch. The ones here are ours: the backward passes of convolution, pooling and nearest
upsampling, which ONNX lacks, each as the forward operator that computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from homespun.errors import PlanError

aten = torch.ops.aten
Decompositions = dict[Any, Callable[..., Any]]


def decompositions() -> Decompositions:
    """The whole table: PyTorch's, without those that ONNX has a single good operator for, and ours."""
    table: Decompositions = dict(core_aten_decompositions())
    table.update(
        get_decompositions(
            [
                aten.embedding_dense_backward,
                aten.nll_loss_forward,
                aten.nll_loss_backward,
                aten.nll_loss2d_forward,
                aten.nll_loss2d_backward,
                aten._log_softmax_backward_data,
                aten._softmax_backward_data,
                aten.native_layer_norm_backward,
                aten.native_group_norm_backward,
                aten.gelu_backward,
                aten.sigmoid_backward,
                aten.tanh_backward,
                aten.select_backward,
                aten.slice_backward,
                aten.index_put_,
                aten.addcmul,
                aten.addcdiv,
            ]
        )
    )
    for operator in (aten._log_softmax, aten._softmax, aten.addmm, aten.gelu, aten.silu):
        table.pop(operator.default, None)
    table.pop(aten.native_layer_norm.default, None)
    return table | {
        aten.convolution_backward.default: convolution_backward,
        aten.max_pool2d_with_indices.default: max_pool,
        aten.max_pool2d_with_indices_backward.default: max_pool_backward,
        aten.avg_pool2d_backward.default: average_pool_backward,
        aten.upsample_nearest2d_backward.default: upsample_nearest_backward,
        aten.threshold_backward.default: threshold_backward,
        aten.empty_permuted.default: empty_permuted,
    }


def translations() -> Decompositions:
    """ONNX for our own operator."""
    opset = onnxscript.opset18

    def max_pool_onnx(
        x: Any,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> Any:
        return opset.MaxPool(
            x,
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=list(padding) * 2,
            dilations=list(dilation),
            ceil_mode=int(ceil_mode),
            storage_order=0,
        )

    return {torch.ops.homespun.max_pool_flat.default: max_pool_onnx}


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by input, weight and bias, all as convolutions."""
    n = x.dim() - 2
    stride, padding, dilation = (_expand(v, n) for v in (stride, padding, dilation))
    by_x = by_weight = None
    if transposed:  # y = conv_transpose(x, w): swap the roles of x and grad
        if wanted[0]:
            by_x = aten.convolution(
                grad, weight, None, stride, padding, dilation, False, [0] * n, groups
            )
        if wanted[1]:
            by_weight = _by_weight(x, grad, weight, stride, padding, dilation, groups)
    else:
        if wanted[0]:
            by_x = _by_input(grad, x, weight, stride, padding, dilation, groups)
        if wanted[1]:
            by_weight = _by_weight(grad, x, weight, stride, padding, dilation, groups)
    by_bias = grad.sum([0, *range(2, 2 + n)]) if wanted[2] else None
    return by_x, by_weight, by_bias


def _by_input(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    n = x.dim() - 2
    reach = [dilation[i] * (weight.shape[2 + i] - 1) for i in range(n)]
    rest = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach[i] + 1)
        for i in range(n)
    ]
    plain = groups == 1 and set(stride) == {1} and set(rest) == {0}
    if plain and all(reach[i] >= padding[i] for i in range(n)):
        # With stride 1 a convolution with the flipped kernel is much faster than ConvTranspose.
        flipped = weight.transpose(0, 1).flip(list(range(2, 2 + n)))
        outer = [reach[i] - padding[i] for i in range(n)]
        result: Tensor = aten.convolution(
            grad, flipped, None, [1] * n, outer, dilation, False, [0] * n, 1
        )
    else:
        result = aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)
    return result


def _by_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolve the input with the gradient: batch and channels change places, stride and dilation too."""
    n = x.dim() - 2
    batch, channels = x.shape[:2]
    inputs = x.transpose(0, 1)
    if groups > 1:
        split = x.reshape(batch, groups, channels // groups, *x.shape[2:])
        inputs = split.permute(2, 1, 0, *range(3, 3 + n))
        inputs = inputs.reshape(channels // groups, groups * batch, *x.shape[2:])
    result: Tensor = aten.convolution(
        inputs, grad.transpose(0, 1), None, dilation, padding, stride, False, [0] * n, groups
    )
    for i in range(n):  # rows and columns that the stride left over
        if result.shape[2 + i] != weight.shape[2 + i]:
            result = result.narrow(2 + i, 0, weight.shape[2 + i])
    return result.transpose(0, 1)


@torch.library.custom_op("homespun::max_pool_flat", mutates_args=())
def max_pool_flat(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Max-pooling with indices as ONNX means them: flat over [N, C, H, W]."""
    pooled, indices = torch.nn.functional.max_pool2d_with_indices(
        x, kernel, stride, padding, dilation, ceil_mode
    )
    n, c, h, w = x.shape
    offsets = torch.arange(n * c, device=x.device) * (h * w)
    return pooled, indices + offsets.reshape(n, c, 1, 1)


@max_pool_flat.register_fake
def _(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    pooled, _ = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    return pooled, pooled.new_empty(pooled.shape, dtype=torch.int64)


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Max-pooling by our own operator: PyTorch's translation pools twice to convert the indices."""
    kernel, padding, dilation = (_expand(v, 2) for v in (kernel, padding, dilation))
    stride = _expand(stride, 2) if stride else kernel
    pooled, indices = torch.ops.homespun.max_pool_flat(
        x, kernel, stride, padding, dilation, ceil_mode
    )
    return pooled, indices


def max_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Each gradient goes back to where its maximum was."""
    kernel = _expand(kernel, 2)
    stride = _expand(stride, 2) if stride else kernel
    zeros = torch.zeros((x.numel(),), dtype=grad.dtype, device=grad.device)
    index, values = indices.reshape(-1), grad.reshape(-1)
    apart = all(s >= k for s, k in zip(stride, kernel, strict=True)) and set(dilation) == {1}
    # Where windows do not overlap, every index occurs once and nothing needs adding.
    spread = zeros.scatter(0, index, values) if apart else zeros.scatter_add(0, index, values)
    return spread.reshape(x.shape)


def average_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Each gradient is spread over its window: a transposed convolution with a constant kernel."""
    if ceil_mode or (any(padding) and not count_include_pad):
        raise PlanError(
            "average pooling with ceil_mode or count_include_pad=False cannot be exported",
            hint="pad the input yourself, or use another kernel size",
        )
    channels = x.shape[1]
    kernel, padding = _expand(kernel, 2), _expand(padding, 2)
    stride = _expand(stride, 2) if stride else kernel
    share = 1.0 / (divisor_override or kernel[0] * kernel[1])
    weight = torch.full((channels, 1, *kernel), share, dtype=grad.dtype, device=grad.device)
    rest = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + kernel[i])
        for i in (0, 1)
    ]
    result: Tensor = aten.convolution(
        grad, weight, None, stride, padding, [1, 1], True, rest, channels
    )
    return result


def upsample_nearest_backward(
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    """Gradients of the copies of a pixel add up. Raises PlanError unless the factor is whole."""
    n, c, h, w = input_size
    if output_size[0] % h or output_size[1] % w:
        raise PlanError(
            f"nearest upsampling from {h}x{w} to {output_size[0]}x{output_size[1]} cannot be exported",
            hint="use a whole factor",
        )
    return grad.reshape(n, c, h, output_size[0] // h, w, output_size[1] // w).sum((3, 5))


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """ReLU's gradient: a mask."""
    return grad * (x > threshold).to(grad.dtype)


def empty_permuted(
    size: Sequence[int],
    physical_layout: Sequence[int],
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """ONNX has no uninitialised memory, and no layouts."""
    return torch.zeros(size, dtype=dtype, device=device)


def _expand(values: Sequence[int], n: int) -> list[int]:
    return list(values) * n if len(values) == 1 else list(values)
