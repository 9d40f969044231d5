"""Time in a simulation: how long clients take, and who is at work when nobody waits for anybody.

When a client finishes, another begins with the model of that moment. Nobody's time depends on what is learned, so the
clock may run ahead of the training: before a model's clients are trained, it is known which of the server's steps each
of them will be part of, and how stale it will be by then.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from homespun.errors import InvalidConfig, InvalidInput, ShapeMismatch
from homespun.simulation import counters
from homespun.simulation.counters import Words
from homespun.simulation.participation import Integers, Numbers, Participation

IDLE_SLOTS = 2_000
"""So many slots of availability without anybody at work end a run that would never end."""


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds from a client's begin to its report: (`seconds` + `per_example` * examples) * its pace * chance.

    Pace and chance are log-normal with median 1: `spread` is the standard deviation of the logarithm of paces, which
    clients keep for the whole run, `jitter` that of chance, anew each time. `measured` [num_clients]: seconds of each
    client, instead of `seconds`. A slot of availability is `slot_seconds` long.
    """

    seconds: float = 60.0
    per_example: float = 0.0
    spread: float = 1.0
    jitter: float = 0.0
    measured: Sequence[float] | None = None
    slot_seconds: float = 3600.0

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for what is no length of time."""
        values = (self.per_example, self.spread, self.jitter)
        lengths = (
            self.seconds,
            self.slot_seconds,
            *(() if self.measured is None else self.measured),
        )
        if not all(0 <= value < float("inf") for value in values):
            raise InvalidConfig("per_example, spread and jitter are numbers from 0 on")
        if not all(0 < value < float("inf") for value in lengths):
            raise InvalidConfig("seconds, slot_seconds and measured are numbers above 0")

    def check(self, num_clients: int) -> None:
        """Raises `ShapeMismatch` for times of other clients."""
        if self.measured is not None and len(self.measured) != num_clients:
            raise ShapeMismatch(
                "not one measured duration per client", expected=num_clients, got=len(self.measured)
            )

    def of(self, clients: Integers, examples: Integers, seed: int, number: int) -> Numbers:
        """[m] seconds of these clients in draw `number`."""
        base = np.full(len(clients), self.seconds)
        if self.measured is not None:
            base = np.asarray(self.measured, np.float64)[clients]
        logarithm = np.zeros(len(clients))
        if self.spread:
            logarithm += self.spread * _normal(counters.begin(seed, "pace"), clients)
        if self.jitter:
            logarithm += self.jitter * _normal(counters.begin(seed, "duration", number), clients)
        seconds: Numbers = (base + self.per_example * examples) * np.exp(logarithm)
        return seconds


def _normal(start: Words, numbers: Integers) -> Numbers:
    """Box and Muller 1958: two even numbers make a normal one."""
    first, second = (counters.uniform(start, 2 * numbers + k) for k in (0, 1))
    normal: Numbers = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    return normal


@dataclass
class Start:
    """A client that began when the server had made `version` steps; its update is part of step `step`, 0: of none."""

    client: int
    version: int
    examples: int
    step: int = 0
    lost: bool = False

    @property
    def staleness(self) -> int:
        """Steps of the server between the model it began from and the one that its update moves."""
        return self.step - 1 - self.version


@dataclass
class Step:
    """A step of the server: when, and whose updates it is made of."""

    time: float
    members: list[Start]


@dataclass(kw_only=True)
class Clock:
    """`concurrency` clients at work at a time, a step for every `size` that finish.

    Who has fallen more than `max_staleness` steps behind stops. Who finishes at the same moment is received before
    anybody begins. A client is at work once at a time and begins once from the same model. `examples`: what a client
    trains on, [num_clients]. Everything follows from the seed of `draw` and the arguments.
    """

    draw: Participation
    durations: Durations
    examples: Integers
    concurrency: int
    size: int
    max_staleness: int
    now: float = 0.0
    version: int = 0
    _slot: int = 0
    _draws: int = 0
    _count: int = 0
    _next: deque[tuple[int, int, bool, float]] = field(default_factory=deque)
    _at_work: Counter[int] = field(default_factory=Counter)
    _work: list[tuple[float, int, Start]] = field(default_factory=list)
    _buffer: list[Start] = field(default_factory=list)
    _began: dict[int, list[Start]] = field(default_factory=lambda: defaultdict(list))
    _steps: dict[int, Step] = field(default_factory=dict)

    def began(self, version: int) -> list[Start]:
        """Those who begin from the model after `version` steps and report in time; asked once, versions in order."""
        while self.version <= version or self._at_work[version]:
            self._next_moment()
        del self._at_work[version]
        return [start for start in self._began.pop(version, []) if start.step]

    def step(self, number: int) -> Step:
        """The server's step `number`; asked once, in order."""
        while number not in self._steps:
            self._next_moment()
        return self._steps.pop(number)

    def _next_moment(self) -> None:
        for _ in range(IDLE_SLOTS):
            self._fill()
            if self._work:
                break
            self.now = (self.now // self.durations.slot_seconds + 1) * self.durations.slot_seconds
        else:
            raise InvalidInput(
                f"nobody can begin, and step {self.version + 1} needs {self.size - len(self._buffer)} more clients",
                hint="lower the size of the buffer, or look at availability and participation",
            )
        self.now = self._work[0][0]
        while self._work and self._work[0][0] == self.now:
            start = heapq.heappop(self._work)[-1]
            self._at_work[start.version] -= 1
            if not start.lost:
                start.step = self.version + 1
                self._buffer.append(start)
            if len(self._buffer) == self.size:
                self._make_step()

    def _make_step(self) -> None:
        self.version += 1
        self._steps[self.version] = Step(self.now, self._buffer)
        self._buffer = []
        oldest = self.version - self.max_staleness
        if self._at_work.pop(oldest - 1, 0):
            self._work = [item for item in self._work if item[-1].version >= oldest]
            heapq.heapify(self._work)

    def _fill(self) -> None:
        """New clients in the free places, from a random order of clients, which is drawn anew when it is used up."""
        free = self.concurrency - len(self._work)
        if not free:
            return
        slot = int(self.now // self.durations.slot_seconds)
        if slot != self._slot:  # others are available
            self._slot = slot
            self._next.clear()
        # Its batches depend on the client and the model: twice the same would be the same update twice.
        barred = {start.client for _, _, start in self._work}
        barred |= {start.client for start in self._began[self.version] if start.step}
        for used_up in (False, True):
            if used_up and free:
                self._draw(free + len(barred))
            while free and self._next:
                client, examples, lost, seconds = self._next.popleft()
                if client in barred or not examples:
                    continue
                start = Start(client, self.version, examples, lost=lost)
                self._count += 1
                heapq.heappush(self._work, (self.now + seconds, self._count, start))
                self._began[self.version].append(start)
                self._at_work[self.version] += 1
                barred.add(client)
                free -= 1

    def _draw(self, asked: int) -> None:
        self._draws += 1
        drawn = self.draw.draw(asked, self._draws, self._slot)
        examples = self.examples[drawn.clients]
        seconds = self.durations.of(drawn.clients, examples, self.draw.seed, self._draws)
        columns = (drawn.clients, examples, drawn.dropped, seconds)
        self._next = deque(zip(*(column.tolist() for column in columns), strict=True))


def clock(
    draw: object,
    durations: Durations,
    examples: Integers,
    *,
    concurrency: int,
    size: int,
    max_staleness: int,
) -> Callable[[], Clock]:
    """A clock that begins anew at every call: a run that is resumed runs it again to where it was.

    `draw`: of a `Participation`; `examples` [num_clients of the arena]. Raises `InvalidConfig` for what no clock can
    do, `ShapeMismatch` as `Durations.check`.
    """
    if not isinstance(draw, Participation) or draw.over_selection != 1:
        raise InvalidConfig(
            "asynchronous runs have no cohort that could be given or over-selected",
            hint="give a Participation without over_selection",
        )
    durations.check(len(examples))
    there = np.arange(draw.num_clients) if draw.population is None else draw.population
    drawable = np.ones(len(there), np.bool_) if draw.weights is None else draw.weights > 0
    usable = int((drawable & (examples[there] > 0)).sum())
    if size > usable:
        raise InvalidConfig(
            "FedBuff's size is larger than the clients that have rows",
            expected=f"<= {usable}",
            got=size,
        )
    return partial(
        Clock,
        draw=draw,
        durations=durations,
        examples=examples,
        concurrency=concurrency,
        size=size,
        max_staleness=max_staleness,
    )
