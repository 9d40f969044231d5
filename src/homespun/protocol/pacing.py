"""When to come back: pace steering without a list of devices.

The server keeps one histogram per population: how many check-ins it has *promised* to each minute of the coming
day. Whoever checks in is given the first minute that has room under the demand, counted from the next meeting
time (a multiple of five minutes). So by one rule a small population meets, because all of it fits into the first
minutes after a meeting time, and a large one spreads, because those are full. If the day is full, every minute of it
takes more: a device comes back about daily at the latest, if only for releases.

Promises are not always kept, and some devices come without one (new ones, those that were in a round or that did
not meet their conditions). `turnout`, check-ins per promise of the last hours, corrects for both.

After Bonawitz et al. 2019, "Towards federated learning at scale: system design", section 2.3, which names the goals
but not the way. A retry time is drawn once and kept; see `device.passage` for where it is stored.
"""

from __future__ import annotations

from math import exp
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from homespun.protocol.messages import Message, RetryWindow
from homespun.protocol.selection import cohort_for

Real = npt.NDArray[np.float64]
Times = TypeVar("Times", float, Real)

TRANSIENT_ERROR = RetryWindow(earliest_s=12 * 60.0, latest_s=18 * 60.0)
"""The server was unreachable or busy: 15 minutes, give or take a fifth."""
PERMANENT_ERROR = RetryWindow(earliest_s=3.2 * 3600.0, latest_s=4.8 * 3600.0)
"""The server refused us: 4 hours, give or take a fifth."""

BIN_S = 60.0
MEETING_BINS = 5
"""Meeting times are this many bins apart, which is also the least time between two check-ins, on average."""
DAY_BINS = 1440
IDLE_DEMAND = 20.0
"""Check-ins per bin of a population that nothing is asked of: a small one will be there soon when something is."""
MEMORY_BINS = 360
"""How far back the turnout looks."""
LATELY_BINS = 10
"""How far back check-ins are counted that nobody was promised, such as after an outage; and LASTING_BINS how far ahead
as many more are expected."""
LASTING_BINS = 30
FAR_SHARE = 2 / 3
"""Of the demand, that is promised far ahead. What is missing is filled up when one sees how many come by themselves."""
LEAST_TURNOUT = 2 / 3
"""No bin is promised to more than 3/2 of those wanted in it."""
_FADING: Real = np.exp(-np.arange(DAY_BINS + MEETING_BINS + 1) / LASTING_BINS)


class PaceRecord(Message, frozen=True, kw_only=True):
    """A `Pace` at rest."""

    first: int
    promised: list[float]
    kept: float
    expected: float
    excess: float
    offered: float
    claimed: float


class Pace:
    """What one population was promised, and how well that was kept. Aggregates only, all of it is `saved`."""

    def __init__(self) -> None:
        self._first = 0  # the bin, counted from the epoch, that `_promised` begins with
        self._promised: Real = np.zeros(DAY_BINS + MEETING_BINS + 1)
        self._num_arrived = 0.0  # in the bin under way
        self._kept = self._expected = (
            0.0  # check-ins and promises, faded by exp(-age / MEMORY_BINS)
        )
        self._excess = 0.0  # check-ins per bin beyond what was promised, lately
        self._offered = self._claimed = (
            0.0  # check-ins that were offered something, and what came of it; faded
        )

    def arrive(self, now: float, num: float = 1) -> None:
        """So many devices checked in."""
        self._advance(now)
        self._num_arrived += num

    def offer(self) -> None:
        """A device that checked in was offered an open round."""
        self._offered += 1

    def claim(self) -> None:
        """A device claimed what it was offered."""
        self._claimed += 1

    @property
    def claims(self) -> tuple[float, float]:
        """Check-ins with an offer that led to a claim and that did not, with a belief of two of each."""
        return 2.0 + self._claimed, 2.0 + max(0.0, self._offered - self._claimed)

    def promise(self, now: float, demand: float, num: int = 1, share: float = 1.0) -> Real:
        """Seconds from now until the bins to which `num` devices are to come back, in order.

        `demand`: check-ins wanted per bin; `share`: how much of a check-in each of them stands for (some will not come
        back as promised, since they are about to take part).
        """
        self._advance(now)
        here = int(now // BIN_S)
        start = (here + 1) // MEETING_BINS * MEETING_BINS + MEETING_BINS - here
        promised = self._promised[start : start + DAY_BINS]
        daily = (float(self._promised.sum()) + num * share) / DAY_BINS
        near = _FADING[start : start + DAY_BINS]
        lately = max(self._excess, -demand / 2)
        wanted = near * (demand - lately) + (1 - near) * FAR_SHARE * demand / self.turnout
        room = np.maximum(np.maximum(wanted, daily) - promised, 0.0)
        places = np.searchsorted(np.cumsum(room), share * np.arange(num), side="right")
        places = np.minimum(places, DAY_BINS - 1)
        promised += share * np.bincount(places, minlength=DAY_BINS)
        starts: Real = (here + start + places).astype(np.float64) * BIN_S - now
        return starts

    @property
    def turnout(self) -> float:
        """Check-ins per promise in the last hours, within reason."""
        prior = 60 * IDLE_DEMAND
        return max((self._kept + prior) / (self._expected + prior), LEAST_TURNOUT)

    def _advance(self, now: float) -> None:
        """Let the bins that are over go; what was promised for them has been kept or not."""
        num = int(now // BIN_S) - self._first
        if num <= 0:  # a clock that was set back changes nothing
            return
        expected, arrived = float(self._promised[0]), self._num_arrived
        self._kept += min(arrived, 2 * expected)  # a bin that was promised to nobody says nothing
        self._excess += (arrived - expected - self._excess) / LATELY_BINS
        fade = exp(-num / MEMORY_BINS)
        self._kept *= fade
        self._expected = (self._expected + float(self._promised[:num].sum())) * fade
        self._excess *= exp(-(num - 1) / LATELY_BINS)
        self._offered *= fade
        self._claimed *= fade
        self._num_arrived = 0.0
        gone = min(num, len(self._promised))
        self._promised = np.concatenate([self._promised[gone:], np.zeros(gone)])
        self._first += num

    def saved(self) -> PaceRecord:
        """All of it that outlives a minute."""
        return PaceRecord(
            first=self._first,
            promised=np.trim_zeros(self._promised, "b").round(3).tolist(),
            kept=self._kept,
            expected=self._expected,
            excess=self._excess,
            offered=self._offered,
            claimed=self._claimed,
        )

    @classmethod
    def restored(cls, record: PaceRecord) -> Pace:
        pace = cls()
        pace._first = record.first
        pace._promised[: len(record.promised)] = record.promised
        pace._kept, pace._expected, pace._excess = record.kept, record.expected, record.excess
        pace._offered, pace._claimed = record.offered, record.claimed
        return pace


def demand(num_wanted: int, selection_s: float, claimed: float, not_claimed: float) -> float:
    """Check-ins per bin that fill a round in its selection window, whenever it opens.

    `num_wanted`: devices in the pool, nearly always; `claimed`, `not_claimed`: how many check-ins led to a claim so
    far, and how many did not.
    """
    num = cohort_for(num_wanted, claimed, not_claimed, limit=20 * num_wanted)
    return num * min(1.0, BIN_S / max(selection_s, 1e-9))


def in_bin(start_s: float) -> RetryWindow:
    """The window of the bin that starts in `start_s` seconds."""
    return RetryWindow(earliest_s=max(0.0, start_s), latest_s=max(0.0, start_s + BIN_S))


def latest_when_away(window: RetryWindow, given_s: Times) -> Times:
    """Until when, in seconds, to come back to a server that is away, instead of the end of `window`.

    `given_s`: the end of the last window that the server gave. Up to twice as long, so half of the devices come
    later and half sooner than it had them come: an outage leaves no herd behind.
    """
    latest: Times = np.maximum(window.latest_s, 2 * given_s)
    return latest


def draw_retry(window: RetryWindow, now: float, rng: np.random.Generator) -> float:
    """Unix seconds at which to come back."""
    return now + float(rng.uniform(window.earliest_s, max(window.earliest_s, window.latest_s)))
