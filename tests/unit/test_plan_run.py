"""Running shipped plans: deterministic, interruptible, exact about padding, and loud about bad numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.errors import (
    InvalidExample,
    InvalidInput,
    NumericFailure,
    ShapeMismatch,
    UnsupportedPlan,
)
from homespun.plan.engine import Trainer
from homespun.plan.initial import initial_checkpoint
from homespun.plan.run import evaluate, predict, schedule, train
from homespun.plan.suggest import Suggester
from homespun.zoo.models import Digits

DIGITS = zoo.load("digits")
CHECKPOINT = initial_checkpoint(DIGITS.manifest, 0)
WORDS = Vocabulary.build(["the cat sat on the mat with a hat"], 4000)
KEYBOARD = zoo.load("keyboard").with_assets({"vocabulary": WORDS.to_bytes()})


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Digits that can be learned: the label is the brightest of ten stripes."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 10, count).astype(np.int32)
    x = draw.random((count, 28, 28), np.float32) * 0.2
    for row, label in enumerate(y):
        x[row, :, 2 * label : 2 * label + 4] += 0.8
    return {"x": x, "y": y}


def test_training_learns_and_says_what_it_did():
    plan = DIGITS.with_settings(local_epochs=8, momentum=0.5)
    rows = images(87)
    result = train(plan, CHECKPOINT, rows, seed=1)
    assert (result.num_examples, result.num_steps, result.interrupted) == (87, 40, False)
    assert result.metrics["loss"].count == result.metrics["top1"].count == 8 * 87
    local = {name: CHECKPOINT[name] + delta for name, delta in result.update.items()}
    before, after = evaluate(DIGITS, CHECKPOINT, rows), evaluate(DIGITS, local, rows)
    assert after["loss"].mean < before["loss"].mean / 4
    assert after["top1"].mean > 0.9 > before["top1"].mean
    assert all(delta.dtype == np.float32 for delta in result.update.values())


def test_the_same_seed_gives_the_same_update_and_another_does_not():
    rows = images(50)
    first, again, other = (train(DIGITS, CHECKPOINT, rows, seed).update for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_a_trainer_used_before_starts_afresh():
    plan = DIGITS.with_settings(momentum=0.9, proximal=0.1)
    trainer = Trainer(plan.manifest, plan.graphs["train"])
    train(plan, initial_checkpoint(plan.manifest, 9), images(30), 5, trainer=trainer)
    reused = train(plan, CHECKPOINT, images(50), 1, trainer=trainer).update
    fresh = train(plan, CHECKPOINT, images(50), 1).update
    assert all((reused[name] == fresh[name]).all() for name in fresh)


def test_the_checkpoint_is_left_alone():
    kept = {name: array.copy() for name, array in CHECKPOINT.items()}
    train(DIGITS, CHECKPOINT, images(20), 1)
    assert all((CHECKPOINT[name] == kept[name]).all() for name in kept)


def test_stopping_is_asked_before_every_step():
    answers = iter([False, False, True])
    result = train(DIGITS, CHECKPOINT, images(100), 1, should_stop=lambda: next(answers))
    assert (result.num_steps, result.interrupted) == (2, True)
    at_once = train(DIGITS, CHECKPOINT, images(100), 1, should_stop=lambda: True)
    assert (at_once.num_steps, at_once.metrics) == (0, {})
    assert not any(delta.any() for delta in at_once.update.values())


def test_max_rows_picks_one_set_for_all_epochs():
    plan = DIGITS.with_settings(max_rows=30, local_epochs=3)
    rows = {"x": np.zeros((90, 28, 28), np.float32), "y": np.arange(90, dtype=np.int32)}
    rows["x"][:, 0, 0] = rows["y"]
    rows["y"] = rows["y"] % 10
    used = [
        row
        for batch, weight in schedule(plan.manifest, rows, seed=4)
        for row in batch["x"][weight > 0, 0, 0]
    ]
    assert len(used) == 90
    assert all(used.count(row) == 3 for row in set(used))
    assert train(plan, CHECKPOINT, rows, 4).num_examples == 30


def test_padding_is_exact():
    """23 rows in batches of 20 give PyTorch's sums over 23 rows, whatever fills the second batch."""
    rows = images(23)
    model = Digits()
    model.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in CHECKPOINT.items()})
    with torch.no_grad():
        logits = model(torch.from_numpy(rows["x"]))
        expected = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(rows["y"]).long(), reduction="sum"
        ).item()
    result = evaluate(DIGITS, CHECKPOINT, rows)
    assert result["loss"].count == 23
    assert result["loss"].sum == pytest.approx(expected, rel=1e-5)
    trainer = Trainer(DIGITS.manifest, DIGITS.graphs["train"])
    updates = []
    for filler in (0.0, 1e6):
        batch = {"x": np.full((20, 28, 28), filler, np.float32), "y": np.zeros(20, np.int32)}
        batch["x"][:3], batch["y"][:3] = rows["x"][:3], rows["y"][:3]
        trainer.start(CHECKPOINT)
        trainer.step(batch, np.array([1] * 3 + [0] * 17, np.float32))
        updates.append({name: a.copy() for name, a in trainer.parameters().items()})
    for name in updates[0]:
        np.testing.assert_allclose(updates[0][name], updates[1][name], atol=1e-6)


def test_prediction_is_pytorchs():
    rows = images(1)
    model = Digits()
    model.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in CHECKPOINT.items()})
    output = predict(DIGITS, CHECKPOINT, {"x": rows["x"]})["output"]
    np.testing.assert_allclose(output, model(torch.from_numpy(rows["x"])).detach(), atol=1e-5)


def test_bad_numbers_and_bad_input_have_names():
    with pytest.raises(InvalidInput, match="no rows"):
        train(DIGITS, CHECKPOINT, images(0), 1)
    with pytest.raises(InvalidInput, match="no rows"):
        evaluate(DIGITS, CHECKPOINT, images(0))
    with pytest.raises(ShapeMismatch):
        train(DIGITS, {}, images(5), 1)
    with pytest.raises(NumericFailure):
        train(DIGITS.with_settings(learning_rate=1e30), CHECKPOINT, images(100), 1)
    with pytest.raises(NumericFailure):
        evaluate(DIGITS, {n: np.full_like(a, 1e30) for n, a in CHECKPOINT.items()}, images(5))
    with pytest.raises(InvalidExample, match="cannot take") as caught:
        train(DIGITS, CHECKPOINT, images(5) | {"y": np.full(5, 61, np.int32)}, 1)
    assert "61" not in str(caught.value)
    with pytest.raises(InvalidInput, match="shape"):
        predict(DIGITS, CHECKPOINT, {"x": np.zeros((2, 28, 28), np.float32)})


def test_a_graph_that_cannot_be_loaded_is_unsupported():
    with pytest.raises(UnsupportedPlan, match="cannot load"):
        Trainer(DIGITS.manifest, b"no graph")


def test_suggestions_are_words_in_order_of_their_probability():
    checkpoint = initial_checkpoint(KEYBOARD.manifest, 0)
    checkpoint["bias"][16:] = -np.arange(4000 - 16) / 10  # frequent words are likelier
    suggester = Suggester(KEYBOARD, checkpoint)
    found = suggester.suggest("the cat sat on")
    assert len(found) == 3
    assert {s.word for s in found} <= set(WORDS.words)
    assert [s.probability for s in found] == sorted((s.probability for s in found), reverse=True)
    assert 0 < sum(s.probability for s in suggester.suggest("the", k=100)) <= 1.0001
    assert {s.word for s in suggester.suggest("the", k=9, prefix="CA")} == {"cat"}
    assert suggester.suggest("the", prefix="xyz") == []
    assert len(suggester.suggest("")) == 3
    long = "the cat sat on the mat with a hat " * 9
    assert suggester.suggest(long) == suggester.suggest(long[-len(long) // 2 :])


def test_suggestions_depend_on_the_last_word_and_not_on_padding():
    checkpoint = initial_checkpoint(KEYBOARD.manifest, 0)
    checkpoint["embedding.weight"] *= 20
    suggester = Suggester(KEYBOARD, checkpoint)
    assert suggester.suggest("the cat") != suggester.suggest("the mat")
    with pytest.raises(UnsupportedPlan, match="does not read text"):
        Suggester(DIGITS, CHECKPOINT)
