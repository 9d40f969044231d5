"""From an ordinary PyTorch module to a plan. The only part of `plan` that needs PyTorch.

    plan = build_plan(
        model,                                   # any nn.Module
        name="digits",
        examples={"x": images, "y": labels},     # at least one row; shapes and types are read off them
        loss=lambda outputs, batch: cross_entropy(outputs, batch["y"]),
        metrics={"top1": lambda outputs, batch: in_top(outputs, batch["y"], 1)},
        features=[TensorFeature(...), TensorFeature(...)],
        optimizer=ClientOptimizer(learning_rate=0.1),
        batch_size=20, max_rows=400, clip_norm=1.0, max_weight=400,
    )

A loss or metric gives one value per element ([B] or [B, ...]), and if some elements must not count also a
mask of that shape. If the module has a method `predict`, the predict graph is that, else its forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from homespun.errors import PlanError
from homespun.plan.build.compare import compare
from homespun.plan.build.export import export
from homespun.plan.build.losses import cross_entropy, in_top
from homespun.plan.build.modules import check_modules, parameter_specs
from homespun.plan.build.steps import (
    PerElement,
    Recipe,
    evaluate_graph,
    predict_graph,
    train_graph,
)
from homespun.plan.manifest import (
    OPTIMIZER_TERMS,
    ClientOptimizer,
    Feature,
    Initializer,
    Manifest,
    Runtime,
    TensorSpec,
)
from homespun.plan.package import Plan
from homespun.types import FloatArray

__all__ = ["build_plan", "checkpoint_of", "cross_entropy", "in_top"]


def build_plan(
    model: nn.Module,
    *,
    name: str,
    examples: Mapping[str, Tensor],
    loss: PerElement,
    metrics: Mapping[str, PerElement],
    features: Sequence[Feature],
    optimizer: ClientOptimizer,
    batch_size: int,
    max_rows: int,
    clip_norm: float,
    max_weight: int,
    local_epochs: int = 1,
    min_examples: int = 1,
    model_inputs: Sequence[str] = ("x",),
    initial: Mapping[str, Initializer] | None = None,
    extra_terms: Sequence[str] = (),
) -> Plan:
    """An unsigned plan, compared with eager PyTorch.

    `examples` maps input names to float32 or int32 tensors [num_rows, ...]; the model is called with
    those named in `model_inputs`. `extra_terms` builds in optimizer terms that are neutral for now, so
    that settings can switch them on later. `initial` says how parameters start (see `parameter_specs`).

    Raises PlanError naming a layer or operator that cannot be exported and what to use instead;
    PlanMismatch if the graphs do not compute what PyTorch computes.
    """
    check_modules(model)
    terms = tuple(t for t in OPTIMIZER_TERMS if t in optimizer.terms or t in extra_terms)
    recipe = Recipe(model, tuple(model_inputs), loss, dict(metrics), terms)
    inputs = tuple(_spec(key, tensor, batch_size) for key, tensor in examples.items())
    batch = _example_batch(examples, batch_size)
    parameters = [p.detach() for p in model.parameters()]
    runtime = Runtime()
    graphs = {
        graph.name: export(graph, runtime)
        for make in (train_graph, evaluate_graph, predict_graph)
        for graph in [make(recipe, parameters, batch)]
    }
    manifest = Manifest(
        name=name,
        parameters=parameter_specs(model, initial or {}),
        inputs=inputs,
        predict_inputs=tuple(
            TensorSpec(name=i.name, dtype=i.dtype, shape=(1, *i.shape[1:]))
            for i in inputs
            if i.name in model_inputs
        ),
        features=tuple(features),
        optimizer=optimizer,
        optimizer_terms=terms,
        batch_size=batch_size,
        local_epochs=local_epochs,
        max_rows=max_rows,
        min_examples=min_examples,
        clip_norm=clip_norm,
        max_weight=max_weight,
        metrics=tuple(metrics),
        graphs={key: hashlib.sha256(data).hexdigest() for key, data in graphs.items()},
        runtime=runtime,
        built_with={p: version(p).split("+")[0] for p in ("torch", "onnx", "onnxscript")},
    )
    manifest.validate()
    compare(recipe, manifest, graphs, examples)
    return Plan(manifest=manifest, graphs=graphs)


def checkpoint_of(model: nn.Module) -> dict[str, FloatArray]:
    """The module's parameters as a checkpoint."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def _spec(name: str, tensor: Tensor, batch_size: int) -> TensorSpec:
    dtypes: dict[Any, Literal["float32", "int32"]] = {
        torch.float32: "float32",
        torch.int32: "int32",
    }
    if tensor.dtype not in dtypes or tensor.dim() == 0 or len(tensor) == 0:
        raise PlanError(
            f"example input {name} is {tensor.dtype}{list(tensor.shape)}",
            hint="give a float32 or int32 tensor with at least one row",
        )
    return TensorSpec(name=name, dtype=dtypes[tensor.dtype], shape=(batch_size, *tensor.shape[1:]))


def _example_batch(examples: Mapping[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    rows = {len(tensor) for tensor in examples.values()}
    if len(rows) != 1:
        raise PlanError(f"example inputs have different numbers of rows: {sorted(rows)}")
    chosen = torch.arange(batch_size) % rows.pop()
    return {name: tensor[chosen] for name, tensor in examples.items()}
