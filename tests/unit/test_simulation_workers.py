"""Workers: the same bits as in one process, also when one of them is killed in the middle of a round."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import homespun
from homespun.errors import InvalidConfig, NotFound, NumericFailure, PlanCrashed
from homespun.simulation.arena import Arena
from homespun.simulation.processes import Processes
from homespun.simulation.shards import SHARD_CLIENTS, ShardSum, split
from homespun.simulation.spec import TrainerSpec
from homespun.simulation.workers import Lost, Workers, deal
from tests.unit.odd_trainers import (
    FAILS,
    KILLS,
    ROWS,
    Odd,
    half_mapped,
    mapped_from_file,
    order,
    shards,
)
from tests.unit.simulated import data, task

NUM_SHARDS = 5


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return half_mapped(tmp_path_factory.mktemp("arena"))


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    """A file for each worker that was killed."""
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def pool(arena, marks):
    with Processes(Odd(str(marks), arena), 2) as workers:
        yield workers


def test_a_worker_that_dies_is_replaced_and_its_shard_is_trained(pool):
    before = pool.process_ids
    for number in (1, 2):
        found = pool.run(order(number), shards(*range(NUM_SHARDS)))
        expected = [(np.arange(3) + number) * client + 1 for client in range(NUM_SHARDS)]
        assert [part.vectors["update"].tolist() for part in found] == [
            vector.tolist() for vector in expected
        ]
        assert all(part.vectors["update"].flags.writeable for part in found)
    assert len(set(before) & set(pool.process_ids)) < 2  # somebody was really killed


def test_a_shard_that_kills_everybody_ends_the_run_and_a_failure_is_told(pool, marks):
    with pytest.raises(PlanCrashed, match=r"trained shard 1 died 3 times \(exit code -9"):
        pool.run(order(3), shards(1, KILLS))
    assert len(list(marks.glob(f"{KILLS}-*"))) == 3
    with pytest.raises(NumericFailure, match="shard 99") as caught:
        pool.run(order(7), shards(1, FAILS, 3))
    assert (caught.value.hint, caught.value.details) == ("as it should be", {"round": 7})
    (again,) = pool.run(order(8), shards(5))
    assert again.vectors["update"].tolist() == [41, 46, 51]


def test_workers_map_the_rows_and_copy_none(pool, arena):
    (found,) = pool.run(order(9), shards(1))
    assert found.numbers == {"a": 1.0, "b": 1.0, "sum": 4.0 * (ROWS - 1)}
    assert not mapped_from_file(arena.inputs["b"])
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(arena, protocol=5, buffer_callback=buffers.append)
    assert len(head) < 2_000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 8 * (ROWS + 2)  # b and the offsets


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own list of maps")
def test_whoever_trains_reads_no_more_of_a_file_than_is_asked_for(tmp_path):
    data().save(tmp_path)
    mapped = Arena.open(tmp_path)
    address = mapped.inputs["x"].__array_interface__["data"][0] // 4096 * 4096

    def is_read_at_random():
        smaps = Path("/proc/self/smaps").read_text()
        (after,) = re.findall(
            rf"^{address:x}-.*?^VmFlags:([^\n]*)", smaps, re.DOTALL | re.MULTILINE
        )
        return "rr" in after.split()

    assert not is_read_at_random()
    TrainerSpec(task=task, arena=mapped, method="FedAvg").build()
    assert is_read_at_random()


def test_what_is_not_just_a_file_travels_as_rows(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(10))
    for array in (np.load(path, mmap_mode="r")[2:], np.load(path, mmap_mode="c")):
        again = pickle.loads(pickle.dumps(Arena({"x": array}, np.array([0, len(array)]))))
        assert not mapped_from_file(again.inputs["x"])
        assert again.inputs["x"].tolist() == array.tolist()
    sent = pickle.dumps(Arena({"x": np.load(path, mmap_mode="r")}, np.array([0, 10])))
    path.unlink()
    with pytest.raises(NotFound, match=r"x\.npy is not here"):
        pickle.loads(sent)


def test_shards_have_about_as_many_rows_and_no_two_the_same_client():
    rows = np.random.default_rng(0).integers(1, 100, 500)
    cohort = np.arange(0, 500, 2)
    for count in (1, 2, 7):
        parts = split(cohort, rows[cohort], count)
        assert np.concatenate(parts).tolist() == cohort.tolist()
        assert len(parts) == count
        sums = [int(rows[part].sum()) for part in parts]
        assert max(sums) - min(sums) <= 100
    one_has_all = np.array([1, 1, 1000, 1, 1])
    assert [p.tolist() for p in split(np.arange(5), one_has_all, 3)] == [[0, 1], [2], [3, 4]]
    assert [p.tolist() for p in split(np.arange(2), rows[:2], 5)] == [[0], [1]]
    most = 3 * SHARD_CLIENTS
    assert max(len(p) for p in split(np.arange(most), np.ones(most, int), 1)) <= SHARD_CLIENTS


def test_the_first_piece_goes_to_whoever_ends_it_first():
    assert deal([0.0, 0.0], [1.0, 1.0], [3, 2, 2, 1]) == [0, 1, 1, 0]
    assert deal([0.0, 0.0], [1.0, 5.0], [1, 1, 1, 1]) == [0, 0, 0, 0]
    assert deal([9.0, 0.0], [1.0, 5.0], [1, 1]) == [1, 0]
    assert deal([], [], [1]) == []


class Slow:
    """A worker on a clock of our own: it takes `pace` for a client."""

    def __init__(self, pace):
        self.pace, self.trained, self.answers = pace, [], []

    def start(self):
        self.answers = [(0.0, None)]

    def send(self, job):
        _, _, shard = job
        seconds = self.pace * int(shard.clients[0])
        self.trained.append(int(shard.clients[0]))
        answer = ShardSum(num_clients=int(shard.clients[0]))
        failure = NumericFailure("as it should be")
        self.answers.append((Clock.now + seconds, failure if seconds == FAILS else answer))

    def receive(self):
        return self.answers.pop()[1]

    def end(self):
        pass


class Clock:
    now = 0.0


class Team(Workers[Slow]):
    def _publish(self, order):
        return order

    def _wait(self, workers, seconds):
        first = min(worker.answers[-1][0] for worker in workers)
        Clock.now = max(Clock.now, first)
        return [worker for worker in workers if worker.answers[-1][0] == first]


def test_a_slow_worker_is_given_less_once_it_is_known(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: Clock.now)
    fast, slow = Slow(1.0), Slow(5.0)
    team = Team([fast, slow], lambda shard: float(shard.clients[0]))
    for number in range(4):
        fast.trained, slow.trained, began = [], [], Clock.now
        found = team.run(order(number), shards(2, 4, 8, 3, 1, 6))
        assert [part.num_clients for part in found] == [2, 4, 8, 3, 1, 6]
    assert sum(slow.trained) == 4
    assert fast.trained[0] == 8
    assert Clock.now - began == 20.0  # the fast one alone needs 24, halves 60


def test_a_worker_that_is_slow_once_keeps_its_share_and_one_that_was_slow_is_tried_again(
    monkeypatch,
):
    monkeypatch.setattr("time.monotonic", lambda: Clock.now)
    usual, other = Slow(1.0), Slow(1.0)
    team = Team([usual, other], lambda shard: float(shard.clients[0]))

    def shards_of_the_other(rounds):
        other.trained = []
        for number in range(rounds):
            team.run(order(number), shards(4, 4))
        return len(other.trained)

    assert shards_of_the_other(3) == 3
    for other.pace in (9.0, 1.0):
        assert shards_of_the_other(1) == 1
    other.pace = 9.0
    assert shards_of_the_other(2) == 2
    assert shards_of_the_other(50) == 0
    other.pace = 1.0
    assert shards_of_the_other(50) > 10


def test_every_worker_makes_its_engine_in_the_first_round_though_one_measures_for_all():
    first, second = Slow(1.0), Slow(1.0)
    team = Team([first, second], lambda shard: 1.0)
    team.run(order(1), shards(3))
    team.run(order(2), shards(4))
    assert (first.trained, second.trained) == ([3], [4])


def test_what_is_left_of_a_failed_round_is_not_taken_for_the_next():
    team = Team([Slow(1.0), Slow(1.0)], lambda shard: 1.0)
    with pytest.raises(NumericFailure):
        team.run(order(1), shards(FAILS, FAILS + 1))
    assert [part.num_clients for part in team.run(order(2), shards(7, 8))] == [7, 8]


class Broken(Slow):
    def receive(self):
        raise Lost("no GPU")


def test_workers_that_never_begin_end_the_run():
    with pytest.raises(PlanCrashed, match=r"workers that were started died 6 times \(no GPU"):
        Team([Broken(1.0), Broken(1.0)], lambda shard: 1.0).run(order(1), shards(1))


def test_a_worker_that_is_not_ready_is_not_waited_for_and_nobody_at_all_is_an_error():
    class Pending(Team):
        waits = 0

        def _wait(self, workers, seconds):
            self.waits += 1
            assert self.waits < 10
            there = [worker for worker in workers if worker is not never]
            return super()._wait(there, seconds) if there else []

    here, never = Slow(1.0), Slow(1.0)
    team = Pending([never, here], lambda shard: 1.0)
    assert len(team.run(order(1), shards(1, 2, 3))) == 3
    assert (len(here.trained), never.trained) == (3, [])
    with pytest.raises(PlanCrashed, match="no worker was ready"):
        Pending([never], lambda shard: 1.0).run(order(1), shards(1))


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
    made = replace(task(), loss=lambda outputs, batch: outputs.sum(-1))
    with pytest.raises(InvalidConfig, match="cannot be sent"):
        homespun.simulate(made, data(), rounds=1, cohort=2, workers=1, progress=False)
