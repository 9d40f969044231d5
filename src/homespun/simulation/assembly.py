"""Puts the rounds of a PyTorch task together: method, engine, shards, pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from homespun.errors import InvalidConfig
from homespun.learning.asynchronous import FedBuff
from homespun.learning.method import method as method_of
from homespun.simulation.arena import Arena
from homespun.simulation.asynchronous import Durations, clock
from homespun.simulation.clients import Clients
from homespun.simulation.cohort_async import AsyncRounds
from homespun.simulation.cohort_rounds import CohortRounds, Evaluator
from homespun.simulation.processes import Processes
from homespun.simulation.ray import Actors, Cluster
from homespun.simulation.shards import Adding, Aggregation, Pool, Shard, split
from homespun.simulation.spec import TrainerSpec
from homespun.simulation.task import Task


def cohort_rounds(
    stack: ExitStack,
    task: Task | Callable[[], Task],
    data: Arena,
    evaluate_on: Arena | None,
    *,
    method: str,
    settings: dict[str, Any],
    seed: int,
    aggregation: str,
    clip_norm: float | None,
    max_weight: int,
    bits: int,
    rotate: bool,
    cohort: int,
    workers: int,
    shards: int | None,
    strategy: str,
    chunk: int | None,
    train_metrics: bool,
    device: str,
    dtype: torch.dtype = torch.float32,
    cluster: Cluster | None = None,
) -> tuple[CohortRounds, Task]:
    """The rounds, and their task; `stack` closes what they hold.

    `dtype`: float64 is for proofs of equality, as checkpoints are of float32. Raises `InvalidConfig`.
    """
    here = task if isinstance(task, Task) else task()
    if aggregation not in set(Aggregation):
        raise InvalidConfig(
            f"unknown aggregation {aggregation!r}", hint=f"one of: {', '.join(Aggregation)}"
        )
    adding = Adding(
        aggregation=Aggregation(aggregation),
        clip_norm=clip_norm,
        max_weight=max_weight,
        bits=bits,
        rotate=rotate,
        max_group=max(cohort, 3),
    )
    rule = method_of(method, settings)
    adding.check(rule)
    rule.check_terms(here.optimizer)
    spec = TrainerSpec(
        task=task,
        arena=replace(data, clients=None),  # nobody asks a worker for names
        method=method,
        settings=settings,
        adding=adding,
        seed=seed,
        strategy=strategy,
        chunk=chunk,
        train_metrics=train_metrics,
        device=device,
        dtype=dtype,
    )

    def rows(clients: Clients) -> npt.NDArray[np.int64]:
        return here.num_examples(data.offsets[clients + 1] - data.offsets[clients])

    def work(shard: Shard) -> float:
        return float(rows(shard.clients).sum())

    pool: Pool
    if cluster is not None:
        pool = Actors(spec, workers, cluster, device, work)
    else:
        pool = Processes(spec, workers, work) if workers else spec.build()
    stack.callback(pool.close)
    own = {name: p.detach().cpu().numpy().copy() for name, p in here.model.named_parameters()}
    return CohortRounds(
        method=rule,
        pool=pool,
        split=lambda clients, number: split(clients, rows(clients), number),
        num_shards=shards or _usual_shards(workers, cluster),
        adding=adding,
        shapes=[(name, tuple(p.shape)) for name, p in here.model.named_parameters()],
        own=own,
        population=data.num_clients,
        seed=seed,
        evaluator=None
        if evaluate_on is None
        else Evaluator(spec.engine(here, evaluate_on), owners(evaluate_on, data)),
        device=device,
        dtype=dtype,
    ), here


def async_rounds(
    rounds: CohortRounds,
    task: Task,
    buffer: FedBuff,
    *,
    draw: object,
    durations: Durations,
    examples: Clients,
    concurrency: int,
) -> AsyncRounds:
    """Without waiting, what `rounds` are with it; `examples` [num_clients]. Raises `InvalidConfig`."""
    if rounds.adding.aggregation is not Aggregation.FLOAT:
        raise InvalidConfig(
            "asynchronous runs add their updates as floats",
            hint='aggregation = "float"; a deployment masks them in groups (docs/async.md)',
            got=rounds.adding.aggregation,
        )
    begin = clock(
        draw,
        durations,
        examples,
        concurrency=concurrency,
        size=buffer.size,
        max_staleness=buffer.max_staleness,
    )
    return AsyncRounds(rounds=rounds, buffer=buffer, clock=begin, num_steps=task.num_steps)


def owners(evaluated: Arena, trained: Arena) -> Clients:
    """For each client of `evaluated` the one of `trained` that it is, -1: none: by name; where there are no names, by
    number, if there are equally many."""
    if evaluated.clients is None and trained.clients is None:
        same = evaluated.num_clients == trained.num_clients
        return np.arange(evaluated.num_clients) if same else np.full(evaluated.num_clients, -1)
    numbers = {name: number for number, name in enumerate(trained.clients or ())}
    names = evaluated.clients or [""] * evaluated.num_clients
    return np.array([numbers.get(name, -1) for name in names], np.int64)


def _usual_shards(workers: int, cluster: Cluster | None) -> int:
    """One per worker; machines of a cluster may be unequal, and then the fast ones need more than one."""
    return workers * 2 if cluster is not None and workers > 1 else max(1, workers)
