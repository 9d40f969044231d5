"""The example store: sealed, capped, expiring, and with two sides that never mix."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from homespun.device.examples import ExampleStore, Limits
from homespun.errors import InvalidExample, StorageFailure

NOW = 1_700_000_000.0


def make(root: Path, salt: str = "salt", **settings: object) -> ExampleStore:
    return ExampleStore(root / "examples.db", root / "store.key", salt, **settings)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path):
    store = make(tmp_path)
    yield store
    store.close()


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"sentence number {n}"} for n in range(count)]


def test_examples_come_back_as_they_were_and_in_order(store: ExampleStore):
    examples: list[dict[str, Any]] = [
        {"text": "é", "n": 1, "x": 0.5, "b": b"\0\1", "l": [[1, 2], [3]]},
        *texts(50),
    ]
    assert store.add_many(examples, NOW) == 51
    training, held_out = store.training(NOW), store.held_out(NOW)
    assert training == [example for example in examples if example in training]
    assert held_out == [example for example in examples if example not in training]


def test_the_sides_never_mix_and_have_their_shares(store: ExampleStore):
    store.add_many(texts(1000), NOW)
    training = {example["text"] for example in store.training(NOW)}
    held_out = {example["text"] for example in store.held_out(NOW)}
    assert not training & held_out
    assert 150 < len(held_out) < 250
    assert (store.count(NOW, False), store.count(NOW, True)) == (len(training), len(held_out))
    assert store.count(NOW) == 1000


def test_equal_examples_are_on_one_side(store: ExampleStore):
    for _ in range(20):
        store.add({"text": "again and again"}, NOW)
    assert sorted((store.count(NOW, False), store.count(NOW, True))) == [0, 20]


def test_the_split_is_stable_and_depends_on_the_salt(tmp_path: Path):
    sides = []
    for number, salt in enumerate(["a", "a", "b"]):
        (tmp_path / str(number)).mkdir()
        store = make(tmp_path / str(number), salt)
        store.add_many(texts(100), NOW)
        sides.append([example["text"] for example in store.held_out(NOW)])
        store.close()
    assert sides[0] == sides[1] != sides[2]


def test_nothing_readable_is_on_disk(store: ExampleStore, tmp_path: Path):
    store.add({"text": "the secret is safe"}, NOW)
    store.close()
    assert b"secret" not in (tmp_path / "examples.db").read_bytes()
    for name in ("examples.db", "store.key"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_the_oldest_go_first(tmp_path: Path):
    store = make(tmp_path, limits=Limits(max_examples=10), held_out_share=0.0)
    store.add_many(texts(8), NOW)
    store.add_many(texts(15)[8:], NOW)
    assert [e["text"] for e in store.training(NOW)] == [e["text"] for e in texts(15)[5:]]
    store.add({"text": "elsewhere"}, NOW, collection="other")
    assert (store.count(NOW), store.count(NOW, collection="other")) == (10, 1)
    store.close()


def test_the_size_is_capped(tmp_path: Path):
    store = make(tmp_path, limits=Limits(max_bytes=1000), held_out_share=0.0)
    for n in range(20):
        store.add({"text": f"{n:0100}"}, NOW)
    assert store.training(NOW)[-1] == {"text": f"{19:0100}"}
    assert 8 <= store.count(NOW) <= 9
    store.close()


def test_examples_expire(tmp_path: Path):
    store = make(tmp_path, limits=Limits(max_age_s=100.0), held_out_share=0.0)
    store.add({"text": "old"}, NOW)
    store.add({"text": "new"}, NOW + 60)
    assert store.count(NOW + 90) == 2
    assert store.training(NOW + 90, max_age_s=50.0) == [{"text": "new"}]
    assert store.training(NOW + 120) == [{"text": "new"}]
    store.expire(NOW + 120)
    store.close()
    with sqlite3.connect(tmp_path / "examples.db") as database:
        assert database.execute("SELECT count(*) FROM example").fetchone() == (1,)
    database.close()


@pytest.mark.parametrize(
    "example",
    [
        {},
        "text",
        {"text": None},
        {"text": {"a": 1}},
        {1: "x"},
        {"n": 2**70},
        {"text": "x" * 300_000},
    ],
    ids=["empty", "string", "none", "nested", "key", "huge", "large"],
)
def test_what_is_no_example_is_refused(example: object, store: ExampleStore):
    with pytest.raises(InvalidExample) as caught:
        store.add(example, NOW)  # type: ignore[arg-type]
    assert caught.value.hint
    assert store.count(NOW) == 0


def test_all_or_none_are_added(store: ExampleStore):
    with pytest.raises(InvalidExample):
        store.add_many([*texts(3), {}], NOW)
    assert store.count(NOW) == 0


def test_deleting_the_key_forgets_everything(store: ExampleStore, tmp_path: Path):
    store.add_many(texts(10), NOW)
    store.close()
    (tmp_path / "store.key").unlink()
    again = make(tmp_path)
    assert again.count(NOW) == 0
    again.add({"text": "new life"}, NOW)
    assert again.count(NOW) == 1
    again.forget()
    assert list(tmp_path.iterdir()) == []


def test_another_key_is_noticed_at_once(store: ExampleStore, tmp_path: Path):
    store.add_many(texts(10), NOW)
    store.close()
    (tmp_path / "store.key").write_bytes(bytes(32))
    with pytest.raises(StorageFailure, match="not its key") as caught:
        make(tmp_path)
    assert "forgets" in caught.value.hint
    (tmp_path / "store.key").write_bytes(b"short")
    with pytest.raises(StorageFailure, match="not a store's key"):
        make(tmp_path)


def test_a_row_moved_to_the_other_side_does_not_open(tmp_path: Path):
    store = make(tmp_path, held_out_share=1.0)
    store.add({"text": "for evaluation only"}, NOW)
    store._db.execute("UPDATE example SET held_out = 0")
    with pytest.raises(StorageFailure, match="damaged"):
        store.training(NOW)
    store.close()


def test_a_damaged_database_is_a_clear_failure(store: ExampleStore, tmp_path: Path):
    store.add_many(texts(10), NOW)
    store.close()
    (tmp_path / "examples.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StorageFailure, match=r"examples\.db") as caught:
        make(tmp_path)
    assert caught.value.hint


def test_a_full_disk_adds_nothing(store: ExampleStore):
    store.add_many(texts(5), NOW)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFailure, match="full"):
        store.add_many(texts(5000), NOW)
    assert store.count(NOW) == 5
