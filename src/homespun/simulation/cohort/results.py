"""What the engine is asked and what it gives, the same for every strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from homespun.learning.method import LocalResult, LocalRule
from homespun.learning.metrics import MetricSum
from homespun.simulation.batches import Batches


@dataclass(frozen=True)
class Choice:
    """A strategy, how many clients train together, and the names of the parameters that are kept as products."""

    strategy: str
    chunk: int
    factored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Partial:
    """The sums of some clients: `vectors` [d] and `numbers` as of `Report`, and loss and metrics over all steps,
    each measured just before its step."""

    vectors: dict[str, Tensor]
    numbers: dict[str, float]
    metrics: dict[str, MetricSum]


class Engine(Protocol):
    """Trains chunks of clients on one device. Parameters are flat float32 (float64 in tests) vectors [d].

    `choices`: of strategies, the first that can run a rule does. Empty until they are given or, by the first
    training, measured; whoever is given another engine's choices gets its bits.
    """

    choices: tuple[Choice, ...]

    def mean_path(
        self, model: Tensor, batches: Batches, weights: Tensor, rule: LocalRule
    ) -> Partial:
        """`vectors["update"]` is the sum over clients of weights[c] * update_c: the path on which no client's own
        parameters need to exist."""

    def train(
        self, model: Tensor, batches: Batches, rule: LocalRule
    ) -> tuple[LocalResult, dict[str, MetricSum]]:
        """Every client's own update [m, d]; rule's vectors are [d] or [m, d] in the order of `batches.clients`."""
