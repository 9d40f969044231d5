"""The tasks' networks as anybody writes them in PyTorch: what homespun, pfl, Flower and the eager loop train."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.peers.simulation_tasks import Cnn, Data, Floats, Ints, Lstm, Mlp, Task


class Network(nn.Module):
    """`loss(x, y)`: the mean over the batch, for next words also over the positions."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x).flatten(0, -2), y.flatten())


class MlpNetwork(Network):
    def __init__(self, model: Mlp) -> None:
        super().__init__()
        self.dense = dense(model.sizes)

    def forward(self, x: Tensor) -> Tensor:
        return through(self.dense, x)


class CnnNetwork(Network):
    def __init__(self, model: Cnn) -> None:
        super().__init__()
        self.conv = nn.ModuleList(
            nn.Conv2d(before, after, model.kernel, padding=model.padding)
            for before, after in pairwise((model.image[0], *model.channels))
        )
        self.pooled = model.pooled
        self.dense = dense(model.sizes)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, pooled in zip(self.conv, self.pooled, strict=True):
            x = F.relu(convolution(x))
            if pooled:
                x = F.max_pool2d(x, 2)
        return through(self.dense, x.flatten(1))


class LstmNetwork(Network):
    def __init__(self, model: Lstm) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocabulary, model.embedding)
        self.lstm = nn.LSTM(model.embedding, model.hidden, batch_first=True)
        self.projection = nn.Linear(model.hidden, model.embedding)
        self.output = nn.Linear(model.embedding, model.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(x))
        return cast(Tensor, self.output(self.projection(states)))


def dense(sizes: tuple[int, ...]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))


def through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    *hidden, last = layers
    for layer in hidden:
        x = F.relu(layer(x))
    return cast(Tensor, last(x))


def network(task: Task, device: str = "cpu", dtype: str = "float32") -> Network:
    """The task's network with its initial weights."""
    torch.backends.cudnn.allow_tf32 = False  # float32 for everybody
    kinds = {Mlp: MlpNetwork, Cnn: CnnNetwork, Lstm: LstmNetwork}
    made = cast(Network, kinds[type(task.model)](task.model))
    made.load_state_dict({name: torch.from_numpy(w) for name, w in task.initial().items()})
    return made.to(device, getattr(torch, dtype))


def clients(data: Data, device: str = "cpu", dtype: str = "float32") -> list[tuple[Tensor, Tensor]]:
    """Each client's rows, where they are trained."""
    return [(inputs(x, device, dtype), torch.from_numpy(y).to(device)) for x, y in data.clients()]


def inputs(x: Floats | Ints, device: str, dtype: str) -> Tensor:
    """Words stay whole numbers."""
    rows = torch.from_numpy(x).to(device)
    return rows.to(getattr(torch, dtype)) if rows.is_floating_point() else rows


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def weights_of(trained: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().cpu() for name, weight in trained.state_dict().items()}
