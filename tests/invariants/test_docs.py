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
from homespun.protocol.group import GROUP
from homespun.protocol.messages import Message, ReportState
from homespun.protocol.problem import Problem
from homespun.protocol.release import RELEASE
from homespun.protocol.round import ROUND
from homespun.protocol.session import SESSION
from homespun.protocol.tasks import GroupSpec, TaskSpec
from homespun.secagg import device as secagg_device
from homespun.secagg import graph
from homespun.secagg import messages as secagg
from homespun.secagg.device import Demands
from homespun.secagg.messages import Terms
from homespun.server.api.device import DeviceApi

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
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
    for module in (messages, secagg)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, module.Message)
    and kind is not module.Message
    and kind.__module__ == module.__name__
]


def section(page: str, heading: str) -> str:
    """The text under `heading` up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#+ |\Z)", page, re.M | re.S)
    assert found is not None, f"there is no heading {heading!r}"
    return found[1]


def chapter(page: str, heading: str) -> str:
    """The text under the second-level `heading`, with the headings below it."""
    found = re.search(rf"^## {re.escape(heading)}$\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found is not None, f"there is no chapter {heading!r}"
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
    listed = [*generate.WIRE, *generate.PARTS, *generate.STEPS, *generate.STEP_PARTS]
    assert set(MESSAGES) == set(listed)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_of_every_message_is_documented(kind: type[Message]):
    info: Any = msgspec.inspect.type_info(kind)
    expected = [info.tag_field] if info.tag else []
    expected += [field.encode_name for field in info.fields]
    table = section(PROTOCOL, kind.__name__)
    assert first_column(table) == expected
    assert re.findall(r"\|\s*\|$", table, re.M) == []  # no empty cell


def test_every_message_says_what_it_tells():
    told = first_column(section(PROTOCOL, "8. What each message tells"))
    messages_of_ours = (*generate.WIRE, *generate.STEPS)
    assert sorted(told) == sorted([*(kind.__name__ for kind in messages_of_ours), "Report"])


def test_every_error_is_documented():
    codes = {
        kind.code: kind.http_status
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.HomespunError) and kind is not errors.HomespunError
    }
    table = section(PROTOCOL, "6. Failures")
    listed = {
        code: int(status) for code, status in re.findall(r"^\| `(\w+)` \| (\d+)", table, re.M)
    }
    assert listed == codes
    assert [name for name in Problem.__struct_fields__ if f"`{name}`" not in table] == []


@pytest.mark.parametrize(
    "machine", [SESSION, ROUND, GROUP, RELEASE], ids=lambda machine: machine.name
)
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


def test_the_steps_are_those_of_the_server_and_the_messages():
    table = section(PROTOCOL, "Steps over HTTP")
    asked = [kind for kind in generate.STEPS if kind.__struct_config__.tag]
    steps = [kind for kind in asked if kind is not messages.Carried]  # answered like Terms
    tags = [kind.__struct_config__.tag for kind in asked]
    assert first_column(table) == [*tags, "waiting", "settled"]
    assert re.findall(r"`PUT \.\.\./group/([a-z-]+)`", table) == [
        kind.__struct_config__.tag.replace("_", "-") for kind in steps
    ]
    answers = [kind.__name__ for kind in generate.STEPS if kind not in asked]
    answers.remove("MaskedInput")  # a frame, not JSON
    assert re.findall(r"\[([A-Z]\w+)\]\(#", table) == answers


def test_every_label_of_secure_aggregation_is_specified():
    """Whoever writes a device has nothing but the page: no hash may have a label that is not in it."""
    sources = (ROOT / "src" / "homespun" / "secagg").glob("*.py")
    labels = {
        label
        for file in sources
        for label in re.findall(r"homespun-secagg-[a-z0-9-]+", file.read_text(encoding="utf-8"))
    }
    assert len(labels) == 11
    text = chapter(PROTOCOL, "5. Secure aggregation")
    assert {label for label in labels if f"`{label}`" not in text} == set()


def test_every_refusal_of_a_device_is_specified():
    table = section(PROTOCOL, "What a device checks")
    codes = {
        kind.code
        for _, kind in inspect.getmembers(secagg_device, inspect.isclass)
        if issubclass(kind, errors.SecureAggregationError)
    }
    assert len(codes) == 10
    assert {code for code in codes if f"`{code}`" not in table} == set()


def test_the_frame_of_a_masked_input_is_the_one_of_the_code():
    assert f"`{frame.MASKED_MAGIC.decode()}`" in section(PROTOCOL, "The masked input")
    assert frame.masked_frame_size(8, 0, 0) == 76
    assert "| 76 + 8 a | d b / 8, rounded up |" in section(PROTOCOL, "The masked input")


def test_the_shapes_in_the_text_are_those_of_the_code():
    text = section(PROTOCOL, "The graph")
    names = ("corrupt_fraction", "drop_out_fraction", "adversary")
    default = [default_of(Terms, name) for name in names]
    (listed,) = re.findall(r"With the default terms: n = (.+)\.$", text, re.M)
    shapes = re.findall(r"(\d+): (\d+), (\d+)", listed)
    assert len(shapes) == 4
    for num_devices, degree, threshold in shapes:
        shape = graph.choose_shape(int(num_devices), *default)
        assert (shape.degree, shape.threshold) == (int(degree), int(threshold))


def test_the_ring_in_the_text_is_the_one_of_the_code():
    example = graph.Graph(graph.Shape(8, 4, 3, 1), bytes(range(32)))
    text = section(PROTOCOL, "The graph")
    (ring,) = re.findall(r"the ring of 8 indices is ([\d, ]+);", text)
    (near,) = re.findall(r"the neighbours of 0 are ([\d, ]+)\.$", text, re.M)
    order = [int(index) for index in ring.split(", ")]
    assert sorted(order) == list(range(8))
    assert example.neighbours(0) == tuple(int(index) for index in near.split(", "))
    assert all(
        set(example.neighbours(index)) == {order[(place + step) % 8] for step in (-2, -1, 1, 2)}
        for place, index in enumerate(order)
    )


def default_of(kind: type[msgspec.Struct], name: str) -> Any:
    info: Any = msgspec.inspect.type_info(kind)
    (field,) = [field for field in info.fields if field.name == name]
    return field.default


CONSTANTS = {
    "smallest masked sum": secagg_device.SMALLEST_GROUP,
    "`min_group` of the policy": Policy().min_group,
    "`min_group` of the task": default_of(TaskSpec, "min_group"),
    "`groups.size` of the task": GroupSpec().size,
    "`corrupt_fraction` that a device asks for": Demands().corrupt_fraction,
    "`corrupt_fraction` of the task": GroupSpec().corrupt_fraction,
    "`drop_out_fraction` of the task": GroupSpec().drop_out_fraction,
    "`adversary`": Demands().adversary,
    "`max_staleness` of the task": default_of(TaskSpec, "max_staleness"),
    "complete graph up to": graph.COMPLETE_UP_TO,
    "bits of security of a ring": graph.SECURITY_BITS,
    "bits of correctness of a ring": graph.CORRECTNESS_BITS,
    "`aggregation` of a task": default_of(TaskSpec, "aggregation"),
    "`clip_norm`, `max_weight` of the plan": "no default",
}


def test_every_constant_of_the_privacy_page_is_the_one_of_the_code():
    table = section(PRIVACY, "Where each constant is enforced")
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", table, re.M)][1:]
    assert {row[0]: row[1] for row in rows} == {name: str(v) for name, v in CONSTANTS.items()}
    files = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[-1])]
    assert len(files) >= len(rows)
    assert [name for name in files if not (ROOT / "src" / "homespun" / name).is_file()] == []


def test_the_losses_of_the_sharp_edges_are_those_of_the_code():
    page = (DOCS / "sharp-edges.md").read_text(encoding="utf-8")
    (sizes,) = re.findall(r"^\| devices of a group, `min_group` 10 \| (.+) \|$", page, re.M)
    (losses,) = re.findall(r"^\| losses it survives \| (.+) \|$", page, re.M)
    spec = GroupSpec()
    shapes = [
        graph.choose_shape(
            int(size), spec.corrupt_fraction, spec.drop_out_fraction, graph.Adversary.SEMI_MALICIOUS
        )
        for size in sizes.split(" | ")
    ]
    least = default_of(TaskSpec, "min_group")
    survived = [min(shape.max_drop_outs, shape.num_devices - least) for shape in shapes]
    assert losses.split(" | ") == [str(number) for number in survived]


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
