"""Every error has a stable code of its own, and the tree at the top of errors.py tells the truth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from homespun import errors
from homespun.errors import HomespunError

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"


def below(error: type[HomespunError]) -> Iterator[type[HomespunError]]:
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from below(child)


ALL = list(below(HomespunError))


def drawn(docstring: str) -> dict[str, tuple[str, str, int]]:
    """Read the picture: class name -> (parent's name, code, HTTP status)."""
    tree: dict[str, tuple[str, str, int]] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+) +(\w+) +(\d+|HTTP)\b", line):
            indent, name, code, status = match.groups()
            path[len(indent) // 4 :] = [name]
            if status != "HTTP":  # the root's line is the heading
                tree[name] = (path[-2], code, int(status))
    return tree


def test_codes_are_unique():
    codes = [error.code for error in ALL]
    assert len(set(codes)) == len(codes)
    assert HomespunError.code not in codes


def test_every_class_names_its_code():
    assert [error.__name__ for error in ALL if "code" not in vars(error)] == []


def test_the_picture_is_the_tree():
    assert drawn(errors.__doc__ or "") == {
        error.__name__: (error.__mro__[1].__name__, error.code, error.http_status) for error in ALL
    }


def test_the_picture_is_really_read():
    picture = """
    HomespunError      code        HTTP
    ├── Outer          outer       400   something
    │   └── Inner      inner       409   something else
    """
    assert drawn(picture) == {
        "Outer": ("HomespunError", "outer", 400),
        "Inner": ("Outer", "inner", 409),
    }


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.code)
def test_the_hint_and_the_values_are_kept(error: type[HomespunError]):
    failure = error("round 3 is closed", hint="wait for the next one", round=3)
    assert str(failure) == "round 3 is closed (wait for the next one)"
    assert failure.details == {"round": 3}


def test_the_reference_page_lists_every_code():
    page = REFERENCE.read_text()
    assert [error.code for error in ALL if f"`{error.code}`" not in page] == []
