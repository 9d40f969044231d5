"""What a round is to the loop that runs them: a state goes in, the next one comes out.

The loop (`run`) knows rounds, time, history and checkpoints; what is trained, and how, is behind `Rounds`. There are
two: `cohort_rounds`, a PyTorch task on the cohort engine, and `plans`, a plan as devices run it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from homespun.errors import NumericFailure
from homespun.learning.metrics import MetricSum
from homespun.rng import derive_seed
from homespun.simulation.checkpoints import Snapshot
from homespun.types import Tree

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a round's training was like; see `RoundRecord`. `timing`: of those fields, what a clock says."""

    metrics: dict[str, MetricSum] = field(default_factory=dict)
    num_clients: int
    num_examples: int
    num_steps: int
    weight: float
    clipped: float | None = None
    timing: dict[str, Any] = field(default_factory=dict)


class Rounds(Protocol[S]):
    """How a run begins, makes a round, and is kept. `S` is a state: never changed in place."""

    def begin(self, initial: Tree | None) -> S:
        """Round 0."""

    def round(self, state: S, number: int, cohort: npt.NDArray[np.int64]) -> tuple[S, Trained]:
        """The state after round `number` of these clients. Raises `NumericFailure` naming the round."""

    def evaluate(self, state: S) -> dict[str, float]:
        """Means of loss and metrics of the model over all rows that were kept for it; nothing without any."""

    def parameters(self, state: S) -> Tree:
        """The model by the names of its parameters."""

    def snapshot(self, state: S) -> Snapshot:
        """All that the next round depends on."""

    def restore(self, snapshot: Snapshot) -> S:
        """The state that it was taken of."""


def round_seed(seed: int, number: int) -> int:
    """Of the first attempt at round `number`, as a server derives it; simulated rounds are never repeated."""
    return derive_seed(seed, number, 1)


def failure_of(number: int, what: str) -> NumericFailure:
    """A round whose result cannot be used."""
    return NumericFailure(
        f"round {number}: {what}",
        hint="lower the client's or the server's learning rate, or bound the steps with max_grad_norm or "
        "the updates with clip_norm",
        round=number,
    )
