"""Curves of learning: a panel per case, the metrics of a run over its rounds, and the lines that they must cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WIDTH, HEIGHT, GAP, LEFT, RIGHT = 560, 170, 56, 48, 170
COLOURS = {"top1": "#4878a8", "top3": "#c0583a"}


@dataclass(frozen=True)
class Curve:
    """`points`: round -> metrics on the people set aside for it; `test`: side -> metrics on the test's."""

    points: Sequence[tuple[int, Mapping[str, float]]]
    test: Mapping[str, Mapping[str, float]]
    goal: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, five digits each."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inside) for inside in value]
    return value


def plot(curves: Mapping[str, Curve]) -> str:
    """SVG: full lines for the runs, circles for their last models on the test, dashes for goals, dots for trigrams."""
    parts = []
    for number, (name, curve) in enumerate(curves.items()):
        parts += _panel(name, curve, 26 + number * (HEIGHT + GAP))
    size = f"{LEFT + WIDTH + RIGHT} {len(curves) * (HEIGHT + GAP)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"'
        ' font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{LEFT + WIDTH + RIGHT}" height="{len(curves) * (HEIGHT + GAP)}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(name: str, curve: Curve, top: int) -> list[str]:
    last = max((number for number, _ in curve.points), default=1)
    lines = [curve.goal, *curve.test.values(), *(values for _, values in curve.points)]
    drawn = [values[metric] for values in lines for metric in curve.goal]
    low, high = min(drawn), max(drawn)
    if low > 0.5:  # the last per cents are what it is about
        low = max(low, 2 * min(curve.goal.values()) - 1.02)

    def x(number: float) -> float:
        return LEFT + WIDTH * number / last

    def y(value: float) -> float:
        return top + HEIGHT * (1 - (max(value, low) - low) / ((high - low) or 1.0))

    parts = [f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{name}</text>']
    for value in (low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{LEFT + WIDTH}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{100 * value:.0f} %</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{top + HEIGHT + 16}">round 0</text>')
    parts.append(
        f'<text x="{LEFT + WIDTH}" y="{top + HEIGHT + 16}" text-anchor="end">{last}</text>'
    )
    for metric, goal in curve.goal.items():
        colour = COLOURS[metric]
        points = " ".join(
            f"{x(number):.1f},{y(values[metric]):.1f}" for number, values in curve.points
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        marks = [("goal", goal, "6 4")]
        if "trigram" in curve.test:
            marks.append(("trigram", curve.test["trigram"][metric], "1 3"))
        for text, value, dashes in marks:
            parts.append(
                f'<path d="M{LEFT} {y(value):.1f}H{LEFT + WIDTH}" stroke="{colour}" stroke-dasharray="{dashes}"/>'
            )
            parts.append(
                f'<text x="{LEFT + WIDTH + 14}" y="{y(value) + 4:.1f}" fill="{colour}">'
                f"{metric}, {text} {100 * value:.1f} %</text>"
            )
        ours = curve.test["homespun"][metric]
        parts.append(f'<circle cx="{x(last):.1f}" cy="{y(ours):.1f}" r="4" fill="{colour}"/>')
    return parts
