"""Linux: UPower, logind and NetworkManager, asked over D-Bus' system bus.

They are asked at every reading and no answer is kept, so that none is older than its question: who is away, or does
not answer within `ANSWER_S`, leaves its conditions unknown. A lost connection is made again at the next reading. The
bus is served by a thread of its own, so that a reading waits for nothing else and may be interrupted anywhere.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from homespun.device.measured import PortableConditions, enough_battery
from homespun.protocol.eligibility import Conditions

if TYPE_CHECKING:  # imported where it is used: the package is installed on Linux only
    from dbus_fast.aio import MessageBus

ANSWER_S = 1.0
"""A reading takes this long at most. With the watch's recheck it leaves half a second of the two to stop in."""
IDLE_AFTER_S = 300.0
"""A terminal is idle when nothing was typed for so long; a desktop decides by itself and says so."""

UPOWER = "org.freedesktop.UPower"
LOGIND = "org.freedesktop.login1"
NETWORK_MANAGER = "org.freedesktop.NetworkManager"
PROPERTIES = "org.freedesktop.DBus.Properties"

Found = dict[str, bool | None]

# UPower's State: 1 charging, 4 fully charged, 5 plugged in and holding back to spare the battery; 0 unknown;
# the others discharge, some of them although plugged in.
CHARGING = {0: None, 1: True, 4: True, 5: True}
# NetworkManager's Metered: 1 yes, 2 no, 3 guessed yes, 4 guessed no; 0 unknown.
UNMETERED = {1: False, 2: True, 3: False, 4: True}
NO_NETWORK = (1, 2)  # NetworkManager's Connectivity: 1 none, 2 behind a login page
GRAPHICAL = ("x11", "wayland", "mir")


class LinuxConditions:
    """Close it to leave the bus."""

    script_start = None

    origins: Mapping[str, str] = {
        **PortableConditions.origins,
        "idle": "logind",
        "charging": "UPower",
        "battery_ok": "UPower",
        "unmetered": "NetworkManager",
    }

    def __init__(self, root: Path) -> None:
        import dbus_fast.aio  # noqa: F401  (now, so that no reading waits for it)

        self._portable = PortableConditions(root)
        self._bus: MessageBus | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="system bus", daemon=True
        )
        self._thread.start()

    def read(self, now: float) -> Conditions:
        """All conditions; never raises and never takes much longer than `ANSWER_S`."""
        asked = asyncio.run_coroutine_threadsafe(self._ask(now), self._loop)
        return {**self._portable.read(now), **asked.result()}

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask(self, now: float) -> Found:
        found: Found = dict.fromkeys(("idle", "charging", "battery_ok", "unmetered"))
        connecting = asyncio.ensure_future(self._connected())

        async def ask(measure: Callable[[MessageBus], Awaitable[Found]]) -> None:
            found.update(await measure(await connecting))

        measures = (_power, partial(_use, now=now), _network)
        tasks = [asyncio.ensure_future(ask(measure)) for measure in measures]
        _, late = await asyncio.wait(tasks, timeout=ANSWER_S)
        for task in late:
            task.cancel()
        # Whoever failed has put nothing into `found`.
        await asyncio.gather(*tasks, return_exceptions=True)
        if late:  # or unanswered questions would pile up in the bus
            await self._leave()
        return found

    async def _connected(self) -> MessageBus:
        from dbus_fast import BusType
        from dbus_fast.aio import MessageBus

        if self._bus is None or not self._bus.connected:
            self._bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
            self._gone = asyncio.ensure_future(self._bus.wait_for_disconnect())  # type: ignore[no-untyped-call]
            # Why is looked at, so that nobody logs that it was not; the next reading connects again.
            self._gone.add_done_callback(lambda gone: gone.cancelled() or gone.exception())
        return self._bus

    async def _leave(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None and bus.connected:
            bus.disconnect()
            await asyncio.wait([self._gone])


async def _power(bus: MessageBus) -> Found:
    """The display device stands for all batteries; where there is none, being on mains is what charging means."""
    path = "/org/freedesktop/UPower"
    on_battery, battery = await asyncio.gather(
        _get(bus, UPOWER, path, UPOWER, "OnBattery"),
        _get(bus, UPOWER, f"{path}/devices/DisplayDevice", f"{UPOWER}.Device"),
    )
    percent = battery["Percentage"] if battery["IsPresent"] else None
    charging = not on_battery and (percent is None or CHARGING.get(battery["State"], False))
    return {"charging": charging, "battery_ok": enough_battery(charging, percent)}


async def _use(bus: MessageBus, now: float) -> Found:
    """Idle: no session is in use, and no program, such as a film, asks that the machine count as used."""
    path, manager = "/org/freedesktop/login1", f"{LOGIND}.Manager"
    blocked, sessions = await asyncio.gather(
        _get(bus, LOGIND, path, manager, "BlockInhibited"),
        _call(bus, LOGIND, path, manager, "ListSessions"),
    )
    found = await asyncio.gather(
        *(_get(bus, LOGIND, session[-1], f"{LOGIND}.Session") for session in sessions)
    )
    used = any(_in_use(session, now) for session in found)
    return {"idle": not used and "idle" not in blocked.split(":")}


def _in_use(session: dict[str, Any], now: float) -> bool:
    """Whether somebody uses it: only people's sessions count, not those of services or of a login screen."""
    if not session["Class"].startswith("user") or session["State"] == "closing":
        return False
    if session["Type"] in GRAPHICAL:
        return not (session["IdleHint"] or session["LockedHint"])
    # A terminal's last input, in microseconds; 0 for a session without a terminal, of which nothing is known.
    last_input = session["IdleSinceHint"] / 1e6
    return not (last_input and now - last_input >= IDLE_AFTER_S)


async def _network(bus: MessageBus) -> Found:
    """`Metered` is the primary connection's."""
    path = "/org/freedesktop/NetworkManager"
    metered, connectivity = await asyncio.gather(
        _get(bus, NETWORK_MANAGER, path, NETWORK_MANAGER, "Metered"),
        _get(bus, NETWORK_MANAGER, path, NETWORK_MANAGER, "Connectivity"),
    )
    return {"unmetered": False if connectivity in NO_NETWORK else UNMETERED.get(metered)}


async def _get(bus: MessageBus, service: str, path: str, interface: str, *name: str) -> Any:
    """One property of an object, or a dictionary of all that the interface has."""
    member = "Get" if name else "GetAll"
    return await _call(bus, service, path, PROPERTIES, member, interface, *name)


async def _call(
    bus: MessageBus, service: str, path: str, interface: str, member: str, *arguments: str
) -> Any:
    """The first value of the answer, variants opened. Raises `ConnectionError` when it is an error."""
    from dbus_fast import Message, MessageType, unpack_variants

    reply = await bus.call(
        Message(
            destination=service,
            path=path,
            interface=interface,
            member=member,
            signature="s" * len(arguments),
            body=list(arguments),
        )
    )
    if reply.message_type is MessageType.ERROR:
        raise ConnectionError(f"{service} does not tell: {reply.error_name}")
    return unpack_variants(reply.body[0])
