"""How often is the release gate wrong, how many devices does it need, and what would others need?

Reports are differences between -10 and 10 points (share of right suggestions, candidate minus incumbent, of one
device). Simulated releases are looked at after every report (errors) or after every group of 10 (devices needed).

    error      share of equal candidates that are ever promoted or ever rejected; stated: at most 2.5 % each
    needed     devices until a true difference is seen, deviation of a device 3 points; a release that never sees
               it counts with the last look. Sides: ours; the same bets on every single report, which nobody sees
               (floor); the empirical Bernstein sequence of Howard et al. 2021, theorem 4, with the means of earlier
               groups as centres (peer); Hoeffding's bound mixed likewise; a t-test, once, planned for a power of 80 %
    width      half the interval's width; floor: a t-interval that is looked at once
    canary     two groups of devices of the same size, ours unknown to be equal; devices are those of one group
    release    whole releases with the gates of `protocol.release` and its defaults, by the true difference of the
               candidate: share that passes the evaluation, share that the stages take back or let pass, devices needed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, exp, log
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row, parse_options, report, rows
from homespun.learning.evidence import (
    SHARES,
    Distances,
    Gate,
    Real,
    Sums,
    log_joint_wealth,
    log_wealth,
)
from homespun.protocol.release import (
    evaluation_gate,
    guardrail_gates,
)
from homespun.protocol.release_request import (
    ReleaseRequest,
)
from homespun.rng import stream

BOUND = 0.1  # reports are clipped to [-BOUND, BOUND]
ALPHA = 0.05
LIMIT = log(2 / ALPHA)

Draw = Callable[[np.random.Generator, tuple[int, int]], Real]
Seen = npt.NDArray[np.bool_]
"""Whether something shows, `[releases, looks]`."""


def clipped(values: Real) -> Real:
    inside: Real = np.clip(values, -BOUND, BOUND)
    return inside


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Real:
    return clipped(rng.normal(0, 0.03, shape))


def rare_loss(rng: np.random.Generator, shape: tuple[int, int]) -> Real:
    """A little better nearly everywhere, much worse on one device in 50."""
    return np.where(rng.random(shape) < 0.02, -0.098, 0.002)


def skewed(rng: np.random.Generator, shape: tuple[int, int]) -> Real:
    """Losses with an exponential tail, cut at five times their mean."""
    loss: Real = np.minimum(rng.exponential(1, shape), 5)
    return 0.02 * (1 - exp(-5) - loss)


def mostly_equal(rng: np.random.Generator, shape: tuple[int, int]) -> Real:
    """The same answers on four devices of five."""
    return np.where(rng.random(shape) < 0.2, clipped(rng.normal(0, 0.06, shape)), 0)


WORLDS: Mapping[str, Draw] = {  # each with mean 0
    "normal": normal,
    "rare loss": rare_loss,
    "rare gain": lambda rng, shape: -rare_loss(rng, shape),
    "skewed": skewed,
    "mostly equal": mostly_equal,
    "coin": lambda rng, shape: rng.choice([-BOUND, BOUND], shape),
    "all equal": lambda _, shape: np.zeros(shape),
}


def sums(distances: Real, every: int = 1) -> tuple[Real, Real, Real]:
    """Count, total and total of squares `[releases, looks]` of reports `[releases, devices]`."""
    looks = slice(every - 1, None, every)
    count = np.arange(1.0, distances.shape[1] + 1)[looks]
    return count, distances.cumsum(1)[:, looks], np.square(distances).cumsum(1)[:, looks]


def gate_sees(values: Real, mean: float = 0.0, every: int = 1) -> Seen:
    """Whether the interval lies above `mean`, `[releases, looks]`; of values in [-BOUND, BOUND]."""
    seen: Seen = log_wealth(*sums(values + BOUND, every), mean + BOUND) >= LIMIT
    return seen


def canary_sees(ours: Real, theirs: Real, difference: float = 0.0, every: int = 10) -> Seen:
    """Whether ours is better by more than `difference`; values in [-BOUND, BOUND]."""
    sides: tuple[Distances, Distances] = sums(ours + BOUND, every), sums(BOUND - theirs, every)
    seen: Seen = log_joint_wealth(*sides, 2 * BOUND, difference) >= LIMIT
    return seen


def canary_could_see(ours: Real, theirs: Real, means: tuple[float, float] = (0, 0)) -> Seen:
    """After every report of each side; at least wherever `canary_sees` does, by more than the difference of `means`.

    Takes what is won against the true means, where the gate takes the least over all pairs of means.
    """
    won = log_wealth(*sums(ours + BOUND), means[0] + BOUND)
    won_too = log_wealth(*sums(BOUND - theirs), BOUND - means[1])
    seen: Seen = won + won_too >= LIMIT
    return seen


def t_quantile(count: Real) -> Real:
    """Two-sided, level ALPHA, by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5): 2.262 for ten."""
    z, free = NormalDist().inv_cdf(1 - ALPHA / 2), count - 1
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / free + second / free**2


def t_half_width(values: Real, every: int = 1) -> tuple[Real, Real]:
    """Mean and half the width of the t-interval at every look, from 10 reports on."""
    count, total, squares = (part[..., 9 // every :] for part in sums(values, every))
    variance = np.maximum(squares - total**2 / count, 0) / (count - 1)
    return total / count, t_quantile(count) * np.sqrt(variance / count)


def naive_sees(values: Real) -> Seen:
    """A t-test after every report, from the tenth on."""
    mean, half = t_half_width(values)
    seen: Seen = mean > half
    return seen


def mixed(log_wealths: Callable[[float], Real]) -> Real:
    """Log of the mean over SHARES, one at a time."""
    total = log_wealths(float(SHARES[0]))
    for share in SHARES[1:]:
        total = np.logaddexp(total, log_wealths(float(share)))
    return total - log(len(SHARES))


def single_reports_see(values: Real, mean: float = 0.0, every: int = 10) -> Seen:
    """The wealth itself, from every single report."""
    ratio = (values + BOUND) / (mean + BOUND) - 1
    looks = slice(every - 1, None, every)
    seen: Seen = mixed(lambda share: np.log1p(share * ratio).cumsum(1)[:, looks]) >= LIMIT
    return seen


def bernstein_low(values: Real, every: int = 10) -> Real:
    """Howard et al. 2021, theorem 4, mixed over SHARES: the low end `[releases, looks]`, by bisection."""
    count, total, squares = sums(values, every)
    before = np.pad(total / count, ((0, 0), (1, 0)))[
        :, :-1
    ]  # the centre of a group: known before it
    new = [np.diff(part, axis=-1, prepend=0) for part in (count, total, squares)]
    variance = (new[2] - 2 * before * new[1] + new[0] * before**2).cumsum(1)
    scale = 2 * BOUND

    def wealth(mean: Real) -> Real:
        return mixed(
            lambda share: (
                share / scale * (total - count * mean)
                + (np.log1p(-share) + share) / scale**2 * variance
            )
        )

    low, high = np.full_like(total, -2 * BOUND), np.full_like(total, BOUND)
    for _ in range(30):
        middle = (low + high) / 2
        excluded = wealth(middle) >= LIMIT
        low, high = np.where(excluded, middle, low), np.where(excluded, high, middle)
    return low


def hoeffding_half_width(count: Real) -> Real:
    """Bounds only: exp(l S - l^2 BOUND^2 n / 2) is a supermartingale; mixed over l = SHARES / BOUND, by bisection."""

    def excess(half: Real) -> Real:
        return mixed(lambda share: count * (share * half / BOUND - share**2 / 2))

    low, high = np.zeros_like(count), np.full_like(count, 4 * BOUND)
    for _ in range(40):
        middle = (low + high) / 2
        inside = excess(middle) < LIMIT
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return high


def gate_low(values: Real) -> Real:
    """The low end `[releases]` for all reports, by bisection."""
    count, total, squares = (part[..., -1] for part in sums(values + BOUND))
    low, high = np.zeros_like(total), np.full_like(total, 2 * BOUND)
    for _ in range(40):
        middle = (low + high) / 2
        excluded = log_wealth(count, total, squares, middle) >= LIMIT
        low, high = np.where(excluded, middle, low), np.where(excluded, high, middle)
    return low - BOUND


def ever(seen: Seen) -> float:
    """Per cent of releases where it happened at some look."""
    return 100 * float(seen.any(axis=1).mean())


def needed(seen: Seen, every: int = 10) -> list[float]:
    """Devices until it was first seen, of each release; the last look's if never."""
    looks = np.where(seen.any(1), seen.argmax(1) + 1, seen.shape[1]) * every
    return [float(devices) for devices in looks]


def errors(num_releases: int, num_devices: int) -> list[Row]:
    """Equal candidates, looked at after every report."""
    results = []
    for name, draw in WORLDS.items():
        values = draw(stream(0, "gate", name), (num_releases, num_devices))
        rates = {
            "gate promotes": [ever(gate_sees(values))],
            "gate rejects": [ever(gate_sees(-values))],
            "repeated t-test promotes": [ever(naive_sees(values))],
        }
        results += rows(f"error, {name}", rates, unit="%")
    return results


def power(num_releases: int, points: float, num_devices: int, deviation: float = 3) -> list[Row]:
    """Devices until a true difference is seen."""
    draws = stream(0, "power", str(points), str(deviation)).normal(
        points / 100, deviation / 100, (num_releases, num_devices)
    )
    values = clipped(draws)
    gate = needed(gate_sees(values, every=10))
    count, total, _ = sums(values, 10)
    z = NormalDist().inv_cdf
    planned = ceil(max(2, ((z(1 - ALPHA / 2) + z(0.8)) * deviation / points) ** 2))
    return [
        *rows(
            f"needed, {points:+g} points, sd {deviation:g}",
            {
                "gate": gate,
                "single reports": needed(single_reports_see(values)),
                "empirical Bernstein": needed(bernstein_low(values) > 0),
                "Hoeffding": needed(total / count > hoeffding_half_width(count)),
                "t-test once": [planned],
            },
            floor="single reports",
            peer="empirical Bernstein",
            unit="devices",
        ),
        *rows(
            f"needed in 9 of 10, {points:+g} points, sd {deviation:g}",
            {"gate": [float(np.quantile(gate, 0.9))]},
            unit="devices",
        ),
    ]


def clipped_at(num_releases: int, bound: float) -> list[Row]:
    """Devices until +2 points are seen if reports may lie within `bound` points."""
    draws = stream(0, "bounds").normal(0.02, 0.03, (num_releases, 600))
    scaled = clipped(draws * BOUND * 100 / bound)  # the question knows no unit
    sides = {"gate": needed(gate_sees(scaled, every=10))}
    return rows(f"needed, +2 points, sd 3, clipped at {bound:g}", sides, unit="devices")


def non_inferior(num_releases: int, margin: float, num_devices: int) -> list[Row]:
    """Devices until an equal candidate is known to be worse by less than `margin` points."""
    values = normal(stream(0, "equal"), (num_releases, num_devices))
    sides = {"gate": needed(gate_sees(values, -margin / 100, every=10))}
    return rows(f"needed, equal, margin {margin:g} points", sides, unit="devices")


def widths(num_releases: int, num_devices: int) -> list[Row]:
    """Half the width in points, at a number of devices."""
    values = normal(stream(0, "width"), (num_releases, num_devices))
    count = np.array([float(num_devices)])
    return rows(
        f"width after {num_devices}",
        {
            "gate": [100 * float(x) for x in (-gate_low(-values) - gate_low(values)) / 2],
            "empirical Bernstein": [
                100 * float(x)
                for x in (-bernstein_low(-values)[:, -1] - bernstein_low(values)[:, -1]) / 2
            ],
            "Hoeffding": [100 * float(hoeffding_half_width(count)[0])],
            "t-interval once": [100 * float(x) for x in t_half_width(values)[1][:, -1]],
        },
        floor="t-interval once",
        unit="points",
    )


def canary(num_releases: int, quick: bool) -> list[Row]:
    """Rollbacks of equal and of worse canaries; promotions of equal ones."""
    results = []
    for name, draw in WORLDS.items():
        rng = stream(0, "canary", name)
        ours, theirs = (draw(rng, (num_releases, 300 if quick else 2000)) for _ in range(2))
        rates = {
            "rolled back, at most": [ever(canary_could_see(theirs, ours))],
            "found better, at most": [ever(canary_could_see(ours, theirs))],
        }
        results += rows(f"canary error, {name}", rates, unit="%")
    for points, num_devices in ((-1.0, 1500), (-2.0, 500), (-5.0, 150)):
        rng = stream(0, "worse", str(points))
        theirs = normal(rng, (num_releases // 4, num_devices))
        ours = clipped(rng.normal(points / 100, 0.03, theirs.shape))
        sides = {"rolled back": needed(canary_sees(theirs, ours))}
        results += rows(f"canary needed, {points:g} points", sides, unit="devices")
    ours, theirs = (normal(stream(0, "soak", band), (num_releases // 4, 2000)) for band in range(2))
    for margin in (1.0, 2.0):
        sides = {"promoted": needed(canary_sees(ours, theirs, -margin / 100))}
        results += rows(f"canary needed, equal, margin {margin:g}", sides, unit="devices")
    for crashing in (0.05, 0.1) if quick else (0.03, 0.05, 0.1):
        rng = stream(0, "crashes", str(crashing))
        ours, theirs = (
            (rng.random((num_releases // 4, 4000)) < rate).astype(float)
            for rate in (crashing, 0.01)
        )
        worse = log_joint_wealth(sums(ours, 20), sums(1 - theirs, 20), 1.0, 0.0) >= LIMIT
        sides = {"rolled back": needed(worse, 20)}
        results += rows(f"canary needed, crashes 1 to {100 * crashing:g} %", sides, unit="devices")
    return results


# --- Whole releases: the gates that the release desk asks --------------------------------------------------

REQUEST = ReleaseRequest(
    population="phones", slot="default", plan_hash="0" * 64, checkpoint="0" * 64, version="1"
)
EVALUATION, GUARDS = evaluation_gate(REQUEST.evaluation, REQUEST.alpha), guardrail_gates(REQUEST)

WATCHED: Mapping[str, Draw] = {  # what devices say of one model, more being better
    "primary": lambda rng, shape: rng.beta(2, 10, shape),
    "latency": lambda rng, shape: -np.minimum(rng.lognormal(log(0.01), 0.5, shape), 0.1),
    "failed": lambda rng, shape: -(rng.random(shape) < 0.01).astype(float),
}


def running(values: Real, every: int = 1) -> Sums:
    """Sums `[releases, looks]` of reports `[releases, devices]`."""
    count, total, squares = sums(values, every)
    return Sums(np.broadcast_to(count, total.shape), total, squares)


def picked(reports: Sums, which: Seen) -> Sums:
    """The sums of some releases and looks."""
    count, total, squares = (
        np.asarray(part)[which] for part in (reports.count, reports.total, reports.squares)
    )
    return Sums(count, total, squares)


def stage_sees(gate: Gate, ours: Real, theirs: Real, *, worse: bool, every: int = 1) -> Seen:
    """Whether a guardrail takes a release back (`worse`) or lets it pass, `[releases, looks]`.

    Says what the gate says. It is asked only where a bound allows it: what is won for all pairs of means is no more
    than for the pair that the reports suggest, and that is quick to know.
    """
    own, control = running(ours, every), running(theirs, every)
    than = -(gate.worthwhile or 0.0) if worse else gate.at_least
    mean = min(max((ours.mean() + theirs.mean() + than) / 2, gate.low), gate.high)
    places = (
        (gate.high - mean, mean + than - gate.low)
        if worse
        else (mean - gate.low, gate.high - mean + than)
    )
    log_limit = log(2 / gate.alpha)
    bound = sum(
        log_wealth(*gate.distances(side, upward=upward), max(place + gate.step, 1e-9))
        for side, upward, place in zip((own, control), (not worse, worse), places, strict=True)
    )
    possible = np.asarray(bound >= log_limit)
    ask = gate.shows_less if worse else gate.shows_more
    seen = np.zeros(possible.shape, np.bool_)
    seen[possible] = ask(picked(own, possible), picked(control, possible))
    return seen


def equal_releases(num_releases: int, num_devices: int) -> dict[str, float]:
    """Per cent of equal candidates that are wrongly promoted or taken back; looked at after every report."""
    values = normal(stream(0, "release", "equal"), (num_releases, num_devices))
    taken_back = np.zeros(num_releases, np.bool_)
    for name, gate in GUARDS.items():
        rng = stream(0, "release", name)
        for part in np.array_split(np.arange(num_releases), max(1, num_releases // 100)):
            ours, theirs = (WATCHED[name](rng, (part.size, num_devices)) for _ in range(2))
            taken_back[part] |= stage_sees(gate, ours, theirs, worse=True).any(axis=1)
    return {
        "found better": ever(np.asarray(EVALUATION.shows_more(running(values)))),
        "found worse": ever(np.asarray(EVALUATION.shows_less(running(values)))),
        "taken back": 100 * float(taken_back.mean()),
    }


def power_of_releases(num_releases: int, num_devices: int) -> list[Row]:
    """What becomes of candidates that truly differ: in the evaluation, and in stages that saw no evaluation."""
    results, every = [], 10
    for points in (-5.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 5.0):
        rng = stream(0, "power of releases", str(points))
        shape = (num_releases, num_devices)
        paired = running(clipped(rng.normal(points / 100, 0.03, shape)), every)
        passes, fails = (
            np.asarray(ask(paired)) for ask in (EVALUATION.shows_more, EVALUATION.shows_less)
        )
        results += rows(
            f"release, {points:+g} points, evaluated",
            {"passes": [ever(passes)], "fails": [ever(fails)]},
            unit="%",
        )
        decided = {"decided": needed(passes | fails, every)}
        results += rows(f"release, {points:+g} points, devices", decided, unit="devices")
        if points <= 0:
            theirs = WATCHED["primary"](rng, shape)
            ours = np.clip(WATCHED["primary"](rng, shape) + points / 100, 0, 1)
            back, on = (
                stage_sees(GUARDS["primary"], ours, theirs, worse=worse, every=every)
                for worse in (True, False)
            )
            first_back, first_on = (
                np.where(seen.any(1), seen.argmax(1), num_devices) for seen in (back, on)
            )
            outcome = {
                "taken back": [100 * float((first_back < first_on).mean())],
                "passes": [100 * float((first_on < first_back).mean())],
            }
            results += rows(f"release, {points:+g} points, staged", outcome, unit="%")
            decided = {"decided": needed(back | on, every)}
            results += rows(f"release, {points:+g} points, stage", decided, unit="devices")
    return results


def main() -> None:
    options = parse_options(__doc__)
    quick = options.quick
    few = 100 if quick else 400
    results = errors(200 if quick else 1000, 300 if quick else 2000)
    for points, num_devices in ((5.0, 200), (2.0, 500), (1.0, 1500), (0.5, 6000)):
        if not (quick and points < 1):
            results += power(few, points, num_devices)
    results += power(few, 5.5, 100, deviation=1.7)  # as in the demo
    for bound in (5.0, 10.0, 20.0, 50.0, 100.0):
        results += clipped_at(few, bound)
    for margin in (1.0, 0.5):
        results += non_inferior(few, margin, 4000)
    for num_devices in (10, 100, 1000) if quick else (10, 100, 1000, 10_000):
        results += widths(20, num_devices)
    results += canary(few if quick else 1000, quick)
    wrong = equal_releases(200 if quick else 1000, 300 if quick else 3000)
    results += rows("release, equal", {name: [rate] for name, rate in wrong.items()}, unit="%")
    results += power_of_releases(few // 2, 500 if quick else 4000)
    report(results, options)


if __name__ == "__main__":
    main()
