"""What goes over the wire is what docs/protocol.md lists, and nothing of a device's examples is in it in clear.

Real device processes train, test and fetch a release from a real server process; every byte passes a wiretap.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.device.conditions import Span
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import AUX_SCALE, Contribution, ContributionCodec
from homespun.learning.optimizers import server_optimizer
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import Manifest
from homespun.protocol import messages
from homespun.protocol.frame import MASKED_MAGIC, decode_masked_input, encode_contribution
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
from homespun.protocol.views import RoundSummary, TaskView
from homespun.server.aggregation import contribution_codec
from homespun.tensors.codec import digest, encode_tree
from homespun.types import AnyArray
from tests.e2e.documented import ROUTES, message_in, route
from tests.e2e.processes import MIN_GROUP, POLL_S, POPULATION, Device, Server, eventually
from tests.e2e.recomputed import contribution, examples_for
from tests.e2e.wiretap import Said, Wiretap, exchanges

PUBLIC = "the quick brown fox jumps over the lazy dog while a small cat sleeps under the old tree"
CANARIES = ("zanzibarquokka", "marmaladetelescope", "xylophonewombat")
NUM_EXAMPLES = (173, 211, 239)
"""Of the devices that take part: numbers that nothing else here has a reason to send."""
RETRY = RetryWindow(earliest_s=0.1, latest_s=0.2)
SIGNED = {"homespun-device", "homespun-time", "homespun-signature"}
PLAIN = {"host", "accept", "accept-encoding", "connection", "user-agent"}


# --- a whole round, overheard -------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """One masked input as it went over the wire, and what the device has masked there."""

    task: TaskView
    assigned: Assigned
    body: bytes
    contribution: Contribution

    @property
    def masked(self) -> Contribution:
        """Its words, which say nothing."""
        mine = self.contribution
        frame = decode_masked_input(self.body, mine.bits, mine.aux.size, mine.main.size)
        main = np.frombuffer(frame.main, mine.main.dtype)
        return Contribution(main, np.frombuffer(frame.aux, np.uint64), mine.bits)

    @property
    def mask(self) -> Contribution:
        """What was added to hide it."""
        masked, mine = self.masked, self.contribution
        return Contribution(masked.main - mine.main, masked.aux - mine.aux, mine.bits)


@dataclass(frozen=True)
class Overheard:
    """All requests with their answers, all bytes, and what a listener must not learn from them."""

    exchanges: list[tuple[Said, Said | None]]
    up: bytes
    down: bytes
    uploads: list[Upload]
    devices: list[Device]
    few: Device
    away: Device
    tasks: dict[str, TaskView]
    rounds: dict[str, RoundSummary]
    manifest: Manifest
    token: str
    operator_token: str
    log: str

    def of(self, kind: TaskKind) -> list[Upload]:
        return [upload for upload in self.uploads if upload.task.spec.kind is kind]

    def codec(self, kind: TaskKind) -> ContributionCodec:
        """How the reports of a task were encoded."""
        spec = self.tasks[kind].spec
        return contribution_codec(spec, self.manifest, 1, 1)

    def steps(self, *names: str) -> Iterator[tuple[Said, Said | None]]:
        """Answers to these steps of secure aggregation."""
        for request, answer in self.exchanges:
            if request.line[0] == "PUT" and request.line[1].split("/")[-1] in names:
                yield request, answer


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
        rounds = {kind: server.client.rounds(task.task_id)[0] for kind, task in tasks.items()}
        for device in (*devices, few, away):
            device.stop()
        server.stop()
    pairs = [pair for conversation in tap.conversations for pair in exchanges(conversation)]
    return Overheard(
        exchanges=pairs,
        uploads=list(uploads(pairs, devices, tasks, server, root / "again")),
        up=b"".join(conversation.up for conversation in tap.conversations),
        down=b"".join(conversation.down for conversation in tap.conversations),
        devices=devices,
        few=few,
        away=away,
        tasks=tasks,
        rounds=rounds,
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
            min_group=MIN_GROUP,
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


def uploads(
    pairs: list[tuple[Said, Said | None]],
    devices: list[Device],
    tasks: dict[str, TaskView],
    server: Server,
    scratch: Path,
) -> Iterator[Upload]:
    """Every masked input, with the contribution that its device must have computed."""
    names = {device.device_id: device for device in devices}
    assigned: dict[str, Assigned] = {}
    for request, answer in pairs:
        if request.line[1] == "/v1/claim" and answer is not None:
            reply: Any = messages.decode(answer.body, messages.ClaimReply)
            if isinstance(reply, Assigned):
                assigned[reply.assignment_id] = reply
        if request.line[1].endswith("/group/mask-input"):
            ticket = assigned[request.line[1].split("/")[3]]
            device = names[request.headers["homespun-device"]]
            examples = examples_for(device, ticket.kind)
            mine = contribution(device, ticket, examples, server, scratch / ticket.assignment_id)
            yield Upload(tasks[ticket.kind], ticket, request.body, mine)


# --- the proofs ---------------------------------------------------------------------------------------


def test_every_request_is_a_documented_one(overheard: Overheard):
    seen = {route(request).row for request, _ in overheard.exchanges}
    assert {row for row in seen if "/group/" in row} == {
        f"PUT /v1/assignments/{{assignment_id}}/group/{step}"
        for step in ("advertise-keys", "share-keys", "mask-input", "agree", "unmask")
    }
    assert len(ROUTES) == 15
    assert {each.row for each in ROUTES} - seen == {
        "PUT /v1/assignments/{assignment_id}/report",  # nothing was plain
        "POST /v1/assignments/{assignment_id}/abort",  # nobody gave up
        "GET /v1/releases/{population}/{slot}/deployed",  # nobody came during a stage
    }


def test_every_json_body_is_exactly_its_documented_message(overheard: Overheard):
    kinds = set()
    for request, answer in overheard.exchanges:
        documented = route(request)
        if documented.bodies:
            kinds.add(type(message_in(request.body, documented.bodies)))
        else:
            assert request.body.startswith(MASKED_MAGIC) or request.body == b""
        if answer is not None:
            assert answer.line[1] in ("200", "206"), answer
            if documented.answers:
                kinds.add(type(message_in(answer.body, documented.answers)))
    assert {kind.__name__ for kind in kinds} >= {
        *("Terms", "ShareKeysRequest", "MaskInputRequest", "AgreeRequest", "UnmaskRequest"),
        *("AdvertiseKeys", "ShareKeys", "Agree", "Unmask", "Settled", "Receipt"),
    }


def test_what_a_device_says_is_known_beforehand(overheard: Overheard):
    """Beside its key and what its group asks for, a device sends nothing but what the server told it."""
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
        assert names <= SIGNED | PLAIN | {"content-length", "range", "prefer"}
        assert request.headers.get("prefer") in (None, f"wait={POLL_S:.0f}")
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


# --- masked inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TaskKind.TRAIN, TaskKind.EVALUATE])
def test_what_a_device_masked_is_known_here(overheard: Overheard, kind: TaskKind):
    """The contributions that the tests below look for are the true ones: they make up the result."""
    codec, summary = overheard.codec(kind), overheard.rounds[kind]
    contributions = [upload.contribution for upload in overheard.of(kind)]
    assert len(contributions) == 3
    found = codec.decode(*contributions).metrics
    assert {name: (m.sum, m.count) for name, m in found.items()} == {
        name: (m.sum, m.count) for name, m in summary.metrics.items()
    }
    if kind is TaskKind.TRAIN:
        manifest, task = overheard.manifest, overheard.tasks[kind]
        algorithm = Algorithm(manifest.shapes, codec, server_optimizer("FedAvg", {}))
        initial = initial_checkpoint(manifest, 0)
        moved, _, _ = algorithm.server_update(initial, {}, *contributions)
        assert digest(encode_tree(moved)) == task.head


@pytest.mark.parametrize("kind", [TaskKind.TRAIN, TaskKind.EVALUATE])
def test_a_masked_input_has_the_same_form_for_every_device(overheard: Overheard, kind: TaskKind):
    train = kind is TaskKind.TRAIN
    dimension, num_aux = (overheard.manifest.num_parameters, 9) if train else (0, 21)
    header = struct.pack("<4sBBHI", MASKED_MAGIC, 16, 0, num_aux, dimension)
    for upload in overheard.of(kind):
        assert upload.body.startswith(header)
        assert len(upload.body) == 12 + 64 + 8 * num_aux + 2 * dimension


def test_masked_inputs_are_noise(overheard: Overheard):
    everything = b"".join(upload.masked.aux.tobytes() for upload in overheard.uploads)
    assert is_noise(everything)
    assert not is_noise(b"".join(u.contribution.aux.tobytes() for u in overheard.uploads))
    for upload in overheard.of(TaskKind.TRAIN):
        assert is_noise(upload.masked.main.tobytes())
        assert not is_noise(upload.contribution.main.tobytes())


def test_masked_inputs_of_any_devices_together_are_noise(overheard: Overheard):
    """Also all three, whose pairwise masks cancel: what their own masks hide, only their shares can open."""
    masks = [upload.mask.main for upload in overheard.of(TaskKind.TRAIN)]
    signs = [s for s in product((0, 1, -1), repeat=3) if any(s)]
    assert (1, 1, 1) in signs
    for each in signs:
        total = sum(
            (
                mask * np.array(sign).astype(mask.dtype)
                for mask, sign in zip(masks, each, strict=True)
            ),
            np.zeros_like(masks[0]),
        )
        assert is_noise(total.tobytes()), each


def test_masked_inputs_have_nothing_in_common(overheard: Overheard):
    """No more words are the same than in noise: with each other, and with what they hide."""
    trained = overheard.of(TaskKind.TRAIN)
    masked, hidden_ = (
        [getattr(u, name).main for u in trained] for name in ("masked", "contribution")
    )
    assert common(hidden_[0], hidden_[1]) > 100  # the count finds what is there
    for one, other in combinations(masked, 2):
        assert common(one, other) < 50
    for one, other in product(masked, hidden_):
        assert common(one, other) < 50
    said = {int(word) for upload in overheard.uploads for word in upload.masked.aux}
    meant = {int(word) for upload in overheard.uploads for word in upload.contribution.aux}
    assert len(said) == sum(upload.masked.aux.size for upload in overheard.uploads)
    assert not said & meant


def is_noise(data: bytes) -> bool:
    """Whether half bytes are as even as random ones: chi-square of 15 degrees, above 80 once in 10^10 times."""
    found = np.frombuffer(data, np.uint8)
    counts = np.bincount(np.concatenate([found >> 4, found & 15]), minlength=16)
    return bool((np.square(counts - counts.mean()) / counts.mean()).sum() < 80)


def common(one: AnyArray, other: AnyArray) -> int:
    """Places where both have the same word."""
    return int((one == other).sum())


def test_what_the_other_steps_carry_is_noise_of_the_same_size_for_all(overheard: Overheard):
    """Keys, sealed shares, signatures, shares: nothing in them, and nothing in how much of them there is."""
    steps = {
        "advertise-keys": ("c_key", "s_key", "nonce", "signature"),
        "share-keys": ("sealed", "commitment"),
        "agree": ("signature",),
        "unmask": ("shares",),
    }
    everything = b""
    for step, names in steps.items():
        bodies = [request.body for request, _ in overheard.steps(step)]
        assert len(bodies) == 6
        assert len({len(body) for body in bodies}) == 1
        for body in bodies:
            data = msgspec.json.decode(body)
            assert set(data) - {"identity"} == set(names)
            for name in names:
                parts = data[name] if isinstance(data[name], list) else [data[name]]
                everything += b"".join(map(base64.b64decode, parts))
    assert len(everything) == 6 * 496
    assert is_noise(everything)


# --- private numbers ----------------------------------------------------------------------------------


def test_no_count_or_metric_of_a_device_is_in_it_in_clear(overheard: Overheard):
    private = private_numbers(overheard)
    assert len(private) > 20
    num_messages = 0
    for request, answer in overheard.exchanges:
        documented = route(request)
        for said, names in ((request, documented.bodies), (answer, documented.answers)):
            if said is not None and names:
                assert not private & set(numbers(message_in(said.body, names)))
                num_messages += 1
    assert num_messages > 100
    for upload in overheard.uploads:  # the search finds what is there
        report = overheard.codec(upload.assigned.kind).decode(upload.contribution)
        metrics = {name: m.sum for name, m in report.metrics.items()}
        assert private & set(numbers({"weight": report.weight, "metrics": metrics}))


def private_numbers(overheard: Overheard) -> set[float]:
    """What a device counted or measured, however it is written."""
    private: set[float] = set(NUM_EXAMPLES)
    for device in overheard.devices:
        status = device.status()
        private |= {status.num_examples - status.num_held_out, status.num_held_out}
    for upload in overheard.uploads:
        report = overheard.codec(upload.assigned.kind).decode(upload.contribution)
        if upload.assigned.kind is TaskKind.TRAIN:
            private.add(round(report.weight * overheard.manifest.max_weight))
        for value in report.metrics.values():
            private |= {value.sum, value.count, value.mean}
        private |= {float(word) for word in upload.contribution.aux.astype(np.int64)}
    for public in (*overheard.tasks.values(), overheard.manifest):  # known before any device spoke
        private -= set(numbers(public))
    return private - {0.0, AUX_SCALE}  # one client, or nothing, as every device says


def test_no_auxiliary_word_is_in_it_in_clear(overheard: Overheard):
    """As bytes, which no message shows."""
    for upload in overheard.uploads:
        words = [word.tobytes() for word in upload.contribution.aux]
        assert all(word in encode_contribution(upload.contribution) for word in words)
        assert not [word for word in words if word in overheard.up]


def numbers(value: Any) -> Iterator[float]:
    """Every number in a record or plain data, in text as well, but not in bytes."""
    if isinstance(value, msgspec.Struct):
        yield from numbers([getattr(value, name) for name in value.__struct_fields__])
    elif isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list | tuple):
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
