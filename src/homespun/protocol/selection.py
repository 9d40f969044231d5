"""Who takes part: a random draw among the devices that gathered, never first come first served.

A device's place in the draw is a hash of the round's seed and its id: whoever knows the seed can check the
draw, and the same pool gives the same cohort whatever the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable

from homespun.learning.metrics import ARMS
from homespun.protocol.messages import Bucket, ReleaseManifest
from homespun.rng import unit_interval

STAGE, CONTROL = ARMS


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
