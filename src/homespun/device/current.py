"""device.json while the device runs: the person changes the policy, an experiment its script; both count at once."""

from __future__ import annotations

import logging
from contextlib import suppress

from homespun.clock import Clock
from homespun.device.conditions import ScriptedConditions
from homespun.device.home import Home, Settings
from homespun.errors import HomespunError
from homespun.protocol.eligibility import Conditions, Policy

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.5


class CurrentSettings:
    """The settings as they are when asked: a look at the file's time. A file that cannot be read changes nothing."""

    def __init__(self, home: Home, settings: Settings) -> None:
        self._home, self._settings, self._heeded = home, settings, settings
        self._seen: tuple[int, int, int] | None = None

    def __call__(self) -> Settings:
        with suppress(OSError):
            found = self._home.settings_file.stat()
            seen = (found.st_mtime_ns, found.st_ino, found.st_size)
            if seen != self._seen:
                self._seen = seen
                self._read()
        return self._settings

    def policy(self) -> Policy:
        return self().policy

    def take_change(self) -> Settings | None:
        """What they were when this was asked last, if they are others now."""
        before, self._heeded = self._heeded, self()
        return before if before != self._heeded else None

    def sleep(self, clock: Clock, seconds: float) -> None:
        """Sleep so long, or until they change."""
        until = clock.now() + seconds
        while self() == self._heeded and (left := until - clock.now()) > 0:
            clock.sleep(min(left, LOOK_EVERY_S))

    def _read(self) -> None:
        try:
            self._settings = self._home.settings()
        except HomespunError as error:
            log.warning("the settings stay as they were: %s", error.message)


class CurrentScript:
    """The script of conditions in device.json, from `start` on. Rewritten, it is played from when that is seen."""

    def __init__(self, home: Home, settings: Settings, start: float) -> None:
        self._current = CurrentSettings(home, settings)
        self._playing = ScriptedConditions(settings.conditions or (), start)

    @property
    def script_start(self) -> float:
        return self._playing.script_start

    def read(self, now: float) -> Conditions:
        script = self._current().conditions
        if script is not None and script != self._playing.script:
            self._playing = ScriptedConditions(script, now)
        return self._playing.read(now)
