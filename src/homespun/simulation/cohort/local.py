"""A local rule and the client's optimizer, resolved to tensors for m clients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from homespun.errors import ShapeMismatch
from homespun.learning.method import LocalRule
from homespun.plan.manifest import ClientOptimizer


@dataclass(frozen=True, kw_only=True)
class Local:
    """One step of client c is, with gradient g of its batch's mean loss at w:

        g <- scale * g + correction + proximal * (w - anchor)                 LocalRule
        g <- g + optimizer.proximal * (w - model)                             ClientOptimizer, in its order:
        g <- g * min(1, max_grad_norm / (|g| + 1e-6))
        g <- g + weight_decay * w
        v <- momentum * v + g; g <- v
        w <- w - learning_rate * g

    Vectors are [d], the same for every client, or [m, d].
    """

    model: Tensor
    start: Tensor
    anchor: Tensor
    correction: Tensor | None
    scale: float
    proximal: float
    optimizer: ClientOptimizer

    @property
    def linear(self) -> bool:
        """A step is linear in the gradient and has no memory: no momentum, no clipping."""
        return not self.optimizer.momentum and not self.optimizer.max_grad_norm

    @property
    def pull(self) -> float:
        """How strongly a step is drawn to the anchor and the model."""
        return self.proximal + self.optimizer.proximal

    @property
    def shrink(self) -> float:
        """What a linear step multiplies the parameters with."""
        return 1 - self.optimizer.learning_rate * (self.pull + self.optimizer.weight_decay)

    def drift(self) -> Tensor | None:
        """What a linear step adds besides the gradient and a multiple of the parameters, if anything: [d] or [m, d]."""
        if self.correction is None and not (self.proximal or self.optimizer.proximal):
            return None
        drift = self.proximal * self.anchor + self.optimizer.proximal * self.model
        if self.correction is not None:
            drift = drift - self.correction
        return self.optimizer.learning_rate * drift

    @property
    def common(self) -> bool:
        """No client has a vector of its own."""
        own = (self.start, self.anchor, self.correction)
        return all(vector is None or vector.dim() == 1 for vector in own)

    def part(self, first: int, last: int) -> Local:
        """The same for the clients `first` to `last` only."""

        def rows(vector: Tensor) -> Tensor:
            return vector if vector.dim() == 1 else vector[first:last]

        return replace(
            self,
            start=rows(self.start),
            anchor=rows(self.anchor),
            correction=None if self.correction is None else rows(self.correction),
        )


def resolve(rule: LocalRule, optimizer: ClientOptimizer, model: Tensor, clients: int) -> Local:
    """Raises `ShapeMismatch` for vectors that fit neither the model nor the clients."""

    def vector(name: str, value: Any) -> Tensor:
        tensor = torch.as_tensor(value).to(model.device, model.dtype)
        if tensor.shape not in ((len(model),), (clients, len(model))):
            raise ShapeMismatch(
                f"the local rule's {name} must be [d] or [m, d]",
                expected=f"[{len(model)}] or [{clients}, {len(model)}]",
                got=str(list(tensor.shape)),
            )
        return tensor

    return Local(
        model=model,
        start=model if rule.start is None else vector("start", rule.start),
        anchor=model if rule.anchor is None else vector("anchor", rule.anchor),
        correction=None if rule.correction is None else vector("correction", rule.correction),
        scale=rule.scale,
        proximal=rule.proximal,
        optimizer=optimizer,
    )
