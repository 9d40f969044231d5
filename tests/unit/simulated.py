"""A small task for tests of simulations; its functions stand at the top of a module, so that workers find them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from homespun.plan.build.losses import cross_entropy, in_top
from homespun.plan.manifest import ClientOptimizer
from homespun.simulation.arena import Arena
from homespun.simulation.task import Task

FEATURES, CLASSES = 6, 3


def loss(outputs, batch):
    return cross_entropy(outputs, batch["y"])


def top1(outputs, batch):
    return in_top(outputs, batch["y"], 1)


def task(learning_rate: float = 0.2, hidden: int = 5) -> Task:
    torch.manual_seed(0)
    return Task(
        model=nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)),
        loss=loss,
        metrics={"top1": top1},
        optimizer=ClientOptimizer(learning_rate=learning_rate),
        batch_size=4,
        local_epochs=2,
        max_rows=10,
    )


@dataclass(frozen=True)
class DeadlyLoss:
    """The loss; the first time that it is asked for, it kills its process. `mark`: a file that remembers."""

    mark: str

    def __call__(self, outputs, batch):
        try:
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return loss(outputs, batch)


def deadly_task(mark: str) -> Task:
    return replace(task(), loss=DeadlyLoss(mark))


def data(num_clients: int = 12, seed: int = 0) -> Arena:
    """Clients of 0 to 13 rows, of which the first has none; the label is the largest of three sums."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 14, num_clients)
    counts[0] = 0
    x = draw.normal(size=(counts.sum(), FEATURES)).astype(np.float32)
    y = (x[:, :3] + x[:, 3:]).argmax(1).astype(np.int32)
    return Arena({"x": x, "y": y}, np.concatenate([[0], np.cumsum(counts)]))


def images(num_clients: int = 4) -> tuple[Arena, Arena]:
    """Rows for the zoo's digits: bright where the label says, to train on and to evaluate on."""
    draw = np.random.default_rng(0)
    y = np.tile(np.arange(10, dtype=np.int32), num_clients)
    x = draw.integers(0, 60, (len(y), 28, 28)).astype(np.uint8)
    x[np.arange(len(y)), 2 * y] = 255
    arena = Arena({"x": x, "y": y}, np.arange(num_clients + 1) * 10)
    return arena, arena
