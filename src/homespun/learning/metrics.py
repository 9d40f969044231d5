"""Metrics as sums and counts, the only form that can be added across devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricSum:
    """`sum` over `count` elements (tokens, pixels, examples); the metric is their quotient."""

    sum: float
    count: float

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def __add__(self, other: MetricSum) -> MetricSum:
        return MetricSum(self.sum + other.sum, self.count + other.count)


def paired_names(metrics: Sequence[str], num_checkpoints: int) -> tuple[str, ...]:
    """Metric names of an evaluation round, in contribution order.

    `0.top1` is the first checkpoint's (the candidate's) top1, `1.top1` the second's (the incumbent's), ...;
    `difference` and `difference_squared` are of the primary metric, candidate minus incumbent, one count per
    device; `wins` counts the devices where the candidate is better.
    """
    names = [f"{index}.{name}" for index in range(num_checkpoints) for name in metrics]
    if num_checkpoints > 1:
        names += ["difference", "difference_squared", "wins"]
    return tuple(names)


ARMS = ("stage", "control")
"""Devices that serve the release that is watched, and those that it is compared with."""
GUARDRAILS = ("primary", "latency", "failed")
"""Of one device: primary metric on held-out examples, seconds of a prediction, whether the release failed there."""


def watched_names() -> tuple[str, ...]:
    """Metric names of a round that watches a release, in contribution order.

    `stage.primary` sums one value per device of the stage (its count is the number of such devices),
    `stage.primary_squared` their squares, and so on for every arm and guardrail; a device fills its own arm.
    """
    return tuple(
        f"{arm}.{name}{suffix}"
        for arm in ARMS
        for name in GUARDRAILS
        for suffix in ("", "_squared")
    )


def paired(
    results: Sequence[Mapping[str, MetricSum]], primary: str, clip: float
) -> dict[str, MetricSum]:
    """One device's evaluation of several checkpoints on the same held-out examples, ready to encode.

    The difference counts as at most `clip`, up or down: what one device can say is bounded.
    """
    sums = {
        f"{index}.{name}": value
        for index, result in enumerate(results)
        for name, value in result.items()
    }
    if len(results) > 1:
        difference = results[0][primary].mean - results[1][primary].mean
        difference = max(-clip, min(clip, difference))
        sums["difference"] = MetricSum(difference, 1.0)
        sums["difference_squared"] = MetricSum(difference * difference, 1.0)
        sums["wins"] = MetricSum(float(difference > 0), 1.0)
    return sums
