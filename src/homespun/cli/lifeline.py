"""A lifeline: a background process that stops when whoever started it is gone.

The starter holds the other end of standard input. When it ends, however it ends, the pipe closes, and
this process is asked to stop as by Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def stop_with_stdin() -> None:
    """From now on, the end of standard input means SIGTERM."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
