"""A state machine is a table. The diagrams of the docs are drawn from it and a test walks every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from homespun.errors import Conflict

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True)
class Row(Generic[S, E]):
    """In `source`, `event` leads to `target`, provided `guard` (in words; code is beside the table)."""

    source: S
    event: E
    target: S
    guard: str = ""


@dataclass(frozen=True)
class Machine(Generic[S, E]):
    """`rows`: the whole table; every (source, event) occurs once."""

    name: str
    initial: S
    rows: Sequence[Row[S, E]]

    def __post_init__(self) -> None:
        keys = [(row.source, row.event) for row in self.rows]
        if len(set(keys)) != len(keys):
            raise ValueError(f"{self.name}: two rows for one state and event")

    def next(self, state: S, event: E) -> S:
        """The state after `event`. Raises `Conflict` when the table has no such row."""
        for row in self.rows:
            if row.source == state and row.event == event:
                return row.target
        raise Conflict(
            f"{self.name} in state {state} does not take {event}",
            state=str(state),
            event=str(event),
        )

    def diagram(self) -> str:
        """The table as a Mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial.name}"]
        for row in self.rows:
            label = f"{row.event} [{row.guard}]" if row.guard else str(row.event)
            lines.append(f"    {row.source.name} --> {row.target.name}: {label}")
        sources = {row.source for row in self.rows}
        ends = dict.fromkeys(row.target for row in self.rows if row.target not in sources)
        lines += [f"    {state.name} --> [*]" for state in ends]
        return "\n".join(lines)
