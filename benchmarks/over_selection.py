"""How many devices must be drawn so that a round reaches its goal, when drop-outs swing with the hour of the day?

Simulated rounds of a task, ten an hour for a week, whose devices drop out silently at any moment of their work, with a
probability that swings fourfold over the day. A round closes when its goal is reached; what became of the others is
then unknown, except that those that still live hear of it. The cohort is chosen by `protocol.selection` from what
the server could have counted. After the first day, which is the warm-up:

    goal      share of rounds that reach their goal; stated: at least 0.99
    drawn     devices drawn per report used; peer: a fixed 130 %, which uses what it has when it misses its goal
    floor     the fewest that would do if the probability were known
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

import numpy as np

from benchmarks.harness import Row, parse_options, report
from homespun.protocol.round import cohort_size
from homespun.protocol.selection import cohort_for, evidence, faded
from homespun.rng import stream

HOUR_S = 3600.0
ROUNDS_PER_HOUR = 10


@dataclass(frozen=True)
class Outcome:
    """Of all rounds after the warm-up."""

    goal_share: float
    drawn_per_report: float


def drop_out(at_s: float, worst: float) -> float:
    """Between a quarter of `worst` and `worst`, once a day."""
    return worst * (0.625 - 0.375 * cos(2 * pi * at_s / 86_400.0))


def simulate(side: str, goal: int, worst: float, days: int, seed: int = 1) -> Outcome:
    """`side`: adaptive, fixed (130 %) or known (the probability itself)."""
    rng = stream(seed, "over-selection", goal, str(worst))
    counts: dict[int, tuple[float, float]] = {}
    reached, drawn, used, num_rounds = 0, 0, 0, 0
    for index in range(days * 24 * ROUNDS_PER_HOUR):
        now = index * HOUR_S / ROUNDS_PER_HOUR
        lost_share = drop_out(now, worst)
        if side == "fixed":
            size = cohort_size(goal, 1.3)
        else:
            known = 1e6 * (1 - lost_share), 1e6 * lost_share
            seen = known if side == "known" else evidence(counts, now / HOUR_S % 24)
            size = cohort_for(goal, *seen, limit=2 * goal)
        done_s = rng.lognormal(5.0, 0.5, size)
        drops = rng.random(size) < lost_share
        dropped_s = np.where(drops, done_s * rng.random(size), np.inf)
        reports = np.sort(done_s[~drops])
        is_reached = len(reports) >= goal
        fence_s = reports[goal - 1] if is_reached else np.inf
        hour = int(now / HOUR_S % 24)
        # Who lives at the fence hears that it fell, and says nothing about the drop-outs.
        num_reported, num_lost = min(goal, len(reports)), int((dropped_s <= fence_s).sum())
        before = counts.get(hour, (0.0, 0.0))
        age_s = HOUR_S / ROUNDS_PER_HOUR if index % ROUNDS_PER_HOUR else 23 * HOUR_S
        counts[hour] = faded(before[0], age_s) + num_reported, faded(before[1], age_s) + num_lost
        if now >= 86_400.0:
            num_rounds += 1
            reached += is_reached
            drawn += size
            used += num_reported
    return Outcome(reached / num_rounds, drawn / used)


def main() -> None:
    options = parse_options(__doc__)
    rows = []
    for goal in (20, 100) if options.quick else (10, 20, 100, 1000):
        for worst in (0.2, 0.32):
            case = f"goal {goal}, drop-out {worst / 4:.0%} to {worst:.0%}"
            sides = {
                side: simulate(side, goal, worst, 3 if options.quick else 8)
                for side in ("known", "fixed", "adaptive")
            }
            floor, peer = sides["known"].drawn_per_report, sides["fixed"].drawn_per_report
            for side, outcome in sides.items():
                drawn, share = outcome.drawn_per_report, outcome.goal_share
                rows += [
                    Row(f"goal, {case}", side, share, "of rounds", None, None, None, (share,)),
                    Row(f"drawn, {case}", side, drawn, "per report", drawn / floor, "fixed",
                        peer / drawn, (drawn,)),
                ]  # fmt: skip
    report(rows, options)


if __name__ == "__main__":
    main()
