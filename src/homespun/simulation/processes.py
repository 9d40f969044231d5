"""Processes of this machine as workers, one thread each, for as long as the run lasts.

Arrays go through files in memory (`/dev/shm` where there is one): what the trainers are made from and the round's
order are written once for all, and each process writes its sums to a file of its own; pipes carry only what is small.
The clients' rows are mapped by all and copied by none.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from homespun.errors import InvalidConfig
from homespun.simulation.shards import Order, Shard
from homespun.simulation.workers import Lost, Makes, Packed, Training, Workers, plain

ALIGNED = 64
"""Bytes; arrays in a file begin at multiples of so many."""


@dataclass(frozen=True)
class _Letter:
    """A value whose arrays are in a file: `head` is its pickle, `sizes` those of the arrays, one after another."""

    path: str
    head: bytes
    sizes: list[int]

    @classmethod
    def write(cls, path: Path, packed: Packed) -> _Letter:
        with path.open("wb") as file:
            for part in packed.parts:
                file.write(part.data)
                file.write(bytes(-len(part) % ALIGNED))
        return cls(str(path), packed.head, [len(part) for part in packed.parts])

    def open(self) -> Packed:
        """With the file mapped, read-only."""
        if not self.sizes:
            return Packed(self.head, [])
        with Path(self.path).open("rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        padded = [size + -size % ALIGNED for size in self.sizes]
        begins = np.cumsum([0, *padded]).tolist()
        parts = [mapped[b : b + size] for b, size in zip(begins, self.sizes, strict=False)]
        return Packed(self.head, parts)


class Processes(Workers["_Process"]):
    """A `Pool` of `count` processes."""

    def __init__(
        self, makes: Makes, count: int, work: Callable[[Shard], float] = lambda shard: 1.0
    ) -> None:
        """Raises `InvalidConfig` for what cannot travel to another process."""
        if count < 1:
            raise InvalidConfig(
                "workers are counted from 1", hint="0 trains in this process", got=count
            )
        packed = Packed.of(makes)
        memory = Path("/dev/shm")
        self._files = tempfile.TemporaryDirectory(
            prefix="homespun-", dir=memory if memory.is_dir() else None
        )
        self._root = Path(self._files.name)
        letter = _Letter.write(self._root / "makes", packed)
        super().__init__(
            [_Process(letter, self._root / f"sum-{index}") for index in range(count)], work
        )

    @property
    def process_ids(self) -> list[int]:
        return [member.worker.process.pid or 0 for member in self._members]

    def _publish(self, order: Order) -> _Letter:
        return _Letter.write(self._root / "order", Packed.of(plain(order)))

    def _wait(self, workers: Sequence[_Process], seconds: float) -> list[_Process]:
        of_pipe = {worker.pipe: worker for worker in workers}
        return [of_pipe[pipe] for pipe in wait(list(of_pipe), seconds)]

    def close(self) -> None:
        """End the processes and remove their files; may be called again."""
        super().close()
        self._files.cleanup()


class _Process:
    """One process and its pipe."""

    def __init__(self, makes: _Letter, sums: Path) -> None:
        self._makes, self._sums = makes, sums

    def start(self) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work,
            args=(theirs, self._makes, self._sums),
            name="homespun-worker",
            daemon=True,
        )
        self.process.start()
        theirs.close()  # so that its death is the end of the pipe

    def send(self, job: Any) -> None:
        with self._losing():
            self.pipe.send(job)

    def receive(self) -> Any:
        with self._losing():
            answer = self.pipe.recv()
            return answer.open().copy() if isinstance(answer, _Letter) else answer

    @contextlib.contextmanager
    def _losing(self) -> Any:
        try:
            yield
        except (EOFError, OSError) as error:
            self.process.kill()
            self.process.join()
            raise Lost(f"exit code {self.process.exitcode}") from error

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _context() -> Any:
    """Workers are forked from a server that has imported what they need, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "homespun.simulation.spec"])
    return context


def _work(pipe: Connection, makes: _Letter, sums: Path) -> None:
    """The life of a worker: it ends with its parent's pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who then ends us
    torch.set_num_threads(1)
    training = Training(lambda: makes.open().view())
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        pipe.send(None)
        while True:
            number, letter, shard = pipe.recv()
            answer: Any = training.answer(number, lambda: letter.open().copy(), shard)  # noqa: B023
            if not isinstance(answer, Exception):
                answer = _Letter.write(sums, Packed.of(answer))
            pipe.send(answer)
