"""The seeds of one participation, from the round's and the device's: a simulation repeats what devices do."""

from __future__ import annotations

import numpy as np

from homespun.rng import derive_seed, stream


def participation_seed(round_seed: int, device_seed: int) -> int:
    """Of all that one device draws in one round."""
    return derive_seed(round_seed, str(device_seed))


def training_seed(seed: int) -> int:
    """`seed`: of the participation."""
    return derive_seed(seed, "train")


def rounding(seed: int, *again: int) -> np.random.Generator:
    """Of a contribution's stochastic rounding; `again`: round and attempt for which it is encoded once more."""
    return stream(seed, "rounding", *again)
