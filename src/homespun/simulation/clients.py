"""What clients keep from one participation to the next: rows of a few arrays, only of those that took part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from homespun.simulation.checkpoints import Arrays
from homespun.types import AnyArray

Clients = npt.NDArray[np.int64]
_BEGIN, _ROWS, _CLIENTS = "begin.", "rows.", "clients"


@dataclass
class ClientStore:
    """`begin`: what a client has before its first participation. Memory grows with the clients that took part."""

    begin: Mapping[str, AnyArray] = field(default_factory=dict)
    _row: dict[int, int] = field(default_factory=dict)
    _rows: dict[str, AnyArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._row)

    def known(self, clients: Clients) -> npt.NDArray[np.bool_]:
        """[m]: who has taken part."""
        return np.array([client in self._row for client in clients.tolist()], np.bool_)

    def take(self, clients: Clients) -> dict[str, AnyArray]:
        """What these clients have, name -> [m, ...]; copies."""
        places = [self._row.get(client, -1) for client in clients.tolist()]
        known = np.array([place >= 0 for place in places], bool)
        taken = {}
        for name, begin in self.begin.items():
            rows = np.repeat(begin[None], len(clients), 0)
            if known.any():
                rows[known] = self._rows[name][[place for place in places if place >= 0]]
            taken[name] = rows
        return taken

    def keep(self, clients: Clients, rows: Mapping[str, AnyArray]) -> None:
        """`rows`: name -> [m, ...] of these clients, instead of what they had."""
        if not rows:
            return
        for client in clients.tolist():
            self._row.setdefault(client, len(self._row))
        places = [self._row[client] for client in clients.tolist()]
        for name, new in rows.items():
            self._grow(name)
            self._rows[name][places] = new

    def _grow(self, name: str) -> None:
        """Room for every client that has a row; doubled, so that growing costs little on the whole."""
        begin, old = self.begin[name], self._rows.get(name)
        if old is None or len(old) < len(self._row):
            size = max(len(self._row), 2 * len(old) if old is not None else 0)
            larger = np.zeros((size, *begin.shape), begin.dtype)
            if old is not None:
                larger[: len(old)] = old
            self._rows[name] = larger

    def arrays(self) -> Arrays:
        """All of it, for a checkpoint."""
        size = len(self._row)
        return {
            _CLIENTS: np.array(list(self._row), np.int64),
            **{_BEGIN + name: np.asarray(array) for name, array in self.begin.items()},
            **{_ROWS + name: array[:size] for name, array in self._rows.items()},
        }

    @classmethod
    def of(cls, arrays: Arrays) -> ClientStore:
        """The store that `arrays` were made of."""

        def named(prefix: str) -> dict[str, AnyArray]:
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

        clients = arrays.get(_CLIENTS, np.zeros(0, np.int64)).tolist()
        return cls(named(_BEGIN), {client: row for row, client in enumerate(clients)}, named(_ROWS))

    def copy(self) -> ClientStore:
        """A store of its own: what one keeps, the other does not see."""
        rows = {name: array.copy() for name, array in self._rows.items()}
        return ClientStore(self.begin, dict(self._row), rows)
