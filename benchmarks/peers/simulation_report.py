"""What `benchmarks.simulation` makes of its measurements: whether they may be reported, ratios, goals, table, plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Row
from benchmarks.peers.simulation_run import Result
from benchmarks.peers.simulation_tasks import Weights

OURS, PFL, FLOWER = "homespun", "pfl", "Flower"
TOLERANCE = 1e-4
"""How far weights trained in float64 may be from the reference's: L2 distance over how far training moved them."""
ROUNDED = 1e-2
"""The same in float32, where rounding alone, which a ReLU may amplify, has made 2e-3 of tasks with convolutions,
whoever computed them. It finds who is badly inexact; that all train the same is proven in float64.
"""
DRAWS = 2000


@dataclass(frozen=True)
class Goal:
    """Times faster than the peer: what must be, and what we want."""

    floor: float
    goal: float


ONE_CORE: Mapping[tuple[str, str], Goal] = {
    ("tiny", PFL): Goal(50, 100),
    ("tiny1k", PFL): Goal(50, 100),
    ("logreg", PFL): Goal(20, 25),
    ("mlp", PFL): Goal(4, 5),
    ("cnn_s", PFL): Goal(1, 1),
    ("cnn_leaf", PFL): Goal(1.9, 2.5),
    ("cifar", PFL): Goal(1.15, 1.3),
    ("lstm256", PFL): Goal(1.1, 1.3),
    ("tiny", FLOWER): Goal(500, 500),
    ("mlp", FLOWER): Goal(20, 20),
    ("cnn_leaf", FLOWER): Goal(4, 4),
    ("cifar", FLOWER): Goal(1.8, 1.8),
    ("lstm256", FLOWER): Goal(1.7, 1.7),
}
ONE_GPU: Mapping[tuple[str, str], Goal] = {
    ("tiny", PFL): Goal(150, 150),
    ("tiny1k", PFL): Goal(1000, 1000),
    ("logreg", PFL): Goal(150, 150),
    ("mlp", PFL): Goal(50, 50),
    ("cnn_s", PFL): Goal(50, 50),
    ("cnn_leaf", PFL): Goal(10, 10),
    ("cifar", PFL): Goal(10, 10),
    ("lstm256", PFL): Goal(5, 5),
}
"""Against the fastest of pfl with 1 to 8 processes on the GPU."""


@dataclass(frozen=True, kw_only=True)
class Figure(Row):
    """A side of a task. `low` to `high`: 95 % of `ratio_to_peer`; `cpu_s` per round and `peak_bytes` of all the side's
    processes; `warm_up_s`: the first round with all compilation; `gemm_share`: of the machine's rate in matrix
    products that the training's products alone reach; `load`: highest; `apart`: largest `difference` of its weights,
    in float64 and, as measured, in float32.
    """

    minimum: float
    low: float | None
    high: float | None
    cpu_s: float
    warm_up_s: float
    peak_bytes: int
    flops_per_s: float
    gemm_share: float
    load: float
    apart: tuple[float, float]


def difference(final: Weights, reference: Weights, initial: Weights) -> float:
    """L2 distance from the reference's weights, over how far these moved; infinite for other shapes."""
    if {n: w.shape for n, w in final.items()} != {n: w.shape for n, w in reference.items()}:
        return math.inf

    def distance(other: Weights) -> float:
        return math.hypot(*(float(np.linalg.norm(other[n] - reference[n])) for n in reference))

    return distance(final) / distance(initial)


def refusal(result: Result, apart: float, steps: int, tolerance: float) -> str | None:
    """Why this must not be reported: it did not train the same thing. `apart`: of `difference`."""
    if result.steps != steps:
        return f"{result.steps} SGD steps instead of {steps}"
    if not apart <= tolerance:
        return f"weights end {apart:.1e} of the way that training went from the reference's"
    return None


def ratio_interval(
    ours: Sequence[Sequence[float]], peer: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float]:
    """95 % of the ratio of medians, peer's over ours, by bootstrap (Efron 1979): turns are drawn with replacement, the
    same for both sides since the machine was the same for both, and each brings all its rounds.
    """
    draws = np.random.default_rng(seed).integers(0, len(ours), (DRAWS, len(ours)))
    medians = [
        np.median(np.asarray(side)[draws].reshape(DRAWS, -1), axis=1) for side in (ours, peer)
    ]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)


def figures(
    case: str,
    sides: Mapping[str, Sequence[Result]],
    apart: Mapping[str, tuple[float, float]],
    flops: int,
    gemm_rate: float,
    peer: str | None,
) -> list[Figure]:
    """A row for each side; the floor is the time that the products alone take at `gemm_rate`."""
    made = []
    against = sides[peer] if peer in sides and peer is not None else None
    for side, results in sides.items():
        raw = tuple(second for result in results for second in result.seconds)
        median = statistics.median(raw)
        ratio = low = high = None
        if against is not None:
            ratio = statistics.median([s for r in against for s in r.seconds]) / median
            low, high = ratio_interval([r.seconds for r in results], [r.seconds for r in against])
        made.append(
            Figure(
                case=case,
                side=side,
                median=median,
                unit="s",
                ratio_to_floor=median * gemm_rate / flops,
                peer=peer if against is not None else None,
                ratio_to_peer=ratio,
                raw=raw,
                minimum=min(raw),
                low=low,
                high=high,
                cpu_s=statistics.median(result.cpu_s for result in results),
                warm_up_s=statistics.median(result.warm_up_s for result in results),
                peak_bytes=max(result.peak_bytes for result in results),
                flops_per_s=flops / median,
                gemm_share=flops / median / gemm_rate,
                load=max(result.load for result in results),
                apart=apart[side],
            )
        )
    return made


TABLE = (
    "| task | side | median ms | least | times faster than pfl (95 %) | CPU ms | GFLOP/s | of GEMM | first round s "
    "| memory MB | load | apart, float64 | float32 |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def table(rows: Sequence[Figure]) -> str:
    lines = [TABLE]
    for row in rows:
        ratio = ""
        if row.ratio_to_peer is not None:
            ratio = f"{row.ratio_to_peer:.2f} ({row.low:.2f} to {row.high:.2f})"
        lines.append(
            f"| {row.case} | {row.side} | {1e3 * row.median:.4g} | {1e3 * row.minimum:.4g} | {ratio} "
            f"| {1e3 * row.cpu_s:.4g} | {row.flops_per_s / 1e9:.3g} | {row.gemm_share:.0%} "
            f"| {row.warm_up_s:.2g} | {row.peak_bytes / 1e6:.0f} | {row.load:.1f} "
            f"| {row.apart[0]:.0e} | {row.apart[1]:.0e} |"
        )
    return "\n".join(lines)


def goals(rows: Sequence[Figure], targets: Mapping[tuple[str, str], Goal]) -> str:
    """Where we stand to each goal that these rows speak about: by the ratio of medians."""
    medians = {(row.case.split(",")[0], row.side): row.median for row in rows}
    lines = ["| task | against | times faster | floor | goal | |\n|---|---|---|---|---|---|"]
    for (task, peer), target in targets.items():
        if (task, OURS) not in medians:
            continue
        # On a GPU there are several of pfl: the fastest counts.
        theirs = [m for (t, side), m in medians.items() if t == task and side.startswith(peer)]
        if theirs:
            ratio = min(theirs) / medians[task, OURS]
            lines.append(
                f"| {task} | {peer} | {ratio:.2f} | {target.floor:g} | {target.goal:g} "
                f"| {verdict(ratio, target)} |"
            )
    return "\n".join(lines) if len(lines) > 1 else ""


def verdict(ratio: float, target: Goal) -> str:
    if ratio >= target.goal:
        return "goal met"
    return "floor met, goal missed" if ratio >= target.floor else "floor missed"


COLOURS = ("#c0392b", "#333333", "#4878a8", "#6aa84f", "#b8860b", "#8e6bbf")
LEFT, WIDTH, LINE = 110, 560, 30


def plot(rows: Sequence[Figure]) -> str:
    """How many times faster than pfl each side is, one line per task, on a logarithmic axis."""
    drawn = [row for row in rows if row.ratio_to_peer]
    cases, sides = list(dict.fromkeys(r.case for r in drawn)), []
    for row in drawn:
        if row.side not in sides:
            sides.append(row.side)
    ratios = [row.ratio_to_peer or 1.0 for row in drawn] or [1.0]
    least = math.floor(math.log10(min(ratios)))
    most = max(math.ceil(math.log10(max(ratios))), least + 1)

    def x(ratio: float) -> float:
        return LEFT + WIDTH * (math.log10(ratio) - least) / (most - least)

    bottom = 40 + LINE * len(cases)
    parts = []
    for power in range(least, most + 1):
        at = x(10.0**power)
        parts += [
            f'<path d="M{at:.0f} 30V{bottom}" stroke="#ccc"/>',
            f'<text x="{at:.0f}" y="{bottom + 16}" text-anchor="middle">{10.0**power:g} x</text>',
        ]
    for number, case in enumerate(cases):
        parts.append(f'<text x="0" y="{54 + LINE * number}">{case}</text>')
    for row in drawn:
        y = 50 + LINE * cases.index(row.case)
        colour = COLOURS[sides.index(row.side) % len(COLOURS)]
        low, high = x(row.low or 1.0), x(row.high or 1.0)
        parts += [
            f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x(row.ratio_to_peer or 1.0):.1f}" cy="{y}" r="5" fill="{colour}"/>',
        ]
    for number, side in enumerate(sides):
        colour, at = COLOURS[number % len(COLOURS)], LEFT + 110 * number
        parts += [
            f'<circle cx="{at}" cy="14" r="5" fill="{colour}"/>',
            f'<text x="{at + 10}" y="18">{side}</text>',
        ]
    size = f"{LEFT + WIDTH + 40} {bottom + 30}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"'
        ' font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{LEFT + WIDTH + 40}" height="{bottom + 30}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
