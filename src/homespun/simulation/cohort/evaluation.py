"""Loss and metrics of many clients' rows, in merged batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from homespun.plan.build.steps import Batch, PerElement
from homespun.simulation.arena import Arena
from homespun.simulation.cohort.gather import Rows
from homespun.simulation.cohort.objective import Objective

MERGED_ROWS = 512
"""Rows of one forward pass: enough for matrix products to be at their best, few enough to stay in a cache."""

Indexes = npt.NDArray[np.int64]


def measure(
    objective: Objective, arena: Arena, rows: Rows, parameters: Tensor, clients: Indexes
) -> dict[str, Tensor]:
    """Name -> [m, 2]: each client's sum and count, over all its rows. `parameters`: [d] for all, or [m, d]."""
    names = objective.names(metrics=True)
    sums = {
        name: torch.zeros(len(clients), 2, dtype=torch.float64, device=parameters.device)
        for name in names
    }
    objective.module.eval()
    with torch.inference_mode():
        shared = objective.named(parameters) if parameters.dim() == 1 else None
        for index, owners in _batches(arena, clients, merged=shared is not None):
            named = shared or objective.named(parameters[int(owners[0])])
            batch = rows.at(index)
            outputs = objective.forward(named, batch)
            place = torch.from_numpy(owners).to(parameters.device)
            for name in names:
                sums[name].index_add_(
                    0, place, _row_sums(objective.functions[name], outputs, batch)
                )
    objective.module.train()
    return sums


def _row_sums(function: PerElement, outputs: object, batch: Batch) -> Tensor:
    """[rows, 2]: sum and count of each row."""
    values = function(outputs, batch)
    values, mask = values if isinstance(values, tuple) else (values, torch.ones_like(values))
    mask = mask.to(values.dtype)
    pairs = torch.stack((values * mask, mask), 1)
    return pairs.reshape(len(values), 2, -1).sum(2, dtype=torch.float64)


def _batches(arena: Arena, clients: Indexes, merged: bool) -> Iterator[tuple[Indexes, Indexes]]:
    """Rows of the arena, and for each the place of its client; one client at a time unless `merged`."""
    counts = arena.num_rows[clients]
    ends = np.cumsum(counts)
    owners = np.repeat(np.arange(len(clients)), counts)
    index = np.arange(len(owners)) + (arena.offsets[clients] - (ends - counts))[owners]
    bounds = [0, len(owners)] if merged else [0, *ends.tolist()]
    for begin, end in pairwise(bounds):
        for first in range(begin, end, MERGED_ROWS):
            last = min(first + MERGED_ROWS, end)
            yield index[first:last], owners[first:last]
