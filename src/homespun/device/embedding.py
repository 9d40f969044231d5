"""A device inside your application.

    from homespun.device import Device

    with Device("data/device") as device:
        device.start()                                    # takes part, while the app runs
        device.store.add({"text": "thank you for the flowers"})
        print(device.predict("thank you for the"))

The app and the device are two processes over one directory. The app stores examples and predicts; a child process
does what `homespun device run` does, and ends when the app ends, however that happens. Nothing is imported before it is
needed: an app that only stores examples loads neither ONNX Runtime nor an HTTP client.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homespun.device.conditions import Span
    from homespun.device.examples import ExampleStore
    from homespun.device.home import Home, Settings
    from homespun.device.models import Models
    from homespun.device.status import Status
    from homespun.device.why import Why
    from homespun.plan.suggest import Suggestion
    from homespun.protocol.eligibility import Policy

STOPPING_S = 10.0
"""A device that was asked to stop has ended long before."""


class Device:
    """The device of `directory`, which `enroll` has made. Any thread of the app may use it.

    Raises `InvalidConfig` if the directory is not a device's.
    """

    def __init__(self, directory: str | Path) -> None:
        from homespun.device.home import Home

        self._home = Home(Path(directory))
        self._settings = self._home.settings()
        self._process: subprocess.Popen[bytes] | None = None
        self.store = Store(self._home, self._settings)

    @classmethod
    def enroll(
        cls,
        directory: str | Path,
        *,
        server: str,
        population: str,
        token: str,
        policy: Policy | None = None,
        conditions: tuple[Span, ...] | None = None,
        seed: int | None = None,
    ) -> Device:
        """Introduce a directory to the server, an URL, as a device of `population`; needs a join token.

        Done again, it is the same device with other settings. `policy`: what the device never does, whatever a server
        asks; `conditions`: a script in place of what the machine reports, and `seed`: makes its randomness
        reproducible, both for experiments only. Raises `InvalidConfig`, `Unreachable`, and what the server refuses.
        """
        from homespun.clock import SystemClock
        from homespun.device.enrolment import enroll
        from homespun.device.home import Home, Settings
        from homespun.protocol.eligibility import Policy

        settings = Settings(
            server=server.rstrip("/"),
            population=population,
            policy=policy or Policy(),
            conditions=conditions,
        )
        enroll(Home(Path(directory)), settings, token, SystemClock(), seed)
        return cls(directory)

    # --- predicting ---------------------------------------------------------------------------------------

    def predict(
        self, text: str, k: int = 3, *, prefix: str = "", slot: str | None = None
    ) -> list[Suggestion]:
        """The `k` likeliest next words after `text`, of those that begin with `prefix`, from the model that is served;
        milliseconds, without the network.

        `slot`: which model, if the population has several. Raises `NotFound` while nothing is served.
        """
        return self._models.predict(text, k, slot, prefix)

    @cached_property
    def _models(self) -> Models:
        from homespun.device.models import open_models

        return open_models(self._home, self._settings)

    # --- taking part --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take part from now on, in the background, until `stop` or the end of this process.

        Another process may be running this device already; then the new one waits for its turn.
        """
        if self.is_running:
            return
        command = ("-m", "homespun.cli.main", "device", "run", "--until-eof", "--wait", "--dir")
        with self._home.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, str(self._home.root)],
                stdin=subprocess.PIPE,  # its end is the end of the device
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the app's
            )

    def stop(self) -> None:
        """Stop taking part; returns when the background process has ended. Nothing of its work is left."""
        from homespun.device.ending import end

        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        end(process, STOPPING_S)  # which may kill it: a device must survive that at any time

    @property
    def is_running(self) -> bool:
        """Whether the background process of this object lives. What it says of failures is in `run.log`."""
        return self._process is not None and self._process.poll() is None

    def status(self) -> Status | None:
        """What the device does and has done; None before its first start."""
        from homespun.device.status import read_status

        return read_status(self._home)

    def why(self) -> Why:
        """Why the device does or does not take part, judged now: in words, and every condition, criterion and rule."""
        from homespun.clock import SystemClock
        from homespun.device.why import explain

        return explain(self._home, SystemClock())

    def close(self) -> None:
        """Stop, and write down what was counted."""
        self.stop()
        if "_models" in self.__dict__:
            self._models.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Store:
    """The device's private examples, which never leave it. The file is open during a call only."""

    def __init__(self, home: Home, settings: Settings) -> None:
        self._home, self._settings = home, settings

    def add(self, example: Mapping[str, Any], collection: str = "default") -> None:
        """Keep an example: field names to text, numbers, booleans, bytes or lists of them.

        The plans of the population say which fields they learn from, such as `{"text": ...}`. Raises `InvalidExample`,
        which never repeats the content, and `StorageFailure`.
        """
        self.add_many([example], collection)

    def add_many(self, examples: Iterable[Mapping[str, Any]], collection: str = "default") -> int:
        """Keep several, all or none; how many they were."""
        with closing(self._open()) as store:
            return store.add_many(examples, _now(), collection)

    def count(self) -> int:
        """How many examples there are."""
        with closing(self._open()) as store:
            return store.count(_now())

    def _open(self) -> ExampleStore:
        from homespun.device.examples import open_examples

        return open_examples(self._home, self._settings)


def _now() -> float:
    from homespun.clock import SystemClock

    return SystemClock().now()
