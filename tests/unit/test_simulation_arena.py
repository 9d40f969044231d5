"""Rows in any order become clients' rows; an arena saved is the arena opened; a client keeps its side."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from homespun.errors import Conflict, InvalidConfig, InvalidInput, NotFound, ShapeMismatch
from homespun.simulation.arena import Arena, assemble
from homespun.simulation.datasets import from_arrays

CODES = np.array([2, 0, 2, 1, 0, 2])
X = np.arange(12, dtype=np.uint8).reshape(6, 2)
Y = np.arange(6, dtype=np.float32)


def blocks(*cuts):
    edges = [0, *cuts, 6]
    return ({"x": X[a:b], "y": Y[a:b]} for a, b in pairwise(edges))


def arena(directory=None, *cuts):
    return assemble(CODES, ["a", "b", "c"], blocks(*cuts), directory)


def same(one, other):
    assert one.offsets.tolist() == other.offsets.tolist()
    assert one.clients == other.clients
    assert set(one.inputs) == set(other.inputs)
    for name, array in one.inputs.items():
        assert array.dtype == other.inputs[name].dtype
        assert array.tolist() == other.inputs[name].tolist()


def held(arena, seed):
    return set(arena.subset(arena.held_out(0.2, seed)[1]).clients)


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3), (0, 5)])
def test_rows_go_to_their_owners_in_their_order_however_they_are_cut(cuts, tmp_path):
    whole = arena(None, *cuts)
    assert whole.rows(0)["y"].tolist() == [1, 4]
    assert whole.rows(1)["y"].tolist() == [3]
    assert whole.rows(2)["y"].tolist() == [0, 2, 5]
    assert whole.inputs["x"].dtype == np.uint8
    mapped = arena(tmp_path / "new", *cuts)
    assert isinstance(mapped.inputs["x"], np.memmap)
    same(whole, mapped)


def test_arrays_and_owners_give_the_same_arena():
    same(arena(), from_arrays({"x": X, "y": Y}, [*"cacbac"]))
    numbered = from_arrays({"x": X, "y": Y}, CODES + 9)
    assert numbered.clients == ("9", "10", "11")
    assert numbered.inputs["x"].tolist() == arena().inputs["x"].tolist()


def test_a_saved_arena_is_the_arena_that_opens(tmp_path):
    arena().save(tmp_path)
    same(arena(), Arena.open(tmp_path))
    with pytest.raises(Conflict, match="has an arena"):
        arena().save(tmp_path)
    with pytest.raises(Conflict, match="has an arena"):
        arena(tmp_path)
    nameless = Arena({"x": X}, np.array([0, 6]))
    nameless.save(tmp_path / "nameless")
    assert Arena.open(tmp_path / "nameless").clients is None


@pytest.mark.parametrize("file", ["arena.json", "input.x.npy", "offsets.npy", "clients.npy"])
def test_a_damaged_file_is_named(file, tmp_path):
    arena().save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    with pytest.raises(InvalidInput, match=file):
        Arena.open(tmp_path)


def test_what_is_absent_or_of_another_format_does_not_open(tmp_path):
    with pytest.raises(NotFound, match="no arena"):
        Arena.open(tmp_path)
    arena().save(tmp_path)
    header = json.loads((tmp_path / "arena.json").read_text())
    (tmp_path / "arena.json").write_text(json.dumps(header | {"format": 2}))
    with pytest.raises(InvalidInput, match="another format"):
        Arena.open(tmp_path)
    (tmp_path / "arena.json").write_text(json.dumps(header))
    np.save(tmp_path / "input.x.npy", X[:5])
    with pytest.raises(InvalidInput, match="another number of rows"):
        Arena.open(tmp_path)
    (tmp_path / "input.x.npy").unlink()
    with pytest.raises(InvalidInput, match=r"input\.x\.npy is missing"):
        Arena.open(tmp_path)


def test_subsets_copy_the_rows_of_their_clients():
    part = arena().subset([2, 0])
    assert part.clients == ("c", "a")
    assert part.inputs["y"].tolist() == [0, 2, 5, 1, 4]
    assert part.offsets.tolist() == [0, 3, 5]
    assert arena().subset([]).num_clients == 0
    with pytest.raises(InvalidInput, match="not in the arena"):
        arena().subset([3])


def test_a_client_keeps_its_side_when_others_join():
    names = [f"user {i}" for i in range(400)]
    rows = {"x": np.zeros(400, np.uint8)}
    few = from_arrays({"x": rows["x"][:200]}, names[:200])
    many = from_arrays(rows, names)
    training, out = many.held_out(0.2, 7)
    assert sorted([*training, *out]) == list(range(400))
    assert 50 < len(out) < 110
    few_out = few.held_out(0.2, 7)[1]
    assert few_out.tolist() == [
        c for c, name in enumerate(few.clients or ()) if name in held(many, 7)
    ]
    assert held(many, 7) != held(many, 8)
    assert [len(side) for side in many.held_out(0, 7)] == [400, 0]
    with pytest.raises(InvalidConfig, match="share"):
        many.held_out(1.5, 7)


@pytest.mark.parametrize(
    ("codes", "given", "message"),
    [
        ([], [], "no rows"),
        ([0, 3], [{"x": X[:2]}], "no name"),
        ([0, 1], [{"x": X[:3]}], "more rows"),
        ([0, 1], [{"x": X[:1]}], "fewer rows"),
        ([0, 1], [], "fewer rows"),
        ([0, 1], [{"x": X[:1]}, {"y": Y[:1]}], "other inputs"),
        ([0, 1], [{"x": X[:2], "y": Y[:1]}], "different numbers of rows"),
        ([0, 1], [{"x": X[:1]}, {"x": X[:1, :1]}], "rows from 1 on are of another type or shape"),
        ([0, 1], [{"y": Y[:1]}, {"y": Y[:1] + np.inf}], "row 1 is not finite"),
        ([0, 1], [{"x": np.array(["a", "b"])}], "not of numbers"),
    ],
)
def test_rows_that_do_not_fit_are_refused(codes, given, message):
    with pytest.raises(InvalidInput, match=message):
        assemble(codes, ["a", "b"], given)


def test_names_of_inputs_are_names_of_files(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be the name"):
        Arena({"../x": X}, np.array([0, 6])).save(tmp_path)


def test_offsets_and_inputs_must_belong_together():
    for offsets in ([0, 5], [1, 6], [0, 4, 3, 6], []):
        with pytest.raises(ShapeMismatch):
            Arena({"x": X}, np.array(offsets, np.int64))
