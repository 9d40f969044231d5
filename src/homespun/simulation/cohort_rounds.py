"""Rounds of a PyTorch task on the cohort engine: shards to the pool, sums to the method's server update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from homespun.errors import NumericFailure
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.method import Layout, Method, Sums, Vectors
from homespun.learning.metrics import MetricSum
from homespun.simulation.checkpoints import Snapshot
from homespun.simulation.clients import Clients, ClientStore
from homespun.simulation.cohort.results import Choice
from homespun.simulation.secure import secure_sum
from homespun.simulation.shards import (
    CHUNK_BYTES,
    Adding,
    Aggregation,
    Order,
    Pool,
    Shard,
    ShardSum,
)
from homespun.simulation.state import Trained, failure_of, round_seed
from homespun.tensors import tree as trees
from homespun.tensors.tree import Shapes
from homespun.types import AnyArray, Tree

PERSONAL = "personal."
"""Before the metrics of clients with their own parameters, beside those of the model."""


class Measures(Protocol):
    """See `CohortEngine.evaluate`."""

    def evaluate(
        self, parameters: Tensor, clients: Clients | None = None
    ) -> dict[str, MetricSum]: ...


@dataclass(frozen=True)
class Evaluator:
    """`engine`: measures on the rows that were kept for it. `owners`: for each client of these rows, the training's
    client that it is, -1: none of them.
    """

    engine: Measures
    owners: Clients


@dataclass(frozen=True)
class CohortState:
    """Between two rounds: the model [d], the server's vectors, what clients keep; how they are trained and added."""

    model: Tensor
    server: Vectors
    clients: ClientStore
    num_shards: int
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CohortRounds:
    """See `state.Rounds`. `split`: a cohort, ascending, into a number of shards, `num_shards` where a run begins;
    `shapes`: of the model's parameters; `population`: clients there are; `own`: the module's parameters, from which a
    run begins that is given nothing else.
    """

    method: Method
    pool: Pool
    split: Callable[[Clients, int], Sequence[Clients]]
    num_shards: int
    adding: Adding
    shapes: Shapes
    own: Tree
    population: int
    seed: int
    evaluator: Evaluator | None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def begin(self, initial: Tree | None) -> CohortState:
        """Raises `ShapeMismatch` for parameters of another model."""
        vector = torch.from_numpy(trees.flatten(initial or self.own, self.shapes))
        model = vector.to(self.device, self.dtype)
        layout, first = Layout.of(self.shapes), self.method.client_begin
        server = self.method.begin(model, layout)
        kept = first(model, layout) if first else {}
        begin = {name: vector.cpu().numpy() for name, vector in kept.items()}
        return CohortState(model, server, ClientStore(begin), self.num_shards)

    def round(
        self, state: CohortState, number: int, cohort: Clients
    ) -> tuple[CohortState, Trained]:
        """Raises `NumericFailure` naming the round."""
        seed = round_seed(self.seed, number)
        cohort = np.sort(cohort)
        shards = [
            Shard(clients, state.clients.take(clients) if state.clients.begin else {})
            for clients in self.split(cohort, state.num_shards)
        ]
        order = Order(number, seed, state.model, state.server, state.choices)
        total = self.trained(order, shards)
        try:
            sums, clipped = self._sums(state.model, total, seed, number)
        except NumericFailure as error:
            raise failure_of(number, error.message) from error
        model, server = self.moved(state, sums, number)
        clients = state.clients
        if total.kept:
            clients = clients.copy()
            clients.keep(total.clients, total.kept)
        after = CohortState(model, server, clients, state.num_shards, total.choices)
        return after, Trained(
            metrics=total.metrics,
            num_clients=total.num_clients,
            num_examples=total.num_examples,
            num_steps=total.num_steps,
            weight=sums.numbers.get("weight", float(total.num_clients)),
            clipped=clipped,
        )

    def trained(self, order: Order, shards: Sequence[Shard]) -> ShardSum:
        """The sum of these shards.

        Who trains the first shard of a run measures what is fastest, and all others go by it: the same bits whoever
        they are, and after a resume.
        """
        done: list[ShardSum] = []
        if not order.choices:
            done = self.pool.run(order, shards[:1])
            order, shards = replace(order, choices=done[0].choices), shards[1:]
        total, *others = done + (self.pool.run(order, shards) if shards else [])
        for part in others:
            total.add(part)
        return total

    def moved(self, state: CohortState, sums: Sums, number: int) -> tuple[Tensor, Vectors]:
        """The next model and server's vectors. Raises `NumericFailure` naming the round."""
        try:
            model, server = self.method.server_update(state.model, state.server, sums)
        except NumericFailure as error:
            raise failure_of(number, error.message) from error
        if not bool(torch.isfinite(model).all()):
            raise failure_of(number, "the model is not finite any more")
        return model, server

    def _sums(
        self, model: Tensor, total: ShardSum, seed: int, number: int
    ) -> tuple[Sums, float | None]:
        """What the server is given, and the share of clients whose update was clipped."""
        vectors = {name: self._tensor(vector, model) for name, vector in total.vectors.items()}
        numbers, clipped = total.numbers, None
        if total.contributions:
            codec = self.adding.codec(len(model), seed)
            seen = codec.decode(self._total(codec, total, number))
            numbers, clipped = {"weight": seen.weight}, seen.clipped_share
            vectors = {"update": self._tensor(seen.mean_update, model) * seen.weight}
        elif self.adding.clip_norm is not None:
            clipped = total.num_clipped / max(total.num_clients, 1)
        if self.method.combine and total.updates is not None and total.weights is not None:
            # the result of all stands for the sum of one client
            updates = self._tensor(total.updates, model)
            weights = self._tensor(total.weights, model)
            vectors, numbers = {"update": self.method.combine(updates, weights)}, {"weight": 1.0}
        return Sums(vectors, numbers, total.num_clients, self.population), clipped

    def _total(self, codec: ContributionCodec, total: ShardSum, number: int) -> Contribution:
        if self.adding.aggregation is Aggregation.SECURE:
            return secure_sum(codec, total.contributions, number)
        return codec.total(total.contributions)

    def evaluate(self, state: CohortState) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        sums = self.evaluator.engine.evaluate(state.model)
        return {name: value.mean for name, value in {**sums, **self._personal(state)}.items()}

    def _personal(self, state: CohortState) -> dict[str, MetricSum]:
        """Loss and metrics of clients that have taken part, each with what it would predict with."""
        assert self.evaluator is not None
        owners, sums = self.evaluator.owners, dict[str, MetricSum]()
        if self.method.evaluated is None:
            return sums
        theirs = np.flatnonzero(state.clients.known(owners))
        most = max(1, CHUNK_BYTES // (4 * len(state.model)))
        for first in range(0, len(theirs), most):
            part = theirs[first : first + most]
            kept = state.clients.take(owners[part])
            clients = {name: torch.from_numpy(rows).to(state.model) for name, rows in kept.items()}
            parameters = self.method.evaluated(state.model, state.server, clients)
            for name, value in self.evaluator.engine.evaluate(parameters, part).items():
                name = PERSONAL + name
                sums[name] = sums.get(name, MetricSum(0.0, 0.0)) + value
        return sums

    def parameters(self, state: CohortState) -> Tree:
        vector = state.model.detach().cpu().numpy().copy()
        return trees.unflatten(vector, self.shapes)

    def snapshot(self, state: CohortState) -> Snapshot:
        server = {name: np.asarray(vector.cpu()) for name, vector in state.server.items()}
        choices = [asdict(choice) for choice in state.choices]
        settled = {"choices": choices, "shards": state.num_shards}
        clients = state.clients.arrays()
        return Snapshot(0, self.parameters(state), server, clients, settled=settled)

    def restore(self, snapshot: Snapshot) -> CohortState:
        vector = trees.flatten(snapshot.model, self.shapes)
        server = {
            name: torch.from_numpy(array).to(self.device) for name, array in snapshot.server.items()
        }
        model = torch.from_numpy(vector).to(self.device)
        choices = msgspec.convert(snapshot.settled.get("choices", []), tuple[Choice, ...])
        num_shards = snapshot.settled.get("shards", self.num_shards)
        return CohortState(model, server, ClientStore.of(snapshot.clients), num_shards, choices)

    @staticmethod
    def _tensor(array: AnyArray, model: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(model)
