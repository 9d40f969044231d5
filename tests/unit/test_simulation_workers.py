"""Workers: the same bits as in one process, also when one of them is killed in the middle of a round."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import homespun
from homespun.errors import InvalidConfig, NumericFailure, PlanCrashed
from homespun.simulation.shards import Order, Shard, ShardSum
from homespun.simulation.workers import Workers
from tests.unit.simulated import data, task

NUM_SHARDS = 5


@dataclass
class Killing:
    """A trainer whose worker kills itself at shard 2, as often as `times` says; files count across processes."""

    marks: str
    times: int

    def build(self):
        return self

    def close(self):
        pass

    def run(self, order, shards):
        (shard,) = shards
        if shard.clients[0] == 2:
            for number in range(self.times):
                try:
                    os.close(os.open(f"{self.marks}/{number}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        if shard.clients[0] == 99:
            raise NumericFailure("shard 99", hint="as it should be", round=order.number)
        vector = order.model.numpy() * shard.clients[0] + order.server["v"].numpy()
        return [ShardSum(vectors={"update": vector}, num_clients=len(shard.clients))]


def order(number):
    return Order(number, 0, torch.arange(3.0) + number, {"v": torch.ones(3)})


def shards(*clients):
    return [Shard(np.array([client])) for client in clients]


def test_a_worker_that_dies_is_replaced_and_its_shard_is_trained(tmp_path):
    with Workers(Killing(str(tmp_path), 2), 2) as workers:
        before = workers.process_ids
        for number in (1, 2):
            found = workers.run(order(number), shards(*range(NUM_SHARDS)))
            expected = [(np.arange(3) + number) * client + 1 for client in range(NUM_SHARDS)]
            assert [part.vectors["update"].tolist() for part in found] == [
                vector.tolist() for vector in expected
            ]
        assert len(list(tmp_path.iterdir())) == 2  # it was really killed
        assert workers.process_ids != before


def test_a_shard_that_kills_everybody_ends_the_run_and_a_failure_is_told(tmp_path):
    with Workers(Killing(str(tmp_path), 100), 1) as workers:
        with pytest.raises(PlanCrashed, match="died 3 times"):
            workers.run(order(1), shards(1, 2))
        with pytest.raises(NumericFailure, match="shard 99") as caught:
            workers.run(order(7), shards(1, 99, 3))
        assert (caught.value.hint, caught.value.details) == ("as it should be", {"round": 7})
        (again,) = workers.run(order(8), shards(5))
        assert again.num_clients == 1


@pytest.mark.parametrize(
    "words",
    [
        {"method": "FedAdam"},
        {"method": "SCAFFOLD"},
        {"aggregation": "fixed-point", "clip_norm": 0.5},
    ],
)
def test_workers_give_the_bits_of_one_process(words):
    def run(workers):
        return homespun.simulate(
            task,
            data(),
            rounds=2,
            cohort=6,
            shards=3,
            seed=1,
            workers=workers,
            strategy="stacked",
            progress=False,
            **words,
        )

    here, there = run(0), run(2)
    assert {n: a.tobytes() for n, a in there.parameters.items()} == {
        n: a.tobytes() for n, a in here.parameters.items()
    }
    assert [r.loss for r in there.history] == [r.loss for r in here.history]


def test_what_cannot_travel_is_refused():
    made = task()
    object.__setattr__(made, "loss", lambda outputs, batch: outputs.sum(-1))
    with pytest.raises(InvalidConfig, match="cannot be sent"):
        homespun.simulate(made, data(), rounds=1, cohort=2, workers=1, progress=False)
