"""One parameter of all clients of a chunk, and what a step's backward pass says about its gradient.

A gradient is recorded in the form in which it arises and applied when the whole backward pass is over:

    pairs    (left [a, R, o], right [a, R, i])    sum over R of left^T right, of matrix products
    data     the same                             of rows @ W^T, through which no gradient passes
    rows     (index [a, R], values [a, R, i])     values added to the rows `index`, of embeddings
    dense    [a, *shape]                          everything else

Here a is the number of active clients, a prefix of the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PRODUCTS = ("pairs", "data")
"""Kinds of what is recorded of matrix products."""


class Dense:
    """Every client's own parameter, stacked: [m, *shape]."""

    def __init__(self, shape: torch.Size, clients: int, like: Tensor) -> None:
        self.shape, self.clients = shape, clients
        if len(shape) == 4:  # convolution on a CPU is fastest with channels last
            flat = like.new_empty(clients * shape[0], *shape[1:])
            flat = flat.contiguous(memory_format=torch.channels_last)
            self.stack = flat.view(clients, *shape)
        else:
            self.stack = like.new_empty(clients, *shape)
        self.velocity: Tensor | None = None
        self._leaf: Tensor | None = None
        self._places = torch.arange(clients, device=like.device)[:, None]
        self.narrow(clients)
        self._forget()

    def begin(self, start: Tensor, plain: bool) -> None:
        """Every client at `start`: [n] or [m, n], flat."""
        self.stack.copy_(start.reshape(-1, *self.shape))
        self.velocity = None
        self.narrow(self.clients)
        self._forget()

    def narrow(self, active: int) -> None:
        """The steps that follow are of the first `active` clients; `here` [a, *shape] is theirs."""
        self.active = active
        self.here = self.stack if active == self.clients else self.stack[:active]

    def tensors(self) -> list[Tensor]:
        """All that a step sees of the parameter."""
        return [self.here]

    def bind(self, tensors: Iterator[Tensor]) -> None:
        """Be the parameter that a step sees in `tensors`."""
        self.stack = self.here = next(tensors)

    def example(self, parameter: Tensor, noise: torch.Generator) -> list[Tensor]:
        """`tensors()` near a parameter."""
        # Only scaled: millions of random numbers would take longer than a step.
        drawn = torch.randn((self.clients, *[1] * len(self.shape)), generator=noise).to(parameter)
        return [drawn.div_(8).add_(1) * parameter]

    def now(self) -> Tensor:
        """[a, *shape], for any differentiable operation; its gradient is taken from `.grad`."""
        if self._leaf is None:
            self._leaf = self.here.detach().requires_grad_()
        return self._leaf

    def only(self) -> Tensor:
        """[*shape], of a chunk of one client; as `now`, but its gradient has no passage through the stack."""
        if self._leaf is None:
            self._leaf = self.stack[0].requires_grad_()
        return self._leaf

    def product(self, rows: Tensor, flip: bool, bias: Dense | None = None) -> Tensor:
        """[a, R, i] -> rows @ W^T + bias, [a, R, o]; flipped: [a, R, o] -> rows @ W + bias."""
        if self.clients == 1:
            matrix = self.stack[0] if flip else self.stack[0].t()
            product = torch.mm(rows[0], matrix)
            if bias is not None:  # which `addmm` would first write into all rows
                product.add_(bias.stack[0])
            return product[None]
        matrix = self.here if flip else self.here.transpose(1, 2)
        if bias is None:
            return torch.bmm(rows, matrix)
        return torch.baddbmm(bias.here.unsqueeze(1), rows, matrix)

    def lookup(self, index: Tensor) -> Tensor:
        """[a, R] -> [a, R, i]: rows of the parameter."""
        if self.clients == 1:
            return torch.nn.functional.embedding(index, self.stack[0])
        return self.here[self._places[: self.active], index]

    def record(self, kind: str, *tensors: Tensor) -> None:
        """`kind`: pairs, data, rows or dense, as above."""
        self._recorded.append((kind, tensors))

    def taken(self) -> list[tuple[str, tuple[Tensor, ...]]]:
        """All that was recorded, which is forgotten."""
        taken = self._recorded
        if self._leaf is not None and self._leaf.grad is not None:
            taken.append(("dense", (self._leaf.grad,)))
        self._forget()
        return taken

    def product_rows(self) -> int:
        """Of this step's products; 0 if the parameter was used in any other way."""
        if self._leaf is not None or any(kind not in PRODUCTS for kind, _ in self._recorded):
            return 0
        return sum(left.shape[1] for _, (left, _) in self._recorded)

    def gradient(self) -> Tensor:
        """[a, *shape]: all that was recorded, in one tensor."""
        gradient = torch.zeros_like(self.here)
        self._add_recorded(gradient, beta=1.0, alpha=1.0)
        return gradient

    def descend(self, rate: float, shrink: float, drift: Tensor | None) -> None:
        """W <- shrink * W - rate * gradient + drift, without a gradient in memory where that is possible."""
        target = self.here
        self._add_recorded(target, beta=shrink, alpha=-rate)
        if drift is not None:
            target.add_(drift.reshape(-1, *self.shape)[: self.active])

    def _add_recorded(self, target: Tensor, beta: float, alpha: float) -> None:
        recorded = self.taken()
        pairs = [tensors for kind, tensors in recorded if kind in PRODUCTS]
        if beta != 1.0 and not pairs:
            target.mul_(beta)
        if pairs:
            left, right = _joined(pairs)
            if self.clients == 1:
                target[0].addmm_(left[0].t(), right[0], beta=beta, alpha=alpha)
            else:
                target.baddbmm_(left.transpose(1, 2), right, beta=beta, alpha=alpha)
        for kind, tensors in recorded:
            if kind == "rows":
                self._add_rows(target, alpha, *tensors)
            elif kind == "dense":
                target.add_(tensors[0], alpha=alpha)

    def _add_rows(self, target: Tensor, alpha: float, index: Tensor, values: Tensor) -> None:
        if self.clients == 1:
            target[0].index_add_(0, index[0], values[0], alpha=alpha)
        else:  # [a * rows, i]: the first row of each client, then the index within it
            place = self._places[: self.active] * self.shape[0] + index
            table = target.view(-1, self.shape[1])
            table.index_add_(0, place.view(-1), values.reshape(-1, self.shape[1]), alpha=alpha)

    def _forget(self) -> None:
        self._leaf = None
        self._recorded: list[tuple[str, tuple[Tensor, ...]]] = []

    def add_mean(self, total: Tensor, start: Tensor, weights: Tensor) -> None:
        """`total` [n] += sum over clients of weights * (W - start)."""
        if self.clients == 1:
            # In place: nobody needs the parameter any more.
            moved = self.stack[0].sub_(start.view(self.shape))
            total.addcmul_(moved.reshape(-1), weights)
            return
        sums = weights @ self.stack.reshape(self.clients, -1)
        total.add_(sums).sub_(weights.sum() * start if start.dim() == 1 else weights @ start)

    def updates(self, start: Tensor) -> Tensor:
        """[m, n]"""
        return self.stack.reshape(self.clients, -1) - start


class Factored:
    """Plain SGD without any client's own matrix: W_c = keep * W_0 + sum over its history of left^T right.

    For a linear layer every gradient is a product of two thin matrices, so that a client's layer after k steps is the
    shared W_0 and k pairs. Products with W_0 are one matrix product for the whole cohort, and so is the mean update.
    Exact, also with weight decay and a proximal term towards W_0: both only scale W_0 and the history.
    """

    def __init__(self, shape: torch.Size, clients: int, like: Tensor) -> None:
        self.shape, self.clients, self.active = shape, clients, clients
        self.plain = True
        self._keep: list[float | Tensor] = [1.0]
        self._left, self._right = (like.new_empty(clients, 0, size) for size in shape)
        self._used = 0
        self._recorded: list[tuple[str, tuple[Tensor, ...]]] = []

    def begin(self, start: Tensor, plain: bool) -> None:
        """W_0, flat [n]; `plain`: steps add to it and never scale it."""
        self.base, self.plain = start.view(self.shape), plain
        self._keep, self._recorded, self._used = [1.0], [], 0
        self._steps = torch.zeros(self.clients, dtype=torch.int64, device=start.device)
        self.active = self.clients

    def narrow(self, active: int) -> None:
        """The steps that follow are of the first `active` clients."""
        self.active = active

    def tensors(self) -> list[Tensor]:
        """All that a step sees of the parameter, W_0 first."""
        left, right = (part[: self.active, : self._used] for part in (self._left, self._right))
        keep = [] if self.plain else [self.base.new_tensor(self._keep[-1])]
        return [self.base, left, right, *keep]

    def bind(self, tensors: Iterator[Tensor]) -> None:
        """Be the parameter that a step sees in `tensors`."""
        self.base, self._left, self._right = (next(tensors) for _ in range(3))
        self._keep = [1.0 if self.plain else next(tensors)]
        self._used = self._left.shape[1]

    def example(self, parameter: Tensor, noise: torch.Generator) -> list[Tensor]:
        """`tensors()` near a parameter, after so many steps as no recording must depend on."""
        history = 2 * abs(self.clients - 4)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=noise).to(parameter) / 8

        sides = [drawn(self.clients, history, size) for size in self.shape]
        keep = [] if self.plain else [parameter.new_tensor(0.9)]
        return [parameter, *sides, *keep]

    def product(self, rows: Tensor, flip: bool, bias: Dense | None = None) -> Tensor:
        base = self.base if flip else self.base.t()
        flat = rows.reshape(-1, rows.shape[2])
        result = torch.mm(flat, base).view(*rows.shape[:2], -1)
        if not self.plain:
            result.mul_(self._keep[-1])
        if self._used:
            left = self._left[: self.active, : self._used]
            right = self._right[: self.active, : self._used]
            met, given = (left, right) if flip else (right, left)
            result.baddbmm_(torch.bmm(rows, met.transpose(1, 2)), given)
        if bias is not None:
            result.add_(bias.here.unsqueeze(1))
        return result

    def record(self, kind: str, *tensors: Tensor) -> None:
        """`kind`: pairs or data; there is nothing else here."""
        self._recorded.append((kind, tensors))

    def taken(self) -> list[tuple[str, tuple[Tensor, ...]]]:
        """All that was recorded, which is forgotten."""
        taken, self._recorded = self._recorded, []
        return taken

    def descend(self, rate: float, shrink: float, pull: float) -> None:
        """W <- shrink * W - rate * gradient + pull * W_0."""
        active, used = self.active, self._used
        if shrink != 1.0 and used:
            self._left[:active, :used].mul_(shrink)
        for _, (left, right) in self.taken():
            count = left.shape[1]
            end = self._used + count
            self._reserve(end)
            torch.mul(left, -rate, out=self._left[:active, self._used : end])
            self._left[active:, self._used : end].zero_()
            self._right[:active, self._used : end] = right
            self._right[active:, self._used : end].zero_()
            self._used = end
        self._keep.append(shrink * self._keep[-1] + pull)
        self._steps[:active] += 1

    def _reserve(self, rows: int) -> None:
        """Room for so many, and no more: what is packed needs no copy for the mean. It stays for the next rounds."""
        if rows <= self._left.shape[1]:
            return
        for name in ("_left", "_right"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(self.clients, rows, old.shape[2])
            new[:, : self._used] = old[:, : self._used]
            setattr(self, name, new)

    def add_mean(self, total: Tensor, start: Tensor, weights: Tensor) -> None:
        target = total.view(self.shape)
        left, right = self._left[:, : self._used], self._right[:, : self._used]
        left = (left * weights[:, None, None]).reshape(-1, self.shape[0])
        target.addmm_(left.t(), right.reshape(-1, self.shape[1]))
        if not self.plain:
            target.add_(self.base * (weights @ self._kept()))

    def updates(self, start: Tensor) -> Tensor:
        left, right = self._left[:, : self._used], self._right[:, : self._used]
        each = torch.bmm(left.transpose(1, 2), right)
        return (each + self._kept()[:, None, None] * self.base).reshape(self.clients, -1)

    def _kept(self) -> Tensor:
        """[m]: keep - 1 after each client's own number of steps."""
        return (self.base.new_tensor(self._keep) - 1)[self._steps]


def _joined(pairs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Several products as one: the matrix is then read and written once."""
    if len(pairs) == 1:
        return pairs[0]
    return tuple(torch.cat(sides, 1) for sides in zip(*pairs, strict=True))
