"""Which strategy trains this task's clients fastest: proven equal to the reference first, then measured.

A candidate that the model cannot be run with, or that does not agree with the reference on a small cohort of the very
model in float64, is never used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from homespun.errors import InvalidConfig
from homespun.simulation.arena import Arena
from homespun.simulation.batches import Batches
from homespun.simulation.cohort.cohort import Cohort, factorable
from homespun.simulation.cohort.eager import Eager
from homespun.simulation.cohort.gather import Rows, Steps, TooSlow
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.objective import Objective, Totals
from homespun.simulation.cohort.reference import Reference
from homespun.simulation.cohort.results import Choice
from homespun.simulation.cohort.slots import Dense
from homespun.simulation.task import Task


class Strategy(Protocol):
    """Trains `chunk` clients at a time."""

    chunk: int

    def run(
        self,
        steps: Steps,
        local: Local,
        totals: Totals,
        mean: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | None:
        """The clients' updates [m, d]; with `mean` [d] and `weights` [m], their weighted sum is added to `mean`.

        Raises `Unsupported` or whatever the author's module raises.
        """


ALONE = ("eager", "sequential")
"""Strategies that train one client after another."""
CHUNKS = (4, 16, 64, 256)
STACKED_CLIENTS, REFERENCE_CLIENTS = 32, 16
"""That many train together where nothing was measured and no chunk is given."""
COMPILED_CLIENTS = 256
"""That many in one call: the more there are, the less the call costs, and no memory grows with them."""
STACKED_BYTES = 2**30
FACTORED_SIZE = 8192
"""Smaller matrices are faster stacked."""
MOST_STEPS = 64
"""Of each client in a measurement: enough for the history of products to cost what it costs."""
MOST_REPEATS, CERTAIN_SECONDS = 50, 0.06
"""Measured so often, for so long at most: what takes longer is measured once, which noise may turn round."""
PATIENCE_SECONDS = 5.0
"""For larger chunks, where a round takes less."""
EQUAL = 1.1
"""A chunk that is so many times slower than the next smaller one is the last that is tried."""
HOPELESS = 1.5
"""A candidate that is so many times slower than the fastest is stopped in the middle of its measurement."""
TURNS, RUN_OFF_SECONDS = 8, 2.0
"""The two fastest are measured again in so many turns, or for so long."""


def build(objective: Objective, choice: Choice) -> Strategy:
    """Raises `Unsupported` or whatever the author's module raises; `InvalidConfig` without the package it needs."""
    if choice.strategy == "reference":
        return Reference(objective, choice.chunk)
    if choice.strategy == "eager":
        return Eager(objective)
    if choice.strategy == "compiled":
        try:
            from homespun.simulation.cohort.compiled import Compiled
        except ImportError as error:
            raise InvalidConfig(
                "the strategy 'compiled' needs llvmlite", hint="pip install homespun[author]"
            ) from error
        return Compiled(objective, choice.chunk)
    return Cohort(objective, choice.chunk, frozenset(choice.factored))


@dataclass(frozen=True)
class Tuning:
    """What is known of the work: one round's `batches` of some clients, under one rule; `names`: what is measured."""

    task: Task
    arena: Arena
    objective: Objective
    rows: Rows
    batches: Batches
    local: Local
    names: tuple[str, ...] = ("loss",)
    _proven: dict[str, bool] = field(default_factory=dict)

    def choices(self, strategy: str, chunk: int | None) -> tuple[Choice, ...]:
        """Of the strategies that are right for this model, the fastest one of each kind, fastest first, and last the
        reference, which always is; of a forced `strategy` that one alone, if it is right.

        `chunk` set: the only number of clients that is tried.
        """
        reference = Choice("reference", chunk or REFERENCE_CLIENTS)
        if strategy == "reference":
            return (reference,)
        if strategy == "auto":
            return (*self._measured(chunk), reference)
        size = chunk or (COMPILED_CLIENTS if strategy == "compiled" else STACKED_CLIENTS)
        size = 1 if strategy in ALONE else size
        choice = Choice(strategy, size, self.worth_factoring() if strategy == "factored" else ())
        return (choice,) if self.proven(choice) else ()

    def _measured(self, chunk: int | None) -> list[Choice]:
        """Growing chunks of a strategy are tried until they are slower, and no longer than a round would take."""
        begin = time.perf_counter()
        fastest: dict[str, tuple[float, Choice]] = {}
        given_up: set[str] = set()
        for choice in self._candidates(chunk):
            name = choice.strategy
            if name in given_up or not self.proven(choice):
                continue
            least = min((seconds for seconds, _ in fastest.values()), default=float("inf"))
            before, _ = fastest.get(name, (float("inf"), choice))
            patience = max(PATIENCE_SECONDS, least * int(self.batches.num_steps.sum()))
            if name in fastest and time.perf_counter() - begin > patience:
                continue
            seconds = self.seconds_per_step(choice, min(HOPELESS * least, EQUAL * before))
            if not seconds < EQUAL * before:
                given_up.add(name)
            if seconds < before:
                fastest[name] = seconds, choice
        ranked = sorted(fastest.values(), key=lambda each: each[0])
        choices = [choice for _, choice in ranked]
        if len(ranked) > 1 and self._doubtful(ranked[:2]):
            choices[:2] = self._run_off(choices[0], choices[1])
        return choices

    def _doubtful(self, measured: list[tuple[float, Choice]]) -> bool:
        """Whether one may have been slower by accident: not by far, and there is time for some turns."""
        took = sum(
            seconds * self._few(choice.chunk, MOST_STEPS).num_steps.sum()
            for seconds, choice in measured
        )
        return measured[1][0] <= HOPELESS * measured[0][0] and bool(2 * took < RUN_OFF_SECONDS)

    def _run_off(self, one: Choice, other: Choice) -> tuple[Choice, Choice]:
        """Both, the faster one first: measured in turns, so that what slows the machine for a while slows both."""
        measures = [self._measurement(choice) for choice in (one, other)]
        least, begin = [float("inf")] * 2, time.perf_counter()
        for _ in range(TURNS):
            least = [min(seconds, once()) for seconds, once in zip(least, measures, strict=True)]
            if time.perf_counter() - begin > RUN_OFF_SECONDS:
                break
        return (one, other) if least[0] <= least[1] else (other, one)

    def _candidates(self, chunk: int | None) -> Iterator[Choice]:
        """All that could be fastest, the simplest first."""
        clients = len(self.batches.clients)
        if chunk is None or chunk == 1:
            yield from (Choice(strategy, 1) for strategy in ALONE)
        yield Choice("compiled", chunk or COMPILED_CLIENTS)
        each = self.objective.dimension * self.local.model.element_size()
        factored = self.worth_factoring() if factorable(self.local) else ()
        # The first size that takes all of these clients is the last; in other rounds there may be more of them.
        for size in (chunk,) if chunk else [size for size in CHUNKS if size // 4 < clients]:
            stacked = chunk or min(size, STACKED_BYTES // each)
            if stacked > (1 if chunk else size // 4):
                yield Choice("stacked", stacked)
            if factored and (chunk or size > CHUNKS[0]):
                yield Choice("factored", size, factored)

    def worth_factoring(self) -> tuple[str, ...]:
        """Matrices that cost more to read once for every client than the history of their products does.

        The history grows with every row of every step, so that a matrix that is used many times per step, for all
        words of a sentence, is soon better stacked.
        """
        steps = self.batches.num_steps
        past = float((steps * (steps - 1) / 2).sum() / max(steps.sum(), 1))
        names = []
        for name, rows in self._product_rows.items():
            shape = self.objective.shapes[name]
            if shape.numel() >= FACTORED_SIZE and rows * past * sum(shape) <= shape.numel():
                names.append(name)
        return tuple(names)

    @cached_property
    def _product_rows(self) -> dict[str, int]:
        """Of one client's step, for parameters that take part in matrix products and nothing else."""
        counting = _Counting(self.objective, 1)
        try:
            self._run(counting, self._few(clients=1, steps=1), limit=float("inf"))
        except Exception:  # noqa: BLE001  of a model that cannot be run so nothing is known
            return {}
        return {name: rows for name, rows in counting.rows.items() if rows}

    def proven(self, choice: Choice) -> bool:
        """The strategy gives the reference's updates, in float64, on a few of these clients."""
        if choice.strategy == "factored" and not choice.factored:
            return False
        if choice.strategy not in self._proven:
            self._proven[choice.strategy] = self._agrees(choice)
        return self._proven[choice.strategy]

    def _agrees(self, choice: Choice) -> bool:
        clients = len(self._small.few.clients)
        chunk = 1 if choice.strategy in ALONE else clients
        try:
            update, sums = self._small.trained(replace(choice, chunk=chunk))
        except Exception:  # noqa: BLE001  whatever the author's module raises here, the reference decides
            return False
        expected, expected_sums = self._small.told(chunk)
        largest = torch.linalg.vector_norm(expected, float("inf"))
        close = bool(torch.dist(update, expected, float("inf")) <= 1e-9 * largest)
        return close and np.allclose(sums, expected_sums, rtol=1e-9)

    @cached_property
    def _small(self) -> _Small:
        last = len(self.batches.clients) - 1
        few = _part(self.batches, np.unique([0, last]), steps=2, size=3)
        local = _exact(self.local)
        objective = Objective(self.task, local.model.device, torch.float64)
        rows = Rows(self.arena, self.task.scales, local.model.device, torch.float64)
        return _Small(few, local, objective, rows, self.names)

    def seconds_per_step(self, choice: Choice, limit: float = float("inf")) -> float:
        """Seconds for one step of one client, the share of what a chunk costs once included; infinite as soon as they
        are certain to be more than `limit`."""
        try:
            once = self._measurement(choice, limit)
        except TooSlow:
            return float("inf")
        best, begin = float("inf"), time.perf_counter()
        for _ in range(MOST_REPEATS):
            with suppress(TooSlow):  # which what is short may be by accident
                best = min(best, once())
            if time.perf_counter() - begin > CERTAIN_SECONDS:
                break
        return best

    def _measurement(self, choice: Choice, limit: float = float("inf")) -> Callable[[], float]:
        """What takes the seconds for one step of one client, anew each time. Both raise `TooSlow` for over `limit`."""
        trainer, clients = build(self.objective, choice), choice.chunk
        if choice.strategy == "compiled":
            clients = self._affordable(trainer, clients, limit)
        # Memory, kernels and the recorded step are there after that.
        self._run(trainer, self._few(clients, steps=1))
        few = self._few(clients, MOST_STEPS)
        count = int(few.num_steps.sum())
        return lambda: self._run(trainer, few, limit * count) / count

    def _affordable(self, compiled: Strategy, clients: int, limit: float) -> int:
        """How many of `clients` to measure in one call, which nothing can stop. Raises `TooSlow`."""
        one = self._few(1, MOST_STEPS)
        self._run(compiled, one)
        seconds = self._run(compiled, one)
        if seconds > CERTAIN_SECONDS and seconds > limit * int(one.num_steps.sum()):
            raise TooSlow
        return min(clients, 1 + int(CERTAIN_SECONDS / seconds))

    def _run(self, trainer: Strategy, few: Batches, limit: float = float("inf")) -> float:
        """Seconds. Raises `TooSlow` if they are more than `limit`."""
        clients, local = len(few.clients), self.local.part(0, len(few.clients))
        weights, mean = local.model.new_ones(clients), torch.zeros_like(local.model)
        begin = time.perf_counter()
        steps = self.rows.steps(few, until=begin + limit)
        trainer.run(steps, local, Totals(self.names), mean, weights)
        if local.model.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _few(self, clients: int, steps: int) -> Batches:
        """A chunk in the middle, whose clients have neither the most steps nor the fewest."""
        first = max(len(self.batches.clients) - clients, 0) // 2
        chosen = np.arange(first, min(first + clients, len(self.batches.clients)))
        return _part(self.batches, chosen, steps, self.batches.rows.shape[2])


@dataclass(frozen=True)
class _Small:
    """Two clients' first steps with a few rows each, in float64."""

    few: Batches
    local: Local
    objective: Objective
    rows: Rows
    names: tuple[str, ...]
    _told: dict[int, tuple[Tensor, list[float]]] = field(default_factory=dict)

    def told(self, chunk: int) -> tuple[Tensor, list[float]]:
        """What the reference makes of them. Its order, so many clients in lockstep, is that of the random numbers."""
        if chunk not in self._told:
            self._told[chunk] = self.trained(Choice("reference", chunk))
        return self._told[chunk]

    def trained(self, choice: Choice) -> tuple[Tensor, list[float]]:
        """Updates [m, d], and the sum of each measure."""
        trainer, totals, parts = build(self.objective, choice), Totals(self.names), []
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same random numbers, should the model draw any
            for first in range(0, len(self.few.clients), choice.chunk):
                steps = self.rows.steps(self.few, first, first + choice.chunk)
                parts.append(trainer.run(steps, self.local, totals))
        update = torch.cat([part for part in parts if part is not None])
        return update, [value.sum for value in totals.read().values()]


class _Counting(Cohort):
    rows: dict[str, int]

    def _descend(self, local: Local, drift: dict[str, Tensor] | None) -> None:
        self.rows = {
            name: slot.product_rows()
            for name, slot in self._slots.items()
            if isinstance(slot, Dense)
        }
        super()._descend(local, drift)


def _part(batches: Batches, chosen: np.ndarray, steps: int, size: int) -> Batches:
    """Some clients' first steps, each with at most `size` rows."""
    num_steps = np.minimum(batches.num_steps[chosen], steps)
    steps = int(num_steps.max(initial=0))
    return replace(
        batches,
        clients=batches.clients[chosen],
        rows=batches.rows[:steps, chosen, :size],
        present=batches.present[:steps, chosen, :size],
        active=(np.arange(steps)[:, None] < num_steps).sum(1),
        num_examples=batches.num_examples[chosen],
        num_steps=num_steps,
    )


def _exact(local: Local) -> Local:
    """The same kind of rule in float64, for any number of clients: each client's own vectors become one."""

    def one(vector: Tensor) -> Tensor:
        return (vector if vector.dim() == 1 else vector.mean(0)).double()

    model = local.model.double()
    return replace(
        local,
        model=model,
        start=model if local.start is local.model else one(local.start),
        anchor=model if local.anchor is local.model else one(local.anchor),
        correction=None if local.correction is None else one(local.correction),
    )
