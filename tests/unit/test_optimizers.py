"""Server optimizers, two steps each, against values worked out by hand from the papers' formulas."""

from __future__ import annotations

import subprocess
import sys
from math import sqrt

import numpy as np
import pytest

from homespun.errors import InvalidConfig
from homespun.learning.optimizers import names, server_optimizer


def walk(name, settings, updates):
    """Positions and last state of one parameter that starts at 0."""
    optimizer = server_optimizer(name, settings)
    parameters = {"x": np.zeros(1, np.float32)}
    state = optimizer.init(parameters)
    positions = []
    for update in updates:
        parameters, state = optimizer.apply(
            parameters, state, {"x": np.array([update], np.float32)}
        )
        assert parameters["x"].dtype == np.float32
        assert all(moment.dtype == np.float32 for moment in state.values())
        positions.append(float(parameters["x"][0]))
    return positions, {key: float(moment[0]) for key, moment in state.items()}


def test_fedavg_adds_the_mean_update():
    assert walk("FedAvg", {}, [2.0, -0.5]) == ([2.0, 1.5], {})
    assert walk("FedAvg", {"learning_rate": 0.5}, [2.0, -0.5]) == ([1.0, 0.75], {})


def test_fedavgm_keeps_a_velocity():
    # v = 2, then 0.5 * 2 + 1 = 2
    settings = {"momentum": 0.5, "learning_rate": 0.25}
    assert walk("FedAvgM", settings, [2.0, 1.0]) == ([0.5, 1.0], {"v/x": 2.0})


def test_fedadagrad_adds_up_squares():
    # v: 9 -> 25 -> 169, m: 2 -> 7; steps 2 / (5 + 3), 7 / (13 + 3)
    positions, state = walk(
        "FedAdagrad", {"learning_rate": 1.0, "beta1": 0.5, "tau": 3.0}, [4.0, 12.0]
    )
    assert positions == [0.25, 0.6875]
    assert state == {"m/x": 7.0, "v/x": 169.0}


def test_fedadam_averages_squares_without_bias_correction():
    # v: 1 -> (1 + 49) / 2 = 25 -> (25 + 35^2) / 2 = 625; m: 3.5 -> 19.25
    settings = {"learning_rate": 1.0, "beta1": 0.5, "beta2": 0.5, "tau": 1.0}
    positions, state = walk("FedAdam", settings, [7.0, 35.0])
    assert positions == pytest.approx([3.5 / 6, 3.5 / 6 + 19.25 / 26], rel=1e-6)
    assert state == {"m/x": 19.25, "v/x": 625.0}


def test_fedyogi_moves_the_squares_by_their_sign():
    # v: 25 > 16, so 25 - 8 = 17; 17 < 36, so 17 + 18 = 35; m: 2 -> -2
    settings = {"learning_rate": 1.0, "beta1": 0.5, "beta2": 0.5, "tau": 5.0}
    positions, state = walk("FedYogi", settings, [4.0, -6.0])
    first = 2 / (sqrt(17) + 5)
    assert positions == pytest.approx([first, first - 2 / (sqrt(35) + 5)], rel=1e-5)
    assert state == {"m/x": -2.0, "v/x": 35.0}


def test_fedyogi_stays_where_square_and_moment_agree():
    settings = {"learning_rate": 1.0, "beta1": 0.0, "beta2": 0.5, "tau": 2.0}
    assert walk("FedYogi", settings, [2.0])[1]["v/x"] == 4.0


@pytest.mark.parametrize("name", names())
def test_no_news_changes_nothing(name):
    positions, _ = walk(name, {}, [0.0, 0.0])
    assert positions == [0.0, 0.0]


@pytest.mark.parametrize("name", names())
def test_inputs_stay_as_they_are(name):
    optimizer = server_optimizer(name, {})
    parameters = {"x": np.ones(2, np.float32)}
    state = optimizer.init(parameters)
    before = {key: moment.copy() for key, moment in state.items()}
    optimizer.apply(parameters, state, {"x": np.ones(2, np.float32)})
    assert parameters["x"].tolist() == [1.0, 1.0]
    for key, moment in before.items():
        np.testing.assert_array_equal(state[key], moment)


@pytest.mark.parametrize("name", names())
def test_an_empty_tree_is_a_tree(name):
    optimizer = server_optimizer(name, {})
    assert optimizer.apply({}, optimizer.init({}), {}) == ({}, {})


def test_names_are_read_without_regard_to_case():
    assert names() == ("fedadagrad", "fedadam", "fedavg", "fedavgm", "fedyogi")
    assert server_optimizer("FEDADAM", {}).name == "FedAdam"


def test_they_are_known_to_whoever_imports_the_registry_alone():
    program = "from homespun.learning.optimizers import names; print(*names())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == list(names())


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("FedSomething", {}, "one of: fedadagrad"),
        ("FedAvg", {"momentum": 0.9}, "FedAvg has no setting 'momentum'.*learning_rate"),
        ("FedAvg", {"learning_rate": float("nan")}, "learning_rate is out of range"),
        ("FedAvg", {"learning_rate": float("inf")}, "learning_rate is out of range"),
        ("FedAvg", {"learning_rate": -0.1}, "learning_rate is out of range"),
        ("FedAvgM", {"momentum": 1.0}, "momentum is out of range"),
        ("FedAdam", {"beta1": 1.0}, "beta1 is out of range"),
        ("FedAdam", {"beta2": 1.5}, "beta2 is out of range"),
        ("FedYogi", {"tau": 0.0}, "tau must be above 0"),
    ],
)
def test_unusable_settings_are_refused(name, settings, says):
    with pytest.raises(InvalidConfig, match=says):
        server_optimizer(name, settings)
