"""Every strategy trains every model with every rule as the reference does."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from homespun.errors import InvalidConfig
from homespun.learning.method import LocalRule
from homespun.simulation.cohort import tuning
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.cohort.gather import Rows
from homespun.simulation.cohort.local import resolve
from homespun.simulation.cohort.results import Choice
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


class Flipped(nn.Module):
    """Rows times matrices, where the others take the matrices' transposes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 6) / 3)
        self.last = nn.Parameter(torch.randn(6, 3) / 3)

    def forward(self, x):
        return torch.tanh(x @ self.first) @ self.last


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
        self.first, self.norm = nn.Conv2d(1, 4, 5, stride=2, padding=(1, 1)), nn.GroupNorm(2, 4)
        self.output = nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.norm(self.first(x.unsqueeze(1)))), 2)
        return self.output(x.flatten(1))


KEYBOARD = KeyboardSize(vocabulary=11, embedding=4, hidden=3, pairs=True)
MODELS = {
    "perceptron": (Perceptron, "vectors"),
    "wide": (lambda: Perceptron(2000), "vectors"),
    "normed": (Normed, "vectors"),
    "flipped": (Flipped, "vectors"),
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


CHOICES = {
    "eager": Choice("eager", 1),
    "sequential": Choice("sequential", 1),
    "stacked": Choice("stacked", 3),
}
PLAIN = LocalRule()
RULE = LocalRule(scale=0.7, proximal=0.2)


@cache
def work(name, terms):
    """The task, its clients and their steps: made once for all tests, which change none of them."""
    build, kind = MODELS[name]
    data = arena(kind)
    return task(build(), kind=kind, **TERMS[terms]), data, batches(data)


def engine(name, terms, choice=None, **options):
    given, data, _ = work(name, terms)
    made = CohortEngine(given, data, dtype=torch.float64, train_metrics=True, **options)
    made.choices = (choice,) if choice else ()
    return made


@cache
def expected(name, terms, rule=RULE):
    """What the reference says."""
    reference = engine(name, terms, strategy="reference")
    return reference.train(reference.initial(), work(name, terms)[2], rule)


def equal(subject, steps, rule, told):
    reference, metrics = told
    model = subject.initial()
    result, measured = subject.train(model, steps, rule)
    size = reference.update.abs().max().item()
    torch.testing.assert_close(result.update, reference.update, rtol=1e-12, atol=1e-12 * size)
    for name, value in metrics.items():
        assert measured[name].sum == pytest.approx(value.sum, rel=1e-12)
        assert measured[name].count == value.count
    weights = torch.tensor([0.5, 2, 1, 0, 3.0])
    mean = subject.mean_path(model, steps, weights, rule).vectors["update"]
    torch.testing.assert_close(
        mean, weights.double() @ reference.update, rtol=1e-12, atol=1e-12 * max(size, 1)
    )


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("strategy", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_a_strategy_takes_the_references_steps(name, strategy, terms):
    if (name, strategy) in LONE:
        pytest.skip("an operation that only a chunk of one client can do")
    subject = engine(name, terms, CHOICES[strategy])
    equal(subject, work(name, terms)[2], RULE, expected(name, terms))


@cache
def own_vectors(count):
    """A rule whose vectors are each client's own, or one for all; a tie of [m, d] and [d] would hide a mistake."""
    torch.manual_seed(3)
    own = torch.randn(3, 5, engine("normed", "plain").objective.dimension).double() * 0.1
    start, anchor, correction = own[:, 0] if count == 1 else own
    return LocalRule(proximal=0.3, start=start, anchor=anchor, correction=correction)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("strategy", CHOICES)
@pytest.mark.parametrize("terms", TERMS)
def test_every_client_may_have_vectors_of_its_own(strategy, terms, count):
    rule, (_, _, steps) = own_vectors(count), work("normed", terms)
    reference = engine("normed", terms, strategy="reference")
    told = reference.train(reference.initial(), steps, rule)
    equal(engine("normed", terms, CHOICES[strategy]), steps, rule, told)


@pytest.mark.parametrize("terms", ["plain", "decaying"])
@pytest.mark.parametrize("name", ["wide", "digits", "convolutional"])
def test_factored_matrices_never_exist_and_give_the_same(monkeypatch, name, terms):
    monkeypatch.setattr(tuning, "FACTORED_SIZE", 100)
    subject = engine(name, terms, strategy="factored", chunk=3)
    equal(subject, work(name, terms)[2], RULE, expected(name, terms))
    assert all(choice.factored for choice in subject.choices)


def measuring(model, kind, steps):
    """Of three clients with so many steps each."""
    data = arena(kind, sizes=(4 * steps,) * 3)
    made = CohortEngine(task(model, kind=kind), data)
    local = resolve(PLAIN, made.task.optimizer, made.initial(), 3)
    return tuning.Tuning(made.task, data, made.objective, made.rows, batches(data), local)


def factored(model, kind, steps):
    """Names of parameters that are worth the factored form for clients with so many steps."""
    return measuring(model, kind, steps).worth_factoring()


def test_a_matrix_is_factored_while_its_history_is_shorter_than_itself():
    assert factored(Perceptron(2000), "vectors", steps=1) == ("first.weight",)
    assert factored(Perceptron(2000), "vectors", steps=9) == ()


def test_what_is_used_for_every_word_is_not_factored(monkeypatch):
    monkeypatch.setattr(tuning, "FACTORED_SIZE", 1)
    # An embedding is no product; LSTM and output see four words of four sentences in each step.
    assert factored(Recurrent(), "tokens", steps=1) == ("output.weight",)
    assert factored(Recurrent(), "tokens", steps=3) == ()


def test_one_slow_measurement_of_what_is_short_proves_nothing(monkeypatch):
    steps, delays = Rows.steps, iter([True])

    def delayed(self, batches, first=0, last=None, until=float("inf")):
        late = until < float("inf") and next(delays, False)
        return steps(self, batches, first, last, 0.0 if late else until)

    monkeypatch.setattr(Rows, "steps", delayed)
    seconds = measuring(Perceptron(), "vectors", 2).seconds_per_step(CHOICES["stacked"], limit=60.0)
    assert next(delays, "used") == "used"
    assert seconds < float("inf")


def test_the_two_fastest_are_measured_in_turns_before_one_is_chosen(monkeypatch):
    """The machine is slow while the faster one of two is measured for the first time."""
    subject = measuring(Perceptron(), "vectors", 2)
    usual = {"eager": 0.11, "sequential": 0.10}
    measured = []

    def run(self, trainer, few, limit=float("inf")):
        name = trainer.strategy
        measured.append(name)
        first = measured.count(name) <= 2  # once to warm up, then its only measurement
        return usual[name] * (1.2 if name == "sequential" and first else 1.0)

    monkeypatch.setattr(tuning, "build", lambda objective, choice: choice)
    monkeypatch.setattr(tuning, "MOST_REPEATS", 1)
    monkeypatch.setattr(tuning.Tuning, "_run", run)
    monkeypatch.setattr(tuning.Tuning, "proven", lambda self, choice: choice.strategy in usual)
    fastest = subject.choices("auto", None)[0]
    assert fastest.strategy == "sequential"
    in_turns = measured[-2 * tuning.TURNS :]
    assert in_turns[::2] == ["eager"] * tuning.TURNS
    assert in_turns[1::2] == ["sequential"] * tuning.TURNS


@pytest.mark.parametrize("name", MODELS)
def test_the_measured_choice_gives_the_same(name):
    subject = engine(name, "plain")
    equal(subject, work(name, "plain")[2], RULE, expected(name, "plain"))
    assert {choice.strategy for choice in subject.choices} > {"reference"}
    # A chunk that takes all five clients takes more of them where there are more.
    together = {c.chunk for c in subject.choices if c.strategy in ("stacked", "factored")}
    assert together <= set(tuning.CHUNKS)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(5, 3)

    def forward(self, x):
        return self.only(functional.dropout(x, 0.5))


def test_a_model_that_draws_random_numbers_is_proven_with_the_same_ones():
    data = arena()
    subject = CohortEngine(task(Dropping()), data)
    subject.train(subject.initial(), batches(data), PLAIN)
    assert {choice.strategy for choice in subject.choices} > {"reference"}


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
    told = reference.train(reference.initial(), batches(data), PLAIN)
    equal(CohortEngine(given, data, dtype=torch.float64), batches(data), PLAIN, told)
