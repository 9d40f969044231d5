"""Who masks with whom: a complete graph for small groups, a random ring with k neighbours for large ones.

Up to 64 devices everybody is everybody's neighbour. Beyond that each device has k/2 neighbours on either
side of a ring whose order follows from the roster root, so that nobody chooses them. The degree k and the
Shamir threshold t come from exact hypergeometric tails: with `corrupt_fraction` of the devices corrupt and
`drop_out_fraction` lost, secrecy fails with probability below 2^-40 and correctness below 2^-20.

Sources: Bonawitz et al. 2017 (complete graph); Bell et al. 2020, "Secure single-server aggregation with
(poly)logarithmic overhead", sections 3 and 4 (ring, both adversaries).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import ceil, exp, floor, lgamma, log

from homespun.errors import InvalidConfig, TooManyDropOuts

COMPLETE_UP_TO = 64
SECURITY_BITS = 40
CORRECTNESS_BITS = 20
MAX_DEVICES = 2**16 - 1
"""A device's Shamir coordinate is its index plus one, a non-zero element of GF(2^16)."""

_ROUNDING = 1e-14  # 0.29 * 100 is a little below 29


class Adversary(StrEnum):
    """`semi_honest`: follows the protocol and looks; `semi_malicious`: may also lie about who survived."""

    SEMI_HONEST = "semi_honest"
    SEMI_MALICIOUS = "semi_malicious"


@dataclass(frozen=True)
class Shape:
    """`degree`: neighbours of a device (k); `threshold`: holders that open a secret (t)."""

    num_devices: int
    degree: int
    threshold: int
    max_drop_outs: int

    @property
    def is_complete(self) -> bool:
        return self.degree == self.num_devices - 1


@lru_cache(maxsize=64)
def choose_shape(
    num_devices: int, corrupt_fraction: float, drop_out_fraction: float, adversary: Adversary
) -> Shape:
    """The graph of a group; both sides compute it and neither can ask for a weaker one.

    Raises `InvalidConfig` when no ring of this size bears such losses, or the group is too large.
    """
    n = num_devices
    if n > MAX_DEVICES:
        raise InvalidConfig("the group is too large", expected=f"<= {MAX_DEVICES}", got=n)
    if n <= COMPLETE_UP_TO:
        threshold = 2 * n // 3 + 1
        return Shape(n, n - 1, threshold, n - threshold)
    ring = find_ring(n, corrupt_fraction, drop_out_fraction, adversary)
    if ring is None:
        raise InvalidConfig(
            "no ring of this size bears such losses",
            hint="tolerate fewer drop-outs or make the group larger",
            num_devices=n,
            corrupt_fraction=corrupt_fraction,
            drop_out_fraction=drop_out_fraction,
        )
    return Shape(n, *ring, _count(n, drop_out_fraction))


def find_ring(
    num_devices: int, corrupt_fraction: float, drop_out_fraction: float, adversary: Adversary
) -> tuple[int, int] | None:
    """Degree and threshold (k, t) of the sparsest ring that is secure and correct, or None."""
    n = num_devices
    corrupt, lost = _count(n, corrupt_fraction), _count(n, drop_out_fraction)
    too_likely = 2.0 ** -(SECURITY_BITS + 1) / n
    likely_enough = 2.0**-CORRECTNESS_BITS / n
    most_corrupt = fewest_alive = 0  # quantiles of what one neighbourhood holds; they grow with k
    for k in range(2, n - 1, 2):
        if not _stays_connected(n, corrupt + lost, k):
            continue
        most_corrupt = max(most_corrupt, k * corrupt // n)
        while _above(most_corrupt, n, corrupt, k) > too_likely:
            most_corrupt += 1
        while _up_to(fewest_alive, n, n - lost, k) < likely_enough:
            fewest_alive += 1
        unsafe = most_corrupt
        if adversary is Adversary.SEMI_MALICIOUS:
            # An honest neighbour gives one of two shares, a corrupt one both: 2 t > k + corrupt.
            unsafe = ceil((most_corrupt + k - 1.25) / 2)
        if unsafe + 1 <= fewest_alive:
            return k, max(unsafe + 1, 2)  # one share must never be enough
    return None


def _count(n: int, fraction: float) -> int:
    return floor((fraction + _ROUNDING) * n)


def _stays_connected(n: int, gone: int, k: int) -> bool:
    """Whether the honest survivors' part of the ring is connected but for a chance of 2^-41."""
    if k > gone:
        return True
    log_chance = log(n) + log(n - k - 1) - log(2)
    log_chance += lgamma(gone + 1) + lgamma(n - k + 1) - lgamma(n + 1) - lgamma(gone - k + 1)
    return log_chance < -(SECURITY_BITS + 1) * log(2)


def _probability(x: int, n: int, marked: int, drawn: int) -> float:
    """P[X = x] when `drawn` of `n` are drawn and X of them are among the `marked`."""

    def log_binomial(a: int, b: int) -> float:
        return lgamma(a + 1) - lgamma(b + 1) - lgamma(a - b + 1)

    if not max(0, drawn + marked - n) <= x <= min(marked, drawn):
        return 0.0
    return exp(
        log_binomial(marked, x) + log_binomial(n - marked, drawn - x) - log_binomial(n, drawn)
    )


def _above(x: int, n: int, marked: int, drawn: int) -> float:
    """P[X > x] for x not below the mean: terms fall from the first on, so the sum ends early."""
    x += 1
    term = total = _probability(x, n, marked, drawn)
    while term > total * 1e-17:
        term *= (marked - x) * (drawn - x) / ((x + 1) * (n - marked - drawn + x + 1))
        total += term
        x += 1
    return total


def _up_to(x: int, n: int, marked: int, drawn: int) -> float:
    """P[X <= x] for x not above the mean, summed downwards."""
    term = total = _probability(x, n, marked, drawn)
    while term > total * 1e-17:
        term *= x * (n - marked - drawn + x) / ((marked - x + 1) * (drawn - x + 1))
        total += term
        x -= 1
    return total


class Graph:
    """The graph of one group, over roster indices 0..n-1.

    Ring order: ascending SHA-256("homespun-secagg-ring-v1", roster root, index as uint32 little-endian).
    """

    def __init__(self, shape: Shape, root: bytes) -> None:
        def place(index: int) -> bytes:
            text = b"homespun-secagg-ring-v1" + root + index.to_bytes(4, "little")
            return hashlib.sha256(text).digest()

        self.shape = shape
        self._ring = sorted(range(shape.num_devices), key=place)
        self._position = {index: position for position, index in enumerate(self._ring)}
        self._neighbours: dict[int, tuple[int, ...]] = {}

    def neighbours(self, index: int) -> tuple[int, ...]:
        """The devices that `index` shares masks with, in ascending order."""
        if index not in self._neighbours:
            n, here = self.shape.num_devices, self._position[index]
            reach = range(1, (self.shape.degree + 1) // 2 + 1)
            found = {self._ring[(here + s * o) % n] for o in reach for s in (-1, 1)}
            self._neighbours[index] = tuple(sorted(found))
        return self._neighbours[index]

    def holders(self, index: int) -> tuple[int, ...]:
        """The devices that hold shares of `index`'s secrets, in ascending order.

        They are its neighbours; in a complete graph it holds one of its own shares as well, as in
        Bonawitz et al., where t counts out of n. The relation is symmetric.
        """
        if self.shape.is_complete:
            return tuple(range(self.shape.num_devices))
        return self.neighbours(index)

    def check_holders(self, index: int, alive: Collection[int], what: str) -> None:
        """Raise `TooManyDropOuts` unless `threshold` holders of `index`'s shares are `alive`."""
        found = sum(holder in alive for holder in self.holders(index))
        if found < self.shape.threshold:
            raise TooManyDropOuts(
                f"too few neighbours {what}",
                device=index,
                expected=f">= {self.shape.threshold}",
                got=found,
            )
