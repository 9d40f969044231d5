"""The shipped plans are what their modules build, train as PyTorch trains, and load without it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from homespun import zoo
from homespun.corpora.vocabulary import FIRST_WORD_ID
from homespun.errors import NotFound
from homespun.plan.engine import Evaluator, Trainer
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.zoo import digits, keyboard, models


def test_loading_needs_no_pytorch():
    code = (
        "import sys; from homespun import zoo; zoo.load('keyboard'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_model_that_is_not_there():
    with pytest.raises(NotFound, match="no model named 'speech'"):
        zoo.load("speech")


def test_sizes():
    manifest = zoo.load("keyboard").manifest
    assert manifest.num_parameters == sum(
        p.numel() for p in models.NextWord(models.DEMO).parameters()
    )
    assert manifest.num_parameters == 350_496
    hard = sum(p.numel() for p in models.NextWord(models.HARD_2018).parameters())
    assert 1_400_000 < hard < 1_450_000
    assert zoo.load("digits").manifest.num_parameters < 100_000


def module_at(model: nn.Module, checkpoint) -> nn.Module:
    model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in checkpoint.items()})
    return model


def keyboard_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As plain PyTorch says it: mean over the targets that count."""
    target = torch.where((y == 0) | (y == 1) | (y == 2), -100, y)
    return cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="mean")


def striped(count: int) -> dict[str, torch.Tensor]:
    """Digits that can be learned: the label says which stripe is bright."""
    x = torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(3)) / 2
    y = torch.arange(count).int() % 10
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 4] += 0.5
    return {"x": x, "y": y}


CASES: dict[str, Any] = {
    "keyboard": (
        lambda: models.NextWord(models.DEMO),
        keyboard_loss,
        lambda: keyboard._examples(models.DEMO),
        torch.float32,
    ),
    "digits": (
        models.Digits,
        cross_entropy,
        lambda: striped(64),
        torch.float64,
    ),
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_twenty_steps_equal_eager_pytorch(name):
    """Ragged batches on our side; PyTorch gets the real rows only, its own losses and its own SGD.

    Digits are compared with double precision: in single, a near-tie of max-pooling can send either of the
    two another way. The keyboard's rate of 3 makes single precision itself drift 6e-4 from double in 20
    steps, so it is compared with single, which rounds alike.
    """
    make, loss, data, precision = CASES[name]
    plan, examples = zoo.load(name), data()
    manifest = plan.manifest
    checkpoint = initial_checkpoint(manifest, 7)
    model = module_at(make(), checkpoint).to(precision)
    sgd = torch.optim.SGD(model.parameters(), lr=manifest.optimizer.learning_rate)
    trainer = Trainer(manifest, plan.graphs["train"])
    trainer.start(checkpoint)
    draw = np.random.default_rng(0)
    for step in range(20):
        rows = draw.integers(0, 64, manifest.batch_size)
        real = manifest.batch_size if step % 2 else int(draw.integers(1, manifest.batch_size))
        weight = (np.arange(manifest.batch_size) < real).astype(np.float32)
        batch = {key: tensor[rows] for key, tensor in examples.items()}
        sums = trainer.step({key: tensor.numpy() for key, tensor in batch.items()}, weight)
        sgd.zero_grad()
        x = batch["x"][:real]
        mean = loss(
            model(x.long() if name == "keyboard" else x.to(precision)), batch["y"][:real].long()
        )
        mean.backward()
        if manifest.optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), manifest.optimizer.max_grad_norm)
        sgd.step()
        assert sums["loss"].mean == pytest.approx(mean.item(), rel=1e-4)
    for parameter, value in model.named_parameters():
        difference = np.abs(trainer.parameters()[parameter] - value.detach().numpy()).max()
        moved = np.abs(trainer.parameters()[parameter] - checkpoint[parameter]).max()
        assert difference < 1e-4 < moved, parameter


def test_keyboard_metrics_ask_for_words_only():
    """On paper: which positions count, and what is a hit."""
    plan = zoo.load("keyboard")
    checkpoint = {n: np.zeros_like(a) for n, a in initial_checkpoint(plan.manifest, 0).items()}
    checkpoint["bias"][[3, 1, 20, 30, 40]] = [9, 8, 3, 2, 1]  # a mark and <unk> score best
    y = np.zeros((16, 20), np.int32)
    y[0, :8] = [20, 30, 40, 50, 1, 2, 3, 0]
    x = np.where(y > 0, y, 0).astype(np.int32)
    evaluator = Evaluator(plan.graphs["evaluate"], checkpoint)
    result = evaluator.evaluate({"x": x, "y": y}, np.ones(16, np.float32))
    assert (result["top1"].sum, result["top1"].count) == (1, 5)  # 20; of 20 30 40 50 <unk>
    assert (result["top3"].sum, result["top3"].count) == (3, 5)
    assert result["loss"].count == 5  # 20 30 40 50 and the mark
    assert FIRST_WORD_ID == 16


def same_numbers(built: Plan, shipped: Plan) -> None:
    """Another version of PyTorch may write another graph; it must compute the same."""
    assert built.manifest.shapes == shipped.manifest.shapes
    checkpoint = initial_checkpoint(shipped.manifest, 3)
    rows = {key: t.numpy() for key, t in CASES[shipped.manifest.name][2]().items()}
    batch = {key: a[: shipped.manifest.batch_size] for key, a in rows.items()}
    weight = np.ones(shipped.manifest.batch_size, np.float32)
    after = []
    for plan in (built, shipped):
        trainer = Trainer(plan.manifest, plan.graphs["train"])
        trainer.start(checkpoint)
        for _ in range(3):
            trainer.step(batch, weight)
        after.append({n: a.copy() for n, a in trainer.parameters().items()})
    for name, array in after[0].items():
        np.testing.assert_allclose(array, after[1][name], atol=1e-5)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_shipped_plan_is_what_its_module_builds(name):
    built = {"digits": digits, "keyboard": keyboard}[name].build()
    shipped = zoo.load(name)
    if built.manifest.built_with == shipped.manifest.built_with:
        assert built.hash == shipped.hash, "run: python -m homespun.zoo build"
    else:
        same_numbers(built, shipped)
