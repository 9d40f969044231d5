"""What docs/protocol.md says that requests and messages are: its tables, read by a program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import msgspec

from homespun.protocol import messages
from homespun.secagg import messages as secagg
from tests.e2e.wiretap import Said

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Route:
    """One row of the table of requests: bodies and answers are names of messages."""

    method: str
    path: re.Pattern[str]
    bodies: tuple[str, ...]
    answers: tuple[str, ...]
    row: str


def documented_steps() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Of secure aggregation: type of a request -> name of the step in paths, and the message of its answer, if JSON."""
    rows = r"^\| `(\w+)` \| [\d.]+ \| `PUT \.\.\./group/([a-z-]+)` \| \[([\w ]+)\]"
    found = re.findall(rows, PROTOCOL, re.MULTILINE)
    return {kind: (step, (name,) if name[0].isupper() else ()) for kind, step, name in found}


def documented_fields() -> dict[str, set[str]]:
    """Of every message: the first column of its table."""
    return {
        name: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) for name, text in sections()
    }


def documented_types() -> dict[str, str]:
    """What the field `type` of a message says -> the message."""
    return {
        kind: name
        for name, text in sections()
        for kind in re.findall(r'^\| `type` \| `"(\w+)"` \|', text, re.MULTILINE)
    }


def sections() -> list[tuple[str, str]]:
    """(title, text) of every part."""
    parts = re.split(r"^#{1,4} ", PROTOCOL, flags=re.MULTILINE)
    return [(title, text) for title, _, text in (part.partition("\n") for part in parts)]


def documented_routes() -> list[Route]:
    """All rows, in order; the one of secure aggregation's steps stands for one row per step with a JSON answer."""
    found: list[Route] = []
    for row in re.findall(r"^\| `[A-Z]+ /.*$", PROTOCOL, re.MULTILINE):
        _, request, body, answer, *_ = (cell.strip() for cell in row.split("|"))
        method, template = request.strip("`").split()
        bodies, answers = named(body), found[-1].answers if answer == "as above" else named(answer)
        steps = STEPS.values() if "{step}" in template else [("", bodies)]
        for step, said in steps:
            if step and not said:
                continue  # it has a row of its own
            filled = template.replace("{step}", step)
            path = re.sub(r"\{\w+\}", "[^/?]+", filled.replace("{sha256}", "[0-9a-f]{64}"))
            found.append(Route(method, re.compile(path), said, answers, f"{method} {filled}"))
    return found


def named(cell: str) -> tuple[str, ...]:
    """Names of the messages in a cell of the table of requests."""
    names = tuple(re.findall(r"\[(\w+)\]\(#", cell))
    return (*names, *(TYPES[kind] for kind in STEPS)) if "[a step]" in cell else names


STEPS, FIELDS, TYPES = documented_steps(), documented_fields(), documented_types()
ROUTES = documented_routes()


def route(request: Said) -> Route:
    """The one row of a request."""
    method, path, _ = request.line
    (found,) = (r for r in ROUTES if r.method == method and r.path.fullmatch(path))
    return found


def message_in(body: bytes, names: tuple[str, ...]) -> Any:
    """`body` is strict JSON of one of these messages, with its documented fields and no others."""
    kinds = tuple(getattr(messages, name, None) or getattr(secagg, name) for name in names)
    message: Any = messages.decode(body, Union[kinds])  # noqa: UP007
    assert messages.encode(message) == body
    assert_documented(message, msgspec.json.decode(body))
    return message


def assert_documented(message: Any, data: Any) -> None:
    """So are the records inside."""
    if isinstance(message, tuple):
        for each, part in zip(message, data, strict=True):
            assert_documented(each, part)
    elif isinstance(message, msgspec.Struct):
        assert set(data) == FIELDS[type(message).__name__]
        for name in message.__struct_fields__:
            assert_documented(getattr(message, name), data[name])
