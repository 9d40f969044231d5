"""The digits plan: images of 28 x 28 pixels, the usual first task."""

from __future__ import annotations

import torch

from homespun.plan.build import build_plan, cross_entropy, in_top
from homespun.plan.manifest import ClientOptimizer, TensorFeature
from homespun.plan.package import Plan
from homespun.zoo.models import Digits


def build() -> Plan:
    """The plan of the digits task."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return build_plan(
        Digits(),
        name="digits",
        examples={
            "x": torch.rand(64, 28, 28, generator=generator),
            "y": torch.randint(0, 10, (64,), generator=generator).int(),
        },
        loss=lambda logits, batch: cross_entropy(logits, batch["y"]),
        metrics={"top1": lambda logits, batch: in_top(logits, batch["y"], 1)},
        features=[
            TensorFeature(field="pixels", input="x", dtype="uint8", shape=(28, 28), scale=1 / 255),
            TensorFeature(field="label", input="y", dtype="int32"),
        ],
        optimizer=ClientOptimizer(learning_rate=0.1),
        extra_terms=("momentum", "proximal"),
        batch_size=20,
        max_rows=400,
        clip_norm=10.0,
        max_weight=400,
        min_examples=10,
    )
