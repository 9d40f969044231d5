"""The history of a run: one JSON object per round, a line each, so that any tool can read it while it grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from homespun.errors import InvalidInput, StorageFailure


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one round did.

    `loss` and `metrics`: means over all elements of all local steps, each measured just before its step; None where
    nothing was measured. `evaluation`: those of the model after the round, in rounds that were evaluated.
    `num_clients` took part, `num_steps` local steps were made by them together; `weight`: sum of the clients'
    weights; `clipped`: share of the clients whose update was clipped, None where nothing clips. `seconds`: wall time
    of the round, evaluation included; `time`: when it ended, UTC, ISO 8601.

    Of asynchronous runs, where a round is a step of the server: `virtual_seconds`, its time on the simulated clock;
    `staleness`, the mean of the updates in it, and `most_stale`, the largest. `loss`, `metrics` and `clipped` are there
    of those who began from the model before it, all else of those whose updates are in it.
    """

    round: int
    time: str
    loss: float | None
    metrics: dict[str, float]
    evaluation: dict[str, float] = {}
    num_clients: int
    num_examples: int
    num_steps: int
    weight: float
    clipped: float | None = None
    seconds: float
    virtual_seconds: float | None = None
    staleness: float | None = None
    most_stale: int | None = None

    @property
    def training(self) -> dict[str, float]:
        """Loss, if it was measured, and metrics of training."""
        return {**({} if self.loss is None else {"loss": self.loss}), **self.metrics}

    def value(self, name: str, evaluated: bool) -> float | None:
        """A metric, or `loss`: of the evaluation if `evaluated`, else of training; None if it was not measured."""
        return (self.evaluation if evaluated else self.training).get(name)


class History:
    """The records of a run, in memory and, if it has a file, durable line by line."""

    def __init__(self, path: Path | None = None, records: Iterable[RoundRecord] = ()) -> None:
        self.path = path
        self.records = list(records)

    @classmethod
    def begin(cls, path: Path) -> History:
        """No records, and an empty file."""
        history = cls(path)
        history._write("w", [])
        return history

    @classmethod
    def resume(cls, path: Path, last_round: int) -> History:
        """The records up to `last_round`; later ones, of rounds whose state was lost, leave the file, too."""
        records = [record for record in read_history(path) if record.round <= last_round]
        if [record.round for record in records] != list(range(1, last_round + 1)):
            raise InvalidInput(
                f"{path} lacks rounds before the checkpoint of round {last_round}",
                hint="the files in this directory are not of one run; begin in another one",
            )
        history = cls(path, records)
        history._write("w", records)
        return history

    def append(self, record: RoundRecord) -> None:
        """Raises `StorageFailure` if the file cannot take it."""
        self.records.append(record)
        self._write("a", [record])

    def _write(self, mode: str, records: Iterable[RoundRecord]) -> None:
        if self.path is None:
            return
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        try:
            with self.path.open(mode + "b") as file:
                file.write(lines)
        except OSError as error:
            raise StorageFailure(f"{self.path} cannot be written: {error.strerror}") from error


def read_history(path: Path) -> list[RoundRecord]:
    """All records of a file; a last line that was cut off by a crash is left out.

    Raises `InvalidInput` for a file that is missing or is no history.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidInput(
            f"there is no history at {path}: {error.strerror}",
            hint="give the directory of a simulation",
        ) from error
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is cut off
        try:
            records.append(msgspec.json.decode(line, type=RoundRecord))
        except msgspec.MsgspecError as error:
            raise InvalidInput(f"{path}, line {number} is not a round: {error}") from error
    return records


def text(values: Mapping[str, float]) -> str:
    """Metrics for people, four digits each."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
