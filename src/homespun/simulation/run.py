"""The loop of a run: cohort, round, evaluation, record, checkpoint, until there is a reason to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from homespun.errors import Conflict, InvalidConfig, StorageFailure
from homespun.simulation.checkpoints import Checkpoints
from homespun.simulation.history import History, RoundRecord
from homespun.simulation.state import Rounds, Trained
from homespun.simulation.stopping import (
    EarlyStopping,
    Target,
    best_round,
    mode_of,
    reason_to_stop,
)
from homespun.types import Tree

S = TypeVar("S")
Callback = Callable[[RoundRecord], None]
"""Called after each round."""
Cohort = Callable[[int], npt.NDArray[np.int64]]
"""The clients that take part in a round, in order of their indexes in the arena."""

HISTORY, CHECKPOINTS = "history.jsonl", "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a run is kept. `identity`: settings that a resumed run must share; a checkpoint every `every` rounds."""

    directory: Path
    identity: dict[str, str]
    resume: bool = False
    every: int = 1
    keep: int = 2

    @property
    def history(self) -> Path:
        return self.directory / HISTORY

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / CHECKPOINTS, self.keep)


@dataclass(frozen=True)
class Ended(Generic[S]):
    """A run that is over: its last state, its history, and why it ended before its last round, if it did."""

    state: S
    history: Sequence[RoundRecord]
    best_round: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Run(Generic[S]):
    """`evaluated`: whether the model is evaluated, every `evaluate_every` rounds and after the last. `lasts`: virtual
    seconds of a round of these clients, if somebody wants to know.
    """

    rounds: Rounds[S]
    num_rounds: int
    cohort: Cohort
    evaluated: bool = False
    evaluate_every: int = 1
    early_stopping: EarlyStopping | None = None
    target: Target | None = None
    files: Files | None = None
    callbacks: Sequence[Callback] = ()
    lasts: Callable[[int, npt.NDArray[np.int64]], float] | None = None

    def go(self, initial: Tree | None = None) -> Ended[S]:
        """Begin, or go on where the directory says. Raises what rounds, files and callbacks raise."""
        state, first, history = self._begin(initial)
        self._check_metrics(history.records)
        for number in range(first, self.num_rounds + 1):
            if self._reason(history.records):
                break
            began = time.perf_counter()
            cohort = self.cohort(number)
            state, trained = self.rounds.round(state, number, cohort)
            if self.lasts is not None:
                before = history.records[-1].virtual_seconds if history.records else None
                ended = (before or 0.0) + self.lasts(number, cohort)
                trained = replace(trained, timing={"virtual_seconds": ended})
            evaluation = self._evaluation(state, number)
            record = _record(number, trained, evaluation, time.perf_counter() - began)
            history.append(record)
            self._check_metrics(history.records)
            self._keep(state, history.records)
            for callback in self.callbacks:
                callback(record)
        reason = self._reason(history.records)
        return Ended(state, history.records, self._best(history.records), reason)

    def _begin(self, initial: Tree | None) -> tuple[S, int, History]:
        files = self.files
        if files is None:
            return self.rounds.begin(initial), 1, History()
        try:
            files.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailure(
                f"{files.directory} cannot be made: {error.strerror}",
                hint="give a directory that can be written to",
            ) from error
        checkpoints = files.checkpoints
        newest = checkpoints.newest(files.identity) if files.resume else None
        if newest is not None:
            history = History.resume(files.history, newest.round)
            return self.rounds.restore(newest), newest.round + 1, history
        if not files.resume and (files.history.exists() or checkpoints.rounds()):
            raise Conflict(
                f"there is a simulation in {files.directory}",
                hint="resume it (resume=True, --resume), or give another directory",
            )
        state = self.rounds.begin(initial)
        return state, 1, History.begin(files.history)

    def _evaluation(self, state: S, number: int) -> dict[str, float]:
        due = number % self.evaluate_every == 0 or number == self.num_rounds
        return self.rounds.evaluate(state) if self.evaluated and due else {}

    def _keep(self, state: S, records: Sequence[RoundRecord]) -> None:
        if self.files is None:
            return
        number, best = records[-1].round, self._best(records)
        ending = number == self.num_rounds or self._reason(records)
        if number % self.files.every == 0 or number == best or ending:
            taken = self.rounds.snapshot(state)
            kept = replace(taken, round=number, identity=self.files.identity)
            self.files.checkpoints.save(kept, best)

    def _reason(self, records: Sequence[RoundRecord]) -> str:
        return reason_to_stop(records, self.early_stopping, self.target, self.evaluated)

    def _best(self, records: Sequence[RoundRecord]) -> int | None:
        rule = self.early_stopping or self.target
        metric = rule.metric if rule else "loss"
        return best_round(records, metric, (rule and rule.mode) or mode_of(metric), self.evaluated)

    def _check_metrics(self, records: Sequence[RoundRecord]) -> None:
        """A metric that is waited for and never measured would be waited for in vain."""
        if not (self.early_stopping or self.target):
            return
        seen = [r.evaluation if self.evaluated else {"loss": 0, **r.metrics} for r in records]
        known = next((values for values in seen if values), None)
        for rule in (self.early_stopping, self.target):
            if rule and known is not None and rule.metric not in known:
                raise InvalidConfig(
                    f"nothing measures {rule.metric!r}, which the end of the run waits for",
                    hint=f"one of: {', '.join(sorted(known))}",
                )


def _record(
    number: int, trained: Trained, evaluation: dict[str, float], seconds: float
) -> RoundRecord:
    means = {name: value.mean for name, value in trained.metrics.items()}
    return RoundRecord(
        round=number,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        loss=means.pop("loss", None),
        metrics=means,
        evaluation=evaluation,
        num_clients=trained.num_clients,
        num_examples=trained.num_examples,
        num_steps=trained.num_steps,
        weight=trained.weight,
        clipped=trained.clipped,
        seconds=round(seconds, 6),
        **trained.timing,
    )
