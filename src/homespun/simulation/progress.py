"""What a terminal shows while a run goes on: a bar, the time that is left, and the newest numbers."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from homespun.simulation.history import RoundRecord, text


class ProgressBar:
    """A callback of a run; shows nothing where standard error is no terminal."""

    def __init__(self, num_rounds: int, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("rounds", total=num_rounds, numbers="")
        self._evaluation = ""

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, record: RoundRecord) -> None:
        if record.evaluation:
            self._evaluation = f" | evaluation: {text(record.evaluation)}"
        numbers = text(record.training) + self._evaluation
        self._progress.update(self._task, completed=record.round, numbers=numbers)
