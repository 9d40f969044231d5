"""Building: ordinary modules become graphs that train as PyTorch does, or are refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F  # noqa: N812

from homespun.errors import PlanError, PlanMismatch
from homespun.plan.build import build_plan, checkpoint_of, cross_entropy, in_top
from homespun.plan.build.compare import compare
from homespun.plan.build.export import export
from homespun.plan.build.modules import check_modules, parameter_specs
from homespun.plan.build.steps import Recipe, train_graph
from homespun.plan.engine import Trainer
from homespun.plan.manifest import (
    OPTIMIZER_TERMS,
    ClientOptimizer,
    Constant,
    Normal,
    Runtime,
    TensorFeature,
    Uniform,
)
from homespun.plan.package import Plan

CLASSES = 4


def loss(outputs, batch):
    return cross_entropy(outputs, batch["y"])


def top1(outputs, batch):
    return in_top(outputs, batch["y"], 1)


def build(model: nn.Module, x: torch.Tensor, **settings) -> Plan:
    labels = torch.arange(len(x)).int() % CLASSES
    options: dict[str, Any] = {
        "optimizer": ClientOptimizer(learning_rate=0.1),
        "batch_size": 4,
        "max_rows": 40,
        "clip_norm": 1.0,
        "max_weight": 40,
    }
    dtype: Literal["float32", "int32"] = "float32" if x.dtype == torch.float32 else "int32"
    return build_plan(
        model,
        name="tiny",
        examples={"x": x, "y": labels},
        loss=loss,
        metrics={"top1": top1},
        features=[
            TensorFeature(field="x", input="x", dtype=dtype, shape=tuple(x.shape[1:])),
            TensorFeature(field="y", input="y", dtype="int32"),
        ],
        **(options | settings),
    )


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@cache
def all_terms() -> Plan:
    return build(perceptron(), numbers(12, 6), extra_terms=OPTIMIZER_TERMS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"proximal": 0.5},
        {"max_grad_norm": 0.2},
        {"momentum": 0.9, "weight_decay": 0.1, "proximal": 0.5, "max_grad_norm": 0.2},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_every_optimizer_term_is_torchs(settings):
    plan = all_terms().with_settings(**settings)
    options = plan.manifest.optimizer
    model = perceptron()
    anchor = [p.detach().clone() for p in model.parameters()]
    sgd = torch.optim.SGD(
        model.parameters(), 0.1, momentum=options.momentum, weight_decay=options.weight_decay
    )
    trainer = Trainer(plan.manifest, plan.graphs["train"])
    trainer.start(checkpoint_of(model))
    x, y = numbers(4, 6), torch.arange(4)
    for step in range(20):
        real = 1 + step % 4
        weight = (np.arange(4) < real).astype(np.float32)
        trainer.step({"x": x.numpy(), "y": y.int().numpy()}, weight)
        sgd.zero_grad()
        objective = F.cross_entropy(model(x[:real]), y[:real])
        for p, a in zip(model.parameters(), anchor, strict=True):
            objective = objective + options.proximal / 2 * ((p - a) ** 2).sum()
        objective.backward()
        if options.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        sgd.step()
    for name, value in model.named_parameters():
        np.testing.assert_allclose(
            trainer.parameters()[name], value.detach(), atol=1e-6, err_msg=name
        )


class Pictures(nn.Module):
    """Every backward pass that is written by us."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.c = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.out = nn.Linear(4 * 9, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 3, 2, padding=1)
        x = F.avg_pool2d(self.norm(self.b(F.interpolate(x, scale_factor=2.0))), 2, 1)
        return self.out(F.max_pool2d(F.relu(self.c(x)), 4, 1)[..., :3, :3].flatten(1))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.rnn = nn.GRU(6, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        mixed = F.scaled_dot_product_attention(states, states, states, is_causal=True)
        return self.out(self.norm(F.gelu(mixed[:, -1])))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (Pictures, numbers(10, 2, 9, 9)),
        (Sequences, torch.arange(30).reshape(10, 3).int() % 9),
    ],
)
def test_layers_with_backward_passes_of_their_own(make, x):
    """`build_plan` itself compares every graph with eager PyTorch, on ragged batches."""
    torch.manual_seed(0)
    plan = build(make(), x)
    assert Plan.read(plan.to_bytes()) == plan


def test_graphs_hold_no_weights_and_no_traces_of_their_maker():
    for data in all_terms().graphs.values():
        graph = onnx.load_from_string(data).graph
        names = [node.name for node in graph.node]
        assert len(set(names)) == len(names)
        assert sum(numpy_helper.to_array(c).size for c in graph.initializer) < 50
        assert b".py" not in data
        assert not any(node.doc_string or node.metadata_props for node in graph.node)


def damaged(data: bytes, operator: str) -> bytes:
    """The graph with one node of this type replaced by doing nothing."""
    model = onnx.load_from_string(data)
    node = next(n for n in reversed(model.graph.node) if n.op_type == operator)
    del node.input[1:], node.attribute[:]
    node.op_type = "Identity"
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("graph", "operator"),
    [("train", "Tanh"), ("train", "Mul"), ("evaluate", "Tanh"), ("predict", "Tanh")],
)
def test_a_wrong_graph_is_caught(graph, operator):
    plan = all_terms()
    model = perceptron()
    recipe = Recipe(model, ("x",), loss, {"top1": top1}, plan.manifest.optimizer_terms)
    examples = {"x": numbers(12, 6), "y": torch.arange(12).int() % CLASSES}
    compare(recipe, plan.manifest, plan.graphs, examples)
    wrong = {**plan.graphs, graph: damaged(plan.graphs[graph], operator)}
    with pytest.raises(PlanMismatch) as caught:
        compare(recipe, plan.manifest, wrong, examples)
    assert "differs between ONNX Runtime and PyTorch" in caught.value.message


class Mixing(nn.Module):
    """Rows are centred by the batch's mean: no layer that a list of names would catch."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(x - x.mean(0))


def test_a_model_that_mixes_rows_is_caught():
    with pytest.raises(PlanMismatch):
        build(Mixing(), numbers(12, 6))


@pytest.mark.parametrize(
    ("layer", "instead"),
    [
        (nn.BatchNorm1d(6), "GroupNorm"),
        (nn.EmbeddingBag(9, 6), "nn.Embedding"),
        (nn.Dropout(0.5), "take it out"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "nearest"),
    ],
)
def test_layers_that_cannot_be_in_a_plan_are_named(layer, instead):
    with pytest.raises(PlanError) as caught:
        check_modules(nn.Sequential(nn.Linear(6, 6), layer))
    assert f"layer 1: {type(layer).__name__}" in caught.value.message
    assert instead in caught.value.hint


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)
        self.function = function

    def forward(self, x):
        return self.linear(self.function(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.dropout(x, 0.5), "random"),
        (lambda x: x if x.sum() > 0 else -x, "torch.where"),
        (lambda x: x + torch.fft.fft(x).real, "matrix product"),
        (lambda x: x[x.sum(1) > 0], "mask"),
    ],
)
def test_operators_that_cannot_be_exported_are_named(function, message):
    recipe = Recipe(Calls(function), ("x",), loss, {}, ())
    parameters = [p.detach() for p in recipe.model.parameters()]
    batch = {"x": numbers(4, 6), "y": torch.arange(4).int()}
    with pytest.raises(PlanError) as caught:
        export(train_graph(recipe, parameters, batch), Runtime())
    assert message in str(caught.value)


def test_how_parameters_start():
    model = nn.ModuleDict(
        {"fc": nn.Linear(16, 2), "table": nn.Embedding(5, 3), "norm": nn.LayerNorm(3)}
    )
    model.register_parameter("free", nn.Parameter(torch.randn(2)))
    with pytest.raises(PlanError, match="parameter free"):
        parameter_specs(model, {})
    specs = {s.name: s.initial for s in parameter_specs(model, {"fr*": Normal(std=0.5)})}
    assert list(specs) == [name for name, _ in model.named_parameters()]
    assert specs["fc.weight"] == specs["fc.bias"] == Uniform(bound=0.25)
    assert specs["table.weight"] == Normal(std=1.0)
    assert (specs["norm.weight"], specs["norm.bias"]) == (Constant(value=1.0), Constant())
    assert specs["free"] == Normal(std=0.5)


def test_lean_losses_are_torchs():
    logits, target = numbers(3, 5, 7).requires_grad_(), torch.arange(15).reshape(3, 5) % 7
    scale = numbers(3, 5)
    ours = cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad((ours * scale).sum(), logits)
    theirs = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    (expected,) = torch.autograd.grad((theirs * scale).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)
    ranks = (logits > logits.gather(-1, target[..., None])).sum(-1)
    for k in (1, 3):
        assert torch.equal(in_top(logits, target, k).bool(), ranks < k)


def test_examples_must_agree():
    for x in (numbers(12, 6).double(), torch.zeros(0, 6), numbers(11, 6)[:0]):
        with pytest.raises(PlanError):
            build(perceptron(), x)
