"""`homespun simulate`, `plot` and `report`, as a newcomer meets them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from homespun.cli.main import app
from homespun.errors import HomespunError, InvalidConfig, InvalidInput

CONFIG = """
[task]
model = "tests.unit.simulated:task"
settings = { learning_rate = 0.1 }

[data]
source = "tests.unit.simulated:data"

[simulation]
rounds = 3
cohort = 4
"""


def homespun(*words, fails=None):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if fails is None:
        assert result.exception is None, result.exception
    else:
        assert isinstance(result.exception, fails), result.exception
        raise result.exception
    return result.output


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(CONFIG)
    return path


def test_from_a_file_to_a_plot_and_a_report(config, tmp_path):
    said = homespun("simulate", config, "--set", "simulation.rounds=2")
    where = tmp_path / "mine-run"
    assert "FedAvg: 2 rounds of 4 of 12 clients" in said
    assert "finished after 2 rounds" in said
    model = where / "checkpoints" / "round-000002" / "model.safetensors"
    assert str(model) in said
    assert model.exists()
    with pytest.raises(HomespunError, match="there is a simulation"):
        homespun("simulate", config, fails=HomespunError)
    assert "finished after 3 rounds" in homespun("simulate", config, "--resume")
    assert "plot.svg" in homespun("plot", where)
    assert (where / "plot.svg").read_text().startswith("<svg")
    homespun("report", where)
    assert "3 rounds" in (where / "report.md").read_text()


def test_rounds_as_json(config, tmp_path):
    said = homespun("simulate", config, "--json", "--directory", tmp_path / "other")
    assert [json.loads(line)["round"] for line in said.splitlines()] == [1, 2, 3]
    assert len(json.loads(homespun("report", tmp_path / "other", "--json"))) == 3


def test_a_model_of_the_zoo_is_trained_as_devices_do(config):
    changes = ("task.model=digits", "data.source=tests.unit.simulated:images", "method.name=FedAvg")
    text = config.read_text().replace("settings = { learning_rate = 0.1 }", "")
    config.write_text(text)
    words = [word for change in changes for word in ("--set", change)]
    records = [json.loads(r) for r in homespun("simulate", config, "--json", *words).splitlines()]
    assert [record["clipped"] is not None for record in records] == [True] * 3  # integers, as there
    losses = [record["evaluation"]["loss"] for record in records]
    assert losses[0] > losses[2]
    words[-1] = "method.name=FedBuff"
    with pytest.raises(InvalidConfig, match="not simulated asynchronously"):
        homespun("simulate", config, "--resume", *words, fails=InvalidConfig)


def test_asynchronous_rounds_from_a_file(config):
    words = ("method.name=FedBuff", "method.settings.size=2", "durations.spread=0.5")
    changes = [word for change in words for word in ("--set", change)]
    records = [json.loads(r) for r in homespun("simulate", config, "--json", *changes).splitlines()]
    assert [record["num_clients"] for record in records] == [2, 2, 2]
    times = [record["virtual_seconds"] for record in records]
    assert 0 < times[0] < times[1] < times[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task.model=tests.unit.simulated:nothing", "no 'nothing'"),
        ("task.model=absent_module:task", "task.model"),
        ("task.settings.depth=3", "depth"),
        ("data.source=tests.unit.simulated:task", "gave Task"),
        ("data.source=data", "names no function"),
        ("method.name=FedAvgg", "unknown method"),
        ("durations.seconds=0", "above 0"),
        ("durations.speed=1", "durations.speed"),
        ("simulation.cohort=99", "cohort is larger"),
        ("cluster.cpus=2", "a cluster needs workers"),
    ],
)
def test_what_is_wrong_is_told(config, change, said):
    with pytest.raises(InvalidConfig, match=said):
        homespun("simulate", config, "--set", change, fails=InvalidConfig)


def test_a_directory_without_a_simulation(tmp_path):
    with pytest.raises(InvalidInput, match="no history"):
        homespun("plot", tmp_path, fails=InvalidInput)
