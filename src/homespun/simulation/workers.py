"""Workers: whoever trains shards outside of this process, and who of them trains which.

A worker has one shard at a time. One that is lost gives its shard to the others and is started again. Who trains what
follows from how long it took before, and changes no bit of the result (see `shards`).
"""

from __future__ import annotations

import pickle
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch

from homespun.errors import HomespunError, InvalidConfig, PlanCrashed
from homespun.simulation.shards import Order, Pool, Shard, ShardSum
from homespun.types import AnyArray

MOST_DEATHS = 3
"""Of workers at one shard, or of a worker before it is ready, until it is taken for more than an accident."""
START_SECONDS = 300.0
"""So long may it take until there is a worker at all."""
LOOK_AGAIN_SECONDS = 1.0
"""An idle worker waits no longer for a faster one before the shards are dealt anew."""
BELIEVED_FASTER = 0.98
"""By this factor after a round without work: who was slow for a while must be tried again some day."""


class Makes(Protocol):
    """What each worker makes its trainer from; travels to it once."""

    def build(self) -> Pool: ...


class Lost(Exception):  # noqa: N818 - it tells what became of a worker
    """A worker that answers no more, and what is known of its end."""


class Worker(Protocol):
    """A process, or an actor on another machine. It can be killed at any time: it writes nothing that lasts."""

    def start(self) -> None:
        """Begin; its first answer is None, when it is ready."""

    def send(self, job: Any) -> None:
        """Give it a job. Raises `Lost`."""

    def receive(self) -> Any:
        """Its answer: a `ShardSum`, or what was raised. Raises `Lost`."""

    def end(self) -> None:
        """Kill it; may be called again."""


W = TypeVar("W", bound=Worker)


class _Member(Generic[W]):
    """A worker, the index of the shard that it trains, and the seconds that a unit of work took of late."""

    def __init__(self, worker: W) -> None:
        self.worker = worker
        self._paces = deque[float](maxlen=2)
        self.start()

    def start(self) -> None:
        self.ready, self.warm, self.shard = False, False, -1
        self.worker.start()

    def restart(self) -> None:
        self.worker.end()
        self.start()

    @property
    def idle(self) -> bool:
        return self.ready and self.shard < 0

    @property
    def pace(self) -> float | None:
        """The better of the last two: a single slow shard is an accident."""
        return min(self._paces, default=None)

    def give(self, index: int, work: float, job: Any) -> None:
        self.shard, self.work, self.began = index, work, time.monotonic()
        self.worker.send(job)

    def done(self) -> None:
        """Learn from the shard that is trained, unless the worker had to make its engine for it."""
        if self.warm:
            self._paces.append((time.monotonic() - self.began) / self.work)
        self.warm, self.shard = True, -1

    def rest(self) -> None:
        """It had nothing to train for a round."""
        self._paces.extend([pace * BELIEVED_FASTER for pace in self._paces])

    def seconds_left(self, pace: float) -> float:
        """Until it is idle. Who is late already is believed to be late by as much again."""
        if self.shard < 0:
            return 0.0
        return abs(pace * self.work - (time.monotonic() - self.began))


class Workers(ABC, Generic[W]):
    """A `Pool` of workers of one kind. `work`: of a shard, in any unit. Close it, or use it in a `with` statement."""

    def __init__(self, workers: Sequence[W], work: Callable[[Shard], float]) -> None:
        self._work = work
        self._num_orders = 0
        self._members = [_Member(worker) for worker in workers]

    @abstractmethod
    def _publish(self, order: Order) -> Any:
        """Put the order where every worker can read it."""

    @abstractmethod
    def _wait(self, workers: Sequence[W], seconds: float) -> list[W]:
        """Those who have answered, or are lost, as soon as there are some; none after `seconds`."""

    def run(self, order: Order, shards: Sequence[Shard]) -> list[ShardSum]:
        """Raises what training raises, and `PlanCrashed` for a shard that kills whoever trains it or where no worker
        can be started."""
        for member in self._members:
            if member.shard >= 0:  # of a round that failed, into this one it would answer
                member.restart()
        self._num_orders += 1
        letter = self._publish(order)
        work = [max(self._work(shard), 1.0) for shard in shards]
        waiting = sorted(range(len(shards)), key=lambda index: -work[index])
        deaths, found = Counter[str](), dict[int, ShardSum]()
        worked = set[_Member[W]]()
        while len(found) < len(shards):
            for member, index in self._dealt(waiting, work):
                waiting.remove(index)
                worked.add(member)
                try:
                    member.give(index, work[index], (self._num_orders, letter, shards[index]))
                except Lost as lost:
                    self._lost(member, lost, waiting, deaths)
            for member in self._answering(bool(waiting)):
                try:
                    answer = member.worker.receive()
                except Lost as lost:
                    self._lost(member, lost, waiting, deaths)
                    continue
                if isinstance(answer, BaseException):
                    member.shard = -1
                    raise answer
                if answer is None:
                    member.ready = True
                else:
                    found[member.shard] = answer
                    member.done()
        for member in set(self._members) - worked:
            member.rest()
        return [found[index] for index in range(len(shards))]

    def _dealt(self, waiting: Sequence[int], work: Sequence[float]) -> list[tuple[_Member[W], int]]:
        """What each idle worker trains next, if anything: a slow one may do best to leave the rest to others."""
        ready = [member for member in self._members if member.ready]
        ready.sort(key=lambda member: member.warm)  # engines are made as early as can be
        known = [member.pace for member in ready if member.pace is not None]
        usual = sum(known) / len(known) if known else 1.0
        paces = [usual if member.pace is None else member.pace for member in ready]
        left = [member.seconds_left(p) for member, p in zip(ready, paces, strict=True)]
        dealt: dict[int, int] = {}
        for index, place in zip(
            waiting, deal(left, paces, [work[i] for i in waiting]), strict=False
        ):
            if ready[place].idle:
                dealt.setdefault(place, index)
        return [(ready[place], index) for place, index in dealt.items()]

    def _answering(self, waiting: bool) -> list[_Member[W]]:
        """Raises `PlanCrashed` if there is nobody to wait for any more."""
        silent = [member for member in self._members if not member.idle]
        training = any(member.shard >= 0 for member in self._members)
        soon = waiting and len(silent) < len(self._members)
        seconds = LOOK_AGAIN_SECONDS if soon else START_SECONDS
        answered = self._wait([member.worker for member in silent], seconds)
        if not answered and not training and not soon:
            raise PlanCrashed(
                f"no worker was ready after {START_SECONDS:.0f} s",
                hint="are there free cores, GPUs and memory for them?",
            )
        return [member for member in silent if any(member.worker is w for w in answered)]

    def _lost(
        self, member: _Member[W], lost: Lost, waiting: list[int], deaths: Counter[str]
    ) -> None:
        index = member.shard
        member.restart()
        if index >= 0:
            waiting.insert(0, index)
            who, most = f"the workers that trained shard {index}", MOST_DEATHS
            hint = "is there enough memory? fewer workers or a smaller chunk need less"
        else:
            who, most = "workers that were started", MOST_DEATHS * len(self._members)
            hint = 'does the script begin its work below `if __name__ == "__main__":`?'
        deaths[who] += 1
        if deaths[who] >= most:
            raise PlanCrashed(f"{who} died {most} times ({lost})", hint=hint)

    def close(self) -> None:
        """End the workers; may be called again."""
        for member in self._members:
            member.worker.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def deal(left: Sequence[float], paces: Sequence[float], work: Sequence[float]) -> list[int]:
    """The worker of each piece of work: the first piece to whoever would end it first, and so on.

    `left`: seconds until each worker is idle; `paces`: its seconds for a unit of work.
    """
    ends, dealt = list(left), []
    for amount in work if ends else ():
        after = [end + pace * amount for end, pace in zip(ends, paces, strict=True)]
        dealt.append(after.index(min(after)))
        ends[dealt[-1]] = min(after)
    return dealt


class Training:
    """A worker's own side. `makes`: gives what the trainer is made from, once it is needed."""

    def __init__(self, makes: Callable[[], Makes]) -> None:
        self._makes = makes
        self._trainer: Pool | None = None
        self._number = 0
        self._order: Order | None = None

    def answer(self, number: int, order: Callable[[], Order], shard: Shard) -> ShardSum | Exception:
        """The shard's sum, or what went wrong. `order`: reads that of round `number`, once for all its shards."""
        try:
            self._trainer = self._trainer or self._makes().build()
            if number != self._number or self._order is None:
                self._number, self._order = number, _tensors(order())
            return self._trainer.run(self._order, [shard])[0]
        except HomespunError as error:
            return error
        except Exception as error:  # noqa: BLE001 - it is told to the parent, who raises it
            return RuntimeError(f"in a worker: {error!r}\n{traceback.format_exc()}")


@dataclass(frozen=True)
class Packed:
    """A value as its pickle and the bytes of its arrays, which need not be copied to travel."""

    head: bytes
    parts: Sequence[AnyArray]

    @classmethod
    def of(cls, value: Any, dumps: Callable[..., bytes] = pickle.dumps) -> Packed:
        """Raises `InvalidConfig` for what cannot travel to another process."""
        buffers: list[pickle.PickleBuffer] = []
        try:
            head = dumps(value, protocol=5, buffer_callback=buffers.append)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InvalidConfig(
                f"the task cannot be sent to workers: {error}",
                hint="define model, loss and metrics at the top of a module (no lambda), or give simulate "
                "a function that makes the task",
            ) from error
        return cls(head, [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers])

    def view(self) -> Any:
        """The value on the arrays that are here, which may be read-only."""
        return pickle.loads(self.head, buffers=self.parts)

    def copy(self) -> Any:
        """The value with arrays of its own."""
        return pickle.loads(self.head, buffers=[bytearray(part) for part in self.parts])


def plain(order: Order) -> Order:
    """The order as NumPy arrays, which travel without a copy."""
    server = {name: np.asarray(vector.cpu()) for name, vector in order.server.items()}
    return replace(order, model=np.asarray(order.model.cpu()), server=server)  # type: ignore[arg-type]


def _tensors(order: Order) -> Order:
    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(array)

    server = {name: tensor(vector) for name, vector in order.server.items()}
    return replace(order, model=tensor(order.model), server=server)
