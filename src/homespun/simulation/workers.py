"""Workers: processes of this machine that train shards, one thread each, for as long as the run lasts.

Arrays go through files in memory (`/dev/shm` where there is one): the round's order is written once for all workers,
and each writes its sums to a file of its own; pipes carry only what is small. A worker that dies gives its shard to
the others and is started again. Which worker trains what changes no bit of the result (see `shards`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from homespun.errors import HomespunError, InvalidConfig, PlanCrashed
from homespun.simulation.shards import Order, Pool, Shard, ShardSum

MOST_DEATHS = 3
"""Of workers at one shard, before it is taken for the shard's fault."""


class Makes(Protocol):
    """What each worker makes its trainer from; travels to it once."""

    def build(self) -> Pool: ...


@dataclass(frozen=True)
class _Letter:
    """A value whose arrays are in a file: `head` is its pickle, `sizes` those of the arrays, one after another."""

    path: str
    head: bytes
    sizes: list[int]

    @classmethod
    def write(cls, path: Path, value: Any) -> _Letter:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
        return cls(str(path), head, [part.nbytes for part in parts])

    def read(self) -> Any:
        """A copy of its own."""
        buffers = [bytearray(size) for size in self.sizes]
        with Path(self.path).open("rb", buffering=0) as file:
            for buffer in buffers:
                file.readinto(buffer)
        return pickle.loads(self.head, buffers=buffers)


class Workers:
    """A `Pool` of `count` processes. Close it, or use it in a `with` statement."""

    def __init__(self, makes: Makes, count: int) -> None:
        """Raises `InvalidConfig` for what cannot travel to another process."""
        if count < 1:
            raise InvalidConfig(
                "workers are counted from 1", hint="0 trains in this process", got=count
            )
        self._makes = _pickled(makes)
        memory = Path("/dev/shm")
        self._files = tempfile.TemporaryDirectory(
            prefix="homespun-", dir=memory if memory.is_dir() else None
        )
        self._num_orders = 0
        self._workers = [_Worker(self._makes, self._root / f"sum-{i}") for i in range(count)]

    @property
    def _root(self) -> Path:
        return Path(self._files.name)

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def run(self, order: Order, shards: Sequence[Shard]) -> list[ShardSum]:
        """Raises what training raises, and `PlanCrashed` for a shard that kills whoever trains it."""
        self._num_orders += 1
        letter = _Letter.write(self._root / "order", _plain(order))
        waiting, deaths = deque(range(len(shards))), Counter[int]()
        found: dict[int, ShardSum] = {}
        while len(found) < len(shards):
            for worker in self._workers:
                if worker.shard is None and waiting:
                    index = waiting.popleft()
                    if not worker.send(index, (self._num_orders, letter, shards[index])):
                        self._died(worker, waiting, deaths)
            busy = {worker.pipe: worker for worker in self._workers if worker.shard is not None}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    self._died(worker, waiting, deaths)
                    continue
                done, worker.shard = worker.shard, None
                if isinstance(answer, BaseException):
                    self._restart_busy()
                    raise answer
                assert done is not None
                found[done] = answer.read()
        return [found[index] for index in range(len(shards))]

    def _died(self, worker: _Worker, waiting: deque[int], deaths: Counter[int]) -> None:
        index, code = worker.shard, worker.end()
        worker.start()
        if index is None:
            return
        deaths[index] += 1
        if deaths[index] >= MOST_DEATHS:
            raise PlanCrashed(
                f"the workers that trained shard {index} died {MOST_DEATHS} times (exit code {code})",
                hint="is there enough memory? fewer workers or a smaller chunk need less",
            )
        waiting.appendleft(index)

    def _restart_busy(self) -> None:
        # Whoever still works on a round that has failed would answer into the next one.
        for worker in self._workers:
            if worker.shard is not None:
                worker.end()
                worker.start()

    def close(self) -> None:
        """End the processes and remove their files; may be called again."""
        for worker in self._workers:
            worker.end()
        self._files.cleanup()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process, its pipe, and the index of the shard that it trains."""

    def __init__(self, makes: bytes, sums: Path) -> None:
        self._makes, self._sums = makes, sums
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.shard: int | None = None
        self.process = context.Process(
            target=_work,
            args=(theirs, self._makes, self._sums),
            name="homespun-worker",
            daemon=True,
        )
        self.process.start()
        theirs.close()  # so that its death is the end of the pipe

    def send(self, index: int, job: Any) -> bool:
        """Whether it could be given the job."""
        self.shard = index
        try:
            self.pipe.send(job)
        except OSError:
            return False
        return True

    def end(self) -> int | None:
        """Kill it, which is always safe: it writes nothing that lasts. Its exit code."""
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.pipe.close()
        self.process.close()
        return code


def _work(pipe: Connection, makes: bytes, sums: Path) -> None:
    """The life of a worker: it ends with its parent's pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who then ends us
    torch.set_num_threads(1)
    trainer: Pool | None = None
    last, order = 0, None
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            number, letter, shard = pipe.recv()
            answer: Any
            try:
                trainer = trainer or pickle.loads(makes).build()
                if number != last or order is None:
                    last, order = number, _tensors(letter.read())
                answer = _Letter.write(sums, trainer.run(order, [shard])[0])
            except HomespunError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - it is told to the parent, who raises it
                answer = RuntimeError(f"in a worker: {error!r}\n{traceback.format_exc()}")
            pipe.send(answer)


def _pickled(makes: Makes) -> bytes:
    try:
        return pickle.dumps(makes)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InvalidConfig(
            f"the task cannot be sent to worker processes: {error}",
            hint="define model, loss and metrics at the top of a module (no lambda), or give simulate "
            "a function that makes the task",
        ) from error


def _plain(order: Order) -> Order:
    """The order as NumPy arrays, which travel without a copy."""
    server = {name: np.asarray(vector.cpu()) for name, vector in order.server.items()}
    return replace(order, model=np.asarray(order.model.cpu()), server=server)  # type: ignore[arg-type]


def _tensors(order: Order) -> Order:
    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(array)

    server = {name: tensor(vector) for name, vector in order.server.items()}
    return replace(order, model=tensor(order.model), server=server)
