"""Asynchronous rounds of a PyTorch task: whoever begins from a model trains at once, in one call of the engine.

Which step of the server each of them will be part of is known (see `asynchronous`), and so is its weight there. So
their updates are added to the sums of those steps right away: no model is kept for who trains longer, but one sum for
every step to come that somebody has trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from homespun.errors import NumericFailure
from homespun.learning.arrays import like
from homespun.learning.asynchronous import FedBuff
from homespun.simulation.asynchronous import Clock, Start
from homespun.simulation.checkpoints import Snapshot
from homespun.simulation.clients import Clients
from homespun.simulation.cohort_rounds import CohortRounds, CohortState
from homespun.simulation.shards import Order, Shard, ShardSum
from homespun.simulation.state import Trained, failure_of, round_seed
from homespun.types import AnyArray, Tree

_PENDING = "pending/"


@dataclass(frozen=True)
class AsyncState:
    """`steps` the server has made; `pending`: step to come -> weighted sum of the updates [d] that are known of it."""

    now: CohortState
    steps: int = 0
    pending: Mapping[int, AnyArray] = field(default_factory=dict)


@dataclass(kw_only=True)
class AsyncRounds:
    """See `state.Rounds`; a round is a step of the server. `rounds`: the same in rounds, which knows the task, the
    method and who trains; `clock`: makes one that begins anew; `num_steps`: examples [m] -> local steps [m].
    """

    rounds: CohortRounds
    buffer: FedBuff
    clock: Callable[[], Clock]
    num_steps: Callable[[AnyArray], AnyArray]
    _clock: Clock | None = None
    _steps: int = -1

    def begin(self, initial: Tree | None) -> AsyncState:
        return AsyncState(self.rounds.begin(initial))

    def round(self, state: AsyncState, number: int, cohort: Clients) -> tuple[AsyncState, Trained]:
        """The server's step `number`; the clock knows its clients. Raises `NumericFailure` naming it."""
        clock = self._at(state.steps)
        began, step = clock.began(state.steps), clock.step(number)
        pending, total = dict(state.pending), ShardSum()
        if began:
            total = self._trained(state.now, number, began)
            targets = sorted({start.step for start in began})
            for target, update in zip(targets, total.vectors["update"], strict=True):
                pending[target] = pending[target] + update if target in pending else update
        update = like(state.now.model, pending.pop(number))
        weights = [self._weight(start) for start in step.members]
        sums = self.buffer.sums(update, weights, self.rounds.population)
        model, server = self.rounds.moved(state.now, sums, number)
        self._steps = number
        examples = np.array([start.examples for start in step.members])
        staleness = [start.staleness for start in step.members]
        clips = self.rounds.adding.clip_norm is not None and total.num_clients
        choices = total.choices or state.now.choices
        now = replace(state.now, model=model, server=server, choices=choices)
        return AsyncState(now, number, pending), Trained(
            metrics=total.metrics,
            num_clients=len(step.members),
            num_examples=int(examples.sum()),
            num_steps=int(self.num_steps(examples).sum()),
            weight=sum(weights),
            clipped=total.num_clipped / total.num_clients if clips else None,
            timing={
                "virtual_seconds": step.time,
                "staleness": float(np.mean(staleness)),
                "most_stale": max(staleness),
            },
        )

    def _at(self, steps: int) -> Clock:
        """The clock after so many steps; where the run was resumed there, everything until then passes again."""
        if self._clock is None or self._steps != steps:
            self._clock = self.clock()
            for number in range(1, steps + 1):
                self._clock.began(number - 1)
                self._clock.step(number)
        return self._clock

    def _weight(self, start: Start) -> float:
        return self.buffer.weight(start.examples, start.staleness)

    def _trained(self, now: CohortState, number: int, began: list[Start]) -> ShardSum:
        """`vectors["update"]` [k, d]: a sum for each of the k steps that they report to."""
        began = sorted(began, key=lambda start: start.client)
        targets = np.unique([start.step for start in began])
        shares = np.zeros((len(began), len(targets)))
        places = np.searchsorted(targets, [start.step for start in began])
        shares[np.arange(len(began)), places] = [self._weight(start) for start in began]
        clients = np.array([start.client for start in began], np.int64)
        parts = self.rounds.split(clients, now.num_shards)
        rows = np.split(shares, np.cumsum([len(part) for part in parts])[:-1])
        seed = round_seed(self.rounds.seed, number)
        shards = [Shard(part, {}, share) for part, share in zip(parts, rows, strict=True)]
        order = Order(number, seed, now.model, now.server, now.choices)
        try:
            return self.rounds.trained(order, shards)
        except NumericFailure as error:
            raise failure_of(number, error.message) from error

    def evaluate(self, state: AsyncState) -> dict[str, float]:
        return self.rounds.evaluate(state.now)

    def parameters(self, state: AsyncState) -> Tree:
        return self.rounds.parameters(state.now)

    def snapshot(self, state: AsyncState) -> Snapshot:
        taken = self.rounds.snapshot(state.now)
        pending = {f"{_PENDING}{step}": update for step, update in state.pending.items()}
        return replace(taken, round=state.steps, server={**taken.server, **pending})

    def restore(self, snapshot: Snapshot) -> AsyncState:
        server: dict[str, Any] = dict(snapshot.server)
        names = [name for name in server if name.startswith(_PENDING)]
        pending = {int(name.removeprefix(_PENDING)): server.pop(name) for name in names}
        now = self.rounds.restore(replace(snapshot, server=server))
        return AsyncState(now, snapshot.round, pending)
