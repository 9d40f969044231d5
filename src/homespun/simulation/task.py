"""What is trained: the author's PyTorch model, its loss and metrics, and how a client works on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import nn

from homespun.errors import InvalidConfig
from homespun.plan.build.steps import PerElement
from homespun.plan.manifest import ClientOptimizer

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The words of `build_plan`, so that what was simulated becomes a plan without another line.

    `model` is called with the inputs named in `model_inputs`; `loss` and `metrics` give values [B, ...] per element,
    or values and a mask. `max_rows`: most rows of a client that one participation uses, None: all. `scales`: input
    name -> factor that turns what is stored (uint8 pixels) into the model's float32.
    """

    model: nn.Module
    loss: PerElement
    metrics: Mapping[str, PerElement] = field(default_factory=dict)
    model_inputs: tuple[str, ...] = ("x",)
    optimizer: ClientOptimizer
    batch_size: int
    local_epochs: int = 1
    max_rows: int | None = None
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for numbers that mean nothing."""
        for name in ("batch_size", "local_epochs", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{name} must be at least 1", got=value)

    def num_examples(self, num_rows: Integers) -> Integers:
        """[m]: what clients with so many rows train on."""
        return num_rows if self.max_rows is None else np.minimum(num_rows, self.max_rows)

    def num_steps(self, num_examples: Integers) -> Integers:
        """[m]: local steps of clients that train on so many."""
        return -(-num_examples // self.batch_size) * self.local_epochs
