"""Does pace steering keep check-ins near demand, and do small populations meet? An event simulation.

The server's and the device's own functions (`protocol.pacing`, `protocol.selection`) drive 50, 5,000 and 1,000,000
devices for two days. All appear within the first half hour (a cold start: the server knows nothing), and for one hour
of the first day the server is away. In the variant `swing` a device is there for 12 hours of its day, so that the share
that is there swings fourfold; one whose time has come while it was not there checks in when it is.

    peak      most check-ins in any minute after the first wave, per check-in wanted; stated: at most 2
    outage    the same in the two hours after the outage
    rounds    an hour, each drawn from as many devices as it wants. Ceiling: 6, since the work takes 10 minutes
    peer      the fixed window of 1 to 5 minutes that devices were given before; 50 and 5,000 devices only

`--plot FILE` draws check-ins per minute against demand, which is how docs/pacing.svg is made.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from math import pi
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row, parse_options, report
from homespun.protocol.messages import RetryWindow
from homespun.protocol.pacing import (
    BIN_S,
    DAY_BINS,
    TRANSIENT_ERROR,
    Pace,
    Real,
    demand,
    latest_when_away,
)
from homespun.protocol.round import pool_ready
from homespun.rng import stream

Devices = npt.NDArray[np.int64]

STEP_S = 15.0
DAY_S = DAY_BINS * BIN_S
WAVE_S = 1800.0
CLAIMS = 0.5  # of the devices that check in while a round gathers
WORK_S = (180.0, 480.0)
ROUND_S = 600.0
SELECTION_S = 60.0
OUTAGE_S = (12 * 3600.0, 13 * 3600.0)
FIXED = RetryWindow(earliest_s=60.0, latest_s=300.0)


@dataclass
class Population:
    """Devices and their server. `wanted`: devices that a round draws; `steered`: or else `FIXED`."""

    size: int
    wanted: int
    swings: bool = False
    outage: bool = True
    steered: bool = True
    seed: int = 1
    minutes: Real = field(init=False)
    num_rounds: int = 0

    def __post_init__(self) -> None:
        self._rng = stream(self.seed, "pacing", self.size, int(self.swings))
        self._pace = Pace()
        self._due: dict[int, list[Devices]] = defaultdict(list)
        self._given_s: Real = np.zeros(self.size)
        self._begins_s = self._beginnings()
        self._pool: Devices = np.empty(0, np.int64)
        self._select_at = self._opens_at = 0.0
        self.demand = demand(self.wanted, SELECTION_S, 1e4 * CLAIMS, 1e4 * (1 - CLAIMS))

    @property
    def wanted_per_minute(self) -> float:
        """What the rounds want, or for every device to come daily if that is more."""
        return max(self.demand, self.size / DAY_BINS)

    def _beginnings(self) -> Real:
        """When each device's 12 hours of the day begin: density 1 + a cos, so that 0.2 to 0.8 of them are there."""
        grid = np.linspace(0, 1, 10_001)
        share = grid + 0.3 * pi / (2 * pi) * np.sin(2 * pi * grid)
        return np.interp(self._rng.random(self.size), share, grid) * DAY_S

    def _send(self, devices: Devices, at: Real) -> None:
        """These devices come at `at`, or when they are there again."""
        if self.swings:
            phase = (at - self._begins_s[devices]) % DAY_S
            at = np.where(phase < DAY_S / 2, at, at - phase + DAY_S)
        if not len(devices):
            return
        steps = (at // STEP_S).astype(np.int64)
        order = np.argsort(steps, kind="stable")
        values, starts = np.unique(steps[order], return_index=True)
        for step, some in zip(values.tolist(), np.split(devices[order], starts[1:]), strict=True):
            self._due[step].append(some)

    def _turn_away(self, devices: Devices, now: float, share: float = 1.0) -> None:
        num = len(devices)
        if self.steered:
            earliest = np.maximum(self._pace.promise(now, self.demand, num, share), 0)
            latest = earliest + BIN_S
        else:
            earliest, latest = np.full(num, FIXED.earliest_s), np.full(num, FIXED.latest_s)
        self._given_s[devices] = latest
        self._send(devices, now + np.maximum(self._rng.uniform(earliest, latest), STEP_S))

    def _find_nobody(self, devices: Devices, now: float) -> None:
        latest = latest_when_away(TRANSIENT_ERROR, self._given_s[devices])
        if not self.steered:
            latest = np.full(len(devices), TRANSIENT_ERROR.latest_s)
        self._send(devices, now + self._rng.uniform(TRANSIENT_ERROR.earliest_s, latest))

    def _answer(self, devices: Devices, now: float) -> None:
        self._pace.arrive(now, len(devices))
        claims = (self._rng.random(len(devices)) < CLAIMS) & (now >= self._opens_at)
        if claims.any() and not len(self._pool):
            self._select_at = now + SELECTION_S
        self._pool = np.concatenate([self._pool, devices[claims]])
        self._turn_away(devices[~claims], now)

    def _draw(self, now: float) -> None:
        num, over = len(self._pool), now >= self._select_at
        if not pool_ready(num, 0, self.wanted, window_over=over):
            return
        self.num_rounds += 1
        pool = self._rng.permutation(self._pool)
        drawn = pool[: self.wanted]
        self._send(drawn, now + self._rng.uniform(*WORK_S, len(drawn)))
        self._turn_away(pool[self.wanted :], now)
        self._pool, self._opens_at = pool[:0], now + ROUND_S

    def run(self, days: float) -> Population:
        everyone = np.arange(self.size)
        self._send(everyone, self._rng.uniform(0, WAVE_S, self.size))
        num_steps = int(days * DAY_S / STEP_S)
        counts = np.zeros(num_steps)
        for step in range(num_steps):
            now = step * STEP_S
            away = self.outage and OUTAGE_S[0] <= now < OUTAGE_S[1]
            if some := self._due.pop(step, None):
                devices = self._rng.permutation(np.concatenate(some))
                counts[step] = len(devices)
                (self._find_nobody if away else self._answer)(devices, now)
            if not away:
                self._draw(now)
        self.minutes = counts.reshape(-1, round(BIN_S / STEP_S)).sum(1)
        return self

    def peak(self, since_s: float, until_s: float) -> float:
        """Most check-ins of any minute, per check-in wanted."""
        span = self.minutes[int(since_s / BIN_S) : int(until_s / BIN_S)]
        return float(span.max() / self.wanted_per_minute)


# --- what is shown ------------------------------------------------------------------------------------

POPULATIONS = ((50, 5), (5_000, 50), (1_000_000, 500))
"""Devices, and how many of them each round wants."""
DAYS = 2.0


def measure(size: int, wanted: int, swings: bool, steered: bool = True) -> list[Row]:
    ran = Population(size, wanted, swings=swings, steered=steered).run(DAYS)
    case = f"{size:,} devices{', swing' if swings else ''}"
    side = "steered" if steered else "peer"

    def row(name: str, value: float, unit: str) -> Row:
        return Row(f"{name}, {case}", side, value, unit, None, None, None, (value,))

    away_s = OUTAGE_S[1]
    return [
        row("peak", ran.peak(2 * WAVE_S, DAYS * DAY_S), "x demand"),
        row("outage", ran.peak(away_s, away_s + 7200), "x demand"),
        row("rounds", ran.num_rounds / (24 * DAYS - 1), "per hour"),
    ]


def plot() -> str:
    """Check-ins per minute over demand: for each population, most and fewest of every ten minutes."""
    width, height, every = 720, 110, 10
    parts = []
    for index, (size, wanted) in enumerate(POPULATIONS):
        top = 26 + index * (height + 34)

        def y(value: float, top: float = top) -> float:
            return top + height * (1 - min(value, 2.5) / 2.5)

        ran = Population(size, wanted, swings=True).run(DAYS)
        spans = (ran.minutes / ran.wanted_per_minute).reshape(-1, every)
        x = np.linspace(0, width, len(spans))
        edge = [*zip(x, spans.max(1), strict=True), *zip(x[::-1], spans.min(1)[::-1], strict=True)]
        points = " ".join(f"{at:.0f},{y(value):.0f}" for at, value in edge)
        left, right = (s / (DAYS * DAY_S) * width for s in OUTAGE_S)
        title = f"{size:,} devices, {ran.wanted_per_minute:.0f} check-ins a minute wanted"
        away = f'x="{left:.0f}" y="{top}" width="{right - left:.0f}" height="{height}"'
        parts += [
            f'<text x="0" y="{top - 6}">{title}</text>',
            f'<rect {away} fill="#e8b0a0"/>',
            f'<polygon points="{points}" fill="#4878a8"/>',
        ]
        for level, dash in ((1, "1 3"), (2, "6 3")):
            line = f'd="M0 {y(level):.0f}H{width}" stroke="#333" stroke-dasharray="{dash}"'
            parts += [
                f"<path {line}/>",
                f'<text x="{width + 4}" y="{y(level) + 4:.0f}">{level}x</text>',
            ]
    bottom = 26 + len(POPULATIONS) * (height + 34)
    hours = "".join(
        f'<text x="{width * hour / 48:.0f}" y="{bottom - 20}">{hour} h</text>'
        for hour in range(0, 48, 6)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 40} {bottom}"'
        ' font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{width + 40}" height="{bottom}" fill="#fff"/>\n'
        + "\n".join(parts)
        + f"\n{hours}\n</svg>\n"
    )


def main() -> None:
    if "--plot" in sys.argv:
        Path(sys.argv[sys.argv.index("--plot") + 1]).write_text(plot(), encoding="utf-8")
        return
    options = parse_options(__doc__)
    rows = []
    for size, wanted in POPULATIONS:
        for swings in (False, True):
            rows += measure(size, wanted, swings)
            if size < 10**5:
                rows += measure(size, wanted, swings, steered=False)
    report(rows, options)


if __name__ == "__main__":
    main()
