"""Small tasks and cohorts for the tests of the cohort engine."""

import numpy as np
import torch
from torch import nn

from homespun.plan.build.losses import cross_entropy, in_top
from homespun.plan.manifest import ClientOptimizer
from homespun.simulation.arena import Arena
from homespun.simulation.batches import Batches
from homespun.simulation.task import Task


def loss(outputs, batch):
    return cross_entropy(outputs, batch["y"])


def tokens_loss(outputs, batch):
    """One value per token; the token 0 is padding and does not count."""
    return cross_entropy(outputs, batch["y"]), batch["y"] != 0


def top1(outputs, batch):
    return in_top(outputs, batch["y"], 1)


class Perceptron(nn.Module):
    def __init__(self, wide=7):
        super().__init__()
        self.first, self.second = nn.Linear(5, wide), nn.Linear(wide, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def task(model, *, kind="vectors", batch_size=4, epochs=1, **optimizer):
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Task(
        model=model,
        loss=tokens_loss if kind == "tokens" else loss,
        metrics={} if kind == "tokens" else {"top1": top1},
        optimizer=ClientOptimizer(**{"learning_rate": 0.1, **optimizer}),
        batch_size=batch_size,
        local_epochs=epochs,
        scales={"x": 1 / 255} if kind == "images" else {},
    )


SIZES = (9, 3, 12, 1, 5)


def arena(kind="vectors", sizes=SIZES, width=5, classes=3, length=4, vocabulary=11):
    rng = np.random.default_rng(2)
    rows = sum(sizes)
    values = {
        "vectors": lambda: rng.normal(size=(rows, width)),
        "images": lambda: rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8),
        "tokens": lambda: rng.integers(1, vocabulary, (rows, length), dtype=np.uint16),
    }[kind]()

    labels = rng.integers(0, classes, rows, dtype=np.int32)
    if kind == "tokens":
        labels = rng.integers(0, vocabulary, (rows, length), dtype=np.uint16)
    return Arena({"x": np.asarray(values), "y": labels}, np.concatenate(([0], np.cumsum(sizes))))


def batches(data, batch_size=4, epochs=1):
    """Every client's rows in their own order, epoch after epoch."""
    per_epoch = -(-data.num_rows // batch_size)
    clients = np.argsort(-per_epoch, kind="stable")
    num_steps = per_epoch[clients] * epochs
    shape = (int(num_steps[0]), len(clients), batch_size)
    rows, present = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for place, client in enumerate(clients):
        first, count = data.offsets[client], data.num_rows[client]
        for step in range(num_steps[place]):
            begin = step % per_epoch[client] * batch_size
            index = np.arange(begin, begin + batch_size)
            present[step, place] = index < count
            rows[step, place] = first + np.minimum(index, count - 1)
    active = (np.arange(shape[0])[:, None] < num_steps).sum(1)
    return Batches(clients, rows, present, active, data.num_rows[clients], num_steps)
