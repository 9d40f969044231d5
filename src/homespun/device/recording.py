"""A recording: what a source of conditions said over time, as a script that `ScriptedConditions` plays again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import UNSET

from homespun.clock import Clock
from homespun.device.conditions import RECHECK_S, ConditionSource, Span, Value
from homespun.device.home import storage
from homespun.device.stopping import Stop, Stopped
from homespun.protocol.eligibility import CONDITIONS, Conditions


def record(source: ConditionSource, path: Path, clock: Clock, stop: Stop) -> None:
    """Write to `path` what `source` says until asked to stop: a line for the start, and one for each change.

    The last line says that nothing is known from there on. Raises `StorageFailure`.
    """
    start = clock.now()
    last: dict[str, Value] = dict.fromkeys(CONDITIONS, UNSET)
    with storage(path), path.open("wb", buffering=0) as file:

        def note(now: float, values: Conditions) -> None:
            changed = {name: values[name] for name in CONDITIONS if values[name] is not last[name]}
            if changed:
                span = Span(from_s=round(now - start, 3), **changed)
                file.write(msgspec.json.encode(span) + b"\n")
                last.update(changed)

        with suppress(Stopped):
            note(start, source.read(start))
            while not stop.requested:
                with stop.interruptible():
                    clock.sleep(RECHECK_S)
                now = clock.now()
                note(now, source.read(now))
        note(clock.now(), dict.fromkeys(CONDITIONS))
