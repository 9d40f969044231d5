"""Puts the rounds of a PyTorch task together: method, engine, shards, pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from homespun.errors import InvalidConfig
from homespun.learning.method import method as method_of
from homespun.simulation.arena import Arena
from homespun.simulation.cohort_rounds import CohortRounds, Evaluate
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
    cluster: Cluster | None,
    shards: int | None,
    strategy: str,
    chunk: int | None,
    train_metrics: bool,
    device: str,
) -> tuple[CohortRounds, nn.Module]:
    """The rounds, and the module of their task; `stack` closes what they hold. Raises `InvalidConfig`."""
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
    )
    rows = data.num_rows if here.max_rows is None else data.num_rows.clip(max=here.max_rows)

    def work(shard: Shard) -> float:
        return float(rows[shard.clients].sum())

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
        split=partial(split, rows=rows, num_shards=shards or _usual_shards(workers, cluster)),
        adding=adding,
        shapes=[(name, tuple(p.shape)) for name, p in here.model.named_parameters()],
        own=own,
        population=data.num_clients,
        seed=seed,
        evaluator=_evaluator(spec, here, evaluate_on),
        device=device,
    ), here.model


def _usual_shards(workers: int, cluster: Cluster | None) -> int:
    """One per worker; machines of a cluster may be unequal, and then the fast ones need more than one."""
    return workers * 2 if cluster is not None and workers > 1 else max(1, workers)


def _evaluator(spec: TrainerSpec, task: Task, rows: Arena | None) -> Evaluate:
    """Means over all of `rows`, whoever they belong to; the engine that measures them is made once."""
    engine = spec.engine(task, rows) if rows is not None else None

    def evaluate(model: Tensor) -> dict[str, float]:
        sums = engine.evaluate(model) if engine is not None else {}
        return {name: value.mean for name, value in sums.items()}

    return evaluate
