"""FedBuff: updates move the model a buffer at a time, whatever model each began from.

Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation", algorithm 1. Clients work without
waiting for each other. When `size` updates have come in, the server makes its step and empties the buffer:

    x <- step(x, sum s_i u_i / sum s_i),     s = w / sqrt(1 + staleness)

where u is local parameters minus the model that the client began from, and staleness counts the server's steps since
then. The weight is the deployment's (`ContributionCodec.weight`), and so is its mean; the paper divides by `size`
instead, so that its steps get shorter as updates get staler (`divide_by="size"`; docs/async.md has the reasons).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from homespun.errors import InvalidConfig, ShapeMismatch
from homespun.learning.contribution import ContributionCodec
from homespun.learning.method import (
    Array,
    Method,
    Sums,
    by_examples,
    checked,
    equally,
    method,
    require,
)


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """For a driver that keeps the time, `simulation.cohort_async`.

    `method`: what clients do and the server's step, of those that report nothing but their update; `settings`: of it.
    `max_weight`: examples beyond which a client weighs no more, 0: all weigh 1. `max_staleness`: who is further behind
    stops.
    """

    method: str = "FedAvg"
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: int = 10
    max_weight: int = 0
    max_staleness: int = 100
    divide_by: str = "weight"

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for settings that make no sense."""
        require(self.size >= 1, "FedBuff", "size", ">= 1", self.size)
        require(self.max_weight >= 0, "FedBuff", "max_weight", ">= 0", self.max_weight)
        require(self.max_staleness >= 0, "FedBuff", "max_staleness", ">= 0", self.max_staleness)
        known = self.divide_by in ("weight", "size")
        require(known, "FedBuff", "divide_by", "weight or size", self.divide_by)
        built = self.build()
        plain = built.numbers in (by_examples, equally)
        if built.report or built.combine or built.client_begin or not plain:
            raise InvalidConfig(
                f"FedBuff cannot buffer {built.name}",
                hint="take a method of which only the weighted mean update crosses, such as FedAvg or FedProx",
            )

    def build(self) -> Method:
        """What clients do, and the server's step."""
        return method(self.method, self.settings)

    def weight(self, num_examples: int, staleness: int) -> float:
        """In (0, 1]; of the deployment, to the bit."""
        codec = ContributionCodec(0, 1.0, self.max_weight, (), 1)
        return codec.weight(num_examples, staleness)

    def sums(self, update: Array, weights: Sequence[float], population: int) -> Sums:
        """What the method's `server_update` is given for one buffer. `update` [d]: sum of weights times updates.

        Raises `ShapeMismatch` if there are not `size` weights.
        """
        if len(weights) != self.size:
            raise ShapeMismatch("the buffer is not full", expected=self.size, got=str(len(weights)))
        divisor = sum(weights) if self.divide_by == "weight" else float(self.size)
        return Sums({"update": update}, {"weight": divisor}, self.size, population)


def is_fed_buff(name: str) -> bool:
    """Whether a method's name asks for it."""
    return name.lower() == "fedbuff"


def fed_buff(settings: Mapping[str, Any]) -> FedBuff:
    """As a method's settings are given. Raises `InvalidConfig` for one that is unknown or makes no sense."""
    default = {field.name: getattr(FedBuff(), field.name) for field in fields(FedBuff)}
    return FedBuff(**checked("FedBuff", default, settings))
