"""Arrays in memory whose rows have owners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from homespun.errors import InvalidInput
from homespun.simulation import partition
from homespun.simulation.arena import Arena, assemble
from homespun.types import AnyArray


def from_arrays(inputs: Mapping[str, AnyArray], owners: Sequence[object] | AnyArray) -> Arena:
    """`inputs`: name -> [num_rows, ...]; `owners` [num_rows]: integers (from `partition`) or names.

    Clients are sorted by owner; one without rows does not exist. Raises `InvalidInput` as `assemble` does.
    """
    if not len(owners):
        raise InvalidInput("there are no rows", hint="check the source")
    codes, names = partition.by_key(owners)
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    return assemble(codes, names.tolist(), [arrays])


def pack(
    owners: Sequence[Sequence[object]],
    blocks: Sequence[Mapping[str, AnyArray]],
) -> Arena:
    """Blocks in memory and the owners of each one's rows. Numbers take the type that holds those of all blocks."""
    kinds = {
        name: np.result_type(*{block[name].dtype for block in blocks if name in block})
        for name in (blocks[0] if blocks else ())
    }
    same_type = (
        {name: array.astype(kinds.get(name, array.dtype)) for name, array in block.items()}
        for block in blocks
    )
    keys = [owner for part in owners for owner in part]
    if not keys:
        raise InvalidInput("there are no rows", hint="check the source")
    if len({isinstance(key, str) for key in keys}) > 1:
        raise InvalidInput("some users are text, some are not", hint="use one kind of name")
    codes, names = partition.by_key(keys)
    return assemble(codes, names.tolist(), same_type)
