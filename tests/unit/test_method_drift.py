"""SCAFFOLD, FedDyn and Mime-lite: methods against client drift reach the minimum that FedAvg misses."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.learning.method import method
from tests.unit.quadratics import Simulation, quadratics

START = np.array([1.0, -2.0, 0.5])
STEPS = np.array([3.0, 5.0, 8.0, 12.0])


def test_scaffold_finds_the_minimum_with_everybody_and_unequal_steps():
    problem = quadratics(num_steps=STEPS)
    scaffold = Simulation(method("SCAFFOLD"), problem, START)
    found = scaffold.rounds(300)
    np.testing.assert_allclose(found, problem.minimiser(), rtol=1e-9)
    # There every control variate is its client's gradient, and the server's is their mean: 0.
    np.testing.assert_allclose(scaffold.clients["control"], problem.gradient(found), atol=1e-8)
    np.testing.assert_allclose(scaffold.server["control"], 0, atol=1e-8)


def test_scaffold_finds_the_minimum_with_two_of_six_at_a_time():
    problem, rng = quadratics(m=6, steps=5), np.random.default_rng(2)
    scaffold = Simulation(method("SCAFFOLD"), problem, START)
    for _ in range(1500):
        scaffold.round(rng.permutation(6)[:2])
        np.testing.assert_allclose(
            scaffold.server["control"], scaffold.clients["control"].mean(0), atol=1e-10
        )
    np.testing.assert_allclose(scaffold.model, problem.minimiser(), rtol=1e-7)
    plain = Simulation(method("FedAvg", {"weights": "equal"}), problem, START).rounds(300)
    assert np.abs(plain - problem.minimiser()).max() > 0.01


def test_scaffold_uses_option_two():
    """One client, K steps: c_1+ = c_1 - c + (x - y) / (K lr), the mean of the corrected gradients on its way."""
    problem = quadratics(m=2, steps=4)
    scaffold = Simulation(method("SCAFFOLD"), problem, START)
    scaffold.round(np.array([0]))
    seen, w = [], START
    for _ in range(4):
        seen.append(problem.curvature[0] @ (w - problem.optimum[0]))
        w = w - 0.1 * seen[-1]
    np.testing.assert_allclose(scaffold.clients["control"][0], np.mean(seen, 0), rtol=1e-12)
    np.testing.assert_allclose(scaffold.clients["control"][1], 0)  # it took no part
    np.testing.assert_allclose(scaffold.server["control"], np.mean(seen, 0) / 2, rtol=1e-12)
    np.testing.assert_allclose(scaffold.model, w, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_feddyn_finds_the_minimum_with_everybody_and_unequal_steps(alpha):
    problem = quadratics(num_steps=STEPS * 3)
    feddyn = Simulation(method("FedDyn", {"alpha": alpha}), problem, START)
    found = feddyn.rounds(400)
    np.testing.assert_allclose(found, problem.minimiser(), rtol=1e-8)
    np.testing.assert_allclose(feddyn.clients["gradient"], problem.gradient(found), atol=1e-7)


def test_feddyn_does_what_algorithm_1_says():
    """Two of four clients, each to its exact minimum, twice, against the paper's lines worked out by hand."""
    alpha, problem = 0.8, quadratics(steps=600)
    feddyn = Simulation(method("FedDyn", {"alpha": alpha}), problem, START)
    x, h, theirs = START, np.zeros(3), np.zeros((4, 3))
    for who in ([0, 2], [2, 3]):
        feddyn.round(np.array(who))
        y = {}
        for i in who:  # A (y - b) - h_i + alpha (y - x) = 0
            a, b = problem.curvature[i], problem.optimum[i]
            y[i] = np.linalg.solve(a + alpha * np.eye(3), a @ b + theirs[i] + alpha * x)
            theirs[i] -= alpha * (y[i] - x)
            np.testing.assert_allclose(theirs[i], a @ (y[i] - b), atol=1e-9)  # its own gradient
        h = h - alpha / 4 * sum(y[i] - x for i in who)
        x = sum(y.values()) / 2 - h / alpha
        np.testing.assert_allclose(feddyn.model, x, rtol=1e-9)
        np.testing.assert_allclose(feddyn.clients["gradient"], theirs, atol=1e-9)


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_mime_lite_with_one_step_is_the_servers_momentum_sgd(weights):
    problem = quadratics(steps=1)
    mime = Simulation(method("MimeLite", {"beta": 0.6, "weights": weights}), problem, START)
    share = problem.num_examples if weights == "examples" else np.ones(4)
    x, momentum = START, np.zeros(3)
    for _ in range(10):
        mime.round()
        momentum = 0.4 * (share @ problem.gradient(x) / share.sum()) + 0.6 * momentum
        x = x - 0.1 * momentum
        np.testing.assert_allclose(mime.model, x, rtol=1e-12)
        np.testing.assert_allclose(mime.server["momentum"], momentum, rtol=1e-12)


def test_mime_lite_keeps_the_momentum_still_during_local_steps():
    problem = quadratics(m=1, steps=3)
    mime = Simulation(method("MimeLite", {"beta": 0.5}), problem, START)
    mime.rounds(2)
    x, momentum = START, np.zeros(3)
    for _ in range(2):
        y, first = x, problem.gradient(x)[0]
        for _ in range(3):
            y = y - 0.1 * (0.5 * problem.gradient(y)[0] + 0.5 * momentum)
        x, momentum = y, 0.5 * first + 0.5 * momentum
    np.testing.assert_allclose(mime.model, x, rtol=1e-12)
    np.testing.assert_allclose(mime.server["momentum"], momentum, rtol=1e-12)
