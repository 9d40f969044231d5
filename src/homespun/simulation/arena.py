"""The packed arena: all clients' rows in one array per input, and where each client's begin.

No object exists per client: a million clients are one offsets array more. Arrays are narrow (uint8 pixels, uint16 or
int32 tokens) and may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homespun.errors import ShapeMismatch
from homespun.types import AnyArray

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arena:
    """`inputs`: name -> [num_rows, ...]; client c has the rows `offsets[c]` to `offsets[c + 1]`, [num_clients + 1];
    `clients`: their names, if they have any.
    """

    inputs: Mapping[str, AnyArray]
    offsets: Offsets
    clients: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Raises `ShapeMismatch` if inputs and offsets do not belong together."""
        ends = int(self.offsets[-1]) if len(self.offsets) else -1
        for name, array in self.inputs.items():
            if len(array) != ends:
                raise ShapeMismatch(
                    f"input {name!r} has another number of rows", expected=ends, got=len(array)
                )
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ShapeMismatch("offsets must begin at 0 and never fall", got=str(self.offsets[:3]))
        if self.clients is not None and len(self.clients) != self.num_clients:
            raise ShapeMismatch(
                "not one name per client", expected=self.num_clients, got=len(self.clients)
            )

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> npt.NDArray[np.int64]:
        """[num_clients]"""
        return np.diff(self.offsets)

    def rows(self, client: int) -> dict[str, AnyArray]:
        """Views of one client's rows."""
        begin, end = self.offsets[client], self.offsets[client + 1]
        return {name: array[begin:end] for name, array in self.inputs.items()}
