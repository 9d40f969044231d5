"""The conditions of this machine, measured at every reading. What cannot be measured is None, never assumed.

The numbers that psutil has, everywhere: battery, free disk, free memory, temperatures. Whether the person is using
the device, and whether they pay for its network by the byte, only Linux tells (`device.linux`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import psutil

from homespun.device.conditions import ConditionSource
from homespun.protocol.eligibility import CONDITIONS, Conditions

BATTERY_OK_PERCENT = 20.0
"""`battery_ok` on battery; on mains it holds at any charge."""
STORAGE_OK_BYTES = 1_000_000_000
"""`storage_ok`: free where the device's directory is."""
MEMORY_OK_BYTES = 300_000_000
"""`memory_ok`: what the machine could give without swapping, beside what the device already uses."""
HOT_C = 80.0
"""`cool`: every sensor is below its own upper limit, or below this if it states none."""
SYSTEM_BUS = Path("/var/run/dbus/system_bus_socket")
"""Where the D-Bus specification puts the system bus, unless DBUS_SYSTEM_BUS_ADDRESS says otherwise."""


class Measured(ConditionSource, Protocol):
    """A source that measures. `origins`: who is asked for which condition; nobody for those that are missing."""

    origins: Mapping[str, str]


@contextmanager
def measured(root: Path) -> Iterator[Measured]:
    """The source for this machine; `root` is the device's directory. Decided once, at the start."""
    if sys.platform == "linux" and (
        os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS.exists()
    ):
        from homespun.device.linux import LinuxConditions

        with closing(LinuxConditions(root)) as source:
            yield source
    else:
        yield PortableConditions(root)


class PortableConditions:
    """What psutil tells. Whether the device is idle and its network unmetered stays unknown."""

    script_start = None

    origins: Mapping[str, str] = {
        **dict.fromkeys(("charging", "battery_ok", "cool", "memory_ok"), "psutil"),
        "storage_ok": "the file system",
    }

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, now: float) -> Conditions:
        """None of these blocks; `now` is not needed, because nothing is remembered."""
        measures: dict[str, Callable[[], bool | None]] = {
            "charging": lambda: _battery()[0],
            "battery_ok": lambda: enough_battery(*_battery()),
            "cool": _cool,
            "storage_ok": lambda: shutil.disk_usage(self._root).free >= STORAGE_OK_BYTES,
            "memory_ok": lambda: bool(psutil.virtual_memory().available >= MEMORY_OK_BYTES),
        }
        return {name: _told(measures[name]) if name in measures else None for name in CONDITIONS}


def enough_battery(charging: bool | None, percent: float | None) -> bool | None:
    """`battery_ok` from `charging` and the charge in percent; None where that does not decide it."""
    if charging or (percent is not None and percent >= BATTERY_OK_PERCENT):
        return True
    return None if charging is None or percent is None else False


def _told(measure: Callable[[], bool | None]) -> bool | None:
    try:
        return measure()
    except (OSError, AttributeError, psutil.Error):  # psutil lacks what a platform lacks
        return None


def _battery() -> tuple[bool | None, float | None]:
    """Charging, percent. psutil does not tell a machine without a battery from one that hides it."""
    battery = psutil.sensors_battery()
    return (battery.power_plugged, battery.percent) if battery else (None, None)


def _cool() -> bool | None:
    chips = psutil.sensors_temperatures().values()
    found = [sensor.current < (sensor.high or HOT_C) for chip in chips for sensor in chip]
    return all(found) if found else None
