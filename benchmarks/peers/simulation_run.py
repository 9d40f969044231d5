"""What every runner of `benchmarks.simulation` shares: its command line, its clock and its one line of results.

    python -m benchmarks.peers.simulation_NAME TASK --rounds R --processes N --device cpu --weights FILE

A runner trains one round to warm up and R that count, in its framework's own fast way, and saves the last weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.simulation_tasks import TASKS, Data, Task


@dataclass(frozen=True)
class Request:
    """What the runner is asked. `processes` share the work of a round, each with `threads` threads."""

    name: str
    task: Task
    num_rounds: int
    processes: int
    threads: int
    device: str
    dtype: str
    weights: Path | None
    cohort: int
    order: str
    folder: Path | None

    def data(self) -> Data:
        return Data.load(self.folder) if self.folder else self.task.data()


@dataclass(frozen=True)
class Result:
    """The line that a runner prints. `seconds` of each round that counts; `warm_up_s`: of the first one, with all
    compilation; `cpu_s` per round and `peak_bytes` of all its processes; `steps` of SGD, of all rounds; `load`: of the
    machine, average of a minute. `own_bytes`: of `peak_bytes`, what is not pages of files, of one process whose rows
    are files (None: not measured).
    """

    seconds: tuple[float, ...]
    warm_up_s: float
    cpu_s: float
    peak_bytes: int
    steps: int
    load: float
    own_bytes: int | None = None


def parse_request() -> Request:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--clients", type=int, help="other than the task has")
    parser.add_argument("--cohort", type=int, help="clients of a round; without it all")
    parser.add_argument("--order", choices=("stored", "homespun"), default="stored")
    parser.add_argument("--data", type=Path, help="folder with the clients' rows")
    given = parser.parse_args()
    task = TASKS[given.task]
    if given.clients:
        task = task.with_clients(given.clients)
    return Request(
        name=given.task,
        task=task,
        num_rounds=given.rounds or task.num_rounds,
        processes=given.processes,
        threads=given.threads,
        device=given.device,
        dtype=given.dtype,
        weights=given.weights,
        cohort=given.cohort or task.num_clients,
        order=given.order,
        folder=given.data,
    )


class Rounds:
    """The clock: `begin` and `end` of every round. `synchronize` waits for what the device still does."""

    def __init__(
        self,
        request: Request,
        *,
        root: int | None = None,
        synchronize: Callable[[], object] = lambda: None,
    ) -> None:
        self._request, self._synchronize = request, synchronize
        self._root = psutil.Process(root or os.getpid())
        self._seconds: list[float] = []
        self._cpu_s: list[float] = []
        self._peak_bytes = 0
        self._own = OwnMemory() if request.folder and sys.platform == "linux" else None

    def begin(self) -> None:
        self._synchronize()
        self._began = time.perf_counter()

    def end(self) -> None:
        self._synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        # The other processes are asked only twice, since that takes longer than a small round.
        if len(self._seconds) in (1, self._request.num_rounds + 1):
            self._read_usage()

    def _read_usage(self) -> None:
        cpu_s, peak_bytes = 0.0, 0
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                peak_bytes += largest_bytes(process)
            except (psutil.Error, FileNotFoundError):
                continue  # it ended meanwhile
            # The kernel counts others in hundredths of a second, this process exactly.
            mine = process.pid == os.getpid()
            cpu_s += time.process_time() if mine else times.user + times.system
        self._cpu_s.append(cpu_s)
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def finish(self, weights: Mapping[str, Any], steps: int) -> None:
        """Saves the weights and prints the result."""
        warm_up_s, *seconds = self._seconds
        assert len(seconds) == self._request.num_rounds, "a round was not measured"
        if self._request.weights is not None:
            arrays: dict[str, Any] = {name: np.asarray(value) for name, value in weights.items()}
            np.savez(self._request.weights, **arrays)
        result = Result(
            seconds=tuple(seconds),
            warm_up_s=warm_up_s,
            cpu_s=(self._cpu_s[1] - self._cpu_s[0]) / len(seconds),
            peak_bytes=self._peak_bytes,
            steps=steps,
            load=os.getloadavg()[0],
            own_bytes=self._own.peak_bytes() if self._own else None,
        )
        print("\n" + json.dumps(asdict(result)), flush=True)


class OwnMemory:
    """The most memory of this process that is no page of a file, looked at every few milliseconds.

    The kernel's own record is of all resident memory. There, pages of mapped files count that others may share and that
    are taken back whenever somebody needs them: where a file lies in large folios, up to 2 MiB for each row touched.
    """

    EVERY_S = 0.003

    def __init__(self) -> None:
        self._peak_kib, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY_S):
            self._look()

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text()
        parts = dict(line.split(":", 1) for line in status.splitlines())
        kib = sum(int(parts[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        self._peak_kib = max(self._peak_kib, kib)

    def peak_bytes(self) -> int:
        self._over.set()
        self._thread.join()
        self._look()
        return 1024 * self._peak_kib


def largest_bytes(process: psutil.Process) -> int:
    """Largest resident memory so far; what it has now where the kernel keeps no record (not Linux)."""
    if sys.platform != "linux":
        return int(process.memory_info().rss)
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
