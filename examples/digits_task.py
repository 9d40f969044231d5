"""Digits by federated learning over the people who wrote them: `digits.toml`.

The images: a Parquet table with the columns user, label and image (784 bytes, 28 x 28 pixels). Writers are divided,
never their images: `test` was never trained on, and is for the last word; `validation` was never trained on either,
and is for curves and decisions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, max_pool2d, relu

from homespun import Arena, Task
from homespun.errors import InvalidConfig
from homespun.plan.build import cross_entropy, in_top
from homespun.plan.build.steps import Batch
from homespun.plan.manifest import ClientOptimizer
from homespun.rng import unit_interval
from homespun.simulation.datasets import Column, from_parquet
from homespun.types import AnyArray


def loss(logits: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(logits, batch["y"])


def top1(logits: Tensor, batch: Batch) -> Tensor:
    return in_top(logits, batch["y"], 1)


class Digits(nn.Module):
    """uint8 images, scaled to float32 [B, 28, 28] in 0..1 -> logits [B, 10]. 80,202 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 5)
        self.second = nn.Conv2d(16, 32, 5)
        self.hidden = nn.Linear(32 * 4 * 4, 128)
        self.output = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = max_pool2d(relu(self.first(images.unsqueeze(1))), 2)
        x = max_pool2d(relu(self.second(x)), 2)
        result: Tensor = self.output(relu(self.hidden(x.flatten(1))))
        return result


def task(
    learning_rate: float = 0.1,
    momentum: float = 0.0,
    batch_size: int = 10,
    local_epochs: int = 1,
    max_rows: int = 200,
) -> Task:
    """`max_rows`: of a writer's images and their copies, others in each round."""
    torch.manual_seed(0)
    return Task(
        model=Digits(),
        loss=loss,
        metrics={"top1": top1},
        optimizer=ClientOptimizer(learning_rate=learning_rate, momentum=momentum),
        batch_size=batch_size,
        local_epochs=local_epochs,
        max_rows=max_rows,
        scales={"x": 1 / 255},
    )


def split(
    path: str, test: float = 0.2, validation: float = 0.05, copies: int = 1, seed: int = 0
) -> tuple[Arena, Arena, Arena]:
    """Images to train on, of `validation` and of `test`: shares of the writers, who are on their side by their name
    alone. Those who train have `copies` more of each image, see `augmented`.
    """
    if not 0 < test < test + validation < 1:
        raise InvalidConfig("test and validation are shares of the writers", got=(test, validation))
    columns = {"x": Column("image", (28, 28)), "y": Column("label", dtype="int32")}
    everybody = from_parquet(path, columns=columns)
    place = np.array([unit_interval(seed, "held out", name) for name in everybody.clients or ()])
    side = (place >= test).astype(int) + (place >= test + validation)
    tested, validated, trained = (everybody.subset(np.flatnonzero(side == n)) for n in range(3))
    return augmented(trained, copies, seed), validated, tested


def data(path: str, **settings: float) -> tuple[Arena, Arena]:
    """To train on, and to draw the curve with: see `split`."""
    training, validation, _ = split(path, **settings)  # type: ignore[arg-type]
    return training, validation


def augmented(writers: Arena, copies: int, seed: int = 0) -> Arena:
    """Beside every image `copies` of it, each turned, moved and scaled a little at random, as their writer could do."""
    if not copies:
        return writers
    generator = torch.Generator().manual_seed(seed)
    images = [writers.inputs["x"], *(varied(writers.inputs["x"], generator) for _ in range(copies))]
    return Arena(
        {
            "x": np.stack(images, 1).reshape(-1, 28, 28),
            "y": np.repeat(writers.inputs["y"], len(images)),
        },
        writers.offsets * len(images),
        writers.clients,
    )


def varied(images: AnyArray, generator: torch.Generator) -> AnyArray:
    """uint8 [n, 28, 28]: by up to 12 degrees, 2 pixels and a tenth of the size."""
    chance = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = chance[0] * 0.21, 1 + chance[1] * 0.1
    cos, sin, shift = scale * torch.cos(angle), scale * torch.sin(angle), chance[2:] / 7
    maps = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).reshape(-1, 2, 3)
    grid = affine_grid(maps, [len(images), 1, 28, 28], align_corners=False)
    pixels = torch.from_numpy(np.asarray(images)).float().unsqueeze(1)
    moved = grid_sample(pixels, grid, align_corners=False).squeeze(1)
    return moved.round().to(torch.uint8).numpy()
