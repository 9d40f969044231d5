"""Rounds of a PyTorch task on the cohort engine: shards to the pool, sums to the method's server update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from homespun.errors import NumericFailure
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.method import Layout, Method, Sums, Vectors
from homespun.simulation.checkpoints import Snapshot
from homespun.simulation.clients import Clients, ClientStore
from homespun.simulation.secure import secure_sum
from homespun.simulation.shards import Adding, Aggregation, Order, Pool, Shard, ShardSum
from homespun.simulation.state import Trained, failure_of, round_seed
from homespun.tensors import tree as trees
from homespun.tensors.tree import Shapes
from homespun.types import AnyArray, Tree

Evaluate = Callable[[Tensor], dict[str, float]]


@dataclass(frozen=True)
class CohortState:
    """Between two rounds: the model [d], the server's vectors, and what clients keep."""

    model: Tensor
    server: Vectors
    clients: ClientStore


@dataclass(frozen=True, kw_only=True)
class CohortRounds:
    """See `state.Rounds`. `split`: a cohort, ascending, into shards; `shapes`: of the model's parameters; `population`:
    clients there are; `own`: the module's parameters, from which a run begins that is given nothing else.
    """

    method: Method
    pool: Pool
    split: Callable[[Clients], Sequence[Clients]]
    adding: Adding
    shapes: Shapes
    own: Tree
    population: int
    seed: int
    evaluator: Evaluate
    device: str = "cpu"

    def begin(self, initial: Tree | None) -> CohortState:
        """Raises `ShapeMismatch` for parameters of another model."""
        model = torch.from_numpy(trees.flatten(initial or self.own, self.shapes)).to(self.device)
        kept = self.method.client_begin(model) if self.method.client_begin else {}
        begin = {name: vector.cpu().numpy() for name, vector in kept.items()}
        server = self.method.begin(model, Layout.of(self.shapes))
        return CohortState(model, server, ClientStore(begin))

    def round(
        self, state: CohortState, number: int, cohort: Clients
    ) -> tuple[CohortState, Trained]:
        """Raises `NumericFailure` naming the round."""
        seed = round_seed(self.seed, number)
        cohort = np.sort(cohort)
        shards = [
            Shard(clients, state.clients.take(clients) if state.clients.begin else {})
            for clients in self.split(cohort)
        ]
        order = Order(number, seed, state.model, state.server)
        total = ShardSum()
        for part in self.pool.run(order, shards):
            total.add(part)
        try:
            sums, clipped = self._sums(state.model, total, seed, number)
            model, server = self.method.server_update(state.model, state.server, sums)
        except NumericFailure as error:
            raise failure_of(number, error.message) from error
        if not bool(torch.isfinite(model).all()):
            raise failure_of(number, "the model is not finite any more")
        clients = state.clients
        if total.kept:
            clients = clients.copy()
            clients.keep(total.clients, total.kept)
        return CohortState(model, server, clients), Trained(
            metrics=total.metrics,
            num_clients=total.num_clients,
            num_examples=total.num_examples,
            num_steps=total.num_steps,
            weight=sums.numbers.get("weight", float(total.num_clients)),
            clipped=clipped,
        )

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
        return self.evaluator(state.model)

    def parameters(self, state: CohortState) -> Tree:
        vector = state.model.detach().cpu().numpy().copy()
        return trees.unflatten(vector, self.shapes)

    def snapshot(self, state: CohortState) -> Snapshot:
        server = {name: np.asarray(vector.cpu()) for name, vector in state.server.items()}
        return Snapshot(0, self.parameters(state), server, state.clients.arrays())

    def restore(self, snapshot: Snapshot) -> CohortState:
        vector = trees.flatten(snapshot.model, self.shapes)
        server = {
            name: torch.from_numpy(array).to(self.device) for name, array in snapshot.server.items()
        }
        model = torch.from_numpy(vector).to(self.device)
        return CohortState(model, server, ClientStore.of(snapshot.clients))

    @staticmethod
    def _tensor(array: AnyArray, model: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(model)
