"""Which examples are relevant: comparisons on fields that the device's app has declared.

An app declares a collection's fields with their types. A query that names a collection the device does not have, a
field that is not declared, or a value of another type than declared cannot be decided, and what is unknown is never
eligible: a task for newer versions of an app passes older ones by. Everything here is a function of the query and one
example; only a device has examples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

from homespun.errors import InvalidConfig
from homespun.protocol.messages import Comparison, Criteria, ExampleQuery, Value


class FieldType(StrEnum):
    """What an app declares a field to be. A `number` may be whole, an `integer` must be."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"


Fields = Mapping[str, FieldType]
"""The declared fields of one collection."""

_TYPES: Mapping[FieldType, tuple[type, ...]] = {
    FieldType.TEXT: (str,),
    FieldType.INTEGER: (int,),
    FieldType.NUMBER: (int, float),
    FieldType.BOOLEAN: (bool,),
}
_TESTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ORDERED = ("<", "<=", ">", ">=")


def is_of(value: object, kind: FieldType) -> bool:
    """Whether `value` is of the declared type. Booleans are not numbers."""
    return type(value) in _TYPES[kind]


def parse_value(text: str, kind: FieldType) -> Value:
    """A value of this type from what a person wrote. Raises `ValueError`."""
    match kind:
        case FieldType.TEXT:
            return text
        case FieldType.INTEGER:
            return int(text)
        case FieldType.NUMBER:
            return float(text)
        case FieldType.BOOLEAN:
            if text.lower() not in ("yes", "true", "no", "false"):
                raise ValueError(text)
            return text.lower() in ("yes", "true")


def undecided(query: ExampleQuery, fields: Fields | None) -> str:
    """Why a device with these fields in the query's collection (None: it has no such collection) cannot decide it.

    Empty if it can.
    """
    if fields is None:
        return f"there is no collection {query.collection!r}"
    for test in query.where:
        kind = fields.get(test.field)
        if kind is None:
            return f"the field {test.field!r} of {query.collection!r} is not declared"
        if problem := _problem(test):
            return problem
        if any(not is_of(value, kind) for value in _values(test)):
            return f"the field {test.field!r} is {kind}, and is compared with something else"
    return ""


def matches(where: Iterable[Comparison], example: Mapping[str, Any]) -> bool:
    """Whether an example passes every comparison, for a query that is decided."""
    return all(_passes(test, example.get(test.field)) for test in where)


def validate(criteria: Criteria) -> None:
    """Raise `InvalidConfig` for comparisons that no device could decide, and demands that demand nothing."""
    for query in (criteria.relevant, *criteria.also):
        for test in query.where:
            if problem := _problem(test):
                raise InvalidConfig(problem, hint="see docs/criteria.md")
    for query in criteria.also:
        if query.min_examples == 0:
            raise InvalidConfig(
                f"criteria.also asks for no examples of {query.collection!r}",
                hint="give min_examples, or leave it out",
            )


def _passes(test: Comparison, value: Any) -> bool:
    if test.op == "in":
        return any(_same_kind(value, each) and value == each for each in _values(test))
    return _same_kind(value, test.value) and _TESTS[test.op](value, test.value)


def _values(test: Comparison) -> tuple[Value, ...]:
    return test.value if isinstance(test.value, tuple) else (test.value,)


def _kind(value: object) -> FieldType | None:
    """The widest type that `value` is of."""
    wide = (FieldType.TEXT, FieldType.NUMBER, FieldType.BOOLEAN)
    return next((kind for kind in wide if is_of(value, kind)), None)


def _same_kind(first: object, second: object) -> bool:
    return _kind(first) is not None and _kind(first) is _kind(second)


def _problem(test: Comparison) -> str:
    """What makes a comparison undecidable for any type of its field."""
    values = _values(test)
    if isinstance(test.value, tuple) != (test.op == "in"):
        return f"{test.field!r} {test.op} takes " + ("a list" if test.op == "in" else "one value")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        return f"{test.field!r} is compared with a number that is not finite"
    if len({_kind(value) for value in values}) > 1:
        return f"{test.field!r} is compared with values of different types"
    if test.op in _ORDERED and isinstance(test.value, bool):
        return f"{test.field!r} is compared with a boolean, which has no order"
    return ""
