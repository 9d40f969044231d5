"""A recorded step gives what its function gives, for any number of clients, or is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from homespun.learning.method import LocalRule
from homespun.plan.build.losses import cross_entropy
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.cohort.program import Unrecordable, record
from tests.unit.simulation_cohorts import Perceptron, arena, batches, task

SHARED = torch.linspace(-1, 1, 15).double().view(5, 3)


def arguments(clients):
    """Two rows of each client, its own scale, and a matrix that all share."""
    torch.manual_seed(clients)
    return [torch.randn(2 * clients, 5).double(), torch.randn(clients).double(), SHARED]


def steps(rows, own, shared):
    products = (rows @ shared).view(len(own), 2, -1)
    return [functional.log_softmax(products * own[:, None, None], -1), rows.sum(1)]


def recorded(function):
    return record(function, arguments, 1, {2})


def test_a_program_is_right_for_any_number_of_clients():
    program = recorded(steps)
    counts = (7, 1, 5)
    given = [arguments(n) for n in counts]
    together = program.shared(13, torch.cat([g[0] for g in given]), *given[0][1:])
    for n, mine, part in zip(counts, given, program.parts(together, counts), strict=True):
        for one, other in zip(program.each(n, *mine, *part), steps(*mine), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_rows_and_shared_tensors_decide_is_computed_once():
    program = recorded(steps)
    rows, _, shared = arguments(4)
    products, sums = program.shared(4, rows, None, shared)
    torch.testing.assert_close(products.view(8, 3), rows @ shared)
    assert torch.equal(sums, rows.sum(1))
    assert program.shared_bytes == 8 * (2 * 3 + 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda rows, own, shared: [rows * 2 if rows[0, 0] > 0 else rows],  # a branch on numbers
        lambda rows, own, shared: [torch.cat([part * 2 for part in rows.chunk(len(own))])],
        lambda rows, own, shared: [own * (1 / len(own))],
        lambda rows, own, shared: [rows.new_ones(len(own) ** 2)],
        lambda rows, own, shared: [own * torch.tensor(float(len(own)))],
        lambda rows, own, shared: [own * rows.roll(1, 0)[::2, 0]],  # rows of different steps meet
        lambda rows, own, shared: [(shared.t() * 2).add_(own[0])],
    ],
)
def test_what_is_not_the_same_for_every_number_of_clients_is_refused(function):
    with pytest.raises(Unrecordable):
        recorded(function)


class Noting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::").strip("_"))
        return func(*args, **(kwargs or {}))


EXPONENTIALS = {"exp", "softmax", "log_softmax"}


def classes(clients):
    """Two rows of 100 logits each, one of which leaves a class no chance, and their classes."""
    torch.manual_seed(clients)
    rows = 4 * torch.randn(2 * clients, 100).double()
    rows[:, 5] = -1000
    return [rows, torch.full((2 * clients,), 5).scatter(0, torch.tensor(0), 7)]


def descent(rows, labels):
    with torch.enable_grad():
        logits = (2 * rows).requires_grad_()
        losses = cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return [losses.detach(), gradient]


def with_logits(rows, labels):
    logits = 2 * rows
    with torch.enable_grad():
        given = logits.detach().requires_grad_()
        losses = cross_entropy(given, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), given)
    return [losses.detach(), gradient, logits.amax(1)]


def with_logarithms(rows, labels):
    logarithms = torch.log_softmax(2 * rows, -1)
    return [logarithms.gather(-1, labels[:, None]), logarithms.sum(1), logarithms.exp_()]


@pytest.mark.parametrize(
    ("function", "exponentials"),
    [
        (descent, ["softmax"]),
        (with_logits, ["softmax"]),
        (with_logarithms, ["log_softmax", "exp"]),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_many_classes_need_one_exponential(function, exponentials, alone):
    program = record(function, classes, 2, set(), alone)
    count = 1 if alone else 7
    given = classes(count)
    with Noting() as noting:
        found = program.each(count, *given, *program.shared(count, *given))
    assert [name for name in noting.names if name in EXPONENTIALS] == exponentials
    for one, other in zip(found, function(*classes(count)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[0].abs().max() > 1900


def test_changes_in_place_are_replayed_in_their_order():
    def function(rows, own, shared):
        doubled = rows * 2
        before = doubled.sum(1)
        doubled[:, 0].mul_(own.repeat_interleave(2))
        return [before, doubled.sum(1), doubled]

    program, mine = recorded(function), arguments(6)
    (part,) = program.parts(program.shared(6, *mine), (6,))
    for one, other in zip(program.each(6, *mine, *part), function(*mine), strict=True):
        assert torch.equal(one, other)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(5, 3)

    def forward(self, x):
        return self.only(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("strategy", ["sequential", "stacked"])
@pytest.mark.parametrize(("model", "is_recorded"), [(Perceptron, True), (Branching, False)])
def test_a_model_that_cannot_be_recorded_is_trained_all_the_same(model, is_recorded, strategy):
    data, given = arena(), task(model())
    engines = [
        CohortEngine(given, data, dtype=torch.float64, strategy=name, chunk=3)
        for name in ("reference", strategy)
    ]
    results = [
        engine.train(engine.initial(), batches(data), LocalRule())[0].update for engine in engines
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    programs = engines[1].objective.programs.values()
    assert {program is not None for program in programs} == {is_recorded}


def test_an_lstm_is_recorded_with_what_its_backward_pass_needs():
    """In float32 a processor's own library keeps it in a workspace, but only where gradients are enabled."""
    torch.manual_seed(1)
    lstm = nn.LSTM(3, 5, batch_first=True)

    def step(rows):
        with torch.enable_grad():
            total = lstm(rows)[0].square().sum()
            return [total.detach(), *torch.autograd.grad(total, list(lstm.parameters()))]

    program = record(step, lambda clients: [torch.randn(4, 6, 3)], 0, set(), alone=True)
    rows = torch.randn(4, 6, 3)
    with torch.no_grad():
        found = program.each(1, rows, *program.shared(1, rows))
    for one, other in zip(found, step(rows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
