"""Homespun: one call of `homespun.simulate`, with everything that a user's call does.

It shuffles each client's rows in every round, as its users want it; the others take them as they are stored. So its
weights are compared with those of the plain loop in the same shuffled order, `batches_in_order`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import homespun
from benchmarks.peers.simulation_run import Request, Rounds, parse_request
from benchmarks.peers.simulation_tasks import Data, Ints, Task
from benchmarks.peers.simulation_torch import network, synchronize
from homespun.plan.build.losses import cross_entropy
from homespun.plan.manifest import ClientOptimizer
from homespun.simulation.assembly import cohort_rounds
from homespun.simulation.batches import batches

SEED = 0


def loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> Any:
    return cross_entropy(outputs, batch["y"])


def simulated(task: Task) -> Any:
    """The task in homespun's words; a function of a module, so that workers can make it, too."""
    return homespun.Task(
        model=network(task),
        loss=loss,
        optimizer=ClientOptimizer(learning_rate=task.learning_rate),
        batch_size=task.batch_size,
    )


def batches_in_order(task: Task, data: Data, number: int) -> Iterator[list[Ints]]:
    """For each client, those with the most steps first: the rows of each of its batches in this round."""
    drawn = batches(
        data.offsets,
        np.arange(data.num_clients),
        batch_size=task.batch_size,
        local_epochs=1,
        max_rows=None,
        seed=SEED,
        round_number=number,
    )
    for place, steps in enumerate(drawn.num_steps.tolist()):
        rows, present = drawn.rows[:steps, place], drawn.present[:steps, place]
        yield [row[there] for row, there in zip(rows, present, strict=True)]


def main() -> None:
    request = parse_request()
    torch.set_num_threads(request.threads)
    data = request.data()
    arena = homespun.Arena({"x": data.x, "y": data.y}, data.offsets)
    rounds = Rounds(request, synchronize=lambda: synchronize(request.device))
    made = partial(simulated, request.task)
    train = in_float64 if request.dtype == "float64" else in_float32
    rounds.finish(*train(request, made, arena, rounds))


def in_float32(
    request: Request, made: Callable[[], Any], arena: Any, rounds: Rounds
) -> tuple[Mapping[str, Any], int]:
    """The weights and the steps of `homespun.simulate`."""

    def next_round(record: Any) -> None:
        rounds.end()
        rounds.begin()

    rounds.begin()
    trained = homespun.simulate(
        made,
        arena,
        rounds=request.num_rounds + 1,
        cohort=request.cohort,
        seed=SEED,
        workers=workers(request),
        device=request.device,
        progress=False,
        callbacks=[next_round],
    )
    return trained.parameters, sum(record.num_steps for record in trained.history)


def in_float64(
    request: Request, made: Callable[[], Any], arena: Any, rounds: Rounds
) -> tuple[Mapping[str, Any], int]:
    """The same rounds, put together as `homespun.simulate` does, which itself knows only float32."""
    steps = 0
    with ExitStack() as stack:
        simulation: Any
        simulation, _ = cohort_rounds(
            stack,
            made,
            arena,
            evaluate_on=None,
            method="FedAvg",
            settings={},
            seed=SEED,
            aggregation="float",
            clip_norm=None,
            max_weight=0,
            bits=16,
            rotate=True,
            cohort=request.cohort,
            workers=workers(request),
            shards=None,
            strategy="auto",
            chunk=None,
            train_metrics=False,
            device=request.device,
            dtype=torch.float64,
        )
        state = simulation.begin(None)
        for number in range(1, request.num_rounds + 2):
            rounds.begin()
            state, trained = simulation.round(state, number, np.arange(arena.num_clients))
            steps += trained.num_steps
            rounds.end()
        return simulation.parameters(state), steps


def workers(request: Request) -> int:
    return request.processes if request.processes > 1 else 0


if __name__ == "__main__":
    main()
