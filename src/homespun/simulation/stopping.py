"""When a run ends before its last round: pure functions of its history, so that a resumed run decides the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from homespun.errors import InvalidConfig
from homespun.simulation.history import RoundRecord

Mode = Literal["min", "max"]


def mode_of(metric: str) -> Mode:
    """Losses are better when lower, the author's metrics when higher, as in a plan."""
    return "min" if metric.endswith("loss") else "max"


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop when `metric` has not been better than its best by more than `min_delta` for `patience` measurements.

    `mode`: `min` or `max`; None: as `mode_of` says.
    """

    metric: str = "loss"
    patience: int = 10
    min_delta: float = 0.0
    mode: Mode | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for numbers that mean nothing."""
        _check_mode(self.mode)
        if self.patience < 1 or not 0 <= self.min_delta < float("inf"):
            raise InvalidConfig(
                "early stopping needs a patience of at least 1 and a min_delta of at least 0",
                got=f"patience {self.patience}, min_delta {self.min_delta}",
            )


@dataclass(frozen=True, kw_only=True)
class Target:
    """Stop when `metric` has reached `value`; `mode`: as of `EarlyStopping`."""

    metric: str
    value: float
    mode: Mode | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for a value that nothing can reach."""
        _check_mode(self.mode)
        if not isfinite(self.value):
            raise InvalidConfig("the target must be a finite number", got=self.value)


def measured(
    records: Sequence[RoundRecord], metric: str, evaluated: bool
) -> list[tuple[int, float]]:
    """(round, value) of each round in which `metric` was measured, on the evaluation's rows if `evaluated`."""
    pairs = ((record.round, record.value(metric, evaluated)) for record in records)
    return [(number, value) for number, value in pairs if value is not None]


def best_round(
    records: Sequence[RoundRecord], metric: str, mode: Mode, evaluated: bool
) -> int | None:
    """The first round with the best value; None while nothing was measured."""
    sign = 1.0 if mode == "min" else -1.0
    pairs = measured(records, metric, evaluated)
    return min(pairs, key=lambda pair: sign * pair[1])[0] if pairs else None


def reason_to_stop(
    records: Sequence[RoundRecord],
    early_stopping: EarlyStopping | None,
    target: Target | None,
    evaluated: bool,
) -> str:
    """Why the run ends here; empty if it goes on."""
    if target and records:
        sign = 1.0 if (target.mode or mode_of(target.metric)) == "min" else -1.0
        value = records[-1].value(target.metric, evaluated)
        if value is not None and sign * value <= sign * target.value:
            return f"{target.metric} reached {value:.4g}, the target was {target.value:.4g}"
    if early_stopping:
        rule = early_stopping
        sign = 1.0 if (rule.mode or mode_of(rule.metric)) == "min" else -1.0
        best, waited = float("inf"), 0
        for _, value in measured(records, rule.metric, evaluated):
            better = sign * value < best - rule.min_delta
            best, waited = (sign * value, 0) if better else (best, waited + 1)
        if waited >= rule.patience:
            return f"{rule.metric} has not become better in {waited} measurements"
    return ""


def _check_mode(mode: str | None) -> None:
    if mode not in (None, "min", "max"):
        raise InvalidConfig("mode is min or max", got=str(mode))
