"""The proof that a plan computes what PyTorch does, made for every plan before it leaves the builder.

Several steps of the exported train graph run in ONNX Runtime next to the author's own module, trained by
autograd and `torch.optim.SGD`. The batches are ragged; PyTorch sees only the real rows, so the comparison
also proves that padding adds exactly nothing and that no layer mixes rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from homespun import rng
from homespun.errors import PlanMismatch
from homespun.learning.metrics import MetricSum
from homespun.plan.build.steps import Recipe, weighted_sum
from homespun.plan.engine import Evaluator, Predictor, Sums, Trainer
from homespun.plan.manifest import ClientOptimizer, Manifest
from homespun.types import AnyArray, FloatArray

TOLERANCE = 1e-3
"""Largest relative L2 difference of an update, tensor by tensor, and of a sum."""
_STRESS = {"momentum": 0.9, "weight_decay": 0.01, "proximal": 0.1, "max_grad_norm": 0.1}


def compare(
    recipe: Recipe,
    manifest: Manifest,
    graphs: Mapping[str, bytes],
    examples: Mapping[str, Tensor],
    steps: int = 6,
) -> None:
    """Raises PlanMismatch, naming the tensor or metric and the difference, unless all three graphs agree
    with eager PyTorch over `steps` steps (terms that were built in but are neutral are switched on)."""
    neutral = [t for t in manifest.optimizer_terms if t not in manifest.optimizer.terms]
    optimizer = msgspec.structs.replace(
        manifest.optimizer, **{term: _STRESS[term] for term in neutral}
    )
    manifest = msgspec.structs.replace(manifest, optimizer=optimizer)
    model = copy.deepcopy(recipe.model)
    start = _parameters(model)
    trainer = Trainer(manifest, graphs["train"])
    trainer.start(start)
    eager = EagerTrainer(recipe, model, optimizer)
    _compare_forward(recipe, manifest, graphs, model, examples)
    for step in range(steps):
        batch, weight = ragged_batch(examples, manifest.batch_size, step)
        got = trainer.step(batch, weight)
        expected = eager.step({name: array[weight > 0] for name, array in batch.items()})
        _check_sums(f"train step {step}", got, expected)
    for name, value in _parameters(model).items():
        _check(
            f"the change of {name} after {steps} train steps",
            trainer.parameters()[name] - start[name],
            value - start[name],
        )
    _compare_forward(recipe, manifest, graphs, model, examples)


class EagerTrainer:
    """The same training as an author would write it: autograd, clip_grad_norm_, torch.optim.SGD."""

    def __init__(self, recipe: Recipe, model: nn.Module, optimizer: ClientOptimizer) -> None:
        self._recipe, self._model, self._settings = recipe, model, optimizer
        self._anchor = [p.detach().clone() for p in model.parameters()]
        self._sgd = torch.optim.SGD(
            model.parameters(),
            lr=optimizer.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, batch: Mapping[str, AnyArray]) -> Sums:
        """One step on a batch of real rows only."""
        self._sgd.zero_grad()
        sums = eager_sums(self._recipe, self._model, batch)
        loss = sums["loss"][0] / sums["loss"][1].clamp(min=1)
        if self._settings.proximal:
            pairs = zip(self._model.parameters(), self._anchor, strict=True)
            distance = torch.stack([((p - a) ** 2).sum() for p, a in pairs]).sum()
            loss = loss + self._settings.proximal / 2 * distance
        loss.backward()  # type: ignore[no-untyped-call]
        if self._settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm)
        self._sgd.step()
        return _as_metrics(sums)


def eager_sums(
    recipe: Recipe, model: nn.Module, batch: Mapping[str, AnyArray]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of loss and metrics of the module itself on real rows."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in batch.items()}
    tensors = {n: t.long() if t.dtype == torch.int32 else t for n, t in tensors.items()}
    outputs = model(*(tensors[name] for name in recipe.model_inputs))
    ones = torch.ones(len(next(iter(tensors.values()))))
    functions = {"loss": recipe.loss, **recipe.metrics}
    return {name: weighted_sum(f(outputs, tensors), ones) for name, f in functions.items()}


def ragged_batch(
    examples: Mapping[str, Tensor], batch_size: int, step: int
) -> tuple[dict[str, AnyArray], FloatArray]:
    """A batch drawn from the examples; every second one has rows that do not count."""
    draw = rng.stream(0, "compare", step)
    num_rows = len(next(iter(examples.values())))
    chosen = draw.integers(0, num_rows, batch_size)
    weight = np.ones(batch_size, np.float32)
    if step % 2 and batch_size > 1:
        weight[draw.integers(1, batch_size) :] = 0
    return {name: tensor.numpy()[chosen] for name, tensor in examples.items()}, weight


def _compare_forward(
    recipe: Recipe,
    manifest: Manifest,
    graphs: Mapping[str, bytes],
    model: nn.Module,
    examples: Mapping[str, Tensor],
) -> None:
    parameters = _parameters(model)
    evaluator = Evaluator(graphs["evaluate"], parameters)
    predictor = Predictor(graphs["predict"], parameters)
    for step in (0, 1):
        batch, weight = ragged_batch(examples, manifest.batch_size, step)
        real = {name: array[weight > 0] for name, array in batch.items()}
        row = {name: batch[name][:1] for name in recipe.model_inputs}
        inputs = [torch.from_numpy(array) for array in row.values()]
        with torch.no_grad():
            expected = _as_metrics(eager_sums(recipe, model, real))
            predict = getattr(model, "predict", model)
            wide = [t.long() if t.dtype == torch.int32 else t for t in inputs]
            prediction = predict(*wide).numpy()
        _check_sums("evaluation", evaluator.evaluate(batch, weight), expected)
        _check("the prediction", predictor.predict(row)["output"], prediction)


def _parameters(model: nn.Module) -> dict[str, FloatArray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def _as_metrics(sums: Mapping[str, tuple[Tensor, Tensor]]) -> Sums:
    return {name: MetricSum(value.item(), count.item()) for name, (value, count) in sums.items()}


def _check_sums(where: str, got: Sums, expected: Sums) -> None:
    for name, value in expected.items():
        # A near-tie may fall either way in a metric that counts: one element is within tolerance.
        slack = 0.0 if name == "loss" else 1.0
        _check(f"{name} in {where}", np.array(got[name].sum), np.array(value.sum), slack)
        _check(f"the count of {name} in {where}", np.array(got[name].count), np.array(value.count))


def _check(what: str, got: AnyArray, expected: AnyArray, slack: float = 0.0) -> None:
    size = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(got - expected))
    if not difference <= TOLERANCE * size + 1e-5 + slack:
        raise PlanMismatch(
            f"{what} differs between ONNX Runtime and PyTorch by {difference:.3g} "
            f"(PyTorch's norm is {size:.3g}, tolerated is {TOLERANCE:.0e} of it)",
            hint="the exported graph is wrong; replace the layer that is special in this model",
            difference=difference,
        )
