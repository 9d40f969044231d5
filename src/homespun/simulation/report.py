"""What a run's history looks like: curves as SVG, and a summary as Markdown. Plain text in, plain text out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from homespun.errors import InvalidInput
from homespun.simulation.history import RoundRecord, text
from homespun.simulation.stopping import best_round, mode_of

WIDTH, HEIGHT, GAP, LEFT = 640, 140, 44, 56
TRAINING, EVALUATION = "#4878a8", "#c0583a"

Curve = list[tuple[int, float]]


def curves(records: Sequence[RoundRecord]) -> dict[str, tuple[Curve, Curve]]:
    """Metric -> (round, value) of training, and of evaluation; the loss first."""
    names = ["loss"]
    for record in records:
        names += [n for n in (*record.metrics, *record.evaluation) if n not in names]
    found = {}
    for name in names:
        both = tuple(
            [(r.round, v) for r in records if (v := r.value(name, evaluated)) is not None]
            for evaluated in (False, True)
        )
        if any(both):
            found[name] = (both[0], both[1])
    return found


def plot(records: Sequence[RoundRecord]) -> str:
    """SVG: one panel per metric, training and evaluation in it. Raises `InvalidInput` without rounds."""
    if not records:
        raise InvalidInput("there is no round to plot yet", hint="run the simulation first")
    first, last = records[0].round, max(records[-1].round, records[0].round + 1)
    parts = []
    panels = curves(records)
    for index, (name, (training, evaluation)) in enumerate(panels.items()):
        top = 26 + index * (HEIGHT + GAP)
        values = [value for _, value in (*training, *evaluation)]
        low, high = min(values), max(values)
        span = (high - low) or 1.0

        def point(
            at: tuple[int, float], top: int = top, low: float = low, span: float = span
        ) -> str:
            x = LEFT + (at[0] - first) / (last - first) * WIDTH
            return f"{x:.1f},{top + HEIGHT * (1 - (at[1] - low) / span):.1f}"

        parts.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{escape(name)}</text>')
        for value, y in ((high, top), (low, top + HEIGHT)):
            parts.append(f'<path d="M{LEFT} {y}H{LEFT + WIDTH}" stroke="#ddd"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
        for curve, colour in ((training, TRAINING), (evaluation, EVALUATION)):
            if curve:
                points = " ".join(point(at) for at in curve)
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                )
    bottom = 26 + len(panels) * (HEIGHT + GAP)
    right = LEFT + WIDTH
    parts += [
        f'<text x="{LEFT}" y="{bottom - 22}">round {first}</text>',
        f'<text x="{right}" y="{bottom - 22}" text-anchor="end">round {last}</text>',
        f'<text x="{right}" y="18" text-anchor="end"><tspan fill="{TRAINING}">training</tspan>',
        f'<tspan fill="{EVALUATION}">evaluation</tspan></text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 16} {bottom}"'
        ' font-family="sans-serif" font-size="12" fill="#333">\n'
        f'<rect width="{right + 16}" height="{bottom}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def summary(records: Sequence[RoundRecord], title: str) -> str:
    """Markdown: what happened, and a table of at most 20 rounds. Raises `InvalidInput` without rounds."""
    if not records:
        raise InvalidInput("there is no round to report yet", hint="run the simulation first")
    last, evaluated = records[-1], any(record.evaluation for record in records)
    seconds = sum(record.seconds for record in records)
    clients = sum(record.num_clients for record in records)
    steps = sum(record.num_steps for record in records)
    best = best_round(records, "loss", mode_of("loss"), evaluated)
    lines = [
        f"# {title}",
        "",
        f"- {last.round} rounds in {seconds:.1f} s ({1000 * seconds / len(records):.1f} ms each)",
        f"- {clients} participations, {steps} local steps",
        f"- training, last round: {text(last.training)}",
    ]
    if last.virtual_seconds is not None:
        lines.append(f"- virtual time: {last.virtual_seconds:.0f} s")
    if stale := [(r.staleness, r.most_stale or 0) for r in records if r.staleness is not None]:
        mean, most = sum(value for value, _ in stale) / len(stale), max(value for _, value in stale)
        lines.append(f"- staleness: {mean:.2f} on average, {most} at most")
    newest = next((r for r in reversed(records) if r.evaluation), None)
    if newest is not None:
        lines.append(f"- evaluation, round {newest.round}: {text(newest.evaluation)}")
    if best is not None:
        lines.append(f"- lowest {'evaluation' if evaluated else 'training'} loss: round {best}")
    lines += ["", "| round | clients | training | evaluation | ms |", "|--:|--:|---|---|--:|"]
    every = -(-len(records) // 20)
    shown = [r for r in records if r.round % every == 0 or r is records[0] or r is last]
    lines += [
        f"| {r.round} | {r.num_clients} | {text(r.training)} | {text(r.evaluation)} | {1000 * r.seconds:.1f} |"
        for r in shown
    ]
    return "\n".join(lines) + "\n"
