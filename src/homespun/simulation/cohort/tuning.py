"""Which strategy trains this task's clients fastest: proven equal to the reference first, then measured.

A candidate that the model cannot be run with, or that does not agree with the reference on a small cohort of the very
model in float64, is never used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from homespun.simulation.arena import Arena
from homespun.simulation.batches import Batches
from homespun.simulation.cohort import reference
from homespun.simulation.cohort.cohort import Cohort, factorable
from homespun.simulation.cohort.eager import Eager
from homespun.simulation.cohort.gather import Rows
from homespun.simulation.cohort.local import Local
from homespun.simulation.cohort.objective import Objective, Totals
from homespun.simulation.task import Task

CHUNKS = (1, 4, 16, 64, 256)
ALONE = ("eager", "sequential")
"""Strategies that train one client after another."""
STACKED_BYTES = 2**30
FACTORED_SIZE = 8192
"""Smaller matrices are faster stacked."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and how many clients train together."""

    strategy: str
    chunk: int


def factored_names(objective: Objective) -> frozenset[str]:
    """Parameters that are worth the factored form: large matrices."""
    return frozenset(
        name
        for name, shape in objective.shapes.items()
        if len(shape) == 2 and shape.numel() >= FACTORED_SIZE
    )


def candidates(objective: Objective, local: Local, clients: int) -> Iterator[Choice]:
    """All that could be fastest, the simplest first."""
    yield Choice("eager", 1)
    yield Choice("sequential", 1)
    each = objective.dimension * local.model.element_size()
    for chunk in CHUNKS[1:]:
        if chunk // 4 < clients and chunk * each <= STACKED_BYTES:
            yield Choice("stacked", min(chunk, clients))
    if factorable(local) and factored_names(objective):
        for chunk in CHUNKS[2:]:
            if chunk // 4 < clients:
                yield Choice("factored", min(chunk, clients))


def build(objective: Objective, choice: Choice) -> Cohort | Eager:
    """Raises `Unsupported` or whatever the author's module raises."""
    if choice.strategy == "eager":
        return Eager(objective)
    names = factored_names(objective) if choice.strategy == "factored" else frozenset()
    return Cohort(objective, choice.chunk, names)


def proven(task: Task, arena: Arena, batches: Batches, local: Local, strategy: str) -> bool:
    """The strategy gives the reference's updates, in float64, on a few of these clients."""
    small = _few(batches, clients=3, steps=2, size=3)
    count = len(small.clients)
    exact = _exact(local)
    objective = Objective(task, local.model.device, torch.float64)
    rows = Rows(arena, task.scales, local.model.device, torch.float64)
    expected_totals, totals = Totals(("loss",)), Totals(("loss",))
    expected = reference.updates(objective, rows.steps(small), exact, count, expected_totals)
    chunk = 1 if strategy in ALONE else count
    parts = []
    try:
        cohort = build(objective, Choice(strategy, chunk))
        for first in range(0, count, chunk):
            last = first + chunk
            steps = rows.steps(small, first, last)
            parts.append(cohort.run(steps, exact, chunk, totals))
    except Exception:  # noqa: BLE001  whatever the author's module raises here, the reference decides
        return False
    update = torch.cat([part for part in parts if part is not None])
    size = expected.abs().max().item()
    close = torch.allclose(update, expected, rtol=1e-9, atol=1e-9 * size)
    losses = totals.read()["loss"], expected_totals.read()["loss"]
    return close and np.isclose(losses[0].sum, losses[1].sum, rtol=1e-9).item()


def seconds_per_step(cohort: Cohort | Eager, rows: Rows, batches: Batches, local: Local) -> float:
    """Seconds for one step of one client, the share of what a chunk costs once included."""
    clients = min(cohort.chunk, len(batches.clients))
    few = _few(batches, clients=clients, steps=3, size=batches.rows.shape[2], spread=False)
    weights = local.model.new_ones(clients)
    mean = torch.zeros_like(local.model)
    first = _few(few, clients=clients, steps=1, size=few.rows.shape[2], spread=False)
    cohort.run(rows.steps(first), local, clients, Totals(("loss",)))  # what is done only once
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        cohort.run(rows.steps(few), local, clients, Totals(("loss",)), mean, weights)
        if local.model.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
        if best > SLOW_SECONDS:
            break
    return best / max(int(few.num_steps.sum()), 1)


SLOW_SECONDS = 0.3
"""What takes longer is measured once: it cannot be noise."""


def _few(batches: Batches, clients: int, steps: int, size: int, spread: bool = True) -> Batches:
    """Some clients' first steps with smaller batches."""
    total = len(batches.clients)
    clients = min(clients, total)
    chosen = np.linspace(0, total - 1, clients).astype(np.int64) if spread else np.arange(clients)
    num_steps = np.minimum(batches.num_steps[chosen], steps)
    steps = int(num_steps.max(initial=0))
    return replace(
        batches,
        clients=batches.clients[chosen],
        rows=batches.rows[:steps, chosen, :size],
        present=batches.present[:steps, chosen, :size],
        active=(np.arange(steps)[:, None] < num_steps).sum(1),
        num_examples=batches.num_examples[chosen],
        num_steps=num_steps,
    )


def _exact(local: Local) -> Local:
    """The same kind of rule in float64, for any number of clients: each client's own vectors become one."""

    def one(vector: Tensor) -> Tensor:
        return (vector if vector.dim() == 1 else vector.mean(0)).double()

    model = local.model.double()
    return replace(
        local,
        model=model,
        start=model if local.start is local.model else one(local.start),
        anchor=model if local.anchor is local.model else one(local.anchor),
        correction=None if local.correction is None else one(local.correction),
    )


def fastest(
    task: Task,
    arena: Arena,
    objective: Objective,
    rows: Rows,
    batches: Batches,
    local: Local,
    chunk: int | None,
) -> Cohort | Eager | None:
    """The fastest proven candidate; None where only the reference will do.

    `chunk` set: the only number of clients that is tried. Of a strategy, growing chunks are tried while that helps.
    """
    agrees: dict[str, bool] = {}
    given_up: set[str] = set()
    best: Cohort | Eager | None = None
    least = {"": float("inf")}
    for choice in candidates(objective, local, len(batches.clients)):
        name = choice.strategy
        if name in given_up:
            continue
        if chunk is not None and (name in ALONE) == (chunk > 1):
            continue
        if name not in agrees:
            agrees[name] = proven(task, arena, batches, local, name)
        if not agrees[name]:
            continue
        cohort = build(objective, replace(choice, chunk=chunk or choice.chunk))
        seconds = seconds_per_step(cohort, rows, batches, local.part(0, cohort.chunk))
        if seconds < min(least.values()):
            best = cohort
        if seconds > 1.1 * least.get(name, float("inf")) or chunk is not None:
            given_up.add(name)
        least[name] = min(seconds, least.get(name, seconds))
    return best
