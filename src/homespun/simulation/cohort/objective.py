"""The author's module, loss and metrics as functions of a flat vector of parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from homespun.errors import InvalidConfig, InvalidInput
from homespun.learning.method import Layout
from homespun.learning.metrics import MetricSum
from homespun.plan.build.steps import PerElement
from homespun.simulation.task import Task


class Objective:
    """A task's functions on one device. The author's module itself is never touched: this has its own copy."""

    def __init__(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `InvalidConfig` for a module without parameters, or with running statistics."""
        self.task, self.dtype = task, dtype
        self.module = copy.deepcopy(task.model).to(device, dtype)
        parameters = dict(self.module.named_parameters())
        if not parameters:
            raise InvalidConfig("the model has no parameters", hint="there is nothing to train")
        for name, part in self.module.named_modules():
            if isinstance(part, _NormBase) and part.track_running_stats:
                raise InvalidConfig(
                    f"layer {name!r} keeps running statistics, which are not parameters",
                    hint="use GroupNorm or LayerNorm, or track_running_stats=False",
                )
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.sizes = [parameter.numel() for parameter in parameters.values()]
        self.dimension = sum(self.sizes)
        self.functions: dict[str, PerElement] = {"loss": task.loss, **task.metrics}
        # Recorded steps, which chunks of all sizes share: see `Cohort`.
        self.programs: dict[Any, Any] = {}

    @property
    def layout(self) -> Layout:
        return Layout.of(self.shapes.items())

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """[d] -> the named parameters; [m, d] -> each stacked, [m, *shape]."""
        parts = torch.split(flat, self.sizes, -1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def forward(self, parameters: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Any:
        return functional_call(self.module, dict(parameters), self.arguments(batch))

    def arguments(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Raises `InvalidInput` if the data lacks an input that the model is called with."""
        try:
            return tuple(batch[name] for name in self.task.model_inputs)
        except KeyError as error:
            raise InvalidInput(
                f"the data has no input {error}", hint=f"it has: {', '.join(batch)}"
            ) from None

    def names(self, metrics: bool) -> tuple[str, ...]:
        """What is measured: the loss, and the author's metrics if they are wanted."""
        return tuple(self.functions) if metrics else ("loss",)


def client_sums(
    values: Tensor | tuple[Tensor, Tensor], weight: Tensor, clients: int
) -> tuple[Tensor, Tensor]:
    """`weighted_sum` for each of m clients whose rows lie one client after another: [m * B, ...] -> [m], [m]."""
    if not isinstance(values, tuple):
        elements = values[0].numel()
        each = values.reshape(clients, -1)
        rows = weight.reshape(clients, -1)
        if elements == 1:
            return (each * rows).sum(1), rows.sum(1)
        wide = rows[:, :, None].expand(-1, -1, elements).reshape(clients, -1)
        return (each * wide).sum(1), wide.sum(1)
    values, mask = values
    mask = mask.to(values.dtype) * weight.reshape(-1, *[1] * (values.dim() - 1))
    return (values * mask).reshape(clients, -1).sum(1), mask.reshape(clients, -1).sum(1)


class Totals:
    """Sums and counts of loss and metrics, kept on the device and read once."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._parts: list[list[Tensor]] = [[] for _ in range(2 * len(names))]

    def add(self, index: int, total: Tensor, count: Tensor) -> None:
        self._parts[2 * index].append(total.detach() if total.requires_grad else total)
        self._parts[2 * index + 1].append(count)

    def read(self) -> dict[str, MetricSum]:
        sums = [
            torch.cat([part.reshape(-1) for part in parts]).sum(dtype=torch.float64)
            for parts in self._parts
            if parts
        ]
        numbers = torch.stack(sums).tolist() if sums else [0.0] * len(self._parts)
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return {name: MetricSum(*pair) for name, pair in zip(self.names, pairs, strict=True)}
