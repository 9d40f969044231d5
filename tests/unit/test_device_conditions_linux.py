"""Conditions on Linux, measured over a real D-Bus: every answer, services and buses that go, hang and come back."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

if sys.platform != "linux":
    pytest.skip("there is no system bus to measure by", allow_module_level=True)

from homespun.cli.device import app
from homespun.clock import ManualClock
from homespun.device import linux
from homespun.device import measured as measuring
from homespun.device.conditions import RECHECK_S, ScriptedConditions, parse_script
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.linux import ANSWER_S, IDLE_AFTER_S, LinuxConditions
from homespun.device.measured import BATTERY_OK_PERCENT, PortableConditions, measured
from homespun.device.status import read_status
from homespun.protocol.eligibility import CONDITIONS, Conditions
from homespun.protocol.session import SessionState as S
from tests.unit.device_server import Device, FakeServer
from tests.unit.system_bus import Machine, Service, need_daemon

NOW = 1_700_000_000.0
ASKED = ("idle", "charging", "battery_ok", "unmetered")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    need_daemon()
    with closing(Machine()) as machine:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", machine.address)
        machine.start()
        yield machine


@pytest.fixture
def source(machine: Machine, tmp_path: Path) -> Iterator[LinuxConditions]:
    with closing(LinuxConditions(tmp_path)) as source:
        yield source


def asked(source: LinuxConditions, now: float = NOW) -> dict[str, bool | None]:
    """What the bus tells, without what psutil does."""
    found = source.read(now)
    assert set(found) == set(CONDITIONS)
    return {name: found[name] for name in ASKED}


GOOD = dict.fromkeys(ASKED, True)
UNKNOWN = dict.fromkeys(ASKED)


# --- every answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_battery", "state", "percent", "charging", "battery_ok"),
    [
        (False, 1, 60.0, True, True),  # charging
        (False, 1, 3.0, True, True),
        (False, 4, 100.0, True, True),  # full
        (False, 5, 80.0, True, True),  # plugged in, holding back
        (True, 2, 60.0, False, True),  # discharging
        (True, 2, BATTERY_OK_PERCENT, False, True),
        (True, 2, BATTERY_OK_PERCENT - 0.1, False, False),
        (True, 3, 0.0, False, False),  # empty
        (False, 2, 60.0, False, True),  # plugged into a charger that is too weak
        (False, 2, 10.0, False, False),
        (False, 6, 60.0, False, True),
        (True, 0, 60.0, False, True),
        (False, 0, 60.0, None, True),  # UPower cannot tell
        (False, 0, 10.0, None, None),
        (True, 1, 60.0, False, True),  # at odds: the worse one counts
        (False, 7, 60.0, False, True),  # a state of the future
    ],
)
def test_power(
    machine: Machine,
    source: LinuxConditions,
    on_battery: bool,
    state: int,
    percent: float,
    charging: bool | None,
    battery_ok: bool | None,
):
    machine.on_battery(on_battery)
    machine.battery(State=state, Percentage=percent)
    assert asked(source) == {**GOOD, "charging": charging, "battery_ok": battery_ok}


def test_a_desktop_without_a_battery_is_on_mains(machine: Machine, source: LinuxConditions):
    machine.battery(Type=0, IsPresent=False, State=0, Percentage=0.0)
    assert asked(source) == GOOD
    machine.on_battery(True)  # one that UPower does not show
    assert asked(source) == {**GOOD, "charging": False, "battery_ok": None}


def terminal(input_s: float, **properties: str) -> dict[str, Any]:
    """A session over ssh, into whose terminal something was typed so many seconds ago."""
    return {"Type": "tty", "IdleSinceHint": int((NOW - input_s) * 1e6)} | properties


RESTING = {"IdleHint": True}


@pytest.mark.parametrize(
    ("sessions", "idle"),
    [
        pytest.param([], True, id="nobody"),
        pytest.param([{}], False, id="a desktop in use"),
        pytest.param([{"Type": "x11"}], False, id="an X desktop in use"),
        pytest.param([RESTING], True, id="a desktop at rest"),
        pytest.param([{"LockedHint": True}], True, id="a locked screen"),
        pytest.param([RESTING, {"State": "online"}], False, id="two desktops, one in use"),
        pytest.param([RESTING, terminal(10)], False, id="recent input over ssh"),
        pytest.param([RESTING, terminal(IDLE_AFTER_S)], True, id="old input over ssh"),
        pytest.param([terminal(IDLE_AFTER_S - 1)], False, id="input just too recent"),
        pytest.param([terminal(-3600)], False, id="input in the future"),
        pytest.param([{"Type": "unspecified"}], False, id="ssh without a terminal"),
        pytest.param([{"Class": "greeter"}], True, id="a login screen"),
        pytest.param([{"Class": "background"}], True, id="a nightly job"),
        pytest.param([terminal(10, State="closing")], True, id="somebody who left"),
    ],
)
def test_use(machine: Machine, source: LinuxConditions, sessions: list[dict[str, Any]], idle: bool):
    for properties in sessions:
        machine.log_in(**properties)
    assert asked(source) == {**GOOD, "idle": idle}


def test_a_film_is_use(machine: Machine, source: LinuxConditions):
    machine.log_in(**RESTING)
    machine.inhibit("handle-lid-switch:idle")
    assert asked(source) == {**GOOD, "idle": False}


@pytest.mark.parametrize(
    ("metered", "connectivity", "unmetered"),
    [
        (0, 4, None),
        (1, 4, False),
        (2, 4, True),
        (3, 4, False),
        (4, 4, True),
        (9, 4, None),
        (2, 0, True),  # nobody checks whether the network reaches anything
        (2, 1, False),  # no network
        (2, 2, False),  # a hotel's login page
        (2, 3, True),  # a network at home, without the internet: the server may be there
        (0, 1, False),
    ],
)
def test_network(
    machine: Machine,
    source: LinuxConditions,
    metered: int,
    connectivity: int,
    unmetered: bool | None,
):
    machine.network(Metered=metered, Connectivity=connectivity)
    assert asked(source) == {**GOOD, "unmetered": unmetered}


def test_a_change_is_seen_at_the_next_reading(machine: Machine, source: LinuxConditions):
    """So within a second, because a device looks that often; the answer before is not remembered."""
    for bad in (True, False, True):
        machine.on_battery(bad)
        machine.inhibit("idle" if bad else "")
        machine.network(Metered=1 if bad else 2)
        expected = GOOD | dict.fromkeys(("idle", "charging", "unmetered"), not bad)
        assert asked(source) == expected


@pytest.mark.parametrize(
    ("service", "interface", "name", "unknown"),
    [
        ("upower", "org.freedesktop.UPower", "OnBattery", ("charging", "battery_ok")),
        ("upower", "org.freedesktop.UPower.Device", "State", ("charging", "battery_ok")),
        ("logind", "org.freedesktop.login1.Manager", "BlockInhibited", ("idle",)),
        ("logind", "org.freedesktop.login1.Session", "Class", ("idle",)),
        ("network_manager", "org.freedesktop.NetworkManager", "Metered", ("unmetered",)),
        ("network_manager", "org.freedesktop.NetworkManager", "Connectivity", ("unmetered",)),
    ],
)
def test_a_service_that_does_not_say_it(
    machine: Machine,
    source: LinuxConditions,
    service: str,
    interface: str,
    name: str,
    unknown: tuple[str, ...],
):
    machine.log_in(**RESTING)
    for interfaces in getattr(machine, service).objects.values():
        interfaces.get(interface, {}).pop(name, None)
    assert asked(source) == GOOD | dict.fromkeys(unknown)


# --- who goes, hangs, and comes back ------------------------------------------------------------------------

AFFECTED = {
    "upower": ("charging", "battery_ok"),
    "logind": ("idle",),
    "network_manager": ("unmetered",),
}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a reading waits here for those that hang: shorter than for a person's device."""
    monkeypatch.setattr(linux, "ANSWER_S", 0.5)
    return 0.5


@pytest.fixture(params=AFFECTED)
def affected(request: pytest.FixtureRequest, machine: Machine) -> tuple[Service, Conditions]:
    """A service, and what is known without it."""
    return getattr(machine, request.param), GOOD | dict.fromkeys(AFFECTED[request.param])


def test_without_a_service_its_conditions_are_unknown(
    machine: Machine, source: LinuxConditions, affected: tuple[Service, Conditions]
):
    service, without = affected
    assert asked(source) == GOOD
    machine.leave(service)
    assert asked(source) == without
    machine.join(service)
    assert asked(source) == GOOD


def test_a_service_that_hangs_makes_nobody_wait(
    machine: Machine,
    source: LinuxConditions,
    affected: tuple[Service, Conditions],
    patience: float,
):
    service, without = affected
    assert asked(source) == GOOD
    connections = machine.connections()
    service.answers = False
    began = time.perf_counter()
    assert asked(source) == without
    assert time.perf_counter() - began < patience + 1
    service.answers = True
    assert asked(source) == GOOD
    now = machine.connections()
    assert len(now) == len(connections)
    assert len(now - connections) == 1  # the questions that nobody answered went with the old one


def test_a_bus_that_ends_and_comes_back(
    machine: Machine, source: LinuxConditions, caplog: pytest.LogCaptureFixture
):
    assert asked(source) == GOOD
    machine.stop()
    for _ in range(3):
        assert asked(source) == UNKNOWN
    assert source.read(NOW)["memory_ok"] is not None  # what needs no bus is still measured
    machine.start()
    assert asked(source) == GOOD
    gc.collect()  # what nobody looked at is logged when it goes
    assert caplog.messages == []


def test_a_bus_that_was_started_anew_between_two_readings(
    machine: Machine, source: LinuxConditions
):
    assert asked(source) == GOOD
    machine.stop()
    machine.start()
    assert asked(source) == GOOD


def test_a_bus_that_comes_later(machine: Machine, source: LinuxConditions):
    machine.stop()
    assert asked(source) == UNKNOWN
    machine.start()
    assert asked(source) == GOOD


@pytest.mark.parametrize("connected", [True, False])
def test_a_bus_that_hangs_makes_nobody_wait(
    machine: Machine, source: LinuxConditions, connected: bool, patience: float
):
    if connected:
        assert asked(source) == GOOD
    machine.freeze(frozen=True)
    began = time.perf_counter()
    assert asked(source) == UNKNOWN
    assert time.perf_counter() - began < patience + 1
    machine.freeze(frozen=False)
    assert asked(source) == GOOD


def test_closing_leaves_the_bus(machine: Machine, tmp_path: Path):
    connections, threads = machine.connections(), threading.active_count()
    source = LinuxConditions(tmp_path)
    assert asked(source) == GOOD
    assert len(machine.connections()) == len(connections) + 1
    source.close()
    assert machine.connections() == connections
    assert threading.active_count() == threads


# --- devices that measure ----------------------------------------------------------------------------------


class Unplugged:
    """Real conditions of a machine that is unplugged in the middle of training."""

    script_start = None

    def __init__(self, device: Device, machine: Machine, source: LinuxConditions) -> None:
        self._device, self._machine, self._source = device, machine, source
        self._measured, self.at = 0, 0.0

    def read(self, now: float) -> Conditions:
        found = self._source.read(now)
        if self._device.state is S.TRAINING:
            self._measured += 1
            if self._measured == 2:
                self._machine.on_battery(True)
                self.at = now
            self._device.clock.advance(RECHECK_S)  # batches take no time on this clock
        return found


def test_training_stops_within_two_seconds_of_unplugging(
    machine: Machine, source: LinuxConditions, tmp_path: Path
):
    server = FakeServer(ManualClock(NOW))
    device = Device(tmp_path / "device", server)
    device.conditions = conditions = Unplugged(device, machine, source)
    server.open_round()
    device.run_to(S.TRAINING)
    while not device.runtime.session.is_paused:
        device.step()
    assert conditions.at > 0
    # The clock stands while a reading waits for its answers: that is what may come on top.
    assert device.clock.now() - conditions.at + ANSWER_S <= 2.0
    device.step()
    status = read_status(device.home)
    assert status is not None
    assert status.verdict == "paused: the device is not charging"
    machine.on_battery(False)
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1
    device.kill()


def test_a_device_goes_on_when_it_is_plugged_in_again(
    machine: Machine, source: LinuxConditions, tmp_path: Path
):
    server = FakeServer(ManualClock(NOW))
    device = Device(tmp_path / "device", server)
    device.conditions = source
    server.open_round()
    machine.on_battery(True)
    for _ in range(5):
        device.step()
    assert device.state is S.WAITING
    assert [line for line in server.log if "check-in" in line] == []
    machine.on_battery(False)
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1
    device.kill()


def test_linux_is_asked_where_it_has_a_bus(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with measured(tmp_path) as source:
        assert isinstance(source, LinuxConditions)
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS")
    monkeypatch.setattr(measuring, "SYSTEM_BUS", tmp_path / "socket")
    with measured(tmp_path) as source:
        assert isinstance(source, PortableConditions)
    (tmp_path / "socket").touch()
    with measured(tmp_path) as source:
        assert isinstance(source, LinuxConditions)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A device that was told no script."""
    home = Home(tmp_path / "device")
    identity = Identity.load_or_create(home.identity_file)
    home.write_settings(
        Settings(server="http://127.0.0.1:9", population="tests", device_id=identity.device_id)
    )
    return home


def start(home: Home, *arguments: str) -> subprocess.Popen[str]:
    program = "from homespun.cli.device import app; app()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--dir", str(home.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()


def test_a_device_without_a_script_measures(machine: Machine, home: Home):
    machine.on_battery(True)
    machine.log_in()
    process = start(home, "run")
    codes: list[str] = []
    for _ in range(400):
        status = read_status(home)
        if status is not None and (codes := [refusal.code for refusal in status.refusals]):
            break
        assert process.poll() is None
        time.sleep(0.05)  # another process cannot be waited for in a better way
    end(process)
    assert codes == ["not_idle", "not_charging"]


def test_the_person_sees_what_is_measured(machine: Machine, home: Home):
    machine.on_battery(True)
    machine.leave(machine.network_manager)
    command = ["conditions", "--dir", str(home.root)]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert list(found) == list(CONDITIONS)
    assert found["idle"] == {"value": True, "from": "logind"}
    assert found["charging"] == {"value": False, "from": "UPower"}
    assert found["unmetered"] == {"value": None, "from": "NetworkManager"}
    printed = CliRunner().invoke(app, command).output
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if "_" not in line}
    assert rows["charging"] == ["no", "UPower"]
    assert rows["unmetered"] == ["unknown", "NetworkManager"]
    assert "script" not in printed


def test_a_day_is_recorded_and_played_again(machine: Machine, home: Home, tmp_path: Path):
    process = start(home, "conditions", "--record", str(tmp_path / "day.jsonl"))

    def recorded(count: int) -> list[dict[str, Any]]:
        for _ in range(400):
            if (tmp_path / "day.jsonl").exists():
                lines = (tmp_path / "day.jsonl").read_text().splitlines()
                if len(lines) == count:
                    return [json.loads(line) for line in lines]
            time.sleep(0.05)
        raise AssertionError(f"{count} lines were not written")

    (first,) = recorded(1)
    assert first.pop("from_s") == 0
    assert set(first) == set(CONDITIONS)
    machine.log_in()
    _, second = recorded(2)
    assert second.pop("from_s") > 0
    assert second == {"idle": False}
    end(process)
    (*_, last) = recorded(3)
    assert last.pop("from_s") > 0
    assert set(last.values()) == {None}
    played = ScriptedConditions(parse_script((tmp_path / "day.jsonl").read_bytes()), NOW)
    assert {name: played.read(NOW)[name] for name in ASKED} == GOOD
    assert played.read(NOW + 1e6) == dict.fromkeys(CONDITIONS)
