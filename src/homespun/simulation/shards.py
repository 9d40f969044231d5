"""A shard: some clients of a cohort, trained and summed in one place.

A round's cohort is cut into a number of shards by its clients' rows alone; each is summed where it is trained, and the
sums are added in the order of the shards. So for a number of shards the result is the same to the last bit, whoever
trains which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from homespun.errors import InvalidConfig
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.method import LocalResult, LocalRule, Method, Vectors, reported
from homespun.learning.metrics import MetricSum
from homespun.plan.seeds import participation_seed, rounding
from homespun.rng import derive_seed
from homespun.simulation.batches import Batches
from homespun.simulation.clients import Clients
from homespun.simulation.cohort.results import Choice, Engine
from homespun.types import AnyArray

CHUNK_BYTES = 2**28
"""Most bytes of clients' own parameters at a time, where each client's must exist."""
SHARD_CLIENTS = 4096
"""Most clients of a shard, whose batches are drawn at once."""


class Aggregation(StrEnum):
    """How updates are added: as floats; as the integers of a deployment; and masked and unmasked, too."""

    FLOAT = "float"
    FIXED_POINT = "fixed-point"
    SECURE = "secure"


@dataclass(frozen=True, kw_only=True)
class Adding:
    """How what clients report is added. `clip_norm`: L2 bound of a client's update, None: none; `max_weight`,
    `bits`, `rotate`: as of `ContributionCodec`; with float sums `max_weight` bounds the examples that count, 0: all.
    """

    aggregation: Aggregation = Aggregation.FLOAT
    clip_norm: float | None = None
    max_weight: int = 0
    bits: int = 16
    rotate: bool = True
    max_group: int = 1

    def check(self, method: Method) -> None:
        """Raises `InvalidConfig` for a method that cannot be added so."""
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise InvalidConfig("clip_norm must be a number above 0", got=self.clip_norm)
        if self.aggregation is Aggregation.FLOAT and self.clip_norm is None:
            return
        if method.report or method.combine:
            raise InvalidConfig(
                f"{method.name} reports or keeps more than the weighted update, which is all that devices do",
                hint='use aggregation = "float" without clip_norm, or a method such as FedAvg or FedProx',
            )
        if self.aggregation is Aggregation.FLOAT:
            return
        one = np.ones(1)
        if others := sorted(set(method.numbers(one, one)) - {"weight"}):
            raise InvalidConfig(
                f"{method.name} needs the sum of {others[0]!r} beside the weight, which no contribution has",
                hint='use aggregation = "float"',
            )
        if self.clip_norm is None:
            raise InvalidConfig(
                f"{self.aggregation} aggregation needs clip_norm",
                hint="integers need a bound: choose about the length of a usual update",
            )

    def codec(self, dimension: int, seed: int) -> ContributionCodec:
        """That of a round whose seed is `seed`; metrics stay beside it, in floats."""
        return ContributionCodec(
            dimension=dimension,
            clip_norm=self.clip_norm or 0.0,
            max_weight=self.max_weight,
            metrics=(),
            max_group=self.max_group,
            bits=self.bits,
            rotation_seed=derive_seed(seed, "rotation") if self.rotate else None,
        )


@dataclass(frozen=True)
class Order:
    """What a round asks of every shard: the round, its seed, the model [d] and the server's vectors; `choices`: the
    run's, with which it trains; without them the engine measures."""

    number: int
    seed: int
    model: Tensor
    server: Vectors
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Shard:
    """`clients` [m], ascending; `kept`: what they have from earlier rounds, name -> [m, ...]. `shares` [m, k]: updates
    are wanted in k sums, each client's with these weights, instead of in the method's one: [k, d].
    """

    clients: Clients
    kept: Mapping[str, AnyArray] = field(default_factory=dict)
    shares: AnyArray | None = None

    def part(self, first: int, last: int) -> Shard:
        """Of the clients `first` to `last` only."""
        kept = {name: rows[first:last] for name, rows in self.kept.items()}
        shares = None if self.shares is None else self.shares[first:last]
        return Shard(self.clients[first:last], kept, shares)

    def rows(self, array: AnyArray, batches: Batches) -> Tensor:
        """One of its arrays [m, ...] in the order of `batches`, where who has the most steps comes first."""
        return torch.from_numpy(array[np.searchsorted(self.clients, batches.clients)])


@dataclass(kw_only=True)
class ShardSum:
    """What comes back. `vectors`, `numbers`: sums as of `Report`; `contributions`: their one sum, or each one where
    they are masked; `clients` [m]: of the rows of `kept` (for their next participation) and of `updates` [m, d] with
    `weights` [m] (for methods that look at each update); `choices`: the strategies it was trained with."""

    vectors: dict[str, AnyArray] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, MetricSum] = field(default_factory=dict)
    num_clients: int = 0
    num_examples: int = 0
    num_steps: int = 0
    num_clipped: int = 0
    clients: Clients = field(default_factory=lambda: np.zeros(0, np.int64))
    kept: dict[str, AnyArray] = field(default_factory=dict)
    updates: AnyArray | None = None
    weights: AnyArray | None = None
    contributions: list[Contribution] = field(default_factory=list)
    choices: tuple[Choice, ...] = ()

    def add(self, other: ShardSum) -> None:
        """`self += other`, in place; rows go behind those that are there."""
        for name, vector in other.vectors.items():
            self.vectors[name] = self.vectors[name] + vector if name in self.vectors else vector
        for name, number in other.numbers.items():
            self.numbers[name] = self.numbers.get(name, 0.0) + number
        for name, metric in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, MetricSum(0.0, 0.0)) + metric
        for count in ("num_clients", "num_examples", "num_steps", "num_clipped"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        self.clients = np.concatenate([self.clients, other.clients])
        self.kept = {
            name: np.concatenate([self.kept[name], rows]) if name in self.kept else rows
            for name, rows in other.kept.items()
        }
        self.updates = _behind(self.updates, other.updates)
        self.weights = _behind(self.weights, other.weights)
        self.contributions += other.contributions
        self.choices = self.choices or other.choices


class Pool(Protocol):
    """Whoever trains shards: this process, processes of this machine, machines."""

    def run(self, order: Order, shards: Sequence[Shard]) -> list[ShardSum]:
        """The sum of each shard, in their order."""

    def close(self) -> None:
        """Give back whatever it holds."""


def split(cohort: Clients, rows: npt.NDArray[np.int64], num_shards: int) -> list[Clients]:
    """The shards of a cohort, in order, of about as many rows each. `rows` [len(cohort)]: of its clients."""
    count = max(num_shards, -(-len(cohort) // SHARD_CLIENTS))
    if count == 1:
        return [cohort]
    ends = np.cumsum(rows)
    middles = ends - rows / 2
    cuts = np.searchsorted(middles, ends[-1] * np.arange(1, count) / count)
    return [part for part in np.split(cohort, cuts) if len(part)]


@dataclass(frozen=True, kw_only=True)
class ShardTrainer:
    """Trains shards in this process. `batches(round, clients)`: the rows that each step sees."""

    engine: Engine
    method: Method
    batches: Callable[[int, Clients], Batches]
    adding: Adding

    def run(self, order: Order, shards: Sequence[Shard]) -> list[ShardSum]:
        """The sum of each shard, one after another: the pool of a run without workers."""
        return [self.train(order, shard) for shard in shards]

    def close(self) -> None:
        """Nothing is held."""

    def train(self, order: Order, shard: Shard) -> ShardSum:
        """Train a shard's clients from the order's model and add up what they report."""
        self.engine.choices = order.choices or self.engine.choices
        total = self._trained(order, shard)
        total.choices = self.engine.choices
        return total

    def _trained(self, order: Order, shard: Shard) -> ShardSum:
        method, model = self.method, order.model
        rules = method.local(model, order.server, {}) if not shard.kept else ()
        one_sum = shard.shares is None or shard.shares.shape[1] == 1
        if one_sum and self._summable(rules):
            return self._mean(order, shard, rules[0])
        total = ShardSum()
        most = max(1, CHUNK_BYTES // (4 * len(model)))
        for start in range(0, len(shard.clients), most):
            total.add(self._each(order, shard.part(start, start + most)))
        if self.adding.aggregation is Aggregation.FIXED_POINT:
            codec = self.adding.codec(len(model), order.seed)
            total.contributions = [codec.total(total.contributions)]
        return total

    def _summable(self, rules: Sequence[LocalRule]) -> bool:
        """Whether the server needs the weighted sum of plain updates only, so that no update need exist."""
        method, adding = self.method, self.adding
        special = method.report or method.combine or method.client_begin
        plain = adding.aggregation is Aggregation.FLOAT and adding.clip_norm is None
        alone = len(rules) == 1 and rules[0].candidates is None and not rules[0].wants_gradient
        return not special and plain and alone

    def _mean(self, order: Order, shard: Shard, rule: LocalRule) -> ShardSum:
        batches = self.batches(order.number, shard.clients)
        numbers = self._numbers(order.model, batches)
        weights = numbers["weight"]
        if shard.shares is not None:
            weights = shard.rows(shard.shares, batches)[:, 0].to(order.model)
        partial = self.engine.mean_path(order.model, batches, weights, rule)
        shape = (-1,) if shard.shares is None else (1, -1)
        return ShardSum(
            vectors={
                name: _array(vector).reshape(shape) for name, vector in partial.vectors.items()
            },
            numbers={name: _total(number) for name, number in numbers.items()},
            metrics=dict(partial.metrics),
            **_counts(batches),
        )

    def _each(self, order: Order, shard: Shard) -> ShardSum:
        method, model = self.method, order.model
        batches = self.batches(order.number, shard.clients)
        state = {n: shard.rows(array, batches).to(model.device) for n, array in shard.kept.items()}
        rules = method.local(model, order.server, state)
        trained = [self.engine.train(model, batches, rule) for rule in rules]
        results = tuple(result for result, _ in trained)
        total = ShardSum(metrics=dict(trained[0][1]), clients=batches.clients, **_counts(batches))
        if self.adding.aggregation is not Aggregation.FLOAT:
            self._encode(total, order, batches, results[0])
            return total
        if self.adding.clip_norm is not None:
            results = (self._clipped(total, results[0]), *results[1:])
        if shard.shares is not None:
            shares = shard.rows(shard.shares, batches).to(model)
            total.vectors = {"update": _array(shares.T @ results[0].update)}
            return total
        if method.report:
            report = reported(method, model, order.server, state, results)
            vectors, numbers = report.vectors, report.numbers
            total.kept = {name: _array(rows) for name, rows in report.kept.items()}
        else:
            numbers = self._numbers(model, batches)
            if method.combine:
                total.updates = _array(results[0].update)
                total.weights = _array(numbers["weight"])
                vectors = {}
            else:
                vectors = {"update": numbers["weight"][:, None] * results[0].update}
        total.vectors = {name: _array(rows.sum(0)) for name, rows in vectors.items()}
        total.numbers = {name: _total(number) for name, number in numbers.items()}
        return total

    def _numbers(self, model: Tensor, batches: Batches) -> Mapping[str, Tensor]:
        examples = batches.num_examples
        if self.adding.max_weight:
            examples = np.minimum(examples, self.adding.max_weight)
        return self.method.numbers(
            torch.from_numpy(examples).to(model), torch.from_numpy(batches.num_steps).to(model)
        )

    def _clipped(self, total: ShardSum, result: LocalResult) -> LocalResult:
        norms = torch.linalg.vector_norm(result.update, dim=1)
        factors = (self.adding.clip_norm / norms).clamp(max=1.0)
        total.num_clipped = int((factors < 1).sum())
        return replace(result, update=result.update * factors[:, None])

    def _encode(self, total: ShardSum, order: Order, batches: Batches, result: LocalResult) -> None:
        """Each update as its device would send it; the random numbers of its rounding are those of (round, client)."""
        codec = self.adding.codec(len(order.model), order.seed)
        updates = _array(result.update).astype(np.float32, copy=False)
        for update, client, count in zip(
            updates, batches.clients.tolist(), batches.num_examples.tolist(), strict=True
        ):
            drawn = rounding(participation_seed(order.seed, client))
            total.contributions.append(codec.encode(update, count, {}, drawn))


def _counts(batches: Batches) -> dict[str, Any]:
    return {
        "num_clients": len(batches.clients),
        "num_examples": int(batches.num_examples.sum()),
        "num_steps": int(batches.num_steps.sum()),
    }


def _array(tensor: Tensor) -> AnyArray:
    array: AnyArray = tensor.detach().cpu().numpy()
    return array


def _total(number: Tensor) -> float:
    return float(number.double().sum())


def _behind(first: AnyArray | None, second: AnyArray | None) -> AnyArray | None:
    if first is None or second is None:
        return second if first is None else first
    joined: npt.NDArray[Any] = np.concatenate([first, second])
    return joined
