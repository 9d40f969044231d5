"""Which rows of the arena each client's steps see: whole chunks of clients at once, no Python per client.

The order depends on (seed, round, client, epoch) alone: not on the strategy, the chunk or the worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Batches:
    """The steps of m clients in lockstep.

    `clients` [m]: their indexes in the arena, those with the most steps first, so that the active ones of step s are
    a prefix of `active[s]` clients. `rows` [num_steps, m, B]: rows of the arena; where a batch is shorter than B, a
    row of the same client stands in whose `present` [num_steps, m, B] is False. What lies beyond the prefix means
    nothing. `num_examples` [m]: rows used, once however many epochs; `num_steps` [m].
    """

    clients: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_]
    active: npt.NDArray[np.int64]
    num_examples: npt.NDArray[np.int64]
    num_steps: npt.NDArray[np.int64]
