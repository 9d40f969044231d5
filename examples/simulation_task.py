"""A task and made-up data for `homespun simulate examples/simulate.toml`: start here with your own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from homespun import Arena, Task
from homespun.plan.build.losses import cross_entropy, in_top
from homespun.plan.build.steps import Batch
from homespun.plan.manifest import ClientOptimizer

FEATURES, CLASSES = 20, 5


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(outputs, batch["y"])


def top1(outputs: Tensor, batch: Batch) -> Tensor:
    return in_top(outputs, batch["y"], 1)


def task(hidden: int = 32, learning_rate: float = 0.1) -> Task:
    torch.manual_seed(0)
    return Task(
        model=nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)),
        loss=loss,
        metrics={"top1": top1},
        optimizer=ClientOptimizer(learning_rate=learning_rate),
        batch_size=10,
    )


def data(num_clients: int = 200) -> tuple[Arena, Arena]:
    """Clients that see some classes more often than others; one in five of them is for evaluation."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(CLASSES, FEATURES))

    def clients(count: int) -> Arena:
        rows = draw.integers(10, 50, count)
        labels = [draw.choice(CLASSES, n, p=draw.dirichlet(np.full(CLASSES, 0.5))) for n in rows]
        y = np.concatenate(labels).astype(np.int32)
        x = (centres[y] + draw.normal(size=(len(y), FEATURES))).astype(np.float32)
        return Arena({"x": x, "y": y}, np.concatenate([[0], np.cumsum(rows)]))

    return clients(num_clients * 4 // 5), clients(num_clients // 5)
