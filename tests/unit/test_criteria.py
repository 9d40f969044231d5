"""Comparisons on declared fields: what matches, what cannot be known, and what no task may ask."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from homespun.errors import InvalidConfig
from homespun.protocol.criteria import FieldType, matches, undecided, validate
from homespun.protocol.messages import Comparison, Criteria, ExampleQuery
from homespun.protocol.tasks import TaskSpec, parse

FIELDS = {
    "stars": FieldType.INTEGER,
    "score": FieldType.NUMBER,
    "language": FieldType.TEXT,
    "seen": FieldType.BOOLEAN,
}
PAGE = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")
TASK = {
    "name": "t",
    "population": "p",
    "kind": "train",
    "plan_hash": "a" * 64,
    "checkpoints": ["b" * 64],
    "goal": 20,
    "minimum": 15,
}


def test(field: str, op: str, value: object) -> Comparison:
    return Comparison(field=field, op=op, value=value)  # type: ignore[arg-type]


test.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("field", "op", "value", "passes"),
    [
        ("stars", "==", 4, True),
        ("stars", "!=", 4, False),
        ("stars", ">", 3, True),
        ("stars", ">", 4, False),
        ("stars", ">=", 4, True),
        ("stars", "<", 4, False),
        ("stars", "<=", 4, True),
        ("stars", "in", (3, 4), True),
        ("stars", "in", (5,), False),
        ("score", ">", 0.4, True),
        ("score", "<", 1, True),
        ("language", "==", "en", True),
        ("language", "<", "es", True),
        ("language", "in", ("de", "fr"), False),
        ("seen", "==", True, True),
        ("seen", "!=", False, True),
        ("seen", "in", (False,), False),
        ("stars", "==", True, False),  # a boolean is no number, nor the other way round
        ("seen", "==", 1, False),
        ("language", ">", 3, False),
        ("absent", "!=", 3, False),
        ("absent", "in", (3,), False),
    ],
)
def test_each_comparison(field: str, op: str, value: object, passes: bool):
    example = {"stars": 4, "score": 0.5, "language": "en", "seen": True, "blob": b"x"}
    assert matches([test(field, op, value)], example) is passes
    assert matches([test("stars", ">", 0), test(field, op, value)], example) is passes


def test_without_comparisons_everything_matches():
    assert matches((), {"anything": 1})


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ([test("stars", ">=", 4)], ""),
        ([test("score", ">=", 4)], ""),
        ([test("language", "in", ("en", "de"))], ""),
        ([test("seen", "==", True)], ""),
        ([test("stars", ">=", 4), test("length", ">", 3)], "'length' of 'default' is not declared"),
        ([test("stars", ">=", 4.0)], "'stars' is integer, and is compared with something else"),
        ([test("stars", "==", True)], "'stars' is integer"),
        ([test("score", "==", "0.5")], "'score' is number"),
        ([test("language", "in", ("en", 4))], "values of different types"),
        ([test("language", "==", ("en",))], "takes one value"),
        ([test("language", "in", "en")], "takes a list"),
        ([test("seen", "<", True)], "has no order"),
    ],
)
def test_what_cannot_be_known(where: list[Comparison], says: str):
    found = undecided(ExampleQuery(where=tuple(where)), FIELDS)
    assert says in found
    assert bool(found) is bool(says)


def test_a_collection_that_is_not_there_is_unknown():
    assert undecided(ExampleQuery(collection="b"), None) == "there is no collection 'b'"
    assert undecided(ExampleQuery(collection="b"), {}) == ""


@pytest.mark.parametrize(
    ("criteria", "says"),
    [
        ({"where": [{"field": "a", "op": "==", "value": [1]}]}, "'a' == takes one value"),
        ({"where": [{"field": "a", "op": "in", "value": 1}]}, "'a' in takes a list"),
        ({"where": [{"field": "a", "op": "in", "value": []}]}, r"length >= 1.*where\[0\].value"),
        ({"where": [{"field": "a", "op": "in", "value": [1, "x"]}]}, "different types"),
        ({"where": [{"field": "a", "op": ">", "value": False}]}, "has no order"),
        ({"where": [{"field": "a", "op": ">", "value": float("nan")}]}, "not finite"),
        ({"where": [{"field": "a", "op": "=~", "value": "x"}]}, r"where\[0\].op"),
        ({"where": [{"field": "a b", "op": "==", "value": 1}]}, r"where\[0\].field"),
        ({"where": [{"field": "a", "op": "==", "value": 2**53}]}, r"where\[0\].value"),
        ({"where": [{"field": "a", "op": "=="}]}, "missing required field `value`"),
        ({"collection": "Not A Name"}, "criteria.collection"),
        ({"also": [{"collection": "b", "min_examples": 0}]}, "asks for no examples of 'b'"),
        ({"also": [{"where": [{"field": "a", "op": "in", "value": 1}]}]}, "takes a list"),
        ({"min_separation_s": -1}, "criteria.min_separation_s"),
    ],
)
def test_no_task_may_ask_nonsense(criteria: dict[str, object], says: str):
    with pytest.raises(InvalidConfig, match=says):
        parse({**TASK, "criteria": criteria})


def test_good_criteria_pass():
    validate(Criteria(where=(test("a", "in", (1, 2.5)),), also=(ExampleQuery(),)))


EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_of_the_page_is_a_task(text: str):
    spec = parse({**TASK, **tomllib.loads(text)})
    assert isinstance(spec, TaskSpec)
    assert spec.criteria != Criteria()


def test_the_page_has_its_examples():
    assert len(EXAMPLES) == 4
