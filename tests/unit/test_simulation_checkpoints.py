"""Checkpoints: whole or not there, the newest and the best are kept, and another run's are refused."""

from __future__ import annotations

import numpy as np
import pytest

from homespun.errors import Conflict, InvalidInput
from homespun.simulation.checkpoints import Checkpoints, Snapshot
from homespun.simulation.clients import ClientStore
from homespun.tensors.codec import decode_tree


def snapshot(number, **identity):
    model = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3).T + number,
        "b": np.ones(1, np.float32),
    }
    server = {"m/model": np.full(3, number / 7)}
    clients = {"clients": np.array([4, 2]), "rows.c": np.ones((2, 3), np.float32)}
    return Snapshot(number, model, server, clients, identity)


def test_what_is_saved_is_loaded_and_the_model_is_a_checkpoint_as_any(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(snapshot(3, seed="1"))
    loaded = checkpoints.newest({"seed": "1"})
    assert loaded is not None
    assert loaded.round == 3
    for kind in ("model", "server", "clients"):
        saved, found = getattr(snapshot(3), kind), getattr(loaded, kind)
        assert {n: a.tobytes() for n, a in found.items()} == {
            n: a.tobytes() for n, a in saved.items()
        }
        assert {n: a.dtype for n, a in found.items()} == {n: a.dtype for n, a in saved.items()}
    tree = decode_tree((path / "model.safetensors").read_bytes())
    np.testing.assert_array_equal(tree["w"], snapshot(3).model["w"])


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for number in range(1, 7):
        checkpoints.save(snapshot(number), best_round=min(number, 2))
    assert checkpoints.rounds() == [2, 5, 6]


def test_what_was_cut_off_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(1))
    (tmp_path / "round-000002.tmp").mkdir()
    assert checkpoints.rounds() == [1]
    checkpoints.save(snapshot(2))
    assert checkpoints.rounds() == [1, 2]
    (tmp_path / "round-000002" / "server.safetensors").write_bytes(b"\0")
    with pytest.raises(InvalidInput, match="round-000002"):
        checkpoints.newest()


def test_another_runs_checkpoint_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(1, seed="1"))
    with pytest.raises(Conflict, match="another seed"):
        checkpoints.newest({"seed": "2"})


def test_a_client_has_what_it_kept_and_at_first_what_all_begin_with():
    store = ClientStore({"c": np.array([1.0, 2.0], np.float32)})
    assert store.take(np.array([7, 3]))["c"].tolist() == [[1, 2], [1, 2]]
    store.keep(np.array([7, 1_000_000]), {"c": np.array([[7, 7], [8, 8]], np.float32)})
    before = store.copy()
    store.keep(np.array([3, 7]), {"c": np.array([[3, 3], [9, 9]], np.float32)})
    taken = store.take(np.array([1_000_000, 3, 5, 7]))["c"]
    assert taken.tolist() == [[8, 8], [3, 3], [1, 2], [9, 9]]
    assert before.take(np.array([7, 3]))["c"].tolist() == [[7, 7], [1, 2]]
    again = ClientStore.of(store.arrays())
    assert len(again) == 3
    assert again.take(np.array([1_000_000, 3, 5, 7]))["c"].tolist() == taken.tolist()
