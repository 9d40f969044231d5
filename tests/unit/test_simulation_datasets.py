"""The same rows give the same arena, whatever they are stored in; what does not fit is named."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import InvalidInput, NotFound
from homespun.simulation.datasets import Column, from_arrays, from_parquet

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
