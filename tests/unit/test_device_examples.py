"""The example store: sealed, capped, expiring, and with two sides that never mix."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from homespun.device.examples import ExampleStore, Limits
from homespun.device.matching import REMEMBERED
from homespun.device.sealing import Seal
from homespun.errors import InvalidConfig, InvalidExample, StorageFailure
from homespun.protocol.messages import Comparison, ExampleQuery

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
    assert (store.count(NOW), store.count(NOW, query=ExampleQuery(collection="other"))) == (10, 1)
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
    assert store.training(NOW + 90, ExampleQuery(max_age_s=50.0)) == [{"text": "new"}]
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


# --- declared fields ------------------------------------------------------------------------------------


FOUR_STARS = ExampleQuery(where=(Comparison(field="stars", op=">=", value=4),))


def test_what_is_declared_can_be_asked_for(store: ExampleStore):
    store.declare({"stars": "integer", "text": "text"})
    store.add_many(({"text": f"n{n}", "stars": n % 6} for n in range(60)), NOW)
    assert store.undecided(FOUR_STARS) == ""
    training, held_out = store.training(NOW, FOUR_STARS), store.held_out(NOW, FOUR_STARS)
    assert {example["stars"] for example in training} == {4, 5}
    assert len(training) + len(held_out) == store.count(NOW, query=FOUR_STARS) == 20
    assert store.count(NOW, False, FOUR_STARS) == len(training)


def test_what_is_not_declared_is_unknown(store: ExampleStore):
    store.add({"text": "x", "stars": 5}, NOW)
    assert "not declared" in store.undecided(FOUR_STARS)
    assert "no collection" in store.undecided(ExampleQuery(collection="reviews"))
    store.add({"text": "x"}, NOW, "reviews")
    assert store.undecided(ExampleQuery(collection="reviews")) == ""
    with pytest.raises(InvalidExample, match="'stars' of an example is int"):
        store.declare({"stars": "text"})
    assert "not declared" in store.undecided(FOUR_STARS)


def test_what_is_added_must_be_as_declared(store: ExampleStore):
    store.declare({"stars": "integer", "score": "number", "seen": "boolean"})
    store.add({"stars": 4, "score": 1, "seen": True, "other": "anything"}, NOW)
    store.add({"score": 0.5}, NOW)
    for wrong in ({"stars": 4.0}, {"stars": True}, {"score": "1"}, {"seen": 1}, {"stars": "4"}):
        with pytest.raises(InvalidExample, match="of an example is") as caught:
            store.add(wrong, NOW)
        assert "declared" in caught.value.hint
    assert store.count(NOW) == 2


def test_declaring_again_replaces_and_is_kept(tmp_path: Path):
    store = make(tmp_path)
    store.declare({"a": "text", "b": "number"}, "reviews")
    store.declare({"a": "text"}, "reviews")
    store.close()
    again = make(tmp_path)
    (_, reviews) = again.collections()
    assert (reviews.name, reviews.fields) == ("reviews", {"a": "text"})
    again.close()


@pytest.mark.parametrize(
    ("fields", "collection"),
    [({"a": "float"}, "default"), ({"a b": "text"}, "default"), ({"a": "text"}, "Not A Name")],
)
def test_what_cannot_be_declared(fields: dict[str, str], collection: str, store: ExampleStore):
    with pytest.raises(InvalidConfig, match="cannot be declared"):
        store.declare(fields, collection)


def test_asking_again_opens_only_what_is_new(store: ExampleStore, monkeypatch: pytest.MonkeyPatch):
    opened = []
    unseal = Seal.unseal

    def counted(seal: Seal, sealed: bytes, bound: bytes, where: Path) -> bytes:
        opened.append(1)
        return unseal(seal, sealed, bound, where)

    store.declare({"stars": "integer"})
    store.add_many(({"stars": n} for n in range(2_500)), NOW)
    monkeypatch.setattr(Seal, "unseal", counted)
    for expected in (2_500, 0):
        opened.clear()
        assert store.count(NOW, query=FOUR_STARS) == 2_496
        assert len(opened) == expected
    opened.clear()
    store.add({"stars": 7}, NOW)
    assert store.count(NOW, query=FOUR_STARS) == 2_497
    assert len(opened) == 1
    opened.clear()
    assert store.count(NOW) == 2_501
    assert opened == []


def test_so_many_questions_are_remembered_and_no_more(store: ExampleStore):
    store.declare({"stars": "integer"})
    store.add_many(({"stars": n} for n in range(50)), NOW)
    queries = [ExampleQuery(where=(Comparison(field="stars", op="<", value=n),)) for n in range(40)]
    for _ in range(2):
        assert [store.count(NOW, query=query) for query in queries] == list(range(40))
    remembered = store._db.execute("SELECT count(DISTINCT query) FROM matched").fetchone()
    assert remembered[0] <= REMEMBERED


# --- looking and deleting -------------------------------------------------------------------------------


def test_everything_can_be_looked_at(store: ExampleStore):
    store.add_many(texts(3), NOW)
    store.add({"text": "elsewhere"}, NOW + 5, "other")
    newest, *rest = store.stored()
    assert (newest.collection, newest.added_at, newest.example) == (
        "other",
        NOW + 5,
        {"text": "elsewhere"},
    )
    assert [each.example for each in rest] == texts(3)[::-1]
    assert [each.id for each in store.stored("other")] == [newest.id]
    default, other = store.collections()
    assert (default.name, default.num_examples, default.oldest_at) == ("default", 3, NOW)
    assert (other.num_examples, other.newest_at) == (1, NOW + 5)


def test_deleting(store: ExampleStore):
    store.add_many(texts(5), NOW)
    store.add_many(texts(5), NOW + 10, "other")
    first = next(iter(store.stored("default"))).id
    assert store.delete(ids=[first, 999]) == 1
    assert store.delete(ids=[]) == 0
    assert store.delete(before=NOW + 5, collection="other") == 0
    assert store.delete(before=NOW + 5) == 4
    assert store.delete(collection="other") == 5
    store.add_many(texts(5), NOW)
    assert store.delete() == 5
    assert [each.num_examples for each in store.collections()] == [0, 0]
