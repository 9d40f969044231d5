"""The end of another process that was asked to stop."""

from __future__ import annotations

import subprocess
from contextlib import suppress

KILLED_S = 2.0
"""Within this time a process that was killed is gone."""


def end(process: subprocess.Popen[bytes], within_s: float) -> None:
    """Wait for it so long, then kill it.

    Returns in any case: a Ctrl-C in the middle of `Popen.poll` leaves its lock taken for good, and whoever then waits
    without a limit waits for ever, for a process that may have ended long ago.
    """
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_S)
