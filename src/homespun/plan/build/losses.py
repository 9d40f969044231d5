"""Losses and metrics that cost little on a device. Any PyTorch function works; these are only lean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy per row with the gradient (softmax - one-hot) * g, two passes over the logits fewer
    than the derivative of log-softmax and gather needs, in the memory of what the forward pass kept: so once only."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = torch.log_softmax(logits, -1)
        return -log_probabilities.gather(-1, target[:, None]).squeeze(-1), log_probabilities

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[1], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        target, log_probabilities = ctx.saved_tensors
        scale = grads[0][:, None]
        # In place: with a large vocabulary, new memory of the size of the logits costs as much as a product.
        gradient = log_probabilities.exp_().mul_(scale)
        return gradient.scatter_add_(-1, target[:, None], -scale), None


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)[target] for every element: [..., classes], int64 [...] -> [...]."""
    classes = logits.shape[-1]
    losses, _ = _CrossEntropy.apply(logits.reshape(-1, classes), target.reshape(-1))  # type: ignore[no-untyped-call]
    result: Tensor = losses.reshape(target.shape)
    return result


def in_top(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """1.0 where fewer than `k` classes have a larger logit than the target's, else 0.0."""
    reached = logits.amax(-1) if k == 1 else logits.topk(k, -1).values[..., -1]
    return (logits.gather(-1, target[..., None]).squeeze(-1) >= reached).to(logits.dtype)
