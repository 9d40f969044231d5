"""The documents say what the code does: generated parts are current, and nothing of the protocol is left out."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec
import pytest

from homespun import errors
from homespun.learning.contribution import ContributionCodec
from homespun.learning.optimizers import names
from homespun.protocol import frame, messages, signing
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import Message, ReportState
from homespun.protocol.problem import Problem
from homespun.protocol.release import RELEASE
from homespun.protocol.round import ROUND
from homespun.protocol.session import SESSION
from homespun.server.api.device import DeviceApi

DOCS = Path(__file__).parents[2] / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")
PRIVACY = (DOCS / "privacy.md").read_text(encoding="utf-8")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()
MESSAGES = [
    kind
    for _, kind in inspect.getmembers(messages, inspect.isclass)
    if issubclass(kind, Message) and kind is not Message
]


def section(page: str, heading: str) -> str:
    """The text under `heading` up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#+ |\Z)", page, re.M | re.S)
    assert found is not None, f"there is no heading {heading!r}"
    return found[1]


def first_column(table: str) -> list[str]:
    rows = re.findall(r"^\| ([^|]+) \|", table, re.M)
    return [row.strip("`* ") for row in rows[1:] if not row.startswith("---")]


@pytest.mark.parametrize("name", generate.PAGES)
def test_what_is_generated_is_current(name: str):
    assert (DOCS / name).read_text(encoding="utf-8") == generate.PAGES[name](), "run ./dev docs"


def test_a_changed_region_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changed = PROTOCOL.replace("| `not_found` | 404 |", "| `not_found` | 405 |")
    assert changed != PROTOCOL
    (tmp_path / "protocol.md").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.protocol_page() == PROTOCOL


def test_a_missing_region_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "protocol.md").write_text(
        PROTOCOL.replace("<!-- generated: errors -->", ""), encoding="utf-8"
    )
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    with pytest.raises(SystemExit, match="errors"):
        generate.protocol_page()


def test_a_field_without_meaning_stops_the_generator():
    class Undocumented(msgspec.Struct):
        """`known`: something."""

        known: int
        unknown: int

    with pytest.raises(SystemExit, match=r"Undocumented\.unknown has no meaning"):
        generate.meanings(Undocumented)


def test_a_docstring_is_read_field_by_field():
    class Documented(msgspec.Struct):
        """What it is for. It mentions `second` once.

        `first`: see `protocol.frame`; with a
        second half; `second`: the other. `wait_s`: its own meaning.
        """

        first: int
        second: int
        wait_s: float
        attempt: int

    assert generate.meanings(Documented) == {
        "first": "see `protocol.frame`; with a second half",
        "second": "the other",
        "wait_s": "its own meaning",
        "attempt": "of the round, from 1",
    }
    assert generate.purpose(Documented) == "What it is for. It mentions `second` once."


def test_the_routes_are_those_of_the_server():
    routes = {
        (method, re.sub(r"{\w+}", "{}", route.path))
        for route in DeviceApi(cast(Any, None)).routes()
        for method in (route.methods or set()) - {"HEAD"}
    }
    listed = re.findall(r"^\| `([A-Z]+) (/v1/\S+)` \|", section(PROTOCOL, "1. Transport"), re.M)
    assert {(method, re.sub(r"{\w+}", "{}", path)) for method, path in listed} == routes


def test_every_record_of_the_messages_is_listed():
    assert set(MESSAGES) == {*generate.WIRE, *generate.PARTS}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_of_every_message_is_documented(kind: type[Message]):
    info: Any = msgspec.inspect.type_info(kind)
    expected = [info.tag_field] if info.tag else []
    expected += [field.encode_name for field in info.fields]
    table = section(PROTOCOL, kind.__name__)
    assert first_column(table) == expected
    assert re.findall(r"\|\s*\|$", table, re.M) == []  # no empty cell


def test_every_message_says_what_it_tells():
    told = first_column(section(PROTOCOL, "7. What each message tells"))
    assert sorted(told) == sorted([*(kind.__name__ for kind in generate.WIRE), "Report"])


def test_every_error_is_documented():
    codes = {
        kind.code: kind.http_status
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.HomespunError) and kind is not errors.HomespunError
    }
    table = section(PROTOCOL, "5. Failures")
    listed = {
        code: int(status) for code, status in re.findall(r"^\| `(\w+)` \| (\d+)", table, re.M)
    }
    assert listed == codes
    assert [name for name in Problem.__struct_fields__ if f"`{name}`" not in table] == []


@pytest.mark.parametrize("machine", [SESSION, ROUND, RELEASE], ids=lambda machine: machine.name)
def test_every_state_is_in_its_picture(machine: Any):
    pictures = re.findall(r"```mermaid\n(.*?)```", PROTOCOL, re.S)
    (picture,) = [text for text in pictures if text.strip() == machine.diagram()]
    assert all(row.source.name in picture and row.target.name in picture for row in machine.rows)


def test_every_state_of_a_report_is_explained():
    assert first_column(section(PROTOCOL, "What becomes of a report")) == list(ReportState)


def test_the_signing_text_is_the_one_of_the_code():
    first, *_ = signing.request_text("GET", "/", "0", "").decode().splitlines()
    part = section(PROTOCOL, "2. Signed requests")
    for piece in (first, signing.DEVICE_HEADER, signing.TIME_HEADER, signing.SIGNATURE_HEADER):
        assert piece in part
    assert signing.RELEASE_CONTEXT.decode().strip() in section(PROTOCOL, "SignedRelease")


def test_the_report_is_the_one_of_the_code():
    assert frame.MAGIC.decode() in section(PROTOCOL, "4. The report")
    codec = ContributionCodec(
        dimension=0, clip_norm=1, max_weight=0, metrics=("<metric>",), max_group=3
    )
    part = section(PROTOCOL, "The auxiliary vector")
    positions = [part.index(f"`{name}`") for name in codec.aux_names]
    assert positions == sorted(positions)


def test_every_rule_of_the_policy_is_in_the_privacy_page():
    listed = [
        name.split("`")[0] for name in first_column(section(PRIVACY, "What the device insists on"))
    ]
    assert listed == list(Policy.__struct_fields__)


def test_every_optimizer_is_in_the_task_page():
    page = (DOCS / "reference" / "task.md").read_text(encoding="utf-8")
    assert sorted(
        name.lower() for name in first_column(section(page, "Server optimizers"))
    ) == list(names())
