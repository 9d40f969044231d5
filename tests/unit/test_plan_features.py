"""Stored examples become rows, rows become batches of one size; nothing is lost, nothing is doubled."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from homespun import rng, zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.errors import InvalidExample, PlanError
from homespun.plan.features import batches, encode, windows
from homespun.plan.manifest import TextFeature

DIGITS = zoo.load("digits").manifest
KEYBOARD = zoo.load("keyboard").manifest
WORDS = Vocabulary.build(["the cat sat on the mat"], 32)
FEATURE = TextFeature(field="text", length=4, vocabulary_size=32)


def test_windows_share_only_their_border_token():
    texts = ["The cat sat on the mat.", "The dog!"]
    stream = [token for text in texts for token in WORDS.encode(text)]
    x, y = windows(WORDS, texts, FEATURE)
    assert x.dtype == y.dtype == np.int32
    assert x.shape == y.shape == (3, 4)  # 12 tokens: 11 pairs in windows of 4
    assert x.reshape(-1)[: len(stream) - 1].tolist() == stream[:-1]
    assert y.reshape(-1)[: len(stream) - 1].tolist() == stream[1:]
    assert x.reshape(-1)[len(stream) :].tolist() == [WORDS.pad_id] * (12 - len(stream))
    assert y.reshape(-1)[len(stream) - 1 :].tolist() == [WORDS.pad_id] * (13 - len(stream))


@pytest.mark.parametrize("num_tokens", range(1, 12))
def test_every_pair_of_neighbours_is_predicted_exactly_once(num_tokens):
    stream = WORDS.encode(" ".join(["cat"] * (num_tokens - 1))) if num_tokens > 1 else []
    x, y = windows(WORDS, [" ".join(["cat"] * (num_tokens - 1))], FEATURE)
    assert (y != WORDS.pad_id).sum() == max(len(stream) - 1, 0)
    assert len(x) == -(-max(len(stream) - 1, 0) // 4)


def test_no_text_gives_no_rows():
    for examples in ([], [{"text": ""}], [{"text": "12 34"}]):
        rows = encode(KEYBOARD, {"vocabulary": WORDS.to_bytes()}, examples)
        assert rows["x"].shape == rows["y"].shape == (0, 20)


def test_a_text_plan_needs_its_vocabulary_and_one_that_fits():
    with pytest.raises(PlanError, match="no asset 'vocabulary'"):
        encode(KEYBOARD, {}, [{"text": "hello"}])
    small = TextFeature(field="text", length=4, vocabulary_size=18)
    with pytest.raises(PlanError, match="ids up to"):
        windows(WORDS, ["the cat sat on the mat"], small)


def test_tensors_from_lists_bytes_and_base64_are_the_same():
    pixels = np.arange(784, dtype=np.uint8).reshape(28, 28)
    forms = [
        pixels.tolist(),
        pixels,
        pixels.tobytes(),
        base64.b64encode(pixels.tobytes()).decode(),
    ]
    rows = encode(DIGITS, {}, [{"pixels": form, "label": 3} for form in forms])
    assert rows["x"].dtype == np.float32
    assert rows["x"].shape == (4, 28, 28)
    assert (rows["x"] == pixels.astype(np.float32) * np.float32(1 / 255)).all()
    assert rows["y"].tolist() == [3, 3, 3, 3]
    assert rows["y"].dtype == np.int32


@pytest.mark.parametrize(
    "example",
    [
        {"label": 1},
        {"pixels": [[0] * 28] * 27, "label": 1},
        {"pixels": [[300] * 28] * 28, "label": 1},
        {"pixels": [[-1] * 28] * 28, "label": 1},
        {"pixels": b"short", "label": 1},
        {"pixels": "*not base64*", "label": 1},
        {"pixels": None, "label": 1},
        {"pixels": [[0, 1], [2]], "label": 1},
        {"pixels": bytes(784), "label": "seven"},
        {"pixels": bytes(784), "label": [1]},
    ],
)
def test_examples_that_do_not_fit(example):
    with pytest.raises(InvalidExample) as caught:
        encode(DIGITS, {}, [example])
    assert caught.value.hint
    assert "seven" not in caught.value.message  # what the example holds stays where it is


def test_text_must_be_text():
    with pytest.raises(InvalidExample, match="expected text"):
        encode(KEYBOARD, {"vocabulary": WORDS.to_bytes()}, [{"text": 7}])


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_batches_have_one_size_and_every_row_counts_once(count):
    rows = {"x": np.arange(count) * 10, "y": np.arange(count)}
    seen: list[int] = []
    for batch, weight in batches(rows, 4, rng.stream(1, "order")):
        assert batch["x"].shape == batch["y"].shape == weight.shape == (4,)
        assert (batch["x"] == batch["y"] * 10).all()
        seen += batch["y"][weight == 1].tolist()
        assert set(weight.tolist()) <= {0.0, 1.0}
    assert sorted(seen) == list(range(count))


def test_order_depends_on_the_stream_only():
    rows = {"x": np.arange(100)}
    first, again, other = (
        [b["x"].tolist() for b, _ in batches(rows, 8, rng.stream(seed, "batches", 0))]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert [b["x"][0] for b, _ in batches(rows, 50)] == [0, 50]
