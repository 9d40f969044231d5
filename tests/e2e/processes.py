"""Real processes: `homespun` commands as a person starts them, waited for by what they show of themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from homespun.cli.client import OperatorClient, connect
from homespun.clock import SystemClock
from homespun.device.conditions import Span
from homespun.device.enrolment import enroll
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.status import Status, read_status
from homespun.errors import HomespunError
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import RetryWindow

PATIENCE_S = 60.0
"""Far more than anything here takes: a test that needs it has failed."""
POPULATION = "tests"
MIN_GROUP = 3
"""Of tasks and devices here, where there are only a few: the smallest group that there ever is."""
POLL_S = 2.0
CLOCK = SystemClock()

COMMAND = (sys.executable, "-m", "homespun.cli.main")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    # When devices of a population without a task come back: soon.
    "HOMESPUN_SERVER_RETRY_EARLIEST_S": "0.1",
    "HOMESPUN_SERVER_RETRY_LATEST_S": "0.2",
}

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str) -> T:
    """What `look` gives as soon as it is true; another process cannot be waited for in a better way."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < give_up_at, f"never: {what}"
        time.sleep(0.02)
    return found


def homespun(
    *arguments: object, command: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with nothing on its standard input."""
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**ENVIRONMENT, "COLUMNS": "500"},
    )


def printed(*arguments: object) -> str:
    """What a command prints; it must succeed, without a word of complaint."""
    done = homespun(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def assert_fails(done: subprocess.CompletedProcess[str], code: str, *parts: str) -> None:
    """A failure is one clear line that has its code and these parts, at most one hint, and exit code 1."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    first, *hints = done.stderr.splitlines()
    assert first.startswith("error: "), done.stderr
    assert first.endswith(f" [{code}]"), done.stderr
    assert len(hints) <= 1, done.stderr
    assert all(hint.startswith("  hint: ") for hint in hints), done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


class Process:
    """A command in the background. It holds our pipe as standard input, so it ends when this process does."""

    def __init__(self, log: Path, *arguments: object, command: Sequence[str] = COMMAND) -> None:
        self.log = log
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                [*command, *map(str, arguments), "--until-eof"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=ENVIRONMENT,
            )
        self.pid = self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it is running."""
        return self._popen.poll()

    def check(self) -> None:
        """It is running."""
        assert self._popen.poll() is None, self.log.read_text()

    def wait_for(self, path: Path) -> None:
        """Until it has written `path`."""

        def written() -> bool:
            self.check()
            return path.exists()

        eventually(written, f"{path.name} is written")

    def stop(self) -> int:
        """End it as its starter's end would; the exit code."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        return self._popen.wait(PATIENCE_S)

    def end(self) -> int:
        """Wait until it ends by itself; the exit code."""
        code = self._popen.wait(PATIENCE_S)
        self.stop()
        return code

    def terminate(self) -> tuple[int, float]:
        """Ask it to end; exit code and how many seconds that took."""
        began = time.monotonic()
        self._popen.send_signal(signal.SIGTERM)
        code = self._popen.wait(PATIENCE_S)
        took = time.monotonic() - began
        self.stop()
        return code, took

    def kill(self) -> None:
        """No goodbye: nothing is finished or written any more."""
        self._popen.kill()
        self._popen.wait(PATIENCE_S)
        self.stop()

    def peak_memory_bytes(self) -> int:
        """Largest resident size so far."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


class Server:
    """`homespun serve` over `data`, and its operator. It comes back on the same port."""

    def __init__(self, data: Path) -> None:
        self.data, self.log = data, data.with_suffix(".log")
        self.port = 0
        self.start()

    def start(self) -> None:
        ready = self.data / "server.json"
        ready.unlink(missing_ok=True)  # a server that was killed leaves it behind
        self.process = Process(self.log, "serve", "--data", self.data, "--port", self.port)
        self.process.wait_for(ready)
        self.client: OperatorClient = connect(None, None, self.data)
        self.url = self.client.url
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.client._http.close()
        self.process.kill()

    def stop(self) -> None:
        self.client._http.close()
        assert self.process.stop() == 0, self.log.read_text()

    def restart(self) -> None:
        """As after a power cut, on the same port."""
        self.kill()
        self.start()

    def token(self, population: str = POPULATION) -> str:
        """A join token of a population, which is made if needed."""
        self.client.create_population(population)
        token = self.client.create_token(population).token
        assert token is not None
        return token


class Device:
    """`homespun device run` over an enrolled directory."""

    def __init__(self, root: Path) -> None:
        self.home, self.log = Home(root), root.with_suffix(".log")

    @classmethod
    def enrolled(
        cls,
        root: Path,
        url: str,
        token: str,
        examples: Sequence[dict[str, Any]],
        *,
        seed: int,
        conditions: tuple[Span, ...] = (),
    ) -> Device:
        """Make `root` a device that holds these examples, and takes part in no smaller sums than any device does."""
        device = cls(root)
        wanted = Settings(
            server=url,
            population=POPULATION,
            policy=Policy(min_group=MIN_GROUP),
            conditions=conditions,
            transient_error=RetryWindow(earliest_s=0.2, latest_s=0.5),
            poll_s=POLL_S,
        )
        enroll(device.home, wanted, token, CLOCK, seed)
        device.add(examples)
        return device

    def add(self, examples: Sequence[dict[str, Any]]) -> None:
        """Put examples into its store."""
        store = open_examples(self.home, self.home.settings())
        store.add_many(examples, CLOCK.now())
        store.close()

    @property
    def device_id(self) -> str:
        return self.home.settings().device_id

    def start(self, *options: object) -> None:
        """Start it, and wait until it has taken its first step."""
        self.home.status_file.unlink(missing_ok=True)
        self.process = Process(self.log, "device", "run", "--dir", self.home.root, *options)
        self.process.wait_for(self.home.status_file)

    def stop(self) -> None:
        assert self.process.stop() == 0, self.log.read_text()

    def kill(self) -> None:
        """Whatever process of it there is."""
        self.process.kill()

    def status(self) -> Status:
        """What it tells its owner."""
        status = read_status(self.home)
        assert status is not None
        return status

    def outcomes(self) -> list[tuple[str, int, str]]:
        """(task, round, how it ended) of its latest sessions, sorted."""
        return sorted((s.task_name, s.round_number, s.outcome) for s in self.status().sessions)


def try_(call: Callable[[], T]) -> T | None:
    """What `call` gives; None while the server is not there."""
    try:
        return call()
    except HomespunError:
        return None
