"""What the benchmark of learning counts, compares and draws, and that its configurations train, on text made here."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import simulation_learning as learning
from benchmarks.peers.learning_plot import Curve, plot
from benchmarks.peers.trigram import Trigram, hits, streams
from homespun.corpora.vocabulary import FIRST_WORD_ID, UNK_ID, Vocabulary
from homespun.errors import InvalidConfig
from homespun.simulation.datasets import from_text

A, B, C, D = range(FIRST_WORD_ID, FIRST_WORD_ID + 4)


# --- the trigram ----------------------------------------------------------------------------------------


def test_streams_are_what_windows_were_cut_from():
    texts = ["the cat sat", "the dog sat, and sat. the cat ran"]
    words = Vocabulary.build(texts, 100)
    rows = from_text([("anna", texts), ("bert", texts[:1])], words, 4)
    whole = [token for text in texts for token in words.encode(text)]
    assert list(streams(rows)) == [whole, words.encode(texts[0])]


def test_probabilities_are_those_of_the_formula():
    model = Trigram([[A, B, C, A, B, D, A, B, C]])
    first = 3 / 9  # B among all words
    second = (2 + 2 * model.probability(C, ())) / (3 + 2)  # after B: C twice, D once
    assert model.probability(B, ()) == pytest.approx(first)
    assert model.probability(C, (B,)) == pytest.approx(second)
    assert model.probability(C, (A, B)) == pytest.approx((2 + 2 * second) / (3 + 2))
    assert model.probability(A, (D, D)) == pytest.approx(model.probability(A, (D,)))
    words = (A, B, C, D)
    for context in ((), (A,), (A, B), (D, A), (C, C)):
        assert sum(model.probability(word, context) for word in words) == pytest.approx(1)


def test_the_likeliest_words_are_the_likeliest_of_all():
    draw = np.random.default_rng(0)
    told = [(FIRST_WORD_ID + draw.zipf(1.6, 300) % 30).tolist() for _ in range(5)]
    model = Trigram(told)
    words = sorted(set(chain(*told)))
    for stream in told:
        for place in range(2, 60):
            context = tuple(stream[place - 2 : place])
            ranked = sorted(words, key=lambda word: (-model.probability(word, context), word))
            assert model.likeliest(context) == ranked[:3]


def test_unknown_words_are_wrong_and_marks_are_not_asked_for():
    told = [[2, A, 3, B, 3, C, C, C]]
    read = [[2, A, UNK_ID, 3, D]]
    found = hits(Trigram(told), read)
    assert found == {"top1": pytest.approx(1 / 3), "top3": pytest.approx(1 / 3)}
    commonest = Counter(word for word in told[0] if word >= FIRST_WORD_ID).most_common(1)[0][0]
    assert hits(Trigram(told), [[2, commonest]], tokens=0) == {"top1": 1.0, "top3": 1.0}


# --- a whole case ---------------------------------------------------------------------------------------


def corpus(path, people=40):
    """Everybody counts, and begins anywhere: whoever knows one number knows the next one."""
    names = ["one", "two", "three", "four", "five", "six", "seven"]
    draw = np.random.default_rng(0)
    lines = []
    for person in range(people):
        for _ in range(10):
            begin = int(draw.integers(7))
            text = " ".join(names[(begin + step) % 7] for step in range(20))
            lines.append(json.dumps({"user": f"person {person}", "text": text}))
    path.write_text("\n".join(lines))
    return path


SMALL = [
    "task.settings={vocabulary = 40, embedding = 8, hidden = 8}",
    'data.settings={path = "%s", vocabulary = 40, validation = 0.2, min_rows = 2}',
    "simulation.rounds=6",
    "simulation.cohort=5",
    "simulation.evaluate_every=3",
]


def test_a_case_is_trained_and_measured_on_people_it_never_saw(tmp_path, monkeypatch):
    path = corpus(tmp_path / "numbers.jsonl")
    changes = [change.replace("%s", str(path)) for change in SMALL]
    monkeypatch.setattr(learning.Trial, "changes", changes)
    trial = learning.Trial("next_word", path, tmp_path / "run", None)
    found = dict(learning.figures(trial, quick=False))
    assert found["trigram"]["top1"] > found["bigram"]["top1"] - 0.02 > 0.8
    assert found["commonest words"]["top1"] < 0.25
    assert found["homespun"]["top3"] > found["commonest words"]["top3"] + 0.1

    training, validation, test = trial.split()
    names = [set(rows.clients or ()) for rows in (training, validation, test)]
    assert len(set.union(*names)) == sum(map(len, names)) == 40
    assert all(names)
    curve = trial.curve()
    assert [number for number, _ in curve] == [3, 6]
    assert trial.measured(validation, 1) == pytest.approx(curve[-1][1], rel=1e-5)

    rows = learning.table("next_word", found)
    goal = next(row for row in rows if (row.case, row.side) == ("next_word top1", "goal"))
    assert goal.raw == pytest.approx((15.7,))


def test_what_only_people_of_the_test_say_is_no_word(tmp_path, monkeypatch):
    path = tmp_path / "words.jsonl"
    people = [f"person {number}" for number in range(30)]
    lines = [{"user": who, "text": f"hello {who.replace('person ', 'x' * 3)}"} for who in people]
    path.write_text("\n".join(map(json.dumps, lines)))
    split = learning.Trial("next_word", path, tmp_path, None).module.split
    for rows in split(str(path), validation=0.2, min_rows=1)[1:]:
        assert (rows.inputs["y"][:, 1] == UNK_ID).all()


def test_shares_that_leave_nobody_are_refused(tmp_path):
    for name in ("next_word", "digits"):
        module = learning.Trial(name, tmp_path, tmp_path, None).module
        with pytest.raises(InvalidConfig, match="shares"):
            module.split("anything", test=0.9, validation=0.1)


# --- digits ---------------------------------------------------------------------------------------------


def test_writers_keep_to_their_side_and_only_those_who_train_have_copies(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (60, 784), np.uint8)
    table = {
        "user": [f"writer {row // 2}" for row in range(60)],
        "label": [row % 10 for row in range(60)],
        "image": [image.tobytes() for image in images],
    }
    path = tmp_path / "digits.parquet"
    parquet.write_table(arrow.table(table), path)
    module = learning.Trial("digits", path, tmp_path, None).module
    training, validation, test = module.split(str(path), validation=0.2, copies=2)
    names = [set(rows.clients or ()) for rows in (training, validation, test)]
    assert len(set.union(*names)) == sum(map(len, names)) == 30
    assert set(training.num_rows) == {6}
    assert {*validation.num_rows, *test.num_rows} == {2}
    assert training.inputs["y"].reshape(-1, 3).std(axis=1).max() == 0
    stored = {image.tobytes() for image in images}
    assert all(image.tobytes() in stored for image in training.inputs["x"][::3])


def test_a_copy_is_the_image_moved_a_little():
    torch = pytest.importorskip("torch")
    module = learning.Trial("digits", Path(), Path(), None).module
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 8:20, 12:16] = 200
    moved = module.varied(np.repeat(image, 50, 0), torch.Generator().manual_seed(0))
    assert moved.dtype == np.uint8
    assert len({copy.tobytes() for copy in moved}) > 45
    mass = moved.sum((1, 2), dtype=np.int64) / image.sum(dtype=np.int64)
    assert 0.75 < mass.min() < mass.max() < 1.3
    places = np.arange(28)
    for axis in (1, 2):
        centres = (moved.sum(axis, dtype=np.int64) * places).sum(1) / moved.sum((1, 2))
        assert np.abs(centres - 13.5).max() < 3


# --- the script -----------------------------------------------------------------------------------------


def test_choices(capsys: pytest.CaptureFixture[str]):
    assert learning.parse_choices([]).cases == ("next_word", "shakespeare", "digits")
    assert learning.parse_choices(["--quick"]).rounds == 3
    assert learning.parse_choices(["--quick", "--rounds", "7"]).rounds == 7
    with pytest.raises(SystemExit):
        learning.parse_choices(["--cases", "digits,numbers"])
    assert "'numbers' is none of next_word" in capsys.readouterr().err


def test_without_the_data_it_says_where_they_belong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["simulation_learning", f"--data={tmp_path}"])
    assert learning.main() == 1
    assert "text_ubuntu_irc.parquet; see benchmarks/README.md" in capsys.readouterr().err


def test_the_plot_shows_runs_goals_and_what_was_reached():
    points = [(10, {"top1": 0.9, "top3": 0.95}), (20, {"top1": 0.97, "top3": 0.99})]
    words = Curve(points, {"homespun": points[1][1], "trigram": points[0][1]}, points[0][1])
    digits = Curve(points, {"homespun": {"top1": 0.98}}, {"top1": 0.985})
    drawn = ElementTree.fromstring(plot({"words": words, "digits": digits}))
    assert len(drawn.findall("{*}polyline")) == len(drawn.findall("{*}circle")) == 3
    said = [text.text for text in drawn.findall("{*}text")]
    assert "top1, goal 98.5 %" in said
    assert "top3, trigram 95.0 %" in said
    assert words.as_dict()["points"][1] == [20, {"top1": 0.97, "top3": 0.99}]


def test_cases_that_were_not_run_stay_in_the_plot(tmp_path):
    points = [(10, {"top1": 0.9}), (20, {"top1": 0.97})]
    curves = {
        name: Curve(points[:rounds], {"homespun": points[0][1]}, {"top1": 0.9})
        for name, rounds in (("digits", 1), ("next_word", 2))
    }
    path = tmp_path / "learning.svg"
    learning.draw(path, {"digits": curves["digits"]})
    learning.draw(path, {"next_word": curves["next_word"]})
    kept = json.loads(path.with_suffix(".json").read_text())
    assert list(kept) == ["next_word", "digits"]
    assert kept["digits"]["points"] == [[10, {"top1": 0.9}]]
    assert len(ElementTree.fromstring(path.read_text()).findall("{*}polyline")) == 2
