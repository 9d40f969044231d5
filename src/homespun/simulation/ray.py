"""Actors of a Ray cluster as workers: one per core or GPU, on this machine or many, for as long as the run lasts.

What the trainers are made from, with the clients' rows, and each round's order are put into Ray's object store once.
Every machine gets one copy, which its actors read where it lies; one sum per shard comes back.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from homespun.errors import InvalidConfig, Unreachable
from homespun.simulation.shards import Order, Shard, ShardSum
from homespun.simulation.workers import Lost, Makes, Packed, Training, Workers, plain

ANSWER_SECONDS = 10.0
"""So long may a cluster take to answer at its address."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where workers run as actors of Ray.

    `address`: of the cluster, as of `ray.init`, which finds one for "auto"; None: RAY_ADDRESS, else one of this machine
    alone. A connection that is there already is used and left open. `cpus`, `gpus`: what each worker takes of its
    machine, parts of one included; gpus None: one where the device is a GPU.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        """Raises `InvalidConfig` for less than nothing."""
        if self.cpus < 0 or (self.gpus or 0.0) < 0:
            raise InvalidConfig("a worker takes at least 0 cpus and gpus", got=str(self))

    def needs(self, device: str) -> dict[str, float]:
        """What a worker takes, by the names that Ray has for it."""
        gpus = float(device.startswith("cuda")) if self.gpus is None else self.gpus
        return {"CPU": self.cpus, "GPU": gpus}


class Actors(Workers["_Actor"]):
    """A `Pool` of `count` actors."""

    def __init__(
        self,
        makes: Makes,
        count: int,
        cluster: Cluster,
        device: str = "cpu",
        work: Callable[[Shard], float] = lambda shard: 1.0,
    ) -> None:
        """Raises `InvalidConfig` without Ray, for a cluster that is too small and for what cannot travel, and
        `Unreachable` if there is no cluster at the address."""
        self._ray = _imported()
        self._connected = not self._ray.is_initialized()
        if self._connected:
            _connect(self._ray, cluster.address)
        try:
            needs = cluster.needs(device)
            _check_size(self._ray.cluster_resources(), count, needs)
            kind = self._ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(_Trainer)
            stored = self._ray.put(Packed.of(makes, self._ray.cloudpickle.dumps))
            threads = max(1, int(cluster.cpus))

            def make() -> Any:
                return kind.remote(stored, threads, sys.path)

            super().__init__([_Actor(self._ray, make) for _ in range(count)], work)
        except BaseException:
            self._disconnect()
            raise

    @property
    def process_ids(self) -> list[int]:
        """On their machines."""
        actors = [member.worker.actor for member in self._members]
        return list(self._ray.get([actor.process_id.remote() for actor in actors]))

    def _publish(self, order: Order) -> Any:
        return self._ray.put(Packed.of(plain(order)))

    def _wait(self, workers: Sequence[_Actor], seconds: float) -> list[_Actor]:
        of_answer = {worker.answer: worker for worker in workers}
        answered, _ = self._ray.wait(list(of_answer), num_returns=1, timeout=seconds)
        return [of_answer[answer] for answer in answered]

    def close(self) -> None:
        """End the actors, and the connection if it was made here; may be called again."""
        super().close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._connected:
            self._ray.shutdown()


class _Actor:
    """One actor, seen from here. `make`: makes one on whatever machine has room."""

    def __init__(self, ray: Any, make: Callable[[], Any]) -> None:
        self._ray, self._make = ray, make

    def start(self) -> None:
        self.actor = self._make()
        self.answer = self.actor.ready.remote()

    def send(self, job: tuple[int, Any, Shard]) -> None:
        self.answer = self.actor.train.remote(*job)

    def receive(self) -> Any:
        try:
            answer = self._ray.get(self.answer)
        except self._ray.exceptions.RayError as error:
            raise Lost(" ".join(str(error).split())[:400]) from error
        return answer.copy() if isinstance(answer, Packed) else answer

    def end(self) -> None:
        if self._ray.is_initialized():
            self._ray.kill(self.actor)


class _Trainer:
    """The actor itself."""

    def __init__(self, makes: Packed, threads: int, path: Sequence[str]) -> None:
        torch.set_num_threads(threads)
        sys.path += [folder for folder in path if folder not in sys.path]  # tasks beside their file
        self._training = Training(makes.view)

    def ready(self) -> None:
        """Answered as soon as it is there."""

    def process_id(self) -> int:
        return os.getpid()

    def train(self, number: int, order: Packed, shard: Shard) -> Packed | Exception:
        answer = self._training.answer(number, order.copy, shard)
        return Packed.of(answer) if isinstance(answer, ShardSum) else answer


def _imported() -> Any:
    # Nothing is reported to Ray's makers; an actor without a GPU sees what its machine has (Ray's own next default).
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.cloudpickle
        import ray.exceptions
    except ImportError as error:
        raise InvalidConfig("Ray is not installed", hint="pip install 'homespun[ray]'") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    # Without an address Ray would look for whatever cluster was here last, and wait minutes for one that is gone.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise Unreachable(
            f"there is no Ray cluster at {address!r}: {error}",
            hint="start it with `ray start --head`, or leave the address out to use this machine alone",
        ) from error


def _check_size(there: dict[str, float], count: int, needs: dict[str, float]) -> None:
    for name, amount in needs.items():
        if count * amount > there.get(name, 0.0) + 1e-6:
            raise InvalidConfig(
                f"the cluster has {there.get(name, 0.0):g} {name}, {count} workers take {count * amount:g}",
                hint=f"use fewer workers, or give each a part: {name.lower()}s=0.5",
            )
