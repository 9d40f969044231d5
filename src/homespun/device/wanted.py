"""Whether the server still wants the report of work under way: a round may reach its goal without this device.

The server is asked beside the work, in a thread, because nothing may delay the check of the conditions. One that does
not answer has said nothing.
"""

from __future__ import annotations

import threading
import time

from homespun.device.connection import Connection
from homespun.errors import HomespunError
from homespun.protocol.messages import Assigned, Receipt, ReportState

ASK_EVERY_S = 15.0


class Wanted:
    """Call it as often as you like. `receipt`: the one that says no."""

    def __init__(self, connection: Connection, assigned: Assigned) -> None:
        self._connection, self._assigned = connection, assigned
        self._asked_at = time.monotonic()
        self._thread: threading.Thread | None = None
        self.receipt: Receipt | None = None

    def __call__(self) -> bool:
        waiting = self._thread is not None and self._thread.is_alive()
        if not waiting and time.monotonic() - self._asked_at >= ASK_EVERY_S:
            self._asked_at = time.monotonic()
            self._thread = threading.Thread(target=self._ask, name="still wanted", daemon=True)
            self._thread.start()
        return self.receipt is None

    def _ask(self) -> None:
        try:
            receipt = self._connection.glance(self._assigned)
        except (HomespunError, RuntimeError):  # RuntimeError: the client was closed meanwhile
            return
        if receipt.state in (ReportState.LATE, ReportState.VOID):
            self.receipt = receipt
