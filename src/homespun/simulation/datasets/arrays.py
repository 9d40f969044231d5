"""Arrays in memory whose rows have owners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from homespun.simulation import partition
from homespun.simulation.arena import Arena, assemble
from homespun.types import AnyArray


def from_arrays(inputs: Mapping[str, AnyArray], owners: Sequence[object] | AnyArray) -> Arena:
    """`inputs`: name -> [num_rows, ...]; `owners` [num_rows]: integers (from `partition`) or names.

    Clients are sorted by owner; one without rows does not exist. Raises `InvalidInput` as `assemble` does.
    """
    codes, names = partition.by_key(owners)
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    return assemble(codes, names.tolist(), [arrays])
