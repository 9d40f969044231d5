"""device.json while the device runs: what a person or an experiment writes into it holds from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from homespun.clock import ManualClock
from homespun.device.conditions import Span
from homespun.device.current import CurrentScript, CurrentSettings
from homespun.device.home import Home
from homespun.device.policy import set_policy
from homespun.device.status import read_status
from homespun.device.why import Why, explain
from homespun.protocol.session import SessionState as S
from tests.unit.device_server import Device, FakeServer
from tests.unit.test_device_cli import enrolled

BUSY = (Span(idle=False),)
BUSY_FROM_10_TO_20 = (Span(from_s=10, to_s=20, idle=False),)
START = 1_700_000_000.0


@pytest.fixture
def device(tmp_path: Path):
    """It plays the script in its device.json, as `homespun device run` has it do."""
    device = Device(tmp_path / "device", FakeServer(ManualClock(START)))
    device.conditions = CurrentScript(device.home, device.settings, device.clock.now())
    yield device
    device.kill()


def write_script(home: Home, script: tuple[Span, ...] | None) -> None:
    home.write_settings(replace(home.settings(), conditions=script))


def why(device: Device) -> Why:
    return explain(device.home, device.clock)


def idle(device: Device) -> bool | None:
    """What `why` says, which is what the device does: it waits, or it does not."""
    (said,) = [check.holds for check in why(device).checks if check.name == "idle"]
    return said


def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path):
    home = enrolled(tmp_path)
    current = CurrentSettings(home, home.settings())
    set_policy(home, ["min_group=7"])
    before = current.take_change()
    assert before is not None
    assert (before.policy.min_group, current.policy().min_group) == (10, 7)
    home.settings_file.write_text("{")
    assert not current.take_change()
    assert current.policy().min_group == 7
    home.settings_file.unlink()
    assert current.policy().min_group == 7


def test_sleep_ends_when_the_settings_change(tmp_path: Path):
    home = enrolled(tmp_path)
    current = CurrentSettings(home, home.settings())

    class Clock(ManualClock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.now() >= 1_700_000_010.0:
                set_policy(home, ["is_enabled=no"])

    clock = Clock()
    current.sleep(clock, 60.0)
    assert 10.0 <= clock.now() - 1_700_000_000.0 <= 11.0
    assert current.take_change()
    current.sleep(clock, 60.0)
    assert clock.now() >= 1_700_000_070.0


# --- a script that is rewritten -----------------------------------------------------------------------------


def test_a_script_counts_from_the_start_and_from_when_it_was_seen_to_change(tmp_path: Path):
    home = enrolled(tmp_path)
    write_script(home, BUSY_FROM_10_TO_20)
    source = CurrentScript(home, home.settings(), START)
    assert [source.read(START + after)["idle"] for after in (0, 10, 20)] == [True, False, True]
    set_policy(home, ["min_group=7"])
    assert not source.read(START + 15)["idle"]  # it is the same script
    write_script(home, (*BUSY_FROM_10_TO_20, Span(charging=False)))
    assert source.script_start == START
    assert source.read(START + 115) == {**source.read(START), "idle": True, "charging": False}
    assert source.script_start == START + 115
    assert [source.read(START + after)["idle"] for after in (124, 125, 135)] == [True, False, True]


@pytest.mark.parametrize("content", ["{", None])
def test_without_a_script_the_last_one_goes_on(content: str | None, tmp_path: Path):
    home = enrolled(tmp_path)
    write_script(home, BUSY)
    source = CurrentScript(home, home.settings(), START)
    if content is None:
        write_script(home, None)
    else:
        home.settings_file.write_text(content)
    assert not source.read(START + 5)["idle"]


def test_a_device_that_is_picked_up_and_put_down(device: Device):
    device.server.open_round()
    device.run_to(S.TRAINING)
    write_script(device.home, BUSY)
    device.step()
    status = read_status(device.home)
    assert status is not None
    assert status.verdict == "paused: the device is not idle"
    assert status.script_start == device.clock.now() - 1.0
    assert idle(device) is False
    write_script(device.home, ())
    assert idle(device) is True
    device.run_to(S.ACKNOWLEDGED)


def test_picked_up_while_it_works_it_stops_within_a_second(device: Device):
    device.server.open_round()
    device.run_to(S.TRAINING)
    seen: list[float] = []

    def work(job: object, should_stop: Callable[[], bool]) -> None:
        assert not should_stop()
        write_script(device.home, BUSY)
        began = device.clock.now()
        while not should_stop():
            device.clock.advance(0.1)
        seen.append(device.clock.now() - began)
        status = read_status(device.home)
        assert status is not None  # before the step has ended
        assert (status.conditions["idle"], status.script_start) == (False, device.clock.now())

    device.runtime._labour = work
    device.step()
    assert seen[0] <= 1.0
    assert device.runtime.session.is_paused
    assert idle(device) is False


def test_a_device_that_waits_for_its_time_says_so_too(device: Device):
    device.run_to(S.REJECTED)
    pause = device.runtime.step()
    assert pause > 5.0
    write_script(device.home, BUSY_FROM_10_TO_20)
    seen_at = device.clock.now()
    device.runtime._current.sleep(device.clock, pause)
    assert device.clock.now() == seen_at
    device.runtime.step()
    said = []
    for _ in range(3):
        said.append(idle(device))
        device.clock.advance(10.0)
    assert said == [True, False, True]
