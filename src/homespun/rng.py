"""Randomness as an argument: named, counter-based streams.

`stream(seed, "round", 3, "batches")` is the same generator on every machine and in every order of
calls, because the name, not a hidden state, selects it. Secrets (keys, masks) never come from here.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed in [0, 2^53) for the sub-stream that `path` names; JSON and SQL carry it without loss."""
    return _hash53("/".join([str(seed), *(str(part) for part in path)]))


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """A Philox generator for the sub-stream that `path` names."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *path)))


def unit_interval(*path: str | int) -> float:
    """A stable point of [0, 1) for `path`: salted buckets, draws that both sides can repeat."""
    return _hash53("/".join(str(part) for part in path)) / 2.0**53


def _hash53(text: str) -> int:
    # The first 53 bits of the SHA-256: as many as a float holds exactly, in every language.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11
