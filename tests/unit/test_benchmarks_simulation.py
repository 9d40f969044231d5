"""What the benchmark of the simulator reports and what it refuses, and that its tasks are what they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import chain
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.peers.simulation_eager import shuffled, stored
from benchmarks.peers.simulation_fedjax import to_jax, to_torch
from benchmarks.peers.simulation_report import (
    ROUNDED,
    TOLERANCE,
    Goal,
    difference,
    figures,
    goals,
    plot,
    ratio_interval,
    refusal,
    table,
    verdict,
)
from benchmarks.peers.simulation_run import OwnMemory, Result
from benchmarks.peers.simulation_tasks import BLOCK, TASKS, Data, Lstm
from benchmarks.peers.simulation_torch import network
from benchmarks.simulation import RunnerError, Side, parse_choices, train

INITIAL = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}
REFERENCE = {"w": np.full((2, 2), 0.5, np.float32), "b": np.full(2, 2.0, np.float32)}


def result(*seconds: float, steps: int = 8) -> Result:
    return Result(seconds, warm_up_s=1.0, cpu_s=0.5, peak_bytes=10**6, steps=steps, load=0.1)


def moved(by: float):
    return {**REFERENCE, "w": REFERENCE["w"] + np.array([[0, 0], [0, by]], np.float32)}


# --- memory ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account of memory")
def test_pages_of_files_are_not_a_process_s_own_memory(tmp_path):
    size = 64 * 2**20
    np.save(tmp_path / "rows.npy", np.ones(size, np.uint8))
    before = OwnMemory().peak_bytes()
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert int(rows.sum()) == size
    assert OwnMemory().peak_bytes() - before < size / 4
    mine = rows.copy()
    assert OwnMemory().peak_bytes() - before > size - size / 4
    assert len(mine) == size


# --- tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_network_has_the_tasks_parameters(name: str):
    task = TASKS[name]
    made = network(task)
    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == task.model.shapes()
    assert all(np.array_equal(p.numpy(), task.initial()[n]) for n, p in made.state_dict().items())


def test_a_task_is_the_same_wherever_it_is_made():
    task = TASKS["tiny"]
    first, second = task.data(), task.data()
    assert np.array_equal(first.x, second.x)
    assert np.array_equal(first.y, second.y)
    sizes = np.diff(first.offsets)
    assert (len(sizes), sizes.min(), sizes.max()) == (100, 10, 30)
    assert task.num_steps() == sum(-(-size // 10) for size in sizes.tolist())
    assert first.y.max() == 9


def test_rows_in_files_are_those_in_memory(tmp_path):
    task = TASKS["tiny"].with_clients(600)  # more rows than are made at a time
    task.data(tmp_path)
    kept, made = Data.load(tmp_path), task.data()
    assert len(made.y) > BLOCK
    for name in ("x", "y", "offsets"):
        assert np.array_equal(getattr(kept, name), getattr(made, name))


def test_operations_are_those_of_the_products():
    tiny = TASKS["tiny"].model
    assert tiny.flops() == 2 * 64 * 32 * 2 + 2 * 32 * 10 * 3
    cifar = TASKS[
        "cifar"
    ].model  # pfl's network: 30 x 30 x 32 maps, then 28 x 28 x 64, pooled to 14 x 14
    convolutions = 2 * (30 * 30 * 32 * 27 * 2 + 28 * 28 * 64 * 288 * 3)
    assert cifar.flops() == convolutions + 6 * (12544 * 128 + 128 * 10)
    leaf = TASKS["cnn_leaf"].model
    assert sum(int(np.prod(shape)) for shape in leaf.shapes().values()) == 6_603_710


def test_words_and_next_words_overlap():
    task = replace(TASKS["lstm256"], model=Lstm(50, 4, 4, 6), num_clients=3)
    data = task.data()
    assert np.array_equal(data.x[:, 1:], data.y[:, :-1])
    assert data.y.max() < 50


def test_both_orders_train_the_same_rows():
    task = TASKS["tiny"].with_clients(5)
    data = task.data()
    plain = [y.tolist() for batches in stored(task, data, "cpu", "float32") for _, y in batches]
    mixed = [
        y.tolist() for batches in shuffled(task, data, "cpu", "float32", 1) for _, y in batches
    ]
    assert len(plain) == len(mixed) == task.num_steps()
    assert plain != mixed
    assert sorted(chain(*plain)) == sorted(chain(*mixed)) == sorted(data.y.tolist())


def test_convolutions_go_to_jax_and_back():
    weight = np.arange(2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
    assert to_jax(weight).shape == (5, 5, 3, 2)
    assert np.array_equal(to_torch(to_jax(weight)), weight)


# --- what may be reported -------------------------------------------------------------------------------


def test_a_distance_is_relative_to_the_way_of_training():
    way = np.sqrt(4 * 0.5**2 + 2 * 2.0**2)
    assert difference(moved(1e-3), REFERENCE, INITIAL) == pytest.approx(1e-3 / way, rel=1e-3)


@pytest.mark.parametrize(
    ("by", "steps", "why"),
    [(2e-4, 8, None), (6e-4, 8, "weights end"), (float("nan"), 8, "weights"), (0.0, 9, "8 SGD")],
)
def test_who_trained_something_else_is_refused(by: float, steps: int, why: str | None):
    reason = refusal(result(1.0), difference(moved(by), REFERENCE, INITIAL), steps, TOLERANCE)
    assert reason is None if why is None else (reason or "").startswith(why)


def test_other_parameters_are_refused():
    for final in ({"w": REFERENCE["w"]}, {**REFERENCE, "b": np.zeros(3, np.float32)}):
        assert refusal(result(1.0), difference(final, REFERENCE, INITIAL), 8, ROUNDED)


def test_a_forgotten_batch_of_one_client_is_refused():
    """Of one client among 50, as large as the rest together: a fiftieth of its way is missing."""
    rng = np.random.default_rng(0)
    ways = rng.standard_normal((50, 100), np.float32)
    mean = {"w": ways.mean(0)}
    ways[0] *= 0.8
    initial = {"w": np.zeros(100, np.float32)}
    assert refusal(result(1.0), difference({"w": ways.mean(0)}, mean, initial), 8, TOLERANCE)


def test_the_interval_of_a_ratio_follows_the_turns():
    ours, peer = [[1.0, 1.0], [2.0, 2.0], [1.5, 1.5]], [[3.0, 3.0], [6.0, 6.0], [4.5, 4.5]]
    assert ratio_interval(ours, peer) == (3.0, 3.0)  # a slow turn is slow for both
    low, high = ratio_interval(ours, [[3.0, 9.0], [4.0, 8.0], [5.0, 2.0]])
    assert low < high
    assert ratio_interval(ours, ours) == (1.0, 1.0)


def test_ratios_floor_and_goals():
    sides = {
        "homespun": [result(0.1), result(0.3)],
        "pfl": [result(8.0), result(12.0)],
        "Flower": [result(20.0), result(20.0)],
    }
    rows = figures(
        "tiny", sides, dict.fromkeys(sides, (0.0, 0.0)), flops=10**6, gemm_rate=10**8, peer="pfl"
    )
    ours = rows[0]
    assert (ours.median, ours.minimum, ours.raw) == (0.2, 0.1, (0.1, 0.3))
    assert ours.ratio_to_peer == pytest.approx(50)
    assert ours.ratio_to_floor == pytest.approx(20)
    assert ours.gemm_share == pytest.approx(1 / 20)
    assert "| tiny | homespun | 200 | 100 | 50.00 (" in table(rows)
    told = goals(rows, {("tiny", "pfl"): Goal(40, 100), ("tiny", "Flower"): Goal(100, 100)})
    assert "| tiny | pfl | 50.00 | 40 | 100 | floor met, goal missed |" in told
    assert "| tiny | Flower | 100.00 | 100 | 100 | goal met |" in told
    assert goals(rows, {("mlp", "pfl"): Goal(1, 1)}) == ""
    assert verdict(0.9, Goal(1, 2)) == "floor missed"


def test_on_a_gpu_the_fastest_of_several_counts():
    sides = {"homespun": [result(1.0)], "pfl": [result(9.0)], "pfl x4": [result(4.0)]}
    rows = figures(
        "mlp", sides, dict.fromkeys(sides, (0.0, 0.0)), flops=1, gemm_rate=1.0, peer="pfl"
    )
    assert "| mlp | pfl | 4.00 |" in goals(rows, {("mlp", "pfl"): Goal(1, 1)})


def test_the_plot_shows_every_side_of_every_task():
    sides = {"homespun": [result(0.1)], "pfl": [result(8.0)]}
    rows = [
        row
        for task in ("tiny", "mlp")
        for row in figures(
            task, sides, dict.fromkeys(sides, (0.0, 0.0)), 1, gemm_rate=1.0, peer="pfl"
        )
    ]
    drawn = ElementTree.fromstring(plot(rows))
    circles = drawn.findall("{*}circle")
    assert len(circles) == 2 * 2 + 2  # and the legend
    assert all(0 <= float(circle.attrib["cx"]) <= 710 for circle in circles)
    ElementTree.fromstring(plot([]))


# --- the driver -----------------------------------------------------------------------------------------


def test_choices():
    quick = parse_choices(["--quick"])
    assert (quick.tasks, quick.repeats, quick.cores) == (("tiny", "logreg", "mlp"), 3, 1)
    assert parse_choices([]).repeats == 5
    assert parse_choices(["--tasks", "mlp,tiny"]).tasks == ("mlp", "tiny")
    assert "Flower" not in parse_choices(["--device", "cuda"]).peers


def test_an_unknown_task_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_choices(["--tasks", "tiny,mpl"])
    assert "'mpl' is none of tiny" in capsys.readouterr().err


def test_pfl_with_two_processes_goes_through_torchrun(tmp_path):
    command = Side("pfl", "pfl", tmp_path / "python", 2).command("tiny", 3, "cpu", tmp_path / "w")
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert command[5:9] == ["-m", "benchmarks.peers.simulation_pfl", "tiny", "--dtype=float32"]


def test_a_runner_that_fails_says_why(tmp_path):
    broken = [sys.executable, "-c", "raise SystemExit('no such layer')"]
    with pytest.raises(RunnerError, match="no such layer"):
        train(broken, tmp_path / "weights.npz", "cpu")
