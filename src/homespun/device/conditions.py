"""What the device is doing now: idle, charging, unmetered, ...; judged in `protocol.eligibility`.

A source answers for one moment: it measures (`device.measured`), or plays a script. A recording of a source is a
script, so that what happened on one device can happen again on many. While the device works, a `Watch` asks its source
again at least once a second, so that the device is the person's again within two seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from homespun.clock import Clock
from homespun.device.stopping import Stop
from homespun.errors import InvalidConfig
from homespun.protocol.eligibility import CONDITIONS, Conditions

RECHECK_S = 0.5
"""A measurement is this old at most when work goes on because of it."""

Value = bool | None | UnsetType


class ConditionSource(Protocol):
    """Every name of `CONDITIONS` to True, False, or None (the platform cannot tell).

    `script_start`: Unix seconds from which the times of a script count; None: it measures.
    """

    @property
    def script_start(self) -> float | None: ...

    def read(self, now: float) -> Conditions: ...


class Span(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """From `from_s` until before `to_s` (None: for good) after the start, these conditions have these values."""

    from_s: float = 0.0
    to_s: float | None = None
    idle: Value = UNSET
    charging: Value = UNSET
    unmetered: Value = UNSET
    battery_ok: Value = UNSET
    cool: Value = UNSET
    storage_ok: Value = UNSET
    memory_ok: Value = UNSET

    def covers(self, elapsed_s: float) -> bool:
        return self.from_s <= elapsed_s and (self.to_s is None or elapsed_s < self.to_s)


class ScriptedConditions:
    """A timeline from `start`: everything holds, except where a span says otherwise; later spans win."""

    def __init__(self, script: Sequence[Span], start: float) -> None:
        self.script, self.script_start = tuple(script), start

    def read(self, now: float) -> Conditions:
        values: dict[str, bool | None] = dict.fromkeys(CONDITIONS, True)
        for span in self.script:
            if span.covers(now - self.script_start):
                said = {name: getattr(span, name) for name in CONDITIONS}
                values |= {name: value for name, value in said.items() if value is not UNSET}
        return values


def parse_script(data: bytes) -> tuple[Span, ...]:
    """A script from JSON: a list of spans; one alone, such as `{"charging": false}`; or a recording, a span per line.

    Raises `InvalidConfig` naming what is wrong.
    """
    try:
        if data.lstrip().startswith(b"{"):
            return tuple(msgspec.json.Decoder(Span).decode_lines(data))
        return msgspec.json.decode(data, type=tuple[Span, ...])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidConfig(
            f"the conditions script cannot be read: {error}",
            hint='write [{"from_s": 0, "to_s": 60, "idle": false}, ...]; the conditions are: '
            + ", ".join(CONDITIONS),
        ) from error


class Watch:
    """`should_stop` for one piece of work: called as often as one likes, measured every `RECHECK_S`.

    `against` gives what speaks against going on now, in words. Once it has said yes it keeps saying so; `reason` says
    why, `said_at` since when.
    """

    def __init__(self, against: Callable[[], str], clock: Clock, stop: Stop, until: float) -> None:
        self._against, self._clock, self._stop, self._until = against, clock, stop, until
        self._measured_at = float("-inf")
        self.reason = ""
        self.said_at = 0.0

    def __call__(self) -> bool:
        if not self.reason:
            self.reason, self.said_at = self._measure(), self._clock.now()
        return bool(self.reason)

    def _measure(self) -> str:
        if self._stop.requested:
            return "the device was stopped"
        now = self._clock.now()
        if now >= self._until:
            return "the deadline has passed"
        if 0 <= now - self._measured_at < RECHECK_S:
            return ""
        self._measured_at = now
        return self._against()
