"""Your own model on devices: an ordinary PyTorch module becomes a plan that needs no PyTorch to train.

    python examples/own_model.py FOLDER      writes FOLDER/plan, FOLDER/initial.safetensors

The model tells from an acceleration window (32 samples of x, y, z) whether its owner walks, sits or
stands. On a device, an example is `{"window": [[x, y, z], ...], "activity": 0 | 1 | 2}`.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from homespun.plan.build import build_plan, checkpoint_of, cross_entropy, in_top
from homespun.plan.manifest import ClientOptimizer, TensorFeature
from homespun.tensors.codec import encode_tree

SAMPLES, ACTIVITIES = 32, 3


class Activity(nn.Module):
    """float32 windows [B, 32, 3] -> logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(3, 8, 5)
        self.output = nn.Linear(8, ACTIVITIES)

    def forward(self, windows: Tensor) -> Tensor:
        features = torch.relu(self.filter(windows.transpose(1, 2)))
        logits: Tensor = self.output(features.amax(-1))
        return logits


def main(folder: Path) -> None:
    model = Activity()
    plan = build_plan(
        model,
        name="activity",
        examples={  # a few rows: shapes and types are read off them, and the build tests itself with them
            "x": torch.randn(64, SAMPLES, 3),
            "y": torch.randint(0, ACTIVITIES, (64,)).int(),
        },
        loss=lambda logits, batch: cross_entropy(logits, batch["y"]),
        metrics={"top1": lambda logits, batch: in_top(logits, batch["y"], 1)},
        features=[
            TensorFeature(field="window", input="x", dtype="float32", shape=(SAMPLES, 3)),
            TensorFeature(field="activity", input="y", dtype="int32"),
        ],
        optimizer=ClientOptimizer(learning_rate=0.1),
        batch_size=16,
        max_rows=200,
        clip_norm=5.0,
        max_weight=200,
    )
    plan.write(folder / "plan")
    (folder / "initial.safetensors").write_bytes(encode_tree(checkpoint_of(model)))
    print(f"{plan.manifest.num_parameters} parameters, plan in {folder / 'plan'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/own_model.py FOLDER")
    main(Path(sys.argv[1]))
