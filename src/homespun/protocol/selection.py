"""Who takes part: a random draw among the devices that gathered, never first come first served.

A device's place in the draw is a hash of the round's seed and its id: whoever knows the seed can check the
draw, and the same pool gives the same cohort whatever the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import lgamma

import numpy as np

from homespun.protocol.messages import Bucket
from homespun.rng import unit_interval

CONFIDENCE = 0.99
"""With which a round is to reach its goal."""


def draw(
    pool: Iterable[str], size: int, *, seed: int, task: str, round_number: int, attempt: int
) -> list[str]:
    """The `size` devices of `pool` that are drawn for this round attempt (all, if there are fewer)."""
    ranked = sorted(
        set(pool),
        key=lambda device: (unit_interval(seed, task, round_number, attempt, device), device),
    )
    return ranked[:size]


def in_bucket(bucket: Bucket | None, device_id: str) -> bool:
    """Whether a device belongs to the part of the population that `bucket` describes."""
    return bucket is None or bucket.low <= unit_interval(bucket.salt, device_id) < bucket.high


def cohort_for(goal: int, reported: float, lost: float, *, limit: int) -> int:
    """The fewest devices of which `goal` report with probability `CONFIDENCE`; at most `limit`.

    `reported`, `lost`: how many did and did not so far, with what was believed before (each above 0). How many of n
    report is then beta-binomial (Skellam 1948): the less is known, the more are drawn.
    """

    def enough(size: int) -> bool:
        return 1.0 - _fewer_than(goal, size, reported, lost) >= CONFIDENCE

    low, high = goal, max(goal, limit)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _fewer_than(goal: int, size: int, alpha: float, beta: float) -> float:
    """P(X < goal) of X ~ beta-binomial(size, alpha, beta), by the ratios of neighbouring terms."""
    k = np.arange(min(goal, size + 1) - 1, dtype=np.float64)
    ratios = np.log((size - k) / (k + 1) * (k + alpha) / (size - k - 1 + beta))
    none = lgamma(size + beta) - lgamma(size + alpha + beta) + lgamma(alpha + beta) - lgamma(beta)
    return float(np.exp(none + np.concatenate([[0.0], np.cumsum(ratios)])).sum())
