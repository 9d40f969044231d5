"""Evaluation of clients with their own parameters, and what these cost."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.learning.method import Layout, method
from homespun.simulation.arena import Arena
from homespun.simulation.assembly import owners
from homespun.simulation.checkpoints import Checkpoints
from homespun.simulation.stopping import Target
from tests.unit.simulated import task
from tests.unit.test_simulation_simulate import run

SETTINGS = {
    "Ditto": {"pull": 0.01},
    "FedPer": {"own": "2.*"},
    "IFCA": {"clusters": 2, "spread": 0.5, "seed": 1},
}


def conflicting(seed, names=None, num_clients=10, rows=12):
    """Clients with the same inputs and, every second one, the opposite label: no one model can be right for both."""
    x = np.random.default_rng(seed).normal(size=(num_clients * rows, 6)).astype(np.float32)
    side = np.repeat(np.arange(num_clients) % 2, rows)
    y = ((x[:, 0] > 0) ^ side.astype(bool)).astype(np.int32)
    return Arena({"x": x, "y": y}, np.arange(num_clients + 1) * rows, names)


@pytest.mark.parametrize("name", SETTINGS)
def test_where_labels_conflict_clients_are_right_and_the_model_is_not(name):
    result = run(
        made=task(learning_rate=0.3, hidden=8),
        on=conflicting(0),
        evaluate_on=conflicting(1),
        method=name,
        method_settings=SETTINGS[name],
        rounds=40,
        cohort=10,
        evaluate_every=40,
        strategy="auto",
    )
    evaluation = result.history[-1].evaluation
    assert 0.4 <= evaluation["top1"] <= 0.6
    assert evaluation["personal.top1"] > 0.75
    assert evaluation["personal.loss"] < evaluation["loss"]


def test_only_clients_that_took_part_are_measured_personally():
    two = np.array([3, 6])
    words = {"method": "Ditto", "method_settings": {"pull": 0.0}, "rounds": 2, "cohort": 2}
    on = conflicting(0)
    result = run(on=on, evaluate_on=on, participation=lambda number: two, **words)
    alone = run(on=on, evaluate_on=on.subset(two), participation=lambda number: two, **words)
    assert "personal.loss" not in alone.history[-1].evaluation  # others than those of training
    names = [f"client {number}" for number in range(10)]
    named, some = conflicting(0, names), conflicting(0, names).subset([6, 3, 0])
    by_name = run(on=named, evaluate_on=some, participation=lambda number: two, **words)
    for number in (0, 1):
        expected = result.history[number].evaluation["personal.loss"]
        assert by_name.history[number].evaluation["personal.loss"] == pytest.approx(expected)


def test_a_run_may_end_by_what_clients_see():
    result = run(
        made=task(learning_rate=0.3),
        on=conflicting(0),
        evaluate_on=conflicting(0),
        method="Ditto",
        rounds=200,
        target=Target(metric="personal.top1", value=0.9),
    )
    assert result.reason
    assert 1 < len(result.history) < 200


def test_clients_are_the_same_by_name_or_by_number():
    plain, names = conflicting(0), [f"c{number}" for number in range(10)]
    assert owners(plain, plain).tolist() == list(range(10))
    assert set(owners(plain.subset([1, 2]), plain)) == {-1}
    named = conflicting(0, names)
    assert owners(named.subset([4, 2]), named).tolist() == [4, 2]
    assert set(owners(plain, named)) == set(owners(named, plain)) == {-1}


def test_fedper_keeps_its_own_parameters_only(tmp_path):
    made = task(hidden=50)
    run(made=made, method="FedPer", method_settings={"own": "2.*"}, directory=tmp_path, rounds=1)
    kept = Checkpoints(tmp_path / "checkpoints").load(1).clients
    assert kept["rows.own"].shape == (5, 3 * 50 + 3)
    layout = Layout.of((n, tuple(p.shape)) for n, p in made.model.named_parameters())
    first = method("FedPer", {"own": "0.bias 2.bias"}).client_begin
    assert first is not None
    assert first(np.arange(503.0), layout)["own"].tolist() == [*range(300, 350), 500, 501, 502]
