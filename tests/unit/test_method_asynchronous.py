"""FedBuff: the deployment's weights, FedAvg where nothing is stale."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from homespun.errors import InvalidConfig, ShapeMismatch
from homespun.learning.asynchronous import FedBuff
from homespun.learning.contribution import ContributionCodec
from homespun.learning.method import Layout, method
from tests.unit.quadratics import Simulation, quadratics

START = np.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize(("max_weight", "weights"), [(0, "equal"), (8, "examples")])
def test_without_staleness_it_is_fedavg(max_weight, weights):
    problem = quadratics()
    buffered = FedBuff(size=4, max_weight=max_weight)
    plain = Simulation(method("FedAvg", {"weights": weights}), problem, START)
    clients = buffered.build()
    model, server = START, clients.begin(START, Layout({}))
    for _ in range(5):
        (rule,) = clients.local(model, server, {})
        updates = problem.train(model, rule, np.arange(4)).update
        weights = [buffered.weight(int(number), 0) for number in problem.num_examples]
        sums = buffered.sums(np.array(weights) @ updates, weights, 100)
        model, server = clients.server_update(model, server, sums)
        plain.round()
        np.testing.assert_allclose(model, plain.model, rtol=1e-12)


def test_stale_updates_count_less_as_in_the_deployment():
    buffered = FedBuff(size=3, max_weight=10)
    codec = ContributionCodec(3, 5.0, 10, ("loss",), 50)
    weights = [buffered.weight(*who) for who in ((5, 0), (20, 3), (10, 8))]
    assert weights == [codec.weight(*who) for who in ((5, 0), (20, 3), (10, 8))]
    assert weights == pytest.approx([0.5, 1 / sqrt(4), 1 / sqrt(9)], abs=1e-5)
    sums = buffered.sums(np.ones(3), weights, 100)
    assert sums.numbers == {"weight": sum(weights)}
    assert (sums.num_clients, sums.population) == (3, 100)


def test_the_paper_divides_by_the_size_of_the_buffer():
    weights = [FedBuff().weight(1, 3)] * 2
    for divide_by, expected in (("size", 0.5), ("weight", 1.0)):
        buffered = FedBuff(size=2, divide_by=divide_by)
        sums = buffered.sums(sum(weights) * np.ones(3), weights, 100)
        moved, _ = buffered.build().server_update(np.zeros(3), {}, sums)
        np.testing.assert_allclose(moved, expected)


def test_any_server_step_and_plain_client_fit():
    buffered = FedBuff(method="FedProx", settings={"server": "FedAdam", "proximal": 0.5})
    built = buffered.build()
    assert set(built.begin(START, Layout({}))) == {"m/model", "v/model"}
    assert built.local(START, {}, {})[0].proximal == 0.5


@pytest.mark.parametrize("name", ["SCAFFOLD", "FedNova", "FedDyn", "Ditto", "Krum", "IFCA"])
def test_methods_that_need_more_than_the_mean_update_are_refused(name):
    with pytest.raises(InvalidConfig, match="cannot buffer"):
        FedBuff(method=name)


@pytest.mark.parametrize(
    "settings",
    [{"size": 0}, {"max_weight": -1}, {"max_staleness": -1}, {"divide_by": "n"}, {"method": "x"}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidConfig):
        FedBuff(**settings)


def test_a_buffer_that_is_not_full_moves_nothing():
    with pytest.raises(ShapeMismatch, match="not full"):
        FedBuff(size=3).sums(np.ones(3), [1.0, 1.0], 100)
