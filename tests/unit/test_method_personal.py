"""q-FedAvg, Ditto, FedPer, IFCA: methods that treat clients differently."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import InvalidConfig
from homespun.learning.method import Layout, method
from tests.unit.quadratics import Simulation, quadratics

START = np.array([1.0, -2.0, 0.5])
LAYOUT = Layout({"body.weight": slice(0, 1), "body.bias": slice(1, 2), "head.weight": slice(2, 3)})


def test_q_0_is_fedavg_with_equal_weights():
    problem = quadratics(num_steps=np.array([1.0, 4.0, 4.0, 9.0]))
    fair = Simulation(method("qFedAvg", {"q": 0.0}), problem, START).rounds(5)
    plain = Simulation(method("FedAvg", {"weights": "equal"}), problem, START).rounds(5)
    np.testing.assert_allclose(fair, plain, rtol=1e-12)


def test_q_fedavg_makes_the_step_of_the_paper():
    q, problem = 2.0, quadratics(steps=3)
    fair = Simulation(method("qFedAvg", {"q": q}), problem, START)
    over, under = np.zeros(3), 0.0
    for i in range(4):
        y = START
        for _ in range(3):
            y = y - 0.1 * problem.curvature[i] @ (y - problem.optimum[i])
        loss, moved = problem.loss(START)[i], (START - y) / 0.1
        over = over + loss**q * moved
        under += q * loss ** (q - 1) * (moved @ moved) + loss**q / 0.1
    np.testing.assert_allclose(fair.rounds(1), START - over / under, rtol=1e-8)


def test_a_larger_q_makes_losses_more_alike():
    problem, spread = quadratics(steps=1), []
    for q in (0.0, 1.0, 5.0):
        fair = Simulation(method("qFedAvg", {"q": q}), problem, START)
        spread.append(float(problem.loss(fair.rounds(2000)).var()))
    assert spread[0] > 1.2 * spread[1] > 1.2**2 * spread[2]


def test_q_fedavg_bears_a_loss_of_zero():
    problem = quadratics(m=2, floor=np.zeros(2))
    at = problem.optimum[0]
    fair = Simulation(method("qFedAvg", {"q": 0.5}), problem, at)
    assert np.isfinite(fair.rounds(1)).all()


def test_ditto_without_pull_is_local_training():
    problem = quadratics(steps=5)
    ditto = Simulation(method("Ditto", {"pull": 0.0}), problem, START)
    common = ditto.rounds(300)
    np.testing.assert_allclose(ditto.clients["own"], problem.optimum, rtol=1e-9)
    np.testing.assert_allclose(common, Simulation(method("FedAvg"), problem, START).rounds(300))


@pytest.mark.parametrize("pull", [0.5, 3.0, 15.0])
def test_ditto_rests_between_the_own_optimum_and_the_common_model(pull):
    problem = quadratics(steps=20)
    ditto = Simulation(method("Ditto", {"pull": pull}), problem, START)
    x = ditto.rounds(300)
    # A (v - b) + pull (v - x) = 0
    targets = (problem.curvature @ problem.optimum[..., None])[..., 0] + pull * x
    expected = np.linalg.solve(problem.curvature + pull * np.eye(3), targets[..., None])[..., 0]
    own = ditto.evaluated()
    np.testing.assert_allclose(own, expected, rtol=1e-9)


def test_ditto_with_a_strong_pull_is_the_common_model():
    problem = quadratics(steps=50, learning_rate=1e-4)
    ditto = Simulation(method("Ditto", {"pull": 1e4}), problem, START)
    for _ in range(3):
        given = ditto.model
        ditto.round()
        np.testing.assert_allclose(
            ditto.clients["own"], given[None, :] * np.ones((4, 1)), atol=2e-3
        )


def test_ditto_leaves_those_alone_who_take_no_part():
    problem = quadratics()
    ditto = Simulation(method("Ditto"), problem, START)
    ditto.round(np.array([0, 1]))
    assert (ditto.clients["own"][2:] == START).all()
    assert (ditto.clients["own"][:2] != START).all()


@pytest.mark.parametrize("own", ["head.*", "*.bias head.weight"])
def test_what_is_private_under_fedper_appears_in_no_sum(own):
    problem = quadratics()
    fedper = Simulation(method("FedPer", {"own": own}), problem, START, LAYOUT)
    private = [2] if own == "head.*" else [1, 2]
    shared = [i for i in range(3) if i not in private]
    for _ in range(5):
        report = fedper.report(np.arange(4))
        for rows in report.vectors.values():
            assert (rows[:, private] == 0).all()
            assert (rows[:, shared] != 0).all()
        assert set(report.numbers) == {"weight"}
        fedper.round()
        assert (fedper.model[private] == START[private]).all()
        assert fedper.clients["own"].shape == (4, len(private))  # nothing else is kept
        assert (fedper.clients["own"] != START[private]).all()


def test_fedper_rests_where_own_and_common_parameters_fit():
    """With one small step a round this is gradient descent on everything, so both kinds of gradients vanish."""
    problem = quadratics(steps=1)
    fedper = Simulation(method("FedPer", {"own": "head.*"}), problem, START, LAYOUT)
    fedper.rounds(2000)
    whole = fedper.evaluated()
    assert (whole[:, :2] == fedper.model[:2]).all()
    gradient = problem.gradient(whole)
    np.testing.assert_allclose(gradient[:, 2], 0, atol=1e-9)
    np.testing.assert_allclose(problem.num_examples @ gradient[:, :2], 0, atol=1e-8)


@pytest.mark.parametrize("own", ["", "tail.*", "*", "body.* head.*", "body.weight tail"])
def test_fedper_must_share_something_and_keep_something(own):
    with pytest.raises(InvalidConfig):
        method("FedPer", {"own": own}).begin(START, LAYOUT)


def planted(rng, m=12):
    """Clients around two optima far from each other, and which of the two each is around."""
    side = rng.permutation(np.arange(m) % 2)
    centres = np.array([[3.0, 0.0, 1.0], [-3.0, 1.0, 0.0]])
    return side, quadratics(m=m, optimum=centres[side] + 0.1 * rng.normal(size=(m, 3)))


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_ifca_finds_planted_clusters(weights):
    side, problem = planted(np.random.default_rng(1))
    settings = {"clusters": 2, "spread": 1.0, "weights": weights, "seed": 3}
    ifca = Simulation(method("IFCA", settings), problem, np.zeros(3))
    ifca.rounds(60)
    choice = ifca.clients["choice"][:, 0]
    assert (choice == side).all() or (choice == 1 - side).all()
    # Each model is where FedAvg comes to rest among the clients of its cluster alone.
    for j in (0, 1):
        group = choice == j
        alone = quadratics(
            curvature=problem.curvature[group],
            optimum=problem.optimum[group],
            num_examples=problem.num_examples[group],
            num_steps=problem.num_steps[group],
            floor=problem.floor[group],
        )
        expected = Simulation(method("FedAvg", {"weights": weights}), alone, np.zeros(3)).rounds(60)
        np.testing.assert_allclose(ifca.server["models"][j], expected, rtol=1e-6)
    used = ifca.evaluated()
    np.testing.assert_array_equal(used, ifca.server["models"][choice.astype(int)])


def test_an_ifca_model_that_nobody_chooses_stays():
    problem = quadratics()
    ifca = Simulation(method("IFCA", {"clusters": 3}), problem, START)
    ifca.server = {"models": np.stack([START, START + 100, START - 100])}
    ifca.round()
    assert (ifca.clients["choice"] == 0).all()
    assert (ifca.server["models"][0] != START).any()
    assert (ifca.server["models"][1:] == np.stack([START + 100, START - 100])).all()


def test_ifcas_first_models_are_noise_around_the_given_one():
    model = np.full(2000, 5.0)
    settings = {"clusters": 3, "spread": 0.5}
    first = method("IFCA", settings).begin(model, Layout({}))["models"]
    assert first.shape == (3, 2000)
    np.testing.assert_allclose(first.mean(1), 5.0, atol=0.05)
    np.testing.assert_allclose(first.std(1), 0.5, atol=0.05)
    assert (first == method("IFCA", settings).begin(model, Layout({}))["models"]).all()
    other = method("IFCA", {**settings, "seed": 1}).begin(model, Layout({}))["models"]
    assert (first != other).all()
