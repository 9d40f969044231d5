"""Stopping: a signal ends waiting at once and work at its next step, never in the middle of a write."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Raised out of a wait when the device is asked to stop; not a failure, so no `except Exception` holds it."""


class Stop:
    """`requested`: somebody wants the device to end. Work asks for it; waiting is interrupted by it."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    def on_signals(self) -> None:
        """Let SIGTERM and SIGINT be the request."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.request()

    def request(self) -> None:
        """Ask to stop. Raises `Stopped` when called, by a signal, inside `interruptible`."""
        self.requested = True
        if self._interruptible:
            raise Stopped

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A stretch that may end anywhere: sleeping, waiting for the network."""
        before, self._interruptible = self._interruptible, True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._interruptible = before
