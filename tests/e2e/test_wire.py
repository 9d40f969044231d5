"""What goes over the wire is what docs/protocol.md lists, and nothing of a device's examples is in it in clear.

Real device processes train, test and fetch a release from a real server process; every byte passes a wiretap.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import msgspec
import pytest

from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.device.conditions import Span
from homespun.learning.contribution import Aggregate
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import Manifest
from homespun.protocol import messages
from homespun.protocol.frame import MAGIC, decode_contribution, frame_size
from homespun.protocol.messages import (
    Assigned,
    CheckIn,
    Claim,
    Criteria,
    Enroll,
    RetryWindow,
    TaskKind,
)
from homespun.protocol.signing import device_id
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import TaskView
from homespun.server.aggregation import contribution_codec
from homespun.tensors.codec import encode_tree
from tests.e2e.processes import POLL_S, POPULATION, Device, Server, eventually
from tests.e2e.wiretap import Said, Wiretap, exchanges

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
PUBLIC = "the quick brown fox jumps over the lazy dog while a small cat sleeps under the old tree"
CANARIES = ("zanzibarquokka", "marmaladetelescope", "xylophonewombat")
NUM_EXAMPLES = (173, 211, 239)
"""Of the devices that take part: numbers that nothing else here has a reason to send."""
RETRY = RetryWindow(earliest_s=0.1, latest_s=0.2)
SIGNED = {"homespun-device", "homespun-time", "homespun-signature"}
PLAIN = {"host", "accept", "accept-encoding", "connection", "user-agent"}


# --- what the documentation says ----------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """One row of the table of requests: bodies and answers are names of messages."""

    method: str
    path: re.Pattern[str]
    bodies: tuple[str, ...]
    answers: tuple[str, ...]
    row: str


def documented_routes() -> list[Route]:
    found = []
    for row in re.findall(r"^\| `[A-Z]+ /.*$", PROTOCOL, re.MULTILINE):
        _, request, body, answer, *_ = (cell.strip() for cell in row.split("|"))
        method, template = request.strip("`").split()
        path = re.sub(r"\{\w+\}", "[^/?]+", template.replace("{sha256}", "[0-9a-f]{64}"))
        bodies, answers = (tuple(re.findall(r"\[(\w+)\]\(#", cell)) for cell in (body, answer))
        found.append(Route(method, re.compile(path), bodies, answers, request))
    return found


def documented_fields() -> dict[str, set[str]]:
    """Of every message: the first column of its table."""
    sections = (part.partition("\n") for part in re.split(r"^### ", PROTOCOL, flags=re.MULTILINE))
    return {
        name: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) for name, _, text in sections
    }


ROUTES, FIELDS = documented_routes(), documented_fields()


# --- a whole round, overheard -------------------------------------------------------------------------


@dataclass(frozen=True)
class Overheard:
    """All requests with their answers, all bytes, and what a listener must not learn from them."""

    exchanges: list[tuple[Said, Said | None]]
    up: bytes
    down: bytes
    devices: list[Device]
    few: Device
    away: Device
    tasks: dict[str, TaskView]
    manifest: Manifest
    token: str
    operator_token: str
    log: str

    def requests(self, pattern: str) -> list[tuple[Said, Said]]:
        return [
            (request, answer)
            for request, answer in self.exchanges
            if answer is not None and re.fullmatch(pattern, f"{request.line[0]} {request.line[1]}")
        ]

    def reports(self) -> list[tuple[TaskView, bytes]]:
        """Every report with its task."""
        assigned = {}
        for _, answer in self.requests("POST /v1/claim"):
            reply: Any = messages.decode(answer.body, messages.ClaimReply)
            if isinstance(reply, Assigned):
                assigned[reply.assignment_id] = self.tasks[str(reply.kind)]
        return [
            (assigned[request.line[1].split("/")[3]], request.body)
            for request, _ in self.requests("PUT .*")
        ]

    def decoded(self, task: TaskView, body: bytes) -> Aggregate:
        """What a report says to who can read it."""
        codec = contribution_codec(task.spec, self.manifest)
        contribution = decode_contribution(body)
        codec.check(contribution)
        return codec.decode(contribution)


def texts(canary: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"the fox {canary} {number}"} for number in range(count)]


@pytest.fixture(scope="module")
def overheard(tmp_path_factory: pytest.TempPathFactory) -> Overheard:
    root = tmp_path_factory.mktemp("wire")
    with ExitStack() as stack:
        server = Server(root / "server")
        stack.callback(server.kill)
        tap = Wiretap(server.port)
        stack.callback(tap.close)
        token = server.token()
        devices = [
            Device.enrolled(
                root / f"device-{index}", tap.url, token, texts(canary, count), seed=index
            )
            for index, (canary, count) in enumerate(zip(CANARIES, NUM_EXAMPLES, strict=True))
        ]
        few = Device.enrolled(root / "few", tap.url, token, texts("pangolinorchestra", 3), seed=10)
        script = (Span(charging=False),)
        away = Device.enrolled(
            root / "away", tap.url, token, texts("x", 60), seed=11, conditions=script
        )
        for device in (*devices, few, away):
            device.start()
            stack.callback(device.process.kill)
        tasks, manifest = play(server, devices, few, away)
        for device in (*devices, few, away):
            device.stop()
        server.stop()
    pairs = [pair for conversation in tap.conversations for pair in exchanges(conversation)]
    return Overheard(
        exchanges=pairs,
        up=b"".join(conversation.up for conversation in tap.conversations),
        down=b"".join(conversation.down for conversation in tap.conversations),
        devices=devices,
        few=few,
        away=away,
        tasks=tasks,
        manifest=manifest,
        token=token,
        operator_token=(server.data / "operator.token").read_text().strip(),
        log=server.log.read_text(),
    )


def play(
    server: Server, devices: list[Device], few: Device, away: Device
) -> tuple[dict[str, TaskView], Manifest]:
    """One round of training, one of evaluation, one release; until every device knows how its reports ended."""
    client = server.client
    vocabulary = Vocabulary.build([PUBLIC], 4000)
    plan = zoo.load("keyboard").with_assets({"vocabulary": vocabulary.to_bytes()})
    plan_hash = client.push_plan(plan.to_bytes()).hash
    initial = encode_tree(initial_checkpoint(plan.manifest, 0))
    incumbent = client.push_checkpoint(initial, plan_hash).hash

    def run(kind: TaskKind, checkpoints: tuple[str, ...]) -> TaskView:
        spec = TaskSpec(
            name=str(kind),
            population=POPULATION,
            kind=kind,
            plan_hash=plan_hash,
            checkpoints=checkpoints,
            goal=3,
            minimum=3,
            over_selection=1.0,
            pool_target=3,
            selection_s=60.0,
            deadline_s=60.0,
            retry=RETRY,
            criteria=Criteria(min_examples=10),
        )
        task_id = client.create_task(spec).task_id
        eventually(lambda: client.task(task_id).state != "active", f"{kind} ends")
        view = client.task(task_id)
        assert view.state == "finished"
        return view

    trained = run(TaskKind.TRAIN, (incumbent,))
    tested = run(TaskKind.EVALUATE, (trained.head, incumbent))
    client.create_release(
        population=POPULATION,
        slot="default",
        plan_hash=plan_hash,
        checkpoint=trained.head,
        version="v1",
    )
    ended = [("evaluate", 1, "included"), ("train", 1, "included")]
    eventually(lambda: all(d.outcomes() == ended for d in devices), "every receipt is final")
    eventually(lambda: all(d.status().served for d in devices), "the release is served")
    eventually(lambda: "too_few_examples" in few.status().refusal_counts, "one has too little")
    eventually(lambda: "not_charging" in away.status().refusal_counts, "one does not charge")
    return {"train": trained, "evaluate": tested}, plan.manifest


# --- the proofs ---------------------------------------------------------------------------------------


def test_every_request_is_a_documented_one(overheard: Overheard):
    seen = set()
    for request, _ in overheard.exchanges:
        method, path, _ = request.line
        (route,) = (r for r in ROUTES if r.method == method and r.path.fullmatch(path))
        seen.add(route.row)
    assert len(ROUTES) == 8
    assert {route.row for route in ROUTES} - seen == {
        "`POST /v1/assignments/{assignment_id}/abort`"  # nobody gave up
    }


def test_every_json_body_is_exactly_its_documented_message(overheard: Overheard):
    for request, answer in overheard.exchanges:
        method, path, _ = request.line
        (route,) = (r for r in ROUTES if r.method == method and r.path.fullmatch(path))
        if method == "POST":
            assert_is(request.body, route.bodies)
        elif method == "GET":
            assert request.body == b""
        if answer is not None:
            assert answer.line[1] in ("200", "206"), answer
            if route.answers:
                assert_is(answer.body, route.answers)


def assert_is(body: bytes, names: tuple[str, ...]) -> None:
    """`body` is strict JSON of one of these messages, with its documented fields and no others."""
    kinds = tuple(getattr(messages, name) for name in names)
    message: Any = messages.decode(body, Union[kinds])  # noqa: UP007
    assert messages.encode(message) == body
    assert set(msgspec.json.decode(body)) == FIELDS[type(message).__name__]


def test_what_a_device_says_is_known_beforehand(overheard: Overheard):
    """Beside its key and its reports, a device sends nothing but what the server told it: there is no room for more."""
    claims = {
        messages.encode(Claim(task_id=task.task_id, round_number=1, attempt=1, wait_s=POLL_S))
        for task in overheard.tasks.values()
    }
    check_in = messages.encode(CheckIn(population=POPULATION, wait_s=POLL_S))
    for request, _ in overheard.exchanges:
        match request.line[:2]:
            case ("POST", "/v1/check-in"):
                assert request.body == check_in
            case ("POST", "/v1/claim"):
                assert request.body in claims
            case ("POST", "/v1/enroll"):
                message: Enroll = messages.decode(request.body, Enroll)
                assert (message.population, message.token) == (POPULATION, overheard.token)
                key = base64.b64decode(message.public_key)
                assert device_id(key) == request.headers["homespun-device"]
            case ("PUT", _):
                pass
            case _:
                assert request.body == b""


def test_headers_say_the_same_for_every_device(overheard: Overheard):
    values = set()
    for request, _ in overheard.exchanges:
        names = request.headers.keys()
        assert names > SIGNED
        assert names <= SIGNED | PLAIN | {"content-length", "range"}
        values.add(tuple(request.headers.get(name) for name in sorted(PLAIN)))
    ((*_, user_agent),) = values  # the last in order
    assert user_agent == f"homespun/{messages.PROTOCOL_VERSION}"


def test_no_text_of_an_example_is_in_it(overheard: Overheard):
    assert hidden("brown", overheard.down)  # the search finds what is there
    for word in (*CANARIES, "pangolinorchestra"):
        assert not hidden(word, overheard.up)
        assert not hidden(word, overheard.down)


def hidden(text: str, data: bytes) -> bool:
    """Whether `text` is in `data`, plain, hexadecimal or in base64 at any offset."""
    plain = text.encode()
    forms = [plain, plain.hex().encode(), plain.decode().encode("utf-16-le")]
    for offset in range(3):
        coded = base64.b64encode(b"\0" * offset + plain)
        forms.append(coded[4 if offset else 0 : -4])
    return any(form in data for form in forms)


def test_reports_are_the_one_exception_and_are_encoded(overheard: Overheard):
    reports = overheard.reports()
    assert sorted(str(task.spec.kind) for task, _ in reports) == ["evaluate"] * 3 + ["train"] * 3
    for task, body in reports:
        codec = contribution_codec(task.spec, overheard.manifest)
        train = task.spec.kind is TaskKind.TRAIN
        num_aux, dimension = len(codec.aux_names), overheard.manifest.num_parameters if train else 0
        assert body[:4] == MAGIC
        assert (body[4], body[5]) == (32, 0)
        assert int.from_bytes(body[6:8], "little") == num_aux == (9 if train else 21)
        assert int.from_bytes(body[8:12], "little") == dimension
        assert len(body) == frame_size(32, num_aux, dimension)


def test_no_count_or_metric_of_a_device_is_in_it_in_clear(overheard: Overheard):
    private: set[float] = set(NUM_EXAMPLES)
    for device in overheard.devices:
        status = device.status()
        private |= {status.num_examples - status.num_held_out, status.num_held_out}
    for task, body in overheard.reports():
        report = overheard.decoded(task, body)
        if task.spec.kind is TaskKind.TRAIN:
            private.add(round(report.weight * overheard.manifest.max_weight))
        for value in report.metrics.values():
            private |= {value.sum, value.count, value.mean}
    for public in (*overheard.tasks.values(), overheard.manifest):  # known before any device spoke
        private -= set(numbers(msgspec.to_builtins(public)))
    assert len(private) > 20
    for request, answer in overheard.exchanges:
        for said in (request, answer):
            if said is None or request.line[1].startswith("/v1/blobs/"):
                continue  # what was published for all
            if not said.body.startswith(MAGIC) and said.body:
                assert not private & set(numbers(msgspec.json.decode(said.body)))


def numbers(value: Any) -> Iterator[float]:
    """Every number in plain data, in text as well."""
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", value))
    elif isinstance(value, int | float):
        yield float(value)


def test_who_does_not_take_part_says_nothing_about_why(overheard: Overheard):
    def asked(device: Device) -> set[str]:
        return {
            request.line[1]
            for request, _ in overheard.exchanges
            if request.headers["homespun-device"] == device.device_id
        }

    assert asked(overheard.away) == {"/v1/enroll"}
    assert "/v1/check-in" in asked(overheard.few)
    assert "/v1/claim" not in asked(overheard.few)
    for word in ("idle", "charging", "unmetered", "too_few", "refus"):
        assert word.encode() not in overheard.up


def test_the_servers_log_has_no_body_token_or_signature(overheard: Overheard):
    log = overheard.log
    assert "ready at" in log
    assert log.count("step='commit'") == 2
    secrets = {overheard.token, overheard.operator_token}
    for request, answer in overheard.exchanges:
        secrets |= {request.headers[name] for name in ("homespun-device", "homespun-signature")}
        if request.line[1].startswith("/v1/assignments/"):
            secrets.add(request.line[1].split("/")[3])
        for said in (request, answer):
            if said is not None and said.body.startswith(b"{"):
                secrets.add(said.body.decode())
    assert len(secrets) > 30
    for secret in secrets:
        assert secret not in log
