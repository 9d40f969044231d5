"""The demo's processes: one server, and one process per device, each with a directory of its own.

Every process holds the read end of a pipe of ours as its standard input and stops when it closes, so
that nothing is left running however the demo ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from homespun.clock import SystemClock
from homespun.device.ending import end
from homespun.errors import HomespunError, StorageFailure

STOP_S = 8.0


@dataclass
class Process:
    """A `homespun` command running in the background, its output in `log`.

    `may_end_with`: an exit code that is no failure.
    """

    name: str
    command: Sequence[str]
    log: Path
    may_end_with: int | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        # One thread each: more would only compete for the same cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "homespun.cli.main", *self.command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the demo, which then stops the others
                )
        except OSError as error:
            raise StorageFailure(f"cannot start {self.name}: {error.strerror}") from error

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or before it was started."""
        return None if self._process is None else self._process.poll()

    def check(self) -> None:
        """Raise, with the last words of its log, if it has ended by itself."""
        if self.exit_code not in (None, self.may_end_with):
            words = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise HomespunError(
                f"{self.name} ended with exit code {self.exit_code}: {' / '.join(words)}",
                hint=f"see {self.log}",
            )

    def ask_to_stop(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def stop(self, deadline: float) -> None:
        """Wait for it until `deadline` (Unix seconds), then kill it."""
        if self._process is None:
            return
        self.ask_to_stop()
        end(self._process, max(0.1, deadline - SystemClock().now()))


def stop_all(processes: Sequence[Process]) -> None:
    """Stop all of them at once; at most `STOP_S` seconds in all."""
    for process in processes:
        process.ask_to_stop()
    deadline = SystemClock().now() + STOP_S
    for process in processes:
        process.stop(deadline)
