"""Every strategy trains every model with every rule as the reference does."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from homespun.errors import InvalidConfig
from homespun.learning.method import LocalRule
from homespun.simulation.cohort import tuning
from homespun.simulation.cohort.engine import CohortEngine
from homespun.zoo.models import Digits, KeyboardSize, NextWord
from tests.unit.simulation_cohorts import Perceptron, arena, batches, task


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = torch.addmm(self.first.bias, x, self.first.weight.t())
        return self.last(self.norm(torch.tanh(x)) * self.scale + x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.states = nn.Embedding(11, 5), nn.LSTM(5, 6, batch_first=True)
        self.output = nn.Linear(6, 11)

    def forward(self, x):
        return self.output(self.states(self.words(x))[0])


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 5, stride=2), nn.GroupNorm(2, 4)
        self.output = nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.norm(self.first(x.unsqueeze(1)))), 2)
        return self.output(x.flatten(1))


KEYBOARD = KeyboardSize(vocabulary=11, embedding=4, hidden=3, pairs=True)
MODELS = {
    "perceptron": (Perceptron, "vectors"),
    "wide": (lambda: Perceptron(2000), "vectors"),
    "normed": (Normed, "vectors"),
    "convolutional": (Convolutional, "images"),
    "digits": (Digits, "images"),
    "next word": (lambda: NextWord(KEYBOARD), "tokens"),
    "recurrent": (Recurrent, "tokens"),
}
TERMS = {
    "plain": {},
    "decaying": {"weight_decay": 0.1, "proximal": 0.5},
    "everything": {
        "weight_decay": 0.1,
        "proximal": 0.5,
        "max_grad_norm": 0.2,
        "momentum": 0.9,
    },
}
LONE = {("recurrent", "stacked"), ("normed", "factored")}


def pair(name, strategy, chunk=3, **terms):
    build, kind = MODELS[name]
    data, given = arena(kind), task(build(), kind=kind, **terms)
    options: dict[str, Any] = {"dtype": torch.float64, "train_metrics": True}
    return (
        batches(data),
        CohortEngine(given, data, strategy="reference", **options),
        CohortEngine(given, data, strategy=strategy, chunk=chunk, **options),
    )


def equal(reference, subject, steps, rule):
    model = reference.initial()
    expected, metrics = reference.train(model, steps, rule)
    result, measured = subject.train(model, steps, rule)
    size = expected.update.abs().max().item()
    torch.testing.assert_close(result.update, expected.update, rtol=1e-12, atol=1e-12 * size)
    for name, value in metrics.items():
        assert measured[name].sum == pytest.approx(value.sum, rel=1e-12)
        assert measured[name].count == value.count
    weights = torch.tensor([0.5, 2, 1, 0, 3.0])
    mean = subject.mean_path(model, steps, weights, rule).vectors["update"]
    torch.testing.assert_close(
        mean, weights.double() @ expected.update, rtol=1e-12, atol=1e-12 * max(size, 1)
    )


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("strategy", ["eager", "sequential", "stacked"])
@pytest.mark.parametrize("name", MODELS)
def test_a_strategy_takes_the_references_steps(name, strategy, terms):
    if (name, strategy) in LONE:
        pytest.skip("an operation that only a chunk of one client can do")
    steps, reference, subject = pair(name, strategy, **TERMS[terms])
    equal(reference, subject, steps, LocalRule(scale=0.7, proximal=0.2))


@pytest.mark.parametrize("strategy", ["eager", "sequential", "stacked"])
@pytest.mark.parametrize("terms", TERMS)
def test_every_client_may_have_vectors_of_its_own(strategy, terms):
    steps, reference, subject = pair("digits", strategy, **TERMS[terms])
    own = torch.randn(3, 5, reference.objective.dimension, dtype=torch.float64) * 0.1
    for count in (1, 5):
        start, anchor, correction = own[:, 0] if count == 1 else own
        rule = LocalRule(proximal=0.3, start=start, anchor=anchor, correction=correction)
        equal(reference, subject, steps, rule)


@pytest.mark.parametrize("terms", ["plain", "decaying"])
@pytest.mark.parametrize("name", ["wide", "digits", "convolutional"])
def test_factored_matrices_never_exist_and_give_the_same(monkeypatch, name, terms):
    monkeypatch.setattr(tuning, "FACTORED_SIZE", 100)
    steps, reference, subject = pair(name, "factored", **TERMS[terms])
    assert tuning.factored_names(subject.objective)
    equal(reference, subject, steps, LocalRule(scale=0.7, proximal=0.2))


@pytest.mark.parametrize("name", MODELS)
def test_the_measured_choice_gives_the_same(name):
    steps, reference, subject = pair(name, "auto", chunk=None)
    equal(reference, subject, steps, LocalRule())
    assert all(cohort is not None for cohort in subject._cohorts.values())


class Mixing(nn.Module):
    """What one row gives depends on the others."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(5, 3)

    def forward(self, x):
        return self.only(x - x.mean(0))


def test_a_model_that_mixes_rows_is_never_merged():
    data, given = arena(), task(Mixing())
    forced = CohortEngine(given, data, strategy="stacked")
    with pytest.raises(InvalidConfig, match="cannot train this model"):
        forced.train(forced.initial(), batches(data), LocalRule())
    reference = CohortEngine(given, data, dtype=torch.float64, strategy="reference")
    equal(reference, CohortEngine(given, data, dtype=torch.float64), batches(data), LocalRule())
