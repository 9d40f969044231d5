"""Simulations as TOML: what is wrong is named with its file, its key and what is allowed."""

from __future__ import annotations

import pytest

from homespun.errors import InvalidConfig
from homespun.simulation.config import read_config

GOOD = """
[task]
model = "digits"

[data]
source = "mine:data"
settings = { num_clients = 5 }

[simulation]
rounds = 3
cohort = 2

[method]
name = "FedAdam"
settings = { learning_rate = 0.01 }
"""


def read(tmp_path, text=GOOD, *changes):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return read_config(path, changes)


def test_a_file_and_changes_of_it(tmp_path):
    config = read(
        tmp_path,
        GOOD,
        "simulation.rounds=5",
        "method.settings.learning_rate = 0.5",
        "data.source=yours:data",
        "target.metric=top1",
        "target.value=0.9",
        "cluster.gpus=0.5",
    )
    assert (config.simulation.rounds, config.simulation.cohort) == (5, 2)
    assert config.method.settings == {"learning_rate": 0.5}
    assert config.data.source == "yours:data"
    assert (config.cluster.address, config.cluster.cpus, config.cluster.gpus) == (None, 1, 0.5)
    assert (config.target.metric, config.target.value, config.target.mode) == ("top1", 0.9, None)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (GOOD.replace("rounds", "round"), "no key simulation.round", "rounds"),
        (GOOD.replace("[method]", "[methods]"), "no section methods", "method"),
        (GOOD.replace("rounds = 3", 'rounds = "3"'), "simulation.rounds: expected `int`", "int"),
        (GOOD.replace("rounds = 3", ""), "simulation: .*missing.*`rounds`", "add it"),
        (GOOD + '\n[early_stopping]\nmode = "up"', "early_stopping.mode", "min"),
        (GOOD.replace("[data]", "[data"), "is not TOML", ""),
        (GOOD.replace("cohort = 2", 'cohort = 2\naggregation = "sum"'), "aggregation", "secure"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said, hint):
    with pytest.raises(InvalidConfig, match=said) as caught:
        read(tmp_path, text)
    assert "run.toml" in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("change", ["rounds=5", "simulation.rounds", "task.model.size=1"])
def test_a_change_that_is_not_understood(tmp_path, change):
    with pytest.raises(InvalidConfig, match="--set"):
        read(tmp_path, GOOD, change)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidConfig, match=r"none\.toml cannot be read"):
        read_config(tmp_path / "none.toml")
