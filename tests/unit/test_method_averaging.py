"""FedAvg and its relatives, FedProx and FedNova: where they come to rest, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from homespun.errors import InvalidConfig, NumericFailure
from homespun.learning.method import (
    Layout,
    Method,
    Sums,
    defaults,
    mean_update,
    method,
    names,
    register,
    weighting,
)
from homespun.learning.optimizers import server_optimizer
from tests.unit.quadratics import Simulation, quadratics, rest

START = np.array([1.0, -2.0, 0.5])
EYE = np.eye(3)


def pulls_of_local_training(problem):
    """P_i [m, d, d] with y_i - x = -P_i (x - b_i): 1 - (1 - r A_i)^K for plain SGD."""
    powers = [
        np.linalg.matrix_power(EYE - problem.learning_rate * a, int(k))
        for a, k in zip(problem.curvature, problem.num_steps, strict=True)
    ]
    return EYE - np.stack(powers)


@pytest.mark.parametrize(("weights", "chosen"), [("examples", True), ("equal", False)])
def test_fedavg_rests_where_the_clients_updates_cancel_and_not_at_the_minimum(weights, chosen):
    problem = quadratics(steps=20)
    shares = problem.num_examples if chosen else np.ones(4)
    found = Simulation(method("FedAvg", {"weights": weights}), problem, START).rounds(200)
    expected = rest(pulls_of_local_training(problem), problem.optimum, shares)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert np.abs(found - problem.minimiser(shares)).max() > 0.1


def test_fedavg_with_one_step_finds_the_minimum():
    problem = quadratics(steps=1)
    found = Simulation(method("FedAvg"), problem, START).rounds(1000)
    np.testing.assert_allclose(found, problem.minimiser(problem.num_examples), rtol=1e-10)


def test_fedprox_rests_where_the_proximal_minima_cancel():
    # y_i = argmin f_i(y) + mu / 2 |y - x|^2 is x - (A_i + mu)^-1 A_i (x - b_i).
    mu, problem = 0.7, quadratics(steps=400)
    found = Simulation(method("FedProx", {"proximal": mu}), problem, START).rounds(200)
    pulls = np.linalg.solve(problem.curvature + mu * EYE, problem.curvature)
    expected = rest(pulls, problem.optimum, problem.num_examples)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    plain = Simulation(method("FedAvg"), problem, START).rounds(200)
    best = problem.minimiser(problem.num_examples)
    assert np.linalg.norm(found - best) < np.linalg.norm(plain - best)


def test_fednova_finds_the_minimum_where_unequal_steps_lead_fedavg_astray():
    # With A_i = 1 for all, K steps of rate r pull by 1 - (1 - r)^K, which is r K for small r: FedAvg rests at the mean
    # of the optima weighted by n K, FedNova at the one weighted by n, but for less than 0.02 at this r.
    problem = quadratics(
        curvature=np.stack([EYE] * 4),
        num_steps=np.array([1.0, 2.0, 10.0, 30.0]),
        learning_rate=1e-4,
    )
    n, k = problem.num_examples, problem.num_steps
    settings = {"server_settings": {"learning_rate": 100.0}}
    nova = Simulation(method("FedNova", settings), problem, START).rounds(300)
    plain = Simulation(method("FedAvg", {"learning_rate": 100.0}), problem, START).rounds(300)
    pulls = n * (1 - (1 - 1e-4) ** k)
    np.testing.assert_allclose(plain, pulls @ problem.optimum / pulls.sum(), rtol=1e-6)
    np.testing.assert_allclose(plain, (n * k) @ problem.optimum / (n * k).sum(), atol=0.02)
    np.testing.assert_allclose(nova, pulls / k @ problem.optimum / (pulls / k).sum(), rtol=1e-6)
    np.testing.assert_allclose(nova, problem.minimiser(n), atol=0.02)
    assert np.abs(plain - problem.minimiser(n)).max() > 0.3


def test_fednova_of_equal_steps_is_fedavg():
    problem = quadratics(steps=7)
    nova = Simulation(method("FedNova"), problem, START).rounds(5)
    np.testing.assert_allclose(
        nova, Simulation(method("FedAvg"), problem, START).rounds(5), rtol=1e-12
    )


@pytest.mark.parametrize(("momentum", "proximal"), [(0.0, 0.0), (0.9, 0.0), (0.0, 3.0)])
def test_fednova_knows_how_far_each_client_went(momentum, proximal):
    """Where gradients are constant, u_i is minus lr |a_i|_1 g_i: the step is minus lr tau times the mean gradient."""
    steps = np.array([1.0, 2.0, 5.0, 9.0])
    problem = quadratics(num_steps=steps, momentum=momentum)
    slopes = problem.optimum
    problem.gradient = lambda w, who=slice(None): slopes[who]  # type: ignore[method-assign]
    nova = method("FedNova", {"momentum": momentum, "proximal": proximal})
    moved = Simulation(nova, problem, START).rounds(1) - START
    lengths = []
    for k in steps:  # the weights of the gradients, by running the recursion on a gradient of 1
        w = velocity = 0.0
        for _ in range(int(k)):
            velocity = momentum * velocity + 1 + proximal * w
            w -= 0.1 * velocity
        lengths.append(-w / 0.1)
    p = problem.num_examples / problem.num_examples.sum()
    np.testing.assert_allclose(moved, -0.1 * (p @ lengths) * (p @ slopes), rtol=1e-10)


FEDOPT = {"FedAvg": {}, "FedAvgM": {}, "FedAdagrad": {}, "FedAdam": {"beta2": 0.9}, "FedYogi": {}}


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("name", FEDOPT)
def test_the_server_makes_the_deployments_step_to_the_bit(name, tensors):
    rng = np.random.default_rng(5)
    settings = {"learning_rate": 0.3, **FEDOPT[name]}
    shapes = {"w": (3, 2), "b": (4,)}
    tree = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    deployed, simulated = server_optimizer(name, settings), method(name, settings)
    state = deployed.init(tree)
    kind = torch.from_numpy if tensors else np.asarray
    model = kind(np.concatenate([tree["w"].ravel(), tree["b"]]))
    server = simulated.begin(model, Layout({}))
    for _ in range(4):
        update = rng.normal(size=10).astype(np.float32)
        tree, state = deployed.apply(tree, state, {"w": update[:6].reshape(3, 2), "b": update[6:]})
        sums = Sums({"update": kind(update * np.float32(8))}, {"weight": 8.0}, 2, 9)
        before, model_before = model + 0, model
        model, server = simulated.server_update(model, server, sums)
        np.testing.assert_array_equal(model_before, before)  # nothing is changed in place
        assert type(model) is type(before)
        assert model.dtype == before.dtype
        assert all(type(moment) is type(before) for moment in server.values())
        expected = np.concatenate([tree["w"].ravel(), tree["b"]])
        np.testing.assert_array_equal(np.asarray(model), expected)


@pytest.mark.parametrize("name", FEDOPT)
def test_float64_stays_float64(name):
    simulated = method(name)
    model = torch.full((2,), 1 / 3, dtype=torch.float64)
    sums = Sums({"update": model * 1e-9}, {"weight": 1.0}, 1, 1)
    moved, server = simulated.server_update(model, simulated.begin(model, Layout({})), sums)
    assert moved.dtype == torch.float64
    assert all(vector.dtype == torch.float64 for vector in server.values())
    assert (moved != moved.float().double()).all()  # and has the digits of it


@pytest.mark.parametrize("name", ["FedProx", "SCAFFOLD", "FedNova", "Ditto", "FedPer", "Median"])
def test_client_methods_take_any_servers_step(name):
    """The same round with FedAdam at the server moves the model by FedAdam's step along the same mean update."""
    own = {"own": "b"} if name == "FedPer" else {}
    layout = Layout({"a": slice(0, 2), "b": slice(2, 3)})
    adam = {"server": "FedAdam", "server_settings": {"learning_rate": 0.2}}
    sums = Sums(
        {"update": np.array([3.0, -1.0, 0.5]), "control": np.zeros(3)},
        {"weight": 2.0, "steps": 2.0, "share": 2.0},
        2,
        5,
    )
    built = method(name, {**own, **adam})
    moved, _ = built.server_update(START, built.begin(START, layout), sums)
    optimizer = server_optimizer("FedAdam", {"learning_rate": 0.2})
    tree = {"x": START}
    expected, _ = optimizer.apply(tree, optimizer.init(tree), {"x": mean_update(sums)})
    np.testing.assert_array_equal(moved, expected["x"])


def test_a_sum_without_weight_is_no_update():
    with pytest.raises(NumericFailure, match="no weight"):
        mean_update(Sums({"update": np.zeros(2)}, {"weight": 0.0}, 0, 5))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("FedAgv", {}, "unknown method"),
        ("FedAvg", {"rate": 1.0}, "has no setting 'rate'"),
        ("FedAvg", {"learning_rate": -1.0}, "learning_rate"),
        ("FedAvg", {"learning_rate": "fast"}, "must be a finite number"),
        ("FedAvg", {"learning_rate": float("nan")}, "must be a finite number"),
        ("FedAvg", {"learning_rate": True}, "must be a finite number"),
        ("FedAvg", {"weights": "size"}, "unknown weighting"),
        ("FedAvg", {"weights": 1}, "must be text"),
        ("FedProx", {"proximal": -0.1}, "proximal"),
        ("FedProx", {"server": "Adam"}, "unknown server optimizer"),
        ("FedProx", {"server_settings": 3}, "settings by name"),
        ("FedProx", {"server_settings": {"learning_rate": "fast"}}, "learning_rate"),
        ("FedProx", {"server_settings": {"tau": 1.0}}, "has no setting 'tau'"),
        ("FedNova", {"momentum": 1.0}, "momentum"),
        ("FedNova", {"momentum": 0.9, "proximal": 0.1}, "momentum"),
        ("FedDyn", {"alpha": 0.0}, "alpha"),
        ("MimeLite", {"beta": 1.0}, "beta"),
        ("qFedAvg", {"q": -1.0}, "q is out"),
        ("Ditto", {"pull": -1.0}, "pull"),
        ("IFCA", {"clusters": 0}, "clusters"),
        ("IFCA", {"clusters": 2.0}, "must be a whole number"),
        ("IFCA", {"spread": -1.0}, "spread"),
        ("TrimmedMean", {"trim": 0.5}, "trim"),
        ("Krum", {"byzantine": -1}, "byzantine"),
        ("MultiKrum", {"select": -1}, "select"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings, says):
    with pytest.raises(InvalidConfig, match=says):
        method(name, settings)


def test_a_method_is_known_by_name_in_any_case():
    assert method("fedavg").name == "FedAvg"
    assert "SCAFFOLD" in names()
    assert defaults("fedprox") == {
        "proximal": 0.01,
        "server": "FedAvg",
        "server_settings": {},
        "weights": "examples",
    }
    with pytest.raises(InvalidConfig, match="equal"):
        weighting("EQUAL")


def test_settings_are_of_their_defaults_kind(monkeypatch):
    monkeypatch.setattr("homespun.learning.method._registry", {})
    register(lambda **s: Method(name=str(s), server_update=lambda m, v, s: (m, v)), "X", on=True)
    assert method("X", {"on": False}).name == "{'on': False}"
    with pytest.raises(InvalidConfig, match="true or false"):
        method("X", {"on": 1})
