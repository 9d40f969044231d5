"""Who takes part in a round: drawn from whoever is available then, and who of them drops out.

Every draw depends on (seed, round) or (seed, round, client) alone, so that round 500 can be drawn without the 499
before it. Nothing grows with the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from homespun import rng
from homespun.errors import InvalidConfig, NotFound, ShapeMismatch, StorageFailure
from homespun.simulation import counters

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cohort:
    """`clients` [m] in random order; `dropped` [m]: those that never report; `wanted`: reports the server waits for."""

    clients: Integers
    dropped: Flags
    wanted: int

    @property
    def reporting(self) -> Integers:
        """The clients whose reports count: the first `wanted` that do not drop out."""
        return self.clients[~self.dropped][: self.wanted]


class Availability(Protocol):
    """When clients could take part: idle, charging, on an unmetered network."""

    @property
    def num_clients(self) -> int: ...

    def available(self, slot: int) -> Flags:
        """[num_clients] in time slot `slot`, which is at least 0."""


@dataclass(frozen=True)
class Traces:
    """What was recorded: bool [num_clients, num_slots], maybe memory-mapped; it repeats after its last slot."""

    slots: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        """Raises `ShapeMismatch` if it is not such an array."""
        if self.slots.ndim != 2 or 0 in self.slots.shape or self.slots.dtype != np.bool_:
            raise ShapeMismatch(
                "availability must be bool [num_clients, num_slots]",
                got=f"{self.slots.dtype}{list(self.slots.shape)}",
            )

    @classmethod
    def open(cls, path: str | Path) -> Traces:
        """Memory-map a `.npy` file of such an array. Raises `NotFound`, or `StorageFailure` for another file."""
        try:
            return cls(np.load(path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError as error:
            raise NotFound(f"there is no file {path}") from error
        except (OSError, ValueError, EOFError) as error:
            raise StorageFailure(
                f"{path} is not a readable .npy file: {error}",
                hint="write it with numpy.save(path, available), bool [num_clients, num_slots]",
            ) from error

    @property
    def num_clients(self) -> int:
        return len(self.slots)

    def available(self, slot: int) -> Flags:
        return np.asarray(self.slots[:, slot % self.slots.shape[1]])


@dataclass(frozen=True, kw_only=True)
class DayNight:
    """Phones that charge at night, around the world; a slot is an hour, slot 0 is midnight in time zone 0.

    A client lives in one of the 24 `time_zones`, drawn by these weights (None: all alike), and is available with
    probability `at_night` between the local hours `night` (the first included, the second not), else `by_day`:
    independently every hour.
    """

    num_clients: int
    seed: int
    at_night: float = 0.8
    by_day: float = 0.1
    night: tuple[int, int] = (22, 7)
    time_zones: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for what is no probability, hour or weight."""
        for name in ("at_night", "by_day"):
            _check_probability(name, getattr(self, name))
        if not all(0 <= hour < 24 for hour in self.night):
            raise InvalidConfig("night must be two hours from 0 to 23", got=str(self.night))
        zones = self.time_zones
        if zones is not None and (len(zones) != 24 or min(zones) < 0 or not sum(zones) > 0):
            raise InvalidConfig("time_zones must be 24 weights, at least 0", got=str(zones))

    def zones(self) -> Integers:
        """[num_clients]: hours ahead of slot 0's time zone, 0 to 23."""
        weights = np.ones(24) if self.time_zones is None else np.array(self.time_zones)
        edges = np.cumsum(weights) / weights.sum()
        edges[np.flatnonzero(weights)[-1] :] = 1  # whatever the sum was rounded to
        points = counters.uniform(
            counters.begin(self.seed, "time zones"), np.arange(self.num_clients)
        )
        return np.searchsorted(edges, points, side="right").astype(np.int64)

    def available(self, slot: int) -> Flags:
        first, end = self.night
        asleep = (np.arange(24) - first) % 24 < (end - first) % 24
        chances = np.where(np.roll(asleep, -slot % 24), self.at_night, self.by_day)
        start = counters.begin(self.seed, "available", slot)
        return counters.uniform(start, np.arange(self.num_clients)) < chances[self.zones()]


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Draws cohorts without replacement.

    Either `cohort_size` or `fraction` (of all `num_clients`, rounded, at least one client) says how many reports the
    server wants; `over_selection` times as many (rounded up) are asked. `weights` [num_clients]: how likely a client
    is drawn against the others at each draw (successive sampling); 0: never. `availability`: only clients available
    in the round's slot are drawn; `rounds_per_slot` rounds fall into one slot. `drop_out`: probability that a drawn
    client never reports, one for all or [num_clients]. `population`: arena's indexes of these clients
    (a training half, say), None: 0, 1, ... Arrays [num_clients] are in its order. When fewer are available than
    wanted, all of them take part.
    """

    num_clients: int
    seed: int
    cohort_size: int | None = None
    fraction: float | None = None
    weights: Numbers | None = None
    availability: Availability | None = None
    rounds_per_slot: int = 1
    drop_out: float | Numbers = 0.0
    over_selection: float = 1.0
    population: Integers | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for numbers that mean nothing, `ShapeMismatch` for arrays of other clients."""
        for name in ("num_clients", "rounds_per_slot"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name} must be at least 1", got=getattr(self, name))
        if (self.cohort_size is None) == (self.fraction is None):
            raise InvalidConfig("give either cohort_size or fraction")
        if self.cohort_size is not None and not 1 <= self.cohort_size <= self.num_clients:
            raise InvalidConfig(
                f"a cohort of {self.cohort_size} out of {self.num_clients} clients",
                hint=f"choose 1 to {self.num_clients}",
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise InvalidConfig("fraction must be above 0 and at most 1", got=self.fraction)
        if not 1 <= self.over_selection < np.inf:
            raise InvalidConfig("over_selection must be at least 1", got=self.over_selection)
        _check_probability("drop_out", self.drop_out)
        if self.weights is not None:
            known = np.isfinite(self.weights) & (self.weights >= 0)
            if not known.all() or not self.weights.any():
                raise InvalidConfig(
                    "weights must be finite, at least 0, and not all 0",
                    hint=f"look at client {int(np.argmin(known))}",
                )
        lengths = {
            "weights": None if self.weights is None else len(self.weights),
            "availability": None if self.availability is None else self.availability.num_clients,
            "drop_out": len(self.drop_out) if isinstance(self.drop_out, np.ndarray) else None,
            "population": None if self.population is None else len(self.population),
        }
        for name, length in lengths.items():
            if length not in (None, self.num_clients):
                raise ShapeMismatch(
                    f"{name} is of another number of clients",
                    expected=self.num_clients,
                    got=length,
                )

    @property
    def wanted(self) -> int:
        """Reports that the server waits for in a round."""
        if self.fraction is not None:
            return max(1, round(self.fraction * self.num_clients))
        assert self.cohort_size is not None
        return self.cohort_size

    def cohort(self, round_number: int) -> Cohort:
        """Who takes part in round `round_number`; nobody, if nobody is available."""
        # The small term keeps 10 * 1.1 at 11, which floating point makes a little more.
        asked = int(np.ceil(self.wanted * self.over_selection - 1e-9))
        return self.draw(asked, round_number, round_number // self.rounds_per_slot)

    def draw(self, asked: int, number: int, slot: int) -> Cohort:
        """`asked` clients in draw `number`, of those available in `slot`; fewer if there are not so many."""
        chosen = self._draw(asked, number, slot)
        chance = self.drop_out[chosen] if isinstance(self.drop_out, np.ndarray) else self.drop_out
        dropped = np.zeros(len(chosen), np.bool_)
        if np.any(chance):
            start = counters.begin(self.seed, "drop-out", number)
            dropped = counters.uniform(start, chosen) < chance
        return Cohort(
            clients=chosen if self.population is None else self.population[chosen],
            dropped=dropped,
            wanted=self.wanted,
        )

    def _draw(self, asked: int, number: int, slot: int) -> Integers:
        generator = rng.stream(self.seed, "cohort", number)
        if self.availability is None and self.weights is None:
            asked = min(asked, self.num_clients)
            return generator.choice(self.num_clients, asked, replace=False).astype(np.int64)
        possible = np.ones(self.num_clients, np.bool_)
        if self.availability is not None:
            possible = self.availability.available(slot)
        if self.weights is None:
            candidates = np.flatnonzero(possible)
            return generator.choice(candidates, min(asked, len(candidates)), replace=False)
        candidates = np.flatnonzero(possible & (self.weights > 0))
        # The one whose exponential clock of rate w rings first is drawn first: in order of these
        # times it is successive sampling (Efraimidis, Spirakis 2006).
        times = generator.standard_exponential(self.num_clients)[candidates]
        times /= self.weights[candidates]
        asked = min(asked, len(candidates))
        first = np.argpartition(times, asked - 1)[:asked] if asked else np.empty(0, np.int64)
        return candidates[first[np.argsort(times[first])]]


def _check_probability(name: str, value: float | Numbers) -> None:
    values = np.asarray(value)
    if not ((values >= 0) & (values <= 1)).all():
        raise InvalidConfig(f"{name} must be from 0 to 1", got=str(value))
