"""A private D-Bus system bus: a real dbus-daemon, with UPower, logind and NetworkManager played on it.

Names, paths, interfaces and types are the real ones; the values are the test's to change at any time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus

DAEMON = shutil.which("dbus-daemon")
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>{address}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/> <allow receive_sender="*"/> <allow own="*"/>
  </policy>
</busconfig>
"""
UPOWER = "org.freedesktop.UPower"
LOGIND = "org.freedesktop.login1"
NETWORK_MANAGER = "org.freedesktop.NetworkManager"


def need_daemon() -> None:
    """Skip the test, or fail it in continuous integration, where the package dbus-daemon is to be installed."""
    if DAEMON is None:
        missing = "dbus-daemon is not installed: conditions on Linux are NOT TESTED"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)


# The types of the properties, by interface.
TYPES = {
    UPOWER: {"OnBattery": "b"},
    f"{UPOWER}.Device": {"IsPresent": "b", "Percentage": "d", "State": "u", "Type": "u"},
    f"{LOGIND}.Manager": {"BlockInhibited": "s"},
    f"{LOGIND}.Session": {
        "Class": "s", "IdleHint": "b", "IdleSinceHint": "t", "LockedHint": "b", "State": "s",
        "Type": "s",
    },
    NETWORK_MANAGER: {"Connectivity": "u", "Metered": "u"},
}  # fmt: skip


class Service:
    """A name on the bus. `objects`: path -> interface -> property -> value; silent unless `answers`."""

    def __init__(self, name: str) -> None:
        self.name, self.answers = name, True
        self.objects: dict[str, dict[str, dict[str, Any]]] = {}
        self.bus: MessageBus | None = None

    def set(self, path: str, interface: str, **properties: Any) -> None:
        """Give the object at `path` these properties; the others stay as they are."""
        known = self.objects.setdefault(path, {}).setdefault(interface, {})
        known |= properties

    async def join(self, address: str) -> None:
        self.bus = await MessageBus(bus_address=address).connect()
        self.bus.add_message_handler(self._reply)
        await self.bus.request_name(self.name)

    async def leave(self) -> None:
        bus, self.bus = self.bus, None
        if bus is not None:
            bus.disconnect()
            await asyncio.gather(bus.wait_for_disconnect(), return_exceptions=True)

    def _reply(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL:
            return None
        if not self.answers:
            return True
        if message.member == "ListSessions":
            rows = [
                [path.rpartition("/")[2], 1000, "ada", "seat0", path]
                for path, interfaces in self.objects.items()
                if f"{LOGIND}.Session" in interfaces
            ]
            return Message.new_method_return(message, "a(susso)", [rows])
        interface, *name = message.body
        plain = self.objects.get(message.path or "", {}).get(interface, {})
        found = {key: Variant(TYPES[interface][key], value) for key, value in plain.items()}
        if message.member == "GetAll" and found:
            return Message.new_method_return(message, "a{sv}", [found])
        if message.member == "Get" and name[0] in found:
            return Message.new_method_return(message, "v", [found[name[0]]])
        return None  # dbus-fast answers with the error for what is unknown


class Machine:
    """A laptop on mains and free Wi-Fi that nobody uses; `start` gives it a bus, `close` takes all away."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bus-"))  # a socket's path must be short
        self.address = f"unix:path={self._folder}/socket"
        (self._folder / "bus.conf").write_text(CONFIG.format(address=self.address))
        self._daemon: subprocess.Popen[str] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.upower, self.logind = Service(UPOWER), Service(LOGIND)
        self.network_manager = Service(NETWORK_MANAGER)
        self.services = (self.upower, self.logind, self.network_manager)
        self.on_battery(False)
        self.battery(Type=2, IsPresent=True, State=1, Percentage=60.0)
        self.inhibit("handle-power-key:handle-lid-switch")  # as desktops do
        self.network(Metered=2, Connectivity=4)

    def on_battery(self, value: bool) -> None:
        self.upower.set("/org/freedesktop/UPower", UPOWER, OnBattery=value)

    def battery(self, **properties: Any) -> None:
        """Of the device that stands for all batteries."""
        path = "/org/freedesktop/UPower/devices/DisplayDevice"
        self.upower.set(path, f"{UPOWER}.Device", **properties)

    def network(self, **properties: int) -> None:
        self.network_manager.set("/org/freedesktop/NetworkManager", NETWORK_MANAGER, **properties)

    def inhibit(self, what: str) -> None:
        self.logind.set("/org/freedesktop/login1", f"{LOGIND}.Manager", BlockInhibited=what)

    def log_in(self, **properties: Any) -> None:
        """One more session; what is not said is that of a desktop in use."""
        path = f"/org/freedesktop/login1/session/_{len(self.logind.objects)}"
        desktop = {"Class": "user", "State": "active", "Type": "wayland"}
        hints = {"IdleHint": False, "IdleSinceHint": 0, "LockedHint": False}
        self.logind.set(path, f"{LOGIND}.Session", **(desktop | hints | properties))

    def start(self) -> None:
        """Start the bus, at the same address as before, and the services that are to be on it."""
        assert DAEMON is not None
        config = f"--config-file={self._folder}/bus.conf"
        self._daemon = subprocess.Popen(
            [DAEMON, "--nofork", "--nopidfile", "--print-address", config],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._daemon.stdout is not None
        assert self._daemon.stdout.readline(), "dbus-daemon did not start"
        for service in self.services:
            self.join(service)

    def stop(self) -> None:
        """End the bus as a crash does."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.communicate()
            self._daemon = None
        for service in self.services:
            self.leave(service)
        (self._folder / "socket").unlink(missing_ok=True)

    def freeze(self, *, frozen: bool) -> None:
        """Let the bus accept what is sent to it and do nothing, or go on."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def join(self, service: Service) -> None:
        self._wait(service.join(self.address))

    def leave(self, service: Service) -> None:
        self._wait(service.leave())

    def connections(self) -> set[str]:
        """Everybody who is on the bus now, but for the one who asks."""

        async def ask() -> set[str]:
            bus = await MessageBus(bus_address=self.address).connect()
            names = await bus.call(
                Message(
                    destination="org.freedesktop.DBus",
                    path="/org/freedesktop/DBus",
                    interface="org.freedesktop.DBus",
                    member="ListNames",
                )
            )
            bus.disconnect()
            await bus.wait_for_disconnect()
            return {name for name in names.body[0] if name.startswith(":")} - {bus.unique_name}

        return set(self._wait(ask()))

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)
