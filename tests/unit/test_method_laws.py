"""What holds for every method there is."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homespun.learning.method import Layout, method, names
from tests.unit.quadratics import Simulation, quadratics

SETTINGS: dict[str, dict[str, Any]] = {
    "FedPer": {"own": "b"},
    "IFCA": {"spread": 1.0},
    "Krum": {"byzantine": 1},
}
LAYOUT = Layout({"a": slice(0, 2), "b": slice(2, 3)})
START = np.array([1.0, -2.0, 0.5])
STEPS = np.array([3.0, 1.0, 6.0, 4.0, 2.0, 6.0])
SUMMED = [name for name in names() if method(name).combine is None]

NEUTRAL: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("FedAvg", "FedAvgM", "FedNova", "SCAFFOLD", "FedDyn")},
    "FedProx": {"proximal": 5.0},
    "FedPer": {"own": "b"},
    "Ditto": {"pull": 0.0},
    "IFCA": {"clusters": 1, "spread": 0.0},
    "MimeLite": {"beta": 0.0},
    "qFedAvg": {"q": 0.0},
    "Median": {},
    "TrimmedMean": {},
}
NOT_SGD = {"FedAdagrad", "FedAdam", "FedYogi", "Krum", "MultiKrum"}  # adaptive; more than one


def simulation(name, problem, start=START):
    return Simulation(method(name, SETTINGS.get(name)), problem, start, LAYOUT)


def everything(sim):
    """All that a method has after a round, by name."""
    server = {f"server {name}": vector for name, vector in sim.server.items()}
    clients = {f"clients {name}": rows for name, rows in sim.clients.items()}
    return {"model": sim.model, "predicts": sim.evaluated(), **server, **clients}


def in_tensors(problem, dtype):
    arrays = {field.name: getattr(problem, field.name) for field in fields(problem)}
    tensors = {n: torch.tensor(a, dtype=dtype) for n, a in arrays.items() if hasattr(a, "shape")}
    return replace(problem, **tensors)


@st.composite
def rounds(draw):
    """Two rounds: who takes part, in any order and cut into chunks anywhere."""
    found = []
    for _ in range(2):
        who = draw(st.permutations(range(6)))[: draw(st.integers(1, 6))]
        cuts = sorted(draw(st.sets(st.integers(1, 5), max_size=3)))
        chunks = np.split(np.array(who), [cut for cut in cuts if cut < len(who)])
        found.append((np.sort(who), chunks))
    return found


@pytest.mark.parametrize("name", SUMMED)
@settings(deadline=None, max_examples=15)
@given(rounds())
def test_neither_the_order_of_clients_nor_chunks_matter(name, given_rounds):
    problem = quadratics(m=6, num_steps=STEPS)
    whole, cut = simulation(name, problem), simulation(name, problem)
    for who, chunks in given_rounds:
        whole.round(who)
        cut.round(*chunks)
    expected = everything(whole)
    for key, found in everything(cut).items():
        np.testing.assert_allclose(found, expected[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", sorted(set(names()) - NOT_SGD))
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6))
def test_one_client_with_one_step_is_sgd(name, seed):
    """With neutral settings; FedDyn is it where this client is one of very many."""
    problem = quadratics(m=1, steps=1, seed=seed)
    start = np.random.default_rng(seed).normal(size=3)
    alone = Simulation(method(name, NEUTRAL[name]), problem, start, LAYOUT, population=10**14)
    alone.round()
    expected = start - 0.1 * problem.gradient(start)[0]
    np.testing.assert_allclose(alone.evaluated()[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_give_what_arrays_give_and_keep_their_type(name, dtype):
    problem = quadratics(m=6, num_steps=STEPS)
    arrays = simulation(name, problem)
    tensors = simulation(name, in_tensors(problem, dtype), torch.tensor(START, dtype=dtype))
    arrays.rounds(3)
    tensors.rounds(3)
    expected, tolerance = everything(arrays), 1e-12 if dtype == torch.float64 else 2e-5
    for key, found in everything(tensors).items():
        assert found.dtype == dtype, key
        np.testing.assert_allclose(
            found.numpy(), expected[key], rtol=tolerance, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("name", names())
def test_what_the_server_and_the_clients_had_is_not_changed_in_place(name):
    sim = simulation(name, quadratics(m=6, num_steps=STEPS))
    sim.rounds(1)
    had = everything(sim)
    before = {key: value.copy() for key, value in had.items()}
    sim.clients = {key: rows.copy() for key, rows in sim.clients.items()}  # it writes there itself
    sim.round()
    for key, value in had.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
