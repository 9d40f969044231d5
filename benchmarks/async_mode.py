"""What do stragglers cost, and what does it bring to let them join later, or not to wait for rounds at all?

An event simulation through the functions that decide on the server (`protocol.round.due`, `may_carry`), with real
contributions (`learning`), of a task with a goal of 20 and 26 devices at work. Training takes 60 s in the median; the
slow tail is heavy (log-normal, sigma 1: one device in a hundred takes ten times as long). The problem is a linear
regression in which every device's data lie elsewhere, the slow ones' too: who never waits for them never hears them.

Sides: `rounds` (the fence falls, stragglers are late), `stragglers` (rounds, `max_staleness` 4), `async` (26 at once,
updates of 20, `max_staleness` 20). An update takes 10 s to be opened. Rows: virtual seconds until 2,000 reports are
in checkpoints; the share of trainings that ended in one; devices at work on average; mean staleness; virtual seconds
until the error of the model is a hundredth of what it was at the start.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.harness import parse_options, report, rows
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.optimizers import ServerOptimizer, server_optimizer
from homespun.protocol.round import (
    RoundEvent,
    RoundState,
    RoundView,
    cohort_size,
    due,
    may_carry,
)
from homespun.rng import stream
from homespun.types import FloatArray

GOAL, OVER_SELECTION, OPEN_S, MEDIAN_S, SIGMA = 20, 1.3, 10.0, 60.0, 1.0
DIMENSION, STEPS, RATE = 16, 5, 0.1
CODEC = ContributionCodec(DIMENSION, 10.0, 0, (), GOAL, bits=32)
SHAPES = (("w", (DIMENSION,)),)


@dataclass(frozen=True)
class Side:
    """How a task lets devices in, and how far behind they may be."""

    name: str
    is_async: bool
    max_staleness: int


SIDES = (Side("rounds", False, 0), Side("stragglers", False, 4), Side("async", True, 20))


@dataclass(order=True)
class Training:
    """A device at work: when it finishes, and what it began with."""

    finishes_at: float
    number: int
    origin: int = field(compare=False)
    base: FloatArray = field(compare=False)


class Task:
    """One task over virtual time; `seed` draws the devices, the same ones for every side."""

    def __init__(self, side: Side, seed: int) -> None:
        self.side, self.seed = side, seed
        self.now, self.number, self.begun = 0.0, 1, 0
        self.worked_s = 0.0  # of all devices together
        self.included: list[int] = []  # their staleness
        self.model: FloatArray = np.zeros(DIMENSION, np.float32)
        self.best = stream(seed, "best").normal(0, 1, DIMENSION).astype(np.float32)
        self.target_at: float | None = None
        self.at_work: list[Training] = []
        self.buffer: list[Training] = []
        self._rule: ServerOptimizer = server_optimizer("FedAvg", {})
        self._size = cohort_size(GOAL, OVER_SELECTION)

    def run(self, num_reports: int) -> None:
        """Until so many reports are in checkpoints and the error is small."""
        self._admit(self._size)
        while len(self.included) < num_reports or self.target_at is None:
            then = max(self.now, self.at_work[0].finishes_at)
            self._pass(then - self.now)
            while self.at_work and self.at_work[0].finishes_at <= self.now:
                self.buffer.append(heapq.heappop(self.at_work))
                if self.side.is_async:
                    self._admit(1)
            if due(self._view(), self.now) is RoundEvent.CLOSE:
                self._commit()

    def _pass(self, seconds: float) -> None:
        self.worked_s += seconds * len(self.at_work)
        self.now += seconds

    def _view(self) -> RoundView:
        return RoundView(
            state=RoundState.RUNNING,
            goal=GOAL,
            minimum=GOAL,
            pool_target=0,
            select_at=0.0,
            deadline_at=float("inf"),
            num_waiting=0,
            num_assigned=self._size,
            num_open=len(self.at_work),
            num_reported=len(self.buffer),
            is_async=self.side.is_async,
        )

    def _commit(self) -> None:
        taken, self.buffer = self.buffer[:GOAL], self.buffer[GOAL:]
        sums = CODEC.empty()
        for each in taken:
            self.included.append(self.number - each.origin)
            CODEC.add(sums, self._contribution(each))
        moved, _, _ = Algorithm(SHAPES, CODEC, self._rule).server_update(
            {"w": self.model}, {}, sums
        )
        self.model = moved["w"]
        self.number += 1
        self._pass(OPEN_S)
        if self.target_at is None and self._error() < 0.01:
            self.target_at = self.now
        self.at_work = [each for each in self.at_work if self._may_join(each)]
        self.buffer = [each for each in self.buffer if self._may_join(each)]
        heapq.heapify(self.at_work)
        if self.side.is_async:
            self._admit(self._size - len(self.at_work) - len(self.buffer))
        else:
            self._admit(self._size)

    def _may_join(self, training: Training) -> bool:
        return may_carry(training.origin, self.number, self.side.max_staleness)

    def _admit(self, count: int) -> None:
        for _ in range(count):
            self.begun += 1
            takes_s = MEDIAN_S * stream(self.seed, "speed", self.begun).lognormal(0, SIGMA)
            training = Training(self.now + takes_s, self.begun, self.number, self.model)
            heapq.heappush(self.at_work, training)

    def _contribution(self, training: Training) -> Contribution:
        """Gradient steps on the device's own quadratic, whose minimum is somewhere around the best model."""
        rng = stream(self.seed, "data", training.number)
        minimum = self.best + rng.normal(0, 0.3, DIMENSION)
        curvature = rng.uniform(0.5, 1.5, DIMENSION)
        update = (minimum - training.base) * (1 - (1 - RATE * curvature) ** STEPS)
        staleness = self.number - training.origin
        return CODEC.encode(update.astype(np.float32), 1, {}, rng, staleness)

    def _error(self) -> float:
        return float(np.square(self.model - self.best).sum() / np.square(self.best).sum())


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__, argv)
    num_reports, seeds = (200, 2) if options.quick else (2_000, 10)
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for side in SIDES:
        tasks = [Task(side, seed) for seed in range(seeds)]
        for task in tasks:
            task.run(num_reports)
        found["time"][side.name] = [task.now * num_reports / len(task.included) for task in tasks]
        found["used"][side.name] = [len(task.included) / task.begun for task in tasks]
        found["busy"][side.name] = [task.worked_s / task.now for task in tasks]
        found["staleness"][side.name] = [float(np.mean(task.included)) for task in tasks]
        found["target"][side.name] = [task.target_at or 0.0 for task in tasks]
    report(
        [
            *rows(f"time to {num_reports} reports", found["time"], peer="rounds"),
            *rows("trainings used", found["used"], unit="share"),
            *rows("devices at work", found["busy"], unit="devices"),
            *rows("mean staleness", found["staleness"], unit="rounds"),
            *rows("time to 1 % of the error", found["target"], peer="rounds"),
        ],
        options,
    )


if __name__ == "__main__":
    main()
