"""Random words from counters: the n-th number of a stream without the n - 1 before it, for whole arrays.

A stream is SplitMix64's (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17): the
n-th word is a mix of start + n * golden ratio. Words are uint64; arithmetic is modulo 2^64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from homespun import rng
from homespun.types import AnyArray

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def begin(seed: int, *path: str | int) -> Words:
    """The start [1] of the stream that `path` names."""
    return np.array([rng.derive_seed(seed, *path)], np.uint64)


def draw(starts: Words, numbers: AnyArray) -> Words:
    """The word with each of `numbers` (at least 0) of the streams at `starts`; the two broadcast."""
    steps = (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return _mixed(starts + steps)


def uniform(starts: Words, numbers: AnyArray) -> npt.NDArray[np.float64]:
    """As `draw`, but points of [0, 1)."""
    return (draw(starts, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: Words) -> Words:
    """A bijection after which each bit depends on all bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
