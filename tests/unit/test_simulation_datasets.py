"""The same rows give the same arena, whatever they are stored in; what does not fit is named."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from homespun import zoo
from homespun.corpora.sources import UserText
from homespun.corpora.vocabulary import Vocabulary
from homespun.errors import InvalidExample, InvalidInput, NotFound
from homespun.plan.features import encode, windows
from homespun.plan.manifest import TextFeature
from homespun.simulation.datasets import (
    Column,
    from_arrays,
    from_examples,
    from_huggingface,
    from_jsonl,
    from_leaf,
    from_parquet,
    from_text,
)

USERS = ["ben", "ann", "ben", "cy", "ann"]
X = np.arange(30).reshape(5, 2, 3)
Y = np.array([1, 0, 1, 0, 1])
COLUMNS: dict[str, str | Column] = {"x": Column("pixels", (2, 3), "uint8"), "y": "label"}
ARENA = from_arrays({"x": X.astype(np.uint8), "y": Y}, USERS)


def same(one, other):
    assert one.offsets.tolist() == other.offsets.tolist()
    assert tuple(one.clients) == tuple(other.clients)
    assert set(one.inputs) == set(other.inputs)
    for name, array in one.inputs.items():
        assert array.dtype == other.inputs[name].dtype
        assert array.tolist() == other.inputs[name].tolist()


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    given = {"user": USERS, "pixels": X.tolist(), "label": Y} | columns
    parquet.write_table(pa.table(given), path / "rows.parquet", row_group_size=2)
    return path / "rows.parquet"


def pixels(kind):
    pa = pytest.importorskip("pyarrow")
    flat = X.reshape(5, 6).astype(np.uint8)
    if kind == "fixed list":
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), 6)
    if kind == "nested list":
        return X.tolist()
    if kind == "flat list":
        return flat.tolist()
    return pa.array([row.tobytes() for row in flat], pa.binary(6 if kind == "fixed bytes" else -1))


@pytest.mark.parametrize("kind", ["fixed list", "nested list", "flat list", "fixed bytes", "bytes"])
def test_a_parquet_table_gives_the_same_arena(kind, tmp_path):
    file = parquet(tmp_path, pixels=pixels(kind))
    same(from_parquet(file, columns=COLUMNS), ARENA)
    same(from_parquet(file, columns=COLUMNS, directory=tmp_path / "arena"), ARENA)


def test_where_keeps_the_rows_that_are_equal(tmp_path):
    file = parquet(tmp_path, split=[*"abaab"])
    kept = np.array([0, 2, 3])
    expected = from_arrays({"x": X[kept].astype(np.uint8), "y": Y[kept]}, ["ben", "ben", "cy"])
    same(from_parquet(file, columns=COLUMNS, where={"split": "a"}), expected)
    with pytest.raises(InvalidInput, match="no rows where"):
        from_parquet(file, columns=COLUMNS, where={"split": "z"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [1, None, 1, 0, 1]}, "'label' has rows without a value"),
        ({"label": ["a"] * 5}, "'label' is not of numbers"),
        ({"label": [1.0, np.inf, 1, 0, 1]}, "'y': row 1 is not finite"),
        ({"pixels": [[1, 2]] * 5}, "'pixels' has rows that are not of shape"),
        ({"pixels": [[1] * 6] * 4 + [[1] * 5]}, "'pixels' has rows that are not of shape"),
        ({"pixels": [1] * 5}, "'pixels' has rows that are not of shape"),
        ({"pixels": [[300] * 6] * 5}, "'pixels' has numbers that uint8 cannot hold"),
        ({"pixels": [b"123"] * 5}, "'pixels', row 0 is not uint8"),
        ({"user": ["a", None, "b", "c", "d"]}, "'user' has rows without a value"),
        ({"user": [1.5] * 5}, "keys must be"),
    ],
)
def test_a_parquet_table_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(InvalidInput, match=message):
        from_parquet(parquet(tmp_path, **changes), columns=COLUMNS)


def test_a_parquet_file_must_be_one_and_have_the_columns(tmp_path):
    with pytest.raises(InvalidInput, match="no column 'class'"):
        from_parquet(parquet(tmp_path), columns={"y": "class"})
    with pytest.raises(InvalidInput, match="no columns"):
        from_parquet(parquet(tmp_path))
    with pytest.raises(NotFound, match="no file"):
        from_parquet(tmp_path / "absent.parquet", columns=COLUMNS)
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InvalidInput, match=r"text\.parquet cannot be read"):
        from_parquet(tmp_path / "text.parquet", columns=COLUMNS)


@pytest.mark.parametrize("dtype", ["pixel", "U3"])
def test_a_column_is_of_numbers(dtype):
    with pytest.raises(InvalidInput, match="no dtype"):
        Column("pixels", dtype=dtype)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInput, match=r'pip install "homespun\[parquet\]"'):
        from_parquet(tmp_path / "rows.parquet", columns=COLUMNS)


def test_whole_numbers_and_fractions_of_a_column_take_one_type(tmp_path):
    rows = [{"user": 7, "v": 1}, {"user": 7, "v": 0.5}]
    arena = from_jsonl(jsonl(tmp_path, rows), columns={"v": "v"})
    assert arena.inputs["v"].dtype == np.float64
    assert arena.rows(0)["v"].tolist() == [1, 0.5]


def jsonl(path, records):
    (path / "rows.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return path / "rows.jsonl"


def records():
    rows = zip(USERS, X.tolist(), Y.tolist(), strict=True)
    return [{"user": user, "pixels": pixels, "label": label} for user, pixels, label in rows]


class Table:
    """As much of a Hugging Face data set as is used."""

    def __init__(self, records):
        self.records = records
        self.column_names = list(records[0])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, part):
        return {name: [r[name] for r in self.records[part]] for name in self.column_names}


def test_json_lines_and_data_sets_give_the_same_arena(tmp_path):
    same(from_jsonl(jsonl(tmp_path, records()), columns=COLUMNS), ARENA)
    same(from_huggingface(Table(records()), columns=COLUMNS), ARENA)


def test_leaf_files_give_the_same_arena(tmp_path):
    columns = {"x": Column("x", (2, 3), "uint8"), "y": Column("y")}
    for file, users in (("1.json", ["cy", "ben"]), ("2.json", ["ann"])):
        owned = {user: [i for i, owner in enumerate(USERS) if owner == user] for user in users}
        data = {
            user: {"x": X.reshape(5, 6)[rows].tolist(), "y": Y[rows].tolist()}
            for user, rows in owned.items()
        }
        content = {
            "users": users,
            "num_samples": [len(r) for r in owned.values()],
            "user_data": data,
        }
        (tmp_path / file).write_text(json.dumps(content))
    same(from_leaf(tmp_path, columns), ARENA)
    flat = from_leaf(tmp_path)
    assert flat.inputs["x"].tolist() == ARENA.inputs["x"].reshape(5, 6).tolist()


def test_leaf_files_must_be_as_leaf_writes_them(tmp_path):
    with pytest.raises(NotFound, match=r"no \.json files"):
        from_leaf(tmp_path)
    for content, message in (
        ({"users": ["a"]}, "not as LEAF writes it"),
        ({"users": ["a"], "user_data": {"a": {"x": [[1]], "y": [1, 2]}}}, "different lengths"),
        ({"users": ["a"], "user_data": {"a": {"x": [["b"]], "y": [1]}}}, "user 'a': column 'x'"),
    ):
        (tmp_path / "1.json").write_text(json.dumps(content))
        with pytest.raises(InvalidInput, match=message):
            from_leaf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "'label', row 0 is not numbers"),
        ({"label": "1"}, "'label', row 0 is not numbers"),
        ({"pixels": [[1, 2], [3]]}, "'pixels', row 0 is not numbers of shape"),
        ({"label": float("nan")}, "'y': row 1 is not finite"),
        ({"user": None}, "neither text nor an integer"),
        ({"user": 3}, "some users are text"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message, tmp_path):
    rows = records()
    rows[1] |= change
    with pytest.raises(InvalidInput, match=message):
        from_jsonl(jsonl(tmp_path, rows), columns=COLUMNS)
    with pytest.raises(InvalidInput, match=message.replace("row 0", "row 1")):
        from_huggingface(Table(rows), columns=COLUMNS)


def test_json_lines_name_the_line(tmp_path):
    rows = records()
    del rows[2]["label"]
    with pytest.raises(InvalidInput, match="line 3 has no column 'label'"):
        from_jsonl(jsonl(tmp_path, rows), columns=COLUMNS)
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(InvalidInput, match="line 1 is not JSON"):
        from_jsonl(tmp_path / "rows.jsonl", columns=COLUMNS)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InvalidInput, match="no rows"):
        from_jsonl(tmp_path / "rows.jsonl", columns=COLUMNS)
    with pytest.raises(NotFound, match="no file"):
        from_jsonl(tmp_path / "absent.jsonl", columns=COLUMNS)


WORDS = Vocabulary.build(["the cat sat on the mat"], 32)
TEXTS = {"b": ["the cat sat", "on the mat"], "a": ["the mat"], "silent": []}


def test_text_becomes_the_windows_of_each_user():
    arena = from_text(TEXTS.items(), WORDS, 4)
    same(arena, from_text([UserText(u, tuple(t)) for u, t in TEXTS.items()], WORDS, 4))
    assert tuple(arena.clients or ()) == ("a", "b")
    assert arena.inputs["x"].dtype == np.uint16
    x, y = windows(WORDS, TEXTS["b"], TextFeature(field="", length=4, vocabulary_size=32))
    assert arena.rows(1)["x"].tolist() == x.tolist()
    assert arena.rows(1)["y"].tolist() == y.tolist()
    with pytest.raises(InvalidInput, match="no rows"):
        from_text([("silent", [])], WORDS, 4)
    with pytest.raises(InvalidInput, match="one text"):
        from_text([("a", "the mat")], WORDS, 4)


def test_examples_are_encoded_as_on_a_device():
    plan = zoo.load("keyboard").manifest
    assets = {"vocabulary": WORDS.to_bytes()}
    stored = {user: [{"text": text} for text in texts] for user, texts in TEXTS.items()}
    arena = from_examples(plan, assets, stored)
    assert tuple(arena.clients or ()) == ("a", "b")
    assert arena.rows(1)["x"].tolist() == encode(plan, assets, stored["b"])["x"].tolist()
    with pytest.raises(InvalidExample, match="user 'a': an example has no field 'text'"):
        from_examples(plan, assets, {"a": [{"words": ""}]})
