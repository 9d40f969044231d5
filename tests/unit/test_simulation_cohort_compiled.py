"""Compiled steps are the reference's, for every operation that is compiled; all else is refused."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from homespun.errors import InvalidConfig
from homespun.learning.method import LocalRule
from homespun.plan.build.losses import cross_entropy
from homespun.simulation.arena import Arena
from homespun.simulation.cohort import compiled, lowering, tuning
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.cohort.local import resolve
from homespun.simulation.cohort.results import Choice
from homespun.simulation.cohort.tuning import Tuning
from tests.unit.simulation_cohorts import SIZES, Perceptron, arena, batches, task, top1

COMPILED = Choice("compiled", 3)
RULE = LocalRule(scale=0.7, proximal=0.2)


def equal(given, data, rule=RULE, dtype=torch.float64, tolerance=1e-12):
    """The reference's updates, sums of losses and metrics, and mean."""
    reference, subject = (
        CohortEngine(given, data, dtype=dtype, train_metrics=True, strategy=strategy)
        for strategy in ("reference", "compiled")
    )
    subject.choices = (COMPILED,)
    model, steps = subject.initial(), batches(data, given.batch_size, given.local_epochs)
    told, metrics = reference.train(model, steps, rule)
    result, measured = subject.train(model, steps, rule)
    size = told.update.abs().max().item()
    assert size > 0
    torch.testing.assert_close(result.update, told.update, rtol=tolerance, atol=tolerance * size)
    for name, value in metrics.items():
        assert measured[name].sum == pytest.approx(value.sum, rel=tolerance)
        assert measured[name].count == value.count
    weights = torch.arange(2 * len(steps.clients), dtype=dtype)[::2]  # which lie apart in memory
    mean = subject.mean_path(model, steps, weights, rule).vectors["update"]
    torch.testing.assert_close(
        mean, weights @ told.update, rtol=tolerance, atol=10 * tolerance * size
    )


def loss_of(function):
    return lambda outputs, batch: function(outputs, batch["y"])


def regression(outputs, batch):
    return (outputs - batch["x"][:, :3]) ** 2


def doubled(outputs, batch):
    return functional.mse_loss(outputs * 2, batch["x"][:, :3] + 1, reduction="none")


def either(outputs, batch):
    wanted = functional.relu(batch["x"][:, :3]).clamp(max=1)
    return functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")


def skipping(outputs, batch):
    return functional.cross_entropy(outputs, batch["y"], reduction="none", ignore_index=1)


def likelihood(outputs, batch):
    chosen = torch.log_softmax(outputs, -1).gather(-1, batch["y"][:, None])
    return -chosen.squeeze(-1), batch["y"] != 2


LOSSES = {
    "cross entropy": loss_of(cross_entropy),
    "PyTorch's cross entropy": skipping,
    "likelihood of what counts": likelihood,
    "squares": regression,
    "mean squares": doubled,
    "either": either,
}


def right(outputs, batch):
    return (outputs.argmax(1) == batch["y"]).to(outputs.dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    given = replace(task(Perceptron()), loss=LOSSES[loss], metrics={"top1": top1, "right": right})
    equal(given, arena())


class Bent(nn.Module):
    """What tables of operations have, all at once."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.scale = nn.Parameter(torch.ones(9))
        self.shift = nn.Buffer(torch.linspace(-1, 1, 9))

    def forward(self, x):
        x = torch.tanh(self.first(x)) * self.scale - 2 * self.shift
        x = x + torch.sigmoid(self.second(x)) / 3
        x = torch.sub(x, x.clamp(-0.5, 0.5), alpha=2) - x.exp() * 0.1
        return self.last(x.view(-1, 3, 3).transpose(1, 2).reshape(-1, 9))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.output = nn.Embedding(11, 5), nn.Linear(20, 3)

    def forward(self, x):
        return self.output(torch.relu(self.words(x).flatten(1)))


class Tied(nn.Module):
    """A table that is looked up and multiplied with; the last layer is used twice, and a parameter not at all."""

    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(11, 5), nn.Linear(5, 5)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = self.last(torch.relu(self.last(self.words(x))))
        return x @ self.words.weight.t()


TERMS = [{}, {"weight_decay": 0.1, "proximal": 0.5}]


@pytest.mark.parametrize("terms", TERMS, ids=["plain", "decaying"])
@pytest.mark.parametrize("transposed", [0, 10**6], ids=["", "transposed"])
def test_models_of_numbers(monkeypatch, transposed, terms):
    monkeypatch.setattr(compiled, "TRANSPOSED_OUTPUTS", 1)
    monkeypatch.setattr(compiled, "TRANSPOSED_SIZE", transposed)
    for model in (Perceptron(), Perceptron(200), Bent(), nn.Linear(5, 3)):
        equal(task(model, epochs=2, **terms), arena())


@pytest.mark.parametrize("terms", TERMS, ids=["plain", "decaying"])
def test_models_of_words(terms):
    data = arena("tokens")
    equal(task(Tied(), kind="tokens", **terms), data)
    labels = {**data.inputs, "y": (data.inputs["x"][:, 0] % 3).astype(np.uint8)}
    equal(task(Words(), **terms), Arena(labels, data.offsets))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f2", "f4", "f8"])
def test_inputs_of_every_type(dtype):
    data = arena()
    least, most = (0, 200) if dtype[0] == "u" else (-100, 100)
    inputs = (data.inputs["x"] * 100).clip(least, most).astype(dtype)
    assert inputs.max() == most
    labels = data.inputs["y"].astype(dtype if dtype[0] != "f" else "u1")
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    given = replace(task(model), scales={"x": 0.125}, loss=LOSSES["cross entropy"])
    equal(given, Arena({"x": inputs, "y": labels}, data.offsets))


def test_float32_is_close_to_the_references():
    equal(task(Perceptron(40)), arena(), dtype=torch.float32, tolerance=1e-5)


def test_vectors_of_each_client():
    torch.manual_seed(3)
    given = task(Bent(), weight_decay=0.1)
    size = CohortEngine(given, arena()).objective.dimension
    start, anchor, correction = torch.randn(3, len(SIZES), size).double() * 0.1
    equal(
        given, arena(), LocalRule(start=start, anchor=anchor, correction=correction, proximal=0.3)
    )
    equal(given, arena(), LocalRule(start=start[0], correction=correction))
    equal(task(Bent()), arena(), LocalRule(correction=correction[0]))


def test_a_client_without_rows_changes_nothing():
    data = arena(sizes=(9, 0, 3))
    equal(task(Perceptron()), data)
    nobody = arena(sizes=(0, 0))
    subject = CohortEngine(task(Perceptron()), nobody, strategy="compiled")
    subject.choices = (COMPILED,)
    result, _ = subject.train(subject.initial(), batches(arena(sizes=(0, 0))), RULE)
    assert not result.update.any()


def test_a_label_that_there_is_not_gives_the_references_error():
    data = arena()
    data.inputs["y"][11] = 3
    subject = CohortEngine(task(Perceptron()), data, strategy="compiled")
    with pytest.raises(RuntimeError, match="index 3 is out of bounds"):
        subject.train(subject.initial(), batches(data), RULE)


def test_what_the_reference_has_a_meaning_for_is_trained_with_it():
    """PyTorch's lookups take no other index, but its ignored class may be any number."""
    data = arena()
    data.inputs["y"][11] = -100
    given = replace(
        task(Perceptron()),
        loss=lambda o, b: functional.cross_entropy(o, b["y"], reduction="none"),
        metrics={},
    )
    equal(given, data)


def test_a_model_that_is_not_finite_stays_so():
    data = arena()
    data.inputs["x"][4, 2] = np.nan
    subject = CohortEngine(task(Perceptron()), data, strategy="compiled")
    subject.choices = (COMPILED,)
    steps = batches(data)
    result, metrics = subject.train(subject.initial(), steps, RULE)
    spoilt = steps.clients == np.searchsorted(data.offsets, 4, side="right") - 1
    assert torch.isnan(result.update).any(1).tolist() == spoilt.tolist()
    assert np.isnan(metrics["loss"].sum)


class Masking(nn.Module):
    """Numbers as a mask, masks as whole numbers: what is 0 or 1 elsewhere."""

    def __init__(self, counted):
        super().__init__()
        self.only, self.counted = nn.Linear(5, 3), counted

    def forward(self, x):
        if self.counted:
            return self.only(x) * (x > 0).sum(1, keepdim=True)
        return self.only(x) * x[:, :1].round().bool()


def below_half(outputs, batch):
    """A whole number compared with one that is none."""
    return (batch["y"] < 0.5).to(outputs.dtype)


def test_whole_numbers_are_compared_with_whole_numbers_only():
    zero = lambda outputs, batch: (batch["y"] < 1).to(outputs.dtype)  # noqa: E731
    equal(replace(task(Perceptron()), metrics={"zero": zero}), arena())
    given = replace(task(Perceptron()), metrics={"below": below_half})
    subject = CohortEngine(given, arena(), strategy="compiled", train_metrics=True)
    with pytest.raises(InvalidConfig, match="cannot train this model"):
        subject.train(subject.initial(), batches(arena()), RULE)


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.only, self.nothing = nn.Linear(5, 3), nn.Parameter(torch.empty(0))

    def forward(self, x):
        return self.only(x) + self.nothing.sum()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Perceptron(), {"momentum": 0.9}),
        (Perceptron(), {"max_grad_norm": 1.0}),
        (nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), {}),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)), {}),
        (Nothing(), {}),
        (Masking(counted=True), {}),
        (Masking(counted=False), {}),
    ],
    ids=[
        "momentum",
        "clipping",
        "an operation",
        "random numbers",
        "no elements",
        "counts",
        "masks",
    ],
)
def test_what_is_not_compiled_is_trained_otherwise(model, options):
    data, given = arena(), task(model, **options)
    subject = CohortEngine(given, data)
    subject.train(subject.initial(), batches(data), RULE)
    assert "compiled" not in {choice.strategy for choice in subject.choices}
    forced = CohortEngine(given, data, strategy="compiled")
    with pytest.raises(InvalidConfig, match="cannot train this model"):
        forced.train(forced.initial(), batches(data), RULE)


def test_without_the_compiler_there_are_other_strategies(monkeypatch):
    monkeypatch.setitem(sys.modules, "homespun.simulation.cohort.compiled", None)
    data = arena()
    subject = CohortEngine(task(Perceptron()), data)
    subject.train(subject.initial(), batches(data), RULE)
    assert {choice.strategy for choice in subject.choices} > {"reference"}
    resumed = CohortEngine(task(Perceptron()), data)
    resumed.choices = (COMPILED,)
    with pytest.raises(InvalidConfig, match="needs llvmlite"):
        resumed.train(resumed.initial(), batches(data), RULE)


def test_what_is_measured_is_proven_too(monkeypatch):
    wrong = dict(lowering.COMPARISONS, lt="<=")
    monkeypatch.setattr(lowering, "COMPARISONS", wrong)
    low = replace(task(Perceptron()), metrics={"low": lambda o, b: (b["y"] < 1).to(o.dtype)})
    ones = arena()
    ones.inputs["y"][:] = 1
    subject = CohortEngine(low, ones, train_metrics=True, dtype=torch.float64)
    _, metrics = subject.train(subject.initial(), batches(ones), RULE)
    assert metrics["low"].sum == 0
    assert "compiled" not in {choice.strategy for choice in subject.choices}


def test_small_models_are_compiled():
    data = arena()
    subject = CohortEngine(task(Perceptron()), data)
    subject.train(subject.initial(), batches(data), RULE)
    assert subject.choices[0].strategy == "compiled"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Meeting(ThreadPoolExecutor):
    """Two calls at once, or none: each begins only when the other does, and ends only after both have begun."""

    barrier = threading.Barrier(2)

    def submit(self, function, /, *arguments, **options):
        def met():
            self.barrier.wait(timeout=60)
            result = function(*arguments, **options)
            self.barrier.wait(timeout=60)
            return result

        return super().submit(met)


def test_parts_of_a_cohort_train_at_once_to_the_same_bits(monkeypatch, threads):
    sizes = (400, 30, 900, 70) * 8  # milliseconds for a part
    data = arena(sizes=sizes)
    work = batches(data)
    weights = torch.arange(1.0, len(sizes) + 1)
    found = []
    monkeypatch.setattr(compiled, "ThreadPoolExecutor", Meeting)
    for count in (1, 2):
        threads(count)
        subject = CohortEngine(task(Perceptron(wide=64)), data, train_metrics=True)
        subject.choices = (Choice("compiled", 4),)
        each, metrics = subject.train(subject.initial(), work, RULE)
        mean = subject.mean_path(subject.initial(), work, weights, RULE)
        found.append((each.update, metrics, mean.vectors["update"], mean.metrics))
    one, two = found
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[2], two[2])
    assert (one[1], one[3]) == (two[1], two[3])


def test_a_long_call_is_measured_on_few_clients_and_a_hopeless_one_on_one(monkeypatch):
    data = arena()
    made = CohortEngine(task(Perceptron()), data)
    local = resolve(RULE, made.task.optimizer, made.initial(), len(SIZES))
    work = Tuning(made.task, data, made.objective, made.rows, batches(data), local)
    calls = []
    run = compiled.Compiled.run

    def counted(self, steps, *others):
        calls.append(steps.num_clients)
        return run(self, steps, *others)

    monkeypatch.setattr(compiled.Compiled, "run", counted)
    assert 0 < work.seconds_per_step(COMPILED, limit=60.0) < 60.0
    assert max(calls) == COMPILED.chunk
    monkeypatch.setattr(tuning, "CERTAIN_SECONDS", 0.0)
    calls.clear()
    assert work.seconds_per_step(COMPILED) < float("inf")
    assert work.seconds_per_step(COMPILED, limit=0.0) == float("inf")
    assert max(calls) == 1


def test_a_mask_that_was_there_before_is_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(5, 3)
            self.mask = nn.Buffer(torch.tensor([True, False, True, True, True]))

        def forward(self, x):
            return self.only(x * self.mask)

    subject = CohortEngine(task(Masked()), arena(), strategy="compiled")
    with pytest.raises(InvalidConfig, match="cannot train this model"):
        subject.train(subject.initial(), batches(arena()), RULE)
