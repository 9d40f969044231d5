"""Actors of a real Ray on this machine: the bits of one process, also when one of them is killed on the way."""

from __future__ import annotations

import importlib
import socket
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

import homespun
from homespun.errors import InvalidConfig, NumericFailure, Unreachable
from homespun.simulation import ray as module
from homespun.simulation.ray import Actors, Cluster
from tests.unit.odd_trainers import FAILS, ROWS, Odd, half_mapped, order, shards
from tests.unit.simulated import data, deadly_task, task

HALF = Cluster(cpus=0.5)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what Ray leaves open


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Holds the connection that all tests use, where Ray remembers a cluster that is gone."""
    odd = Odd(str(tmp_path_factory.mktemp("marks")), half_mapped(tmp_path_factory.mktemp("arena")))
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        files = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        )
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", files)  # a short path: it holds sockets
        remembered = Path(files, "ray", "ray_current_cluster")
        remembered.parent.mkdir()
        remembered.write_text("192.0.2.2:6391")
        actors = stack.enter_context(Actors(odd, 1, HALF))
        yield actors
        actors.close()
        assert not actors._ray.is_initialized()


def test_actors_train_shards_on_rows_that_are_mapped_and_tell_failures(pool):
    with pytest.raises(NumericFailure, match="shard 99") as caught:
        pool.run(order(3), shards(1, FAILS))
    assert (caught.value.hint, caught.value.details) == ("as it should be", {"round": 3})
    found = pool.run(order(4), shards(1, 5))
    assert [part.vectors["update"].tolist() for part in found] == [[5, 6, 7], [21, 26, 31]]
    for part in found:
        assert part.vectors["update"].flags.writeable
        assert part.numbers == {"a": 1.0, "b": 1.0, "sum": 4.0 * (ROWS - 1)}


def test_a_simulation_gives_the_bits_of_one_process_although_an_actor_is_killed(
    pool, tmp_path, monkeypatch
):
    def run(made, workers, cluster):
        result = homespun.simulate(
            made,
            data(),
            rounds=2,
            cohort=8,
            method="SCAFFOLD",
            shards=4,
            seed=1,
            strategy="stacked",
            workers=workers,
            cluster=cluster,
            progress=False,
        )
        parameters = {name: array.tobytes() for name, array in result.parameters.items()}
        return parameters, [record.loss for record in result.history]

    mark = tmp_path / "killed"
    here = run(task(), 0, None)
    assert run(partial(deadly_task, str(mark)), 2, HALF) == here
    assert mark.exists()
    # One worker, and a task in a module that only this process's path has.
    (tmp_path / "beside_the_file.py").write_text(
        "from tests.unit import simulated\ndef task(): return simulated.task()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(importlib.import_module("beside_the_file").task, 1, HALF) == here


def test_a_cluster_that_is_too_small_is_refused(pool):
    words = {"rounds": 1, "cohort": 2, "progress": False}
    with pytest.raises(InvalidConfig, match="CPU, 2 workers take 2000"):
        homespun.simulate(task, data(), workers=2, cluster=Cluster(cpus=1000), **words)
    with pytest.raises(InvalidConfig, match="GPU, 1 workers take 1000"):
        homespun.simulate(task, data(), workers=1, cluster=Cluster(gpus=1000), **words)
    with pytest.raises(InvalidConfig, match="needs workers"):
        homespun.simulate(task, data(), cluster=Cluster(), **words)


def test_gpus_are_taken_where_the_device_is_one():
    assert Cluster().needs("cuda:0") == {"CPU": 1, "GPU": 1}
    assert Cluster().needs("cpu") == {"CPU": 1, "GPU": 0}
    assert Cluster(cpus=2, gpus=0.25).needs("cuda") == {"CPU": 2, "GPU": 0.25}
    with pytest.raises(InvalidConfig, match="at least 0"):
        Cluster(gpus=-1)


def test_without_ray_or_its_cluster_there_is_a_hint(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ray = module._imported()
    for address in (f"127.0.0.1:{port}", "ray://127.0.0.1:x"):
        with pytest.raises(Unreachable, match=f"no Ray cluster at '{address}'"):
            module._connect(ray, address)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidConfig, match="Ray is not installed") as caught:
        module._imported()
    assert "homespun[ray]" in caught.value.hint
