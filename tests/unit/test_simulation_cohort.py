import numpy as np
import pytest
import torch
from torch import nn

from homespun.errors import InvalidConfig, ShapeMismatch
from homespun.learning.method import LocalRule
from homespun.plan.build.steps import Recipe, train_graph
from homespun.simulation.cohort.engine import CohortEngine
from tests.unit.simulation_cohorts import Perceptron, arena, batches, task


def engine(given, data, **options):
    return CohortEngine(given, data, dtype=torch.float64, strategy="reference", **options)


@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "proximal": 0.5, "max_grad_norm": 0.2, "momentum": 0.5},
    ],
)
def test_the_reference_takes_the_steps_of_the_plans_train_graph(terms):
    data, given = arena(), task(Perceptron().double(), epochs=2, **terms)
    steps = batches(data, epochs=2)
    result, metrics = engine(given, data).train(engine(given, data).initial(), steps, LocalRule())
    names = [name for name, _ in given.model.named_parameters()]
    start = [p.detach() for p in given.model.parameters()]
    recipe = Recipe(given.model, ("x",), given.loss, {}, given.optimizer.terms)
    loss_sum = 0.0
    for place, client in enumerate(steps.clients):
        rows = {n: torch.from_numpy(a[:4]) for n, a in data.rows(0).items()}
        graph = train_graph(recipe, start, rows)
        state = {f"p.{n}": p for n, p in zip(names, start, strict=True)}
        state |= {f"m.{n}": torch.zeros_like(p) for n, p in zip(names, start, strict=True)}
        state |= {f"a.{n}": p for n, p in zip(names, start, strict=True)}
        state |= {
            n: torch.tensor(getattr(given.optimizer, n), dtype=torch.float64)
            for n in ("learning_rate", *given.optimizer.terms)
        }
        for step in range(steps.num_steps[place]):
            state |= {
                n: torch.from_numpy(a[steps.rows[step, place]]) for n, a in data.inputs.items()
            }
            state["weight"] = torch.from_numpy(steps.present[step, place]).double()
            results = graph.function(*(state[n] for n in graph.arguments))
            named = dict(zip(graph.results, results, strict=True))
            loss_sum += float(named["sum.loss"])
            state |= {f"p.{n[2:]}": t for n, t in named.items() if n.startswith("n.")}
            state |= {f"m.{n[2:]}": t for n, t in named.items() if n.startswith("v.")}
        expected = torch.cat(
            [(state[f"p.{n}"] - p).view(-1) for n, p in zip(names, start, strict=True)]
        )
        torch.testing.assert_close(result.update[place], expected, rtol=1e-12, atol=1e-14)
        assert result.num_examples[place] == data.num_rows[client]
    assert metrics["loss"].sum == pytest.approx(loss_sum, rel=1e-12)
    assert metrics["loss"].count == 2 * sum(data.num_rows)


def test_the_mean_path_is_the_weighted_sum_of_the_updates():
    data, given = arena(), task(Perceptron())
    steps, weights = batches(data), torch.tensor([0.5, 2, 1, 0, 3.0])
    for chunk in (1, 2, 64):
        subject = engine(given, data, chunk=chunk)
        result, _ = subject.train(subject.initial(), steps, LocalRule())
        partial = subject.mean_path(subject.initial(), steps, weights, LocalRule())
        torch.testing.assert_close(partial.vectors["update"], weights.double() @ result.update)


def test_a_client_begins_at_the_candidate_with_the_least_loss():
    data, given = arena(), task(Perceptron(), epochs=2)
    subject, steps = engine(given, data), batches(data, epochs=2)
    candidates = subject.initial() + torch.randn(3, subject.objective.dimension).double()
    result, _ = subject.train(subject.initial(), steps, LocalRule(candidates=candidates))
    for index, candidate in enumerate(candidates):
        each = subject.evaluate_each(candidate, steps.clients)["loss"]
        torch.testing.assert_close(result.losses[:, index], each[:, 0] / each[:, 1])
    assert (result.choice == result.losses.argmin(1)).all()
    started = subject.train(subject.initial(), steps, LocalRule(start=candidates[result.choice]))[0]
    assert torch.equal(result.update, started.update)


def test_the_wanted_gradient_is_the_mean_over_all_examples_at_the_start():
    data, given = arena(), task(Perceptron(), epochs=2, learning_rate=0.01)
    subject, steps = engine(given, data), batches(data, epochs=2)
    start = subject.initial() + torch.randn(5, subject.objective.dimension).double()
    result, _ = subject.train(subject.initial(), steps, LocalRule(start=start, wants_gradient=True))
    whole = CohortEngine(
        task(Perceptron(), batch_size=12, learning_rate=1.0), data, dtype=torch.float64
    )
    everyone = start[np.argsort(steps.clients)]
    moved, _ = whole.train(subject.initial(), batches(data, 12), LocalRule(start=everyone))
    torch.testing.assert_close(result.gradient, -moved.update[steps.clients])


def test_metrics_are_measured_with_the_model_or_with_every_clients_own():
    data, given = arena(), task(Perceptron())
    subject = engine(given, data)
    model = subject.initial()
    shared = subject.evaluate(model)
    own = subject.evaluate(model.expand(data.num_clients, -1))
    assert shared["top1"].count == sum(data.num_rows) == own["top1"].count
    assert shared["loss"].sum == pytest.approx(own["loss"].sum)
    few = subject.evaluate_each(model, np.array([3, 0]))["loss"]
    assert few[:, 1].tolist() == [data.num_rows[3], data.num_rows[0]]


def test_what_cannot_be_is_refused_with_its_name():
    data, given = arena(), task(Perceptron())
    with pytest.raises(InvalidConfig, match="unknown strategy"):
        CohortEngine(given, data, strategy="magic")
    with pytest.raises(InvalidConfig, match="running statistics"):
        CohortEngine(task(nn.Sequential(nn.BatchNorm1d(5))), data)
    with pytest.raises(InvalidConfig, match="not this model's"):
        engine(given, data).evaluate(torch.zeros(3))
    with pytest.raises(ShapeMismatch, match="correction"):
        engine(given, data).train(
            engine(given, data).initial(), batches(data), LocalRule(correction=torch.zeros(2, 2))
        )
