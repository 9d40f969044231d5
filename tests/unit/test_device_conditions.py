"""Conditions: scripts, recordings, and the watch that ends work in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from homespun.clock import ManualClock
from homespun.device import recording
from homespun.device.conditions import (
    RECHECK_S,
    ScriptedConditions,
    Span,
    Watch,
    parse_script,
)
from homespun.device.stopping import Stop
from homespun.errors import InvalidConfig, StorageFailure
from homespun.protocol.eligibility import (
    CONDITIONS,
    Conditions,
    Policy,
    check_conditions,
    refusals,
)

START = 1_700_000_000.0


def test_a_script_is_a_timeline_from_the_start():
    script = parse_script(
        b'[{"to_s": 60, "idle": false}, {"from_s": 30, "to_s": 40, "idle": null}]'
    )
    source = ScriptedConditions(script, START)
    idle = {at: source.read(START + at)["idle"] for at in (0, 29, 30, 39, 40, 59, 60, 1e6)}
    assert idle == {
        0: False,
        29: False,
        30: None,
        39: None,
        40: False,
        59: False,
        60: True,
        1e6: True,
    }
    assert all(source.read(START)[name] for name in CONDITIONS if name != "idle")


def test_constants_are_one_span():
    source = ScriptedConditions(parse_script(b'{"charging": false}'), START)
    assert source.read(START + 1e9) == {**dict.fromkeys(CONDITIONS, True), "charging": False}


def test_a_span_knows_every_condition():
    assert set(Span.__struct_fields__) == {"from_s", "to_s", *CONDITIONS}


@pytest.mark.parametrize(
    "script",
    [b"", b"[1]", b'{"asleep": true}', b'{"idle": "no"}', b"\xff", b'{"idle": true}\n{"idle"'],
)
def test_a_script_that_is_none_is_refused(script: bytes):
    with pytest.raises(InvalidConfig) as caught:
        parse_script(script)
    assert "idle" in caught.value.hint


class Day:
    """A source that loses charging after 10 seconds, cannot tell from 20 on, and ends the recording at 30."""

    script_start = None

    def __init__(self, clock: ManualClock, stop: Stop) -> None:
        self._clock, self._stop = clock, stop

    def read(self, now: float) -> Conditions:
        hour = int(now - START) // 10
        self._stop.requested = hour == 3
        return {**dict.fromkeys(CONDITIONS, True), "charging": (True, False, None, None)[hour]}


def test_a_recording_is_a_script(tmp_path: Path):
    clock, stop = ManualClock(START), Stop()
    recording.record(Day(clock, stop), tmp_path / "day.jsonl", clock, stop)
    lines = (tmp_path / "day.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert lines[1] == '{"from_s":10.0,"charging":false}'
    source = ScriptedConditions(parse_script("\n".join(lines).encode()), 0.0)
    seen = {at: source.read(at)["charging"] for at in (0, 9, 10, 19, 20)}
    assert seen == {0: True, 9: True, 10: False, 19: False, 20: None}
    assert source.read(29.0) == {**dict.fromkeys(CONDITIONS, True), "charging": None}
    assert source.read(30.0) == dict.fromkeys(CONDITIONS)  # the device may have been anything since


def test_a_recording_that_cannot_be_written_says_so(tmp_path: Path):
    clock, stop = ManualClock(START), Stop()
    with pytest.raises(StorageFailure, match="day"):
        recording.record(Day(clock, stop), tmp_path / "no" / "day.jsonl", clock, stop)


class Counting:
    """A source that counts how often it is asked; `values` may change under way."""

    def __init__(self) -> None:
        self.values: dict[str, bool | None] = dict.fromkeys(CONDITIONS, True)
        self.asked = 0

    def read(self, now: float) -> Conditions:
        self.asked += 1
        return self.values


def watch(
    source: Counting, clock: ManualClock, stop: Stop | None = None, *, unknown_is_met: bool = False
) -> Watch:
    policy = Policy(unknown_is_met=unknown_is_met)

    def against() -> str:
        unmet = refusals(check_conditions(("idle",), source.read(clock.now()), policy))
        return "; ".join(check.text for check in unmet)

    return Watch(against, clock, stop or Stop(), START + 100)


def test_work_stops_within_two_seconds_of_a_condition_ending():
    source, clock = Counting(), ManualClock(START)
    should_stop = watch(source, clock)
    for _ in range(100):
        assert not should_stop()
        clock.advance(0.05)
    source.values["idle"] = False
    ended = clock.now()
    while not should_stop():
        clock.advance(0.05)
    assert clock.now() - ended <= 2.0
    assert should_stop.reason == "the device is not idle"
    source.values["idle"] = True
    clock.advance(10)
    assert should_stop()  # it does not start again by itself


def test_measuring_is_throttled_but_never_older_than_a_second():
    source, clock = Counting(), ManualClock(START)
    should_stop = watch(source, clock)
    for _ in range(100):
        should_stop()
    assert source.asked == 1
    clock.advance(RECHECK_S)
    should_stop()
    assert source.asked == 2
    assert RECHECK_S <= 1.0


def test_a_clock_set_back_does_not_blind_the_watch():
    source, clock = Counting(), ManualClock(START)
    should_stop = watch(source, clock)
    assert not should_stop()
    clock.advance(-3600)
    source.values["idle"] = False
    assert should_stop()


def test_unknown_is_no_unless_the_policy_says_otherwise():
    source, clock = Counting(), ManualClock(START)
    source.values["idle"] = None
    assert watch(source, clock)()
    assert not watch(source, clock, unknown_is_met=True)()


def test_the_deadline_and_the_person_end_work_too():
    source, clock, stop = Counting(), ManualClock(START), Stop()
    late, stopped = watch(source, clock), watch(source, clock, stop)
    clock.advance(100)
    assert late()
    assert "deadline" in late.reason
    stop.request()
    assert stopped()
    assert "stopped" in stopped.reason
