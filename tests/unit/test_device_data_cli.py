"""`homespun device add` and `data`: declared fields, looking, exporting, deleting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from homespun.errors import InvalidConfig, InvalidExample, NotFound
from tests.unit.test_device_cli import enrolled, invoke

REVIEWS = ("--collection", "reviews")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = enrolled(tmp_path / "device").root
    invoke("add", "one", "two", "--dir", root)
    invoke(
        *("add", "the soup", "--dir", root, *REVIEWS),
        *("--declare", "stars=integer", "--declare", "seen=boolean", "--declare", "score=number"),
        *("--field", "stars=5", "--field", "seen=yes", "--field", "score=0.5"),
    )
    return root


def stored(root: Path, *options: str) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for line in invoke("data", "export", "-", "--dir", root, *options).splitlines()
    ]


def test_fields_are_read_as_they_were_declared(root: Path):
    (review,) = stored(root, *REVIEWS)
    assert review["example"] == {"text": "the soup", "stars": 5, "seen": True, "score": 0.5}
    assert "1 added; reviews holds 2" in invoke("add", "x", "--dir", root, *REVIEWS)
    invoke("add", "--dir", root, *REVIEWS, "--declare", "language=text")
    invoke("add", "y", "--dir", root, *REVIEWS, "--field", "language=en=x", "--field", "seen=No")
    assert stored(root, *REVIEWS)[0]["example"] == {"text": "y", "language": "en=x", "seen": False}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (["--field", "stars=5"], InvalidConfig, "'stars' of 'default' is not declared"),
        ([*REVIEWS, "--field", "stars=5.5"], InvalidConfig, "stars is integer, not '5.5'"),
        ([*REVIEWS, "--field", "seen=maybe"], InvalidConfig, "seen is boolean"),
        ([*REVIEWS, "--field", "stars"], InvalidConfig, "not NAME=VALUE"),
        ([*REVIEWS, "--declare", "stars=float"], InvalidConfig, "cannot be declared"),
        ([*REVIEWS, "--declare", "stars=text"], InvalidExample, "'stars' of an example is int"),
    ],
)
def test_what_does_not_fit_is_said(
    options: list[str], error: type[Exception], says: str, root: Path
):
    with pytest.raises(error, match=says):
        invoke("add", "x", "--dir", root, *options)
    assert len(stored(root)) == 3


def test_showing(root: Path):
    shown = json.loads(invoke("data", "--dir", root, "--json", "--examples", "1"))
    default, reviews = shown["collections"]
    assert (default["name"], default["num_examples"]) == ("default", 2)
    assert reviews["fields"] == {"stars": "integer", "seen": "boolean", "score": "number"}
    assert [each["example"]["text"] for each in shown["examples"]] == ["the soup"]
    printed = invoke("data", "--dir", root)
    assert "stars: integer" in printed
    assert "soup" not in printed
    assert "the soup" in invoke("data", "--dir", root, "--examples", "5")
    with pytest.raises(InvalidConfig, match="which device"):
        invoke("data")


def test_exporting_never_overwrites_and_is_private(root: Path, tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    assert "not encrypted" in invoke("data", "export", file, "--dir", root)
    lines = file.read_text().splitlines()
    assert [json.loads(line)["example"]["text"] for line in lines] == ["the soup", "two", "one"]
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(InvalidConfig, match="cannot be written"):
        invoke("data", "export", file, "--dir", root)
    with pytest.raises(NotFound, match=r"no collection 'nothing'.*default, reviews"):
        invoke("data", "export", "-", "--dir", root, "--collection", "nothing")


def test_deleting(root: Path):
    newest = str(stored(root)[0]["id"])
    assert "0 deleted" in invoke("data", "delete", "--older-than-s", "3600", "--yes", "--dir", root)
    assert "1 deleted" in invoke(
        "data", "delete", "--id", newest, "--id", "99", "--yes", "--dir", root
    )
    assert "2 deleted" in invoke(
        "data", "delete", "--collection", "default", "--yes", "--dir", root
    )
    invoke("add", "again", "--dir", root)
    assert "1 deleted" in invoke("data", "delete", "--all", "--yes", "--dir", root)
    assert stored(root) == []


@pytest.mark.parametrize("options", [[], ["--all", "--id", "1"]])
def test_deleting_wants_to_know_what(options: list[str], root: Path):
    with pytest.raises(InvalidConfig, match="which examples"):
        invoke("data", "delete", "--yes", "--dir", root, *options)


def test_deleting_asks_first(root: Path):
    with pytest.raises(InvalidConfig, match="cannot be undone"):
        invoke("data", "delete", "--all", "--dir", root)
    assert len(stored(root)) == 3
