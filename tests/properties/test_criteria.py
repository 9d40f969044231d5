"""What the store says of a query is what one loop over all examples says, whatever happened to the store in between."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from homespun.device.examples import ExampleStore
from homespun.protocol.criteria import undecided
from homespun.protocol.messages import Comparison, ExampleQuery

NOW = 1_700_000_000.0
FIELDS = {"i": "integer", "n": "number", "t": "text", "b": "boolean"}

integers = st.integers(-3, 3)
numbers = st.one_of(integers, st.floats(-3, 3, allow_nan=False))
texts = st.sampled_from(["", "a", "ab", "b", "é", "😀"])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "i": integers,
    "n": numbers,
    "t": texts,
    "b": st.booleans(),
}
examples = st.fixed_dictionaries({"k": st.integers(0, 1000)}, optional=VALUES)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    field = draw(st.sampled_from("intb"))
    orders = [] if field == "b" else ["<", "<=", ">", ">="]
    op: Any = draw(st.sampled_from(["==", "!=", "in", *orders]))
    value = VALUES[field]
    many = st.lists(value, min_size=1, max_size=3).map(tuple)
    return Comparison(field=field, op=op, value=draw(many if op == "in" else value))


queries = st.builds(
    ExampleQuery,
    collection=st.sampled_from(["default", "other"]),
    where=st.lists(comparisons(), max_size=2).map(tuple),
    max_age_s=st.one_of(st.none(), st.integers(0, 30).map(float)),
)
operations = st.one_of(
    st.tuples(
        st.just("add"), st.sampled_from(["default", "other"]), st.lists(examples, max_size=5)
    ),
    st.tuples(st.just("delete"), st.integers(0, 30), st.none()),
    st.tuples(st.just("ask"), st.integers(0, 2), st.just(False)),
    st.tuples(st.just("ask"), st.integers(0, 2), st.booleans()),
)


def naive(query: ExampleQuery, example: dict[str, Any]) -> bool:
    """As a person would write it, for values that are of the declared types."""
    for test in query.where:
        if test.field not in example:
            return False
        here, there = example[test.field], test.value
        held = {
            "==": lambda a, b: a == b,
            "!=": lambda a, b: a != b,
            "<": lambda a, b: a < b,
            "<=": lambda a, b: a <= b,
            ">": lambda a, b: a > b,
            ">=": lambda a, b: a >= b,
            "in": lambda a, b: a in b,
        }[test.op](here, there)
        if not held:
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.lists(queries, min_size=3, max_size=3), st.lists(operations, min_size=10, max_size=30))
def test_the_store_agrees_with_a_loop(asked: list[ExampleQuery], steps: list[tuple[Any, Any, Any]]):
    """Three queries are asked again and again, so that what is remembered of them is put to use."""
    with tempfile.TemporaryDirectory() as root:
        store = ExampleStore(Path(root) / "examples.db", Path(root) / "store.key", "salt")
        for collection in ("default", "other"):
            store.declare(FIELDS, collection)
        now = NOW
        for what, first, second in steps:
            now += 1.0
            if what == "add":
                store.add_many(second, now, first)
            elif what == "delete":
                store.delete(before=now - first)
            else:
                query, side = asked[first], second
                assert undecided(query, store._fields(query.collection)) == ""
                oldest = now - query.max_age_s if query.max_age_s is not None else 0.0
                expected = [
                    each.example
                    for each in reversed(list(store.stored(query.collection)))
                    if each.held_out == side
                    and each.added_at >= oldest
                    and naive(query, each.example)
                ]
                read = store.held_out if side else store.training
                assert store.count(now, side, query) == len(expected)
                assert read(now, query) == expected
        store.close()
