"""The three pure functions of a plan, made from a module, a loss and metrics.

Everything a function needs is an argument and everything it changes is a result, because that is what
becomes an ONNX graph. Arguments and results are named here once, in order (`Graph.inputs`, `.outputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from homespun.plan.manifest import OPTIMIZER_TERMS

Batch = Mapping[str, Tensor]
PerElement = Callable[[Any, Batch], Tensor | tuple[Tensor, Tensor]]
"""A loss or metric: (model outputs, batch) -> values [B, ...], or values and a mask of that shape."""


@dataclass(frozen=True)
class Recipe:
    """What the author gives: the model, which inputs it is called with, the loss and the metrics."""

    model: nn.Module
    model_inputs: tuple[str, ...]
    loss: PerElement
    metrics: Mapping[str, PerElement]
    terms: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def forward(self, parameters: Sequence[Tensor], batch: Batch) -> Any:
        arguments = tuple(batch[name] for name in self.model_inputs)
        return functional_call(
            self.model, dict(zip(self.names, parameters, strict=True)), arguments
        )

    def sums(self, outputs: Any, batch: Batch, weight: Tensor) -> list[Tensor]:
        """[sum, count] of the loss, then of each metric. Rows of weight 0 add exactly nothing."""
        functions = [self.loss, *self.metrics.values()]
        return [part for f in functions for part in weighted_sum(f(outputs, batch), weight)]

    @property
    def sum_names(self) -> list[str]:
        return [f"{part}.{name}" for name in ("loss", *self.metrics) for part in ("sum", "count")]


@dataclass(frozen=True)
class Graph:
    """A pure function of flat tensors, the names of its arguments and results, and example arguments."""

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    arguments: Mapping[str, Tensor]
    results: Sequence[str]


def weighted_sum(values: Tensor | tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of per-element values, where row b counts `weight[b]` times."""
    values, mask = values if isinstance(values, tuple) else (values, torch.ones_like(values))
    rows = weight.reshape(-1, *[1] * (values.dim() - 1))
    mask = mask.to(values.dtype) * rows
    return (values * mask).sum(), mask.sum()


def train_graph(recipe: Recipe, parameters: Sequence[Tensor], batch: Batch) -> Graph:
    """One step of the client optimizer (see ClientOptimizer for the order of its terms)."""
    names, terms = recipe.names, recipe.terms
    weight = torch.ones(len(next(iter(batch.values()))))
    arguments = {**_named("p", names, parameters), **batch, "weight": weight}
    arguments["learning_rate"] = torch.tensor(0.1)
    arguments |= {term: torch.tensor(0.1) for term in OPTIMIZER_TERMS if term in terms}
    if "momentum" in terms:
        arguments |= _named("m", names, [torch.zeros_like(p) for p in parameters])
    if "proximal" in terms:
        arguments |= _named("a", names, parameters)
    order = list(arguments)

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(order, flat, strict=True))
        data = _widened({name: given[name] for name in batch})
        current = [given[f"p.{name}"] for name in names]

        def mean_loss(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            sums = recipe.sums(recipe.forward(tensors, data), data, given["weight"])
            return sums[0] / sums[1].clamp(min=1), sums

        gradient, sums = grad(mean_loss, has_aux=True)(current)
        gradient = _terms(terms, gradient, current, given, names)
        momentum: list[Tensor] = []
        if "momentum" in terms:
            momentum = [
                given["momentum"] * given[f"m.{name}"] + g
                for name, g in zip(names, gradient, strict=True)
            ]
            gradient = momentum
        updated = [p - given["learning_rate"] * g for p, g in zip(current, gradient, strict=True)]
        return (*updated, *momentum, *sums)

    results = [f"n.{name}" for name in names]
    if "momentum" in terms:
        results += [f"v.{name}" for name in names]
    return Graph("train", step, arguments, results + recipe.sum_names)


def _terms(
    terms: Sequence[str],
    gradient: Sequence[Tensor],
    current: Sequence[Tensor],
    given: Mapping[str, Tensor],
    names: Sequence[str],
) -> Sequence[Tensor]:
    if "proximal" in terms:
        gradient = [
            g + given["proximal"] * (p - given[f"a.{name}"])
            for name, g, p in zip(names, gradient, current, strict=True)
        ]
    if "max_grad_norm" in terms:
        norm = torch.stack([(g * g).sum() for g in gradient]).sum().sqrt()
        scale = (given["max_grad_norm"] / (norm + 1e-6)).clamp(max=1)
        gradient = [g * scale for g in gradient]
    if "weight_decay" in terms:
        gradient = [g + given["weight_decay"] * p for g, p in zip(gradient, current, strict=True)]
    return gradient


def evaluate_graph(recipe: Recipe, parameters: Sequence[Tensor], batch: Batch) -> Graph:
    """Sums and counts of the loss and the metrics, changing nothing."""
    names = recipe.names
    weight = torch.ones(len(next(iter(batch.values()))))
    arguments = {**_named("p", names, parameters), **batch, "weight": weight}
    order = list(arguments)

    def evaluate(*flat: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(order, flat, strict=True))
        data = _widened({name: given[name] for name in batch})
        outputs = recipe.forward([given[f"p.{name}"] for name in names], data)
        return tuple(recipe.sums(outputs, data, given["weight"]))

    return Graph("evaluate", evaluate, arguments, recipe.sum_names)


def predict_graph(recipe: Recipe, parameters: Sequence[Tensor], batch: Batch) -> Graph:
    """The module's `predict` method if it has one, else its forward, on a batch of one row."""
    names = recipe.names
    data = {name: batch[name][:1] for name in recipe.model_inputs}
    arguments = _named("p", names, parameters) | data
    order = list(arguments)
    predicting = _Predicting(recipe.model)

    def predict(*flat: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(order, flat, strict=True))
        inputs = _widened({name: given[name] for name in data})
        tensors = {f"model.{name}": given[f"p.{name}"] for name in names}
        return (functional_call(predicting, tensors, tuple(inputs.values())),)

    return Graph("predict", predict, arguments, ["output"])


class _Predicting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = getattr(self.model, "predict", self.model)(*inputs)
        return result


def _named(prefix: str, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}


def _widened(batch: Batch) -> dict[str, Tensor]:
    """Integers as PyTorch indexes with them: int32 travels (64 bits are awkward in browsers)."""
    return {n: t.long() if t.dtype == torch.int32 else t for n, t in batch.items()}
