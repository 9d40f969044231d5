"""Conditions where only psutil is there: what it tells, and what stays unknown."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from homespun.device import measured as measuring
from homespun.device.measured import (
    BATTERY_OK_PERCENT,
    HOT_C,
    PortableConditions,
    enough_battery,
    measured,
)
from homespun.protocol.eligibility import CONDITIONS

NOW = 1_700_000_000.0
Battery = namedtuple("Battery", "percent power_plugged")
Sensor = namedtuple("Sensor", "current high")


def read(root: Path, name: str) -> bool | None:
    found = PortableConditions(root).read(NOW)
    assert tuple(found) == CONDITIONS
    return found[name]


def say(monkeypatch: pytest.MonkeyPatch, function: str, answer: Any) -> None:
    """Let the platform's part of psutil answer this, or fail with it."""

    def told() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(psutil, function, told, raising=False)


def test_whether_it_is_used_and_what_its_network_costs_stays_unknown(tmp_path: Path):
    assert read(tmp_path, "idle") is None
    assert read(tmp_path, "unmetered") is None


@pytest.mark.parametrize(
    ("battery", "charging", "battery_ok"),
    [
        (Battery(50.0, True), True, True),
        (Battery(5.0, True), True, True),
        (Battery(50.0, False), False, True),
        (Battery(5.0, False), False, False),
        (Battery(50.0, None), None, True),
        (Battery(5.0, None), None, None),
        (None, None, None),  # no battery, or none that psutil sees
        (OSError("no such device"), None, None),
    ],
)
def test_the_battery(
    battery: Any,
    charging: bool | None,
    battery_ok: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    say(monkeypatch, "sensors_battery", battery)
    assert read(tmp_path, "charging") is charging
    assert read(tmp_path, "battery_ok") is battery_ok


def test_the_limit_of_the_battery():
    assert enough_battery(False, BATTERY_OK_PERCENT) is True
    assert enough_battery(False, BATTERY_OK_PERCENT - 1) is False
    assert enough_battery(False, None) is None
    assert enough_battery(True, None) is True


@pytest.mark.parametrize(
    ("chips", "cool"),
    [
        ({}, None),
        ({"cpu": []}, None),
        ({"cpu": [Sensor(45.0, None)]}, True),
        ({"cpu": [Sensor(HOT_C, None)]}, False),
        ({"cpu": [Sensor(HOT_C + 5, 100.0)]}, True),
        ({"cpu": [Sensor(45.0, 100.0), Sensor(100.0, 100.0)]}, False),
        ({"cpu": [Sensor(45.0, None)], "disk": [Sensor(71.0, 70.0)]}, False),
        ({"cpu": [Sensor(45.0, 0.0)]}, True),  # a limit that is none
        (OSError("gone"), None),
    ],
)
def test_temperatures(
    chips: Any, cool: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    say(monkeypatch, "sensors_temperatures", chips)
    assert read(tmp_path, "cool") is cool


@pytest.mark.parametrize(
    ("function", "names"),
    [("sensors_temperatures", ["cool"]), ("sensors_battery", ["charging", "battery_ok"])],
)
def test_a_platform_without_a_sensor(
    function: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(psutil, function, raising=False)
    assert [read(tmp_path, name) for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("limit", "name"), [("STORAGE_OK_BYTES", "storage_ok"), ("MEMORY_OK_BYTES", "memory_ok")]
)
def test_room(limit: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, limit, 1)
    assert read(tmp_path, name) is True
    monkeypatch.setattr(measuring, limit, 10**18)
    assert read(tmp_path, name) is False


def test_a_directory_that_is_gone_has_no_room_that_is_known(tmp_path: Path):
    assert read(tmp_path / "gone", "storage_ok") is None


def test_other_platforms_are_not_asked_for_a_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere")
    with measured(tmp_path) as source:
        assert isinstance(source, PortableConditions)
        assert "idle" not in source.origins
        assert source.origins["charging"] == "psutil"
