"""The tasks of `benchmarks.simulation`, made of NumPy alone so that every framework trains the very same thing.

A task has clients with synthetic rows, batches in the stored order, initial weights and a learning rate: plain SGD on
the mean loss of a batch, one local epoch, all clients in every round, their models averaged by examples. Weights have
PyTorch's shapes: dense [out, in], convolution [out, in, k, k], recurrent [4 hidden, in] in the order i, f, g, o.

Learning rates are so small that training does not amplify rounding: with ten times these, a change of 1e-7 in LEAF's
network makes 1e-2 after two rounds, also in float64, and no two frameworks could be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Floats]

FORWARD_BACKWARD = 3  # products of a layer: forward, gradient of its weights, gradient of its input
BLOCK = 10_000  # rows that are made at a time
FIRST_LAYER = 2  # nobody asks for the gradient of the data


@dataclass(frozen=True)
class Mlp:
    """Dense layers with ReLU between them; one layer is logistic regression."""

    sizes: tuple[int, ...]

    def shapes(self) -> Shapes:
        return dense_shapes(self.sizes)

    def flops(self) -> int:
        return sum(
            2 * rows * columns * (FORWARD_BACKWARD if layer else FIRST_LAYER)
            for layer, (rows, columns) in enumerate(pairwise(self.sizes))
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.sizes[:1]

    @property
    def num_classes(self) -> int:
        return self.sizes[-1]


@dataclass(frozen=True)
class Cnn:
    """Convolutions with ReLU, 2 x 2 max-pooling after those that `pooled` names, then dense layers.

    `image`: channels and side length; `channels`: of each convolution; `dense`: the sizes after the first.
    """

    image: tuple[int, int]
    channels: tuple[int, ...]
    kernel: int
    padding: int
    pooled: tuple[bool, ...]
    dense: tuple[int, ...]

    def sides(self) -> list[int]:
        """Side lengths of the maps that each convolution makes, before pooling."""
        sides, side = [], self.image[1]
        for pooled in self.pooled:
            sides.append(side + 2 * self.padding - self.kernel + 1)
            side = sides[-1] // 2 if pooled else sides[-1]
        return sides

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the dense layers, with that of the flattened maps."""
        last = self.sides()[-1] // (2 if self.pooled[-1] else 1)
        return (self.channels[-1] * last**2, *self.dense)

    def shapes(self) -> Shapes:
        shapes: Shapes = {}
        for layer, (before, after) in enumerate(pairwise((self.image[0], *self.channels))):
            shapes[f"conv.{layer}.weight"] = (after, before, self.kernel, self.kernel)
            shapes[f"conv.{layer}.bias"] = (after,)
        return shapes | dense_shapes(self.sizes)

    def flops(self) -> int:
        pairs = pairwise((self.image[0], *self.channels))
        convolutions = sum(
            2
            * (side * self.kernel) ** 2
            * before
            * after
            * (FORWARD_BACKWARD if layer else FIRST_LAYER)
            for layer, (side, (before, after)) in enumerate(zip(self.sides(), pairs, strict=True))
        )
        dense = sum(FORWARD_BACKWARD * 2 * a * b for a, b in pairwise(self.sizes))
        return convolutions + dense

    @property
    def input_shape(self) -> tuple[int, ...]:
        channels, side = self.image
        return (channels, side, side)

    @property
    def num_classes(self) -> int:
        return self.dense[-1]


@dataclass(frozen=True)
class Lstm:
    """Next word: embedding, one LSTM layer, projection to the embedding's width, output over the vocabulary."""

    vocabulary: int
    embedding: int
    hidden: int
    length: int

    def shapes(self) -> Shapes:
        gates = 4 * self.hidden
        return {
            "embedding.weight": (self.vocabulary, self.embedding),
            "lstm.weight_ih_l0": (gates, self.embedding),
            "lstm.weight_hh_l0": (gates, self.hidden),
            "lstm.bias_ih_l0": (gates,),
            "lstm.bias_hh_l0": (gates,),
            "projection.weight": (self.embedding, self.hidden),
            "projection.bias": (self.embedding,),
            "output.weight": (self.vocabulary, self.embedding),
            "output.bias": (self.vocabulary,),
        }

    def flops(self) -> int:
        products = (
            4 * self.hidden * (self.embedding + self.hidden)
            + self.hidden * self.embedding
            + self.embedding * self.vocabulary
        )
        return FORWARD_BACKWARD * 2 * self.length * products


def dense_shapes(sizes: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for layer, (before, after) in enumerate(pairwise(sizes)):
        shapes[f"dense.{layer}.weight"] = (after, before)
        shapes[f"dense.{layer}.bias"] = (after,)
    return shapes


@dataclass(frozen=True)
class Data:
    """All rows behind one another; client c has `offsets[c]` to `offsets[c + 1]`. y: classes, or the next words."""

    x: Floats | Ints
    y: Ints
    offsets: Ints

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def load(cls, folder: Path) -> Data:
        """What `Task.data` wrote there, memory-mapped."""
        x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy")
        return cls(x, y, np.load(folder / "offsets.npy"))

    def clients(self) -> Iterator[tuple[Floats | Ints, Ints]]:
        for begin, end in pairwise(self.offsets.tolist()):
            yield self.x[begin:end], self.y[begin:end]


@dataclass(frozen=True, kw_only=True)
class Task:
    """`rows`: fewest and most rows of a client; `num_rounds`: that one process measures."""

    model: Mlp | Cnn | Lstm
    num_clients: int
    rows: tuple[int, int]
    batch_size: int = 10
    learning_rate: float
    num_rounds: int

    def offsets(self) -> Ints:
        sizes = np.random.default_rng(1).integers(
            self.rows[0], self.rows[1], self.num_clients, endpoint=True
        )
        return np.concatenate(([0], np.cumsum(sizes)))

    def data(self, folder: Path | None = None) -> Data:
        """Learnable rows: noisy prototypes of classes that each client has in other shares, or Zipf's words. In
        memory, or in files of `folder` where `Data.load` finds them.
        """
        offsets, rng, model = self.offsets(), np.random.default_rng(2), self.model
        num_rows = int(offsets[-1])
        if isinstance(model, Lstm):
            weights = np.arange(1, model.vocabulary + 1) ** -1.05
            words = np.searchsorted(
                np.cumsum(weights / weights.sum()), rng.random((num_rows, model.length + 1))
            ).clip(max=model.vocabulary - 1)
            x, y = np.ascontiguousarray(words[:, :-1]), np.ascontiguousarray(words[:, 1:])
            return Data(x, y, offsets)

        def room(name: str, shape: tuple[int, ...], dtype: type) -> Any:
            if folder is None:
                return np.empty(shape, dtype)
            return open_memmap(folder / f"{name}.npy", "w+", dtype, shape)

        classes = model.num_classes
        shares = rng.dirichlet(np.full(classes, 0.3), self.num_clients).cumsum(1)
        prototypes = 0.3 * rng.standard_normal((classes, *model.input_shape), np.float32)
        x = room("x", (num_rows, *model.input_shape), np.float32)
        y = room("y", (num_rows,), np.int64)
        for begin in range(
            0, num_rows, BLOCK
        ):  # a million clients need no more memory than their rows
            rows = np.arange(begin, min(begin + BLOCK, num_rows))
            client = np.searchsorted(offsets, rows, side="right") - 1
            drawn = (shares[client] < rng.random((len(rows), 1))).sum(1).clip(max=classes - 1)
            noise = rng.standard_normal((len(rows), *model.input_shape), np.float32)
            y[begin : begin + BLOCK] = drawn
            x[begin : begin + BLOCK] = prototypes[drawn] + np.float32(0.5) * noise
        if folder is not None:
            np.save(folder / "offsets.npy", offsets)
        return Data(x, y, offsets)

    def initial(self) -> Weights:
        """Weights with deviation 1 / sqrt(fan-in), biases 0.01, embedding 0.1."""
        rng, weights = np.random.default_rng(3), {}
        for name, shape in self.model.shapes().items():
            deviation = float(np.prod(shape[1:])) ** -0.5
            if "bias" in name:
                deviation = 0.01
            elif name.startswith("embedding"):
                deviation = 0.1
            weights[name] = (deviation * rng.standard_normal(shape)).astype(np.float32)
        return weights

    def num_steps(self) -> int:
        """SGD steps of a round, of all clients together."""
        return int((-(-np.diff(self.offsets()) // self.batch_size)).sum())

    def flops(self) -> int:
        """Floating-point operations of a round: the products of training, nothing else."""
        return self.model.flops() * int(self.offsets()[-1])

    def with_clients(self, number: int) -> Task:
        return replace(self, num_clients=number)


TINY = Task(
    model=Mlp((64, 32, 10)), num_clients=100, rows=(10, 30), learning_rate=0.1, num_rounds=40
)
TASKS: Mapping[str, Task] = {
    "tiny": TINY,
    "tiny1k": replace(TINY, num_clients=1000, num_rounds=10),
    "logreg": replace(TINY, model=Mlp((784, 10)), learning_rate=0.03),
    "mlp": Task(
        model=Mlp((784, 200, 200, 10)),
        num_clients=50,
        rows=(30, 70),
        learning_rate=0.1,
        num_rounds=6,
    ),
    "cnn_s": Task(
        model=Cnn((1, 28), (16, 32), 5, 0, (True, True), (62,)),
        num_clients=50,
        rows=(30, 70),
        learning_rate=0.01,
        num_rounds=5,
    ),
    # LEAF's network for FEMNIST.
    "cnn_leaf": Task(
        model=Cnn((1, 28), (32, 64), 5, 2, (True, True), (2048, 62)),
        num_clients=50,
        rows=(30, 70),
        learning_rate=0.002,
        num_rounds=2,
    ),
    # The network of pfl's own CIFAR-10 benchmark, without its dropout, whose draws no two frameworks share.
    "cifar": Task(
        model=Cnn((3, 32), (32, 64), 3, 0, (False, True), (128, 10)),
        num_clients=50,
        rows=(50, 50),
        learning_rate=0.01,
        num_rounds=2,
    ),
    "lstm256": Task(
        model=Lstm(vocabulary=10_000, embedding=96, hidden=256, length=20),
        num_clients=20,
        rows=(64, 64),
        batch_size=16,
        learning_rate=0.3,
        num_rounds=2,
    ),
}
