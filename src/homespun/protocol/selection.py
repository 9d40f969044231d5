"""Who takes part: a random draw among the devices that gathered, never first come first served.

A device's place in the draw is a hash of the round's seed and its id: whoever knows the seed can check the
draw, and the same pool gives the same cohort whatever the order of arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import exp, lgamma

import numpy as np

from homespun.learning.metrics import ARMS
from homespun.protocol.messages import Bucket, ReleaseManifest
from homespun.rng import unit_interval

STAGE, CONTROL = ARMS
TURNS_S = 600.0
"""How far back claims are counted when tasks share a population."""
DECIDES_S = 5.0
"""How long a device takes from an offer to its claim, about."""
FULL_S = 30.0
"""How long the other tasks come first after one had no place for a device."""
CONFIDENCE = 0.99
"""With which a round is to reach its goal."""
BELIEF = (3.0, 1.0)
"""Reports and losses that a task is taken to have had before it had any."""
FAR_HOUR = 0.003
"""Weight of the other side of the day."""
MOST_EVIDENCE = 2000
HALF_LIFE_S = 4 * 86_400.0
"""After which an outcome counts half."""


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


def arm(release: ReleaseManifest, salt: str) -> str | None:
    """Where the device with this salt stands: in the STAGE that serves the release, in the CONTROL band that it is
    compared with, or (None) in neither.
    """
    place = unit_interval(release.stage_salt, salt)
    if place < release.fraction:
        return STAGE
    return CONTROL if place >= 1 - release.control else None


class Turns:
    """Whose turn it is among the tasks of a population: the one furthest behind its share of the claims.

    Claims count less and less with time, so a task that was away for long has no more than minutes to catch up with.
    An offer in first place counts as a claim for the seconds in which its device decides, or all devices that come
    together would be sent to one task. A task without a place comes last for a while, however far behind it is.
    """

    def __init__(self) -> None:
        self._full_until: dict[str, float] = {}
        # claims, claims to come, time of both
        self._served: dict[str, tuple[float, float, float]] = {}

    def order(self, shares: Iterable[tuple[str, float]], now: float) -> list[str]:
        """Tasks, those furthest behind first. `shares`: task and what share of the devices it is to have."""
        behind = {
            task: (now < self._full_until.get(task, 0.0), sum(self._faded(task, now)) / share)
            for task, share in shares
        }
        return sorted(behind, key=behind.__getitem__)

    def offer(self, task: str, now: float) -> None:
        """A device was offered this task in the first place."""
        claims, to_come = self._faded(task, now)
        self._served[task] = claims, to_come + 1, now

    def claim(self, task: str, now: float) -> None:
        claims, to_come = self._faded(task, now)
        self._served[task] = claims + 1, max(0.0, to_come - 1), now

    def full(self, task: str, now: float) -> None:
        """A device that claimed this task was turned away for want of a place."""
        self._full_until[task] = now + FULL_S

    def keep(self, tasks: Collection[str]) -> None:
        """Forget all other tasks."""
        wanted = set(tasks)
        self._served = {task: self._served[task] for task in self._served.keys() & wanted}
        self._full_until = {t: self._full_until[t] for t in self._full_until.keys() & wanted}

    def _faded(self, task: str, now: float) -> tuple[float, float]:
        claims, to_come, then = self._served.get(task, (0.0, 0.0, now))
        age_s = max(0.0, now - then)
        return claims * exp(-age_s / TURNS_S), to_come * exp(-age_s / DECIDES_S)


def evidence(by_hour: Mapping[int, tuple[float, float]], hour: float) -> tuple[float, float]:
    """Reports and losses to go by at an hour of the day, from those of all hours (0 to 23) and a little belief.

    Hours count by their distance, around the clock. More than `MOST_EVIDENCE` is scaled down to that: it would make
    us surer than days that differ allow.
    """
    reported, lost = BELIEF
    for each, (num_reported, num_lost) in by_hour.items():
        distance = abs((each + 0.5 - hour + 12) % 24 - 12)
        weight = max(exp(-(distance**2) / 2), FAR_HOUR)
        reported, lost = reported + weight * num_reported, lost + weight * num_lost
    scale = min(1.0, MOST_EVIDENCE / (reported + lost))
    return scale * reported, scale * lost


def faded(count: float, age_s: float) -> float:
    """What a count from so long ago still says."""
    return float(count * 0.5 ** (max(0.0, age_s) / HALF_LIFE_S))


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


def beside(size: int, num_carried: int) -> int:
    """Devices to draw, of a cohort of `size`, beside those that were carried into the round.

    They are at work for it already and take places of the draw; at most half of them, for they may be gone for good.
    """
    return max(size - num_carried, (size + 1) // 2)


def _fewer_than(goal: int, size: int, alpha: float, beta: float) -> float:
    """P(X < goal) of X ~ beta-binomial(size, alpha, beta), by the ratios of neighbouring terms."""
    k = np.arange(min(goal, size + 1) - 1, dtype=np.float64)
    ratios = np.log((size - k) / (k + 1) * (k + alpha) / (size - k - 1 + beta))
    none = lgamma(size + beta) - lgamma(size + alpha + beta) + lgamma(alpha + beta) - lgamma(beta)
    return float(np.exp(none + np.concatenate([[0.0], np.cumsum(ratios)])).sum())
