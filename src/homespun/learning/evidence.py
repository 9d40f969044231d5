"""Evidence for a release: is the candidate better, asked after every batch of reports, as often as one likes.

Each device reports one number between known bounds (candidate minus incumbent, say; more is better), once. The server
knows sums only: how many, their total, their total of squares. From these three, whatever their order and whenever it
looks, it has an interval for the mean that is right at *all* looks together with probability 1 - alpha.

**Betting.** Let y >= 0 be how far a report is from the worst possible value, and suppose that its mean is at most m.
Who stakes a share f of what he owns on each report has, of 1 at the start,

    wealth = product over reports of (1 - f + f y / m)

which in such a world does not grow on average (a supermartingale). So it ever reaches 1/a with probability at most a
(Ville 1939): all m where it did are excluded. Waudby-Smith and Ramdas (2024), "Estimating means of bounded random
variables by betting", section 4. The best f is not known beforehand; the money is split over a fixed grid of shares
(a mixture; Cover's universal portfolio, as in Orabona and Jun 2024).

**From sums alone.** The wealth needs every single y, so the least wealth that *any* reports with these sums could have
made takes its place. With S the total and Q the total of squares of y, it is that of a sample of two values:

    k = S^2 / Q reports at z = Q / S, the others at 0:    (n - k) log(1 - f) + k log(1 - f + f z / m)

Proof: let g(y) = log(1 - f + f y / m) and P the parabola with P(0) = g(0), P(z) = g(z), P'(z) = g'(z). By Hermite's
error formula g(y) - P(y) = g'''(.)/6 y (y - z)^2 >= 0. So the log wealth is at least the sum of P over the reports.
That depends on n, S and Q only, which the sample of two values has too, and there P is g. (Bennett 1962 and
Hoeffding 1963 meet the same extremal sample.) No other parabola below g can give more, in particular not that of Fan,
Grama and Liu (2015), log(1 + x) >= x + x^2 (log(1 - f) + f) / f^2 for x >= -f, from which the empirical Bernstein
sequences are made: Howard, Ramdas, McAuliffe and Sekhon (2021), theorem 4; Waudby-Smith and Ramdas (2024), theorem 2.
What was compared: docs/decisions/0008.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isfinite, log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from homespun.errors import InvalidConfig, NumericFailure

Real: TypeAlias = npt.NDArray[np.float64]

Shown: TypeAlias = bool | np.bool_ | npt.NDArray[np.bool_]

Distances: TypeAlias = tuple[Real | float, Real | float, Real | float]
"""Count, total and total of squares of distances from the worst value."""

SHARES: Real = np.geomspace(0.9, 0.01, 10)
"""What is staked, with equal weights: large shares see large differences early, small ones see small ones at all."""


_NEAR = 4e-8
"""Of the range: what is nearer to its ends is not told apart from them."""


class Verdict(StrEnum):
    PASS = "pass"
    REJECT = "reject"
    CONTINUE = "continue"


@dataclass(frozen=True)
class Sums:
    """Reports of one number by `count` devices: its sum, and the sum of its squares. Added in any order.

    In simulations arrays `[...]`, one entry for each release and look.
    """

    count: int | Real = 0
    total: float | Real = 0.0
    squares: float | Real = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )


@dataclass(frozen=True)
class Gate:
    """A question about a mean, fixed before the first report, and how sure its answer must be.

    `low`, `high`: what one report may be, more being better (report latency and crashes negated); `at_least`: PASS
    when the mean is above this, 0 for better and -margin for not worse; `worthwhile`: REJECT when the mean is below
    this, `at_least` if None; `most`: devices after which an open question is a REJECT.
    PASS is wrong (the mean is not above `at_least`), or REJECT by the interval (the mean is not below `worthwhile`),
    with probability at most alpha/2 each, over all looks.
    `step`: reports, and their squares, were rounded to multiples of this, up or down, right on average.
    """

    low: float
    high: float
    at_least: float = 0.0
    worthwhile: float | None = None
    alpha: float = 0.05
    most: int = 10_000
    step: float = 0.0

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for a question that cannot be answered."""
        hoped = self.at_least if self.worthwhile is None else self.worthwhile
        numbers = (self.low, self.high, self.at_least, hoped, self.step)
        fits = self.low < self.high and self.at_least <= hoped and self.step >= 0
        if not (all(map(isfinite, numbers)) and fits and 0 < self.alpha < 1 and self.most >= 1):
            raise InvalidConfig(
                "no gate can answer this",
                hint="it needs low < high, at_least <= worthwhile, 0 < alpha < 1, most >= 1, step >= 0",
                **asdict(self),
            )

    def interval(self, sums: Sums, control: Sums | None = None) -> tuple[float, float]:
        """Lowest and highest credible mean of the reports, or difference to the mean of `control`'s.

        The mean always lies inside. Raises `NumericFailure` for sums that no reports within the bounds have.
        """
        return self._low_end(sums, control, upward=True), -self._low_end(
            sums, control, upward=False
        )

    def judge(self, sums: Sums, control: Sums | None = None) -> Verdict:
        """The answer by now. To be acted upon at once: a later look may have lost what an earlier one had."""
        if self.shows_more(sums, control):
            return Verdict.PASS
        over = sums.count >= self.most or self.shows_less(sums, control)
        return Verdict.REJECT if over else Verdict.CONTINUE

    def shows_more(self, sums: Sums, control: Sums | None = None) -> Shown:
        """Whether the interval lies above `at_least`, `[...]`; quicker than the interval."""
        return self._beyond(sums, control, self.at_least, upward=True)

    def shows_less(self, sums: Sums, control: Sums | None = None) -> Shown:
        """Whether it lies below `worthwhile`."""
        hoped = self.at_least if self.worthwhile is None else self.worthwhile
        return self._beyond(sums, control, -hoped, upward=False)

    def _beyond(self, sums: Sums, control: Sums | None, than: float, *, upward: bool) -> Shown:
        """Whether the mean, negated if not `upward`, is credibly above `than`."""
        width = self._width
        ours = self.distances(sums, upward=upward)
        if control is None:
            mean = than - (self.low if upward else -self.high) + self.step
            wealth = log_wealth(*ours, max(mean, _NEAR * width))
            possible = mean < width
        else:
            theirs = self.distances(control, upward=not upward)
            difference = max(than, (_NEAR - 1) * width)
            possible = difference < width
            wealth = log_joint_wealth(ours, theirs, width, min(difference, (1 - _NEAR) * width))
        shown: Shown = possible & (wealth >= self._log_limit)
        return shown

    def _low_end(self, sums: Sums, control: Sums | None, *, upward: bool) -> float:
        """Of the interval; not `upward`: of that of the negated reports, minus the interval's high end."""
        width, ours = self._width, self.distances(sums, upward=upward)
        if control is None:
            edge = (self.low if upward else -self.high) - self.step
            return edge + _boundary(
                lambda mean: log_wealth(*ours, mean), 0.0, width, self._log_limit
            )
        theirs = self.distances(control, upward=not upward)
        return _boundary(
            lambda by: log_joint_wealth(ours, theirs, width, by), -width, width, self._log_limit
        )

    @property
    def _width(self) -> float:
        return self.high - self.low + 2 * self.step

    @property
    def _log_limit(self) -> float:
        return log(2 / self.alpha)

    def distances(self, sums: Sums, *, upward: bool) -> Distances:
        """Count, total and total of squares of the distances from the low end (`upward`) or from the high end.

        Rounding may have moved a report over the edge by a step, and its square may have lost one.
        """
        sign, edge = (1.0, self.low - self.step) if upward else (-1.0, -self.high - self.step)
        count, largest = sums.count, max(abs(self.low), abs(self.high))
        total = sign * sums.total - count * edge
        lost = count * self.step * (1 + 2 * largest + self.step)
        squares = sums.squares + lost - 2 * sign * edge * sums.total + count * edge * edge
        slack = 1e-9 * count * largest
        fits = (-slack <= total) & (total <= count * self._width + slack) & np.isfinite(squares)
        if not np.all(fits & (count >= 0)):
            raise NumericFailure(
                "no reports within the bounds have this sum",
                hint="were they clipped on the device?",
                **asdict(sums),
            )
        total = np.maximum(total, 0.0)
        squares = np.maximum(squares, total**2 / np.maximum(count, 1))
        return np.asarray(count, np.float64), total, squares


def log_wealth(
    count: Real | float, total: Real | float, squares: Real | float, mean: Real | float
) -> Real:
    """Least log wealth of betting against "the mean of y >= 0 is at most `mean`" (> 0); the module says how.

    Arguments broadcast: `[...]` to `[...]`. It falls with `mean` and is convex in it, rises with `total` and falls
    with `squares`.
    """
    total, squares = np.asarray(total, np.float64), np.asarray(squares, np.float64)
    shape = np.broadcast_shapes(total.shape, squares.shape)
    value = np.divide(squares, total, out=np.zeros(shape), where=total > 0)
    number = np.divide(total, value, out=np.zeros(shape), where=value > 0)
    logs = np.multiply.outer(count - number, np.log1p(-SHARES))
    logs = logs + number[..., None] * np.log1p(np.multiply.outer(value / mean - 1, SHARES))
    top = logs.max(axis=-1, keepdims=True)
    wealth: Real = top[..., 0] + np.log(np.exp(logs - top).mean(axis=-1))
    return wealth


def log_joint_wealth(
    ours: Distances, theirs: Distances, width: float, difference: Real | float
) -> Real:
    """The same for two groups of devices and "our mean exceeds theirs by at most `difference`".

    `ours`: distances from the low end; `theirs`: from the high end, which is `width` above it; `difference` in
    (-width, width); `[...]` to `[...]`. Neither mean is known. For each pair of means the product of what is won on
    both sides is a wealth, so the least product over all pairs with this difference counts. That is the minimum of a
    convex function, found by thirds to 2e-6 of the range; being flat there, it is known better than its place.
    """

    def product(mean: Real) -> Real:
        return log_wealth(*ours, mean) + log_wealth(*theirs, width + difference - mean)

    low = np.maximum(0.0, difference)
    high = np.minimum(width, width + difference)
    for _ in range(32):
        third = (high - low) / 3
        falls = product(low + third) > product(high - third)
        low, high = np.where(falls, low + third, low), np.where(falls, high, high - third)
    return product((low + high) / 2)


def _boundary(evidence: Callable[[Real], Real], low: float, high: float, limit: float) -> float:
    """The largest point of [low, high) up to which `evidence`, which falls, is at least `limit`; else `low`."""
    for _ in range(6):  # to 18^-6 = 3e-8 of the range
        points = np.linspace(low, high, 19)
        excluded = int(np.count_nonzero(evidence(points[1:-1]) >= limit))
        low, high = float(points[excluded]), float(points[excluded + 1])
    return low


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several guardrails: REJECT if any does, PASS if all do.

    A wrong PASS stays at alpha/2; a wrong REJECT has as many chances as there are gates, so divide alpha by them.
    """
    found = set(verdicts)
    if Verdict.REJECT in found:
        return Verdict.REJECT
    return Verdict.PASS if found == {Verdict.PASS} else Verdict.CONTINUE
