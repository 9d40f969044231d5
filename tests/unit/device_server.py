"""A small server that speaks the device protocol from memory, for tests of the device; and a device to test.

It is a transport for httpx: no sockets, no threads, no waiting. It verifies every signature, keeps what it
was sent, and fails on request.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import urandom
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from homespun import zoo
from homespun.clock import ManualClock
from homespun.device.child import Labour, try_model
from homespun.device.conditions import ConditionSource, ScriptedConditions, Span
from homespun.device.connection import Connection
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.labour import work_on
from homespun.device.runtime import Runtime
from homespun.device.stopping import Stop
from homespun.errors import HomespunError, NotAuthentic, NotFound, ReportConflict
from homespun.learning.contribution import ContributionCodec
from homespun.learning.metrics import paired_names, watched_names
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.protocol import messages
from homespun.protocol.eligibility import Policy
from homespun.protocol.frame import decode_masked_input, frame_size
from homespun.protocol.messages import (
    Abort,
    Aggregation,
    Assigned,
    Carried,
    CheckIn,
    CheckInReply,
    Claim,
    ClaimReply,
    Criteria,
    Encoding,
    Enroll,
    Enrolled,
    GroupReply,
    Offer,
    Receipt,
    Rejected,
    ReleaseManifest,
    ReleaseNotice,
    ReportState,
    RetryWindow,
    Settled,
    SignedRelease,
    TaskKind,
    Waiting,
    Watch,
    checkpoints_hash,
)
from homespun.protocol.problem import encode_problem
from homespun.protocol.session import SessionState
from homespun.protocol.signing import (
    DEVICE_HEADER,
    RELEASE_CONTEXT,
    SIGNATURE_HEADER,
    TIME_HEADER,
    device_id,
    verify_request,
)
from homespun.secagg import device as secagg
from homespun.secagg.messages import (
    AdvertiseKeys,
    Agree,
    AgreeRequest,
    MaskedInput,
    MaskInputRequest,
    ShareKeys,
    ShareKeysRequest,
    Terms,
    Unmask,
    UnmaskRequest,
)
from homespun.secagg.server import Group, Step, Sums
from homespun.tensors.codec import digest, encode_tree
from homespun.tensors.packing import word

POPULATION = "tests"
TOKEN = "let me in"
RETRY = RetryWindow(earliest_s=10.0, latest_s=20.0)
WAITING = Waiting(retry=RetryWindow(earliest_s=0.0, latest_s=0.0))
PUBLISHER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
DIGITS = zoo.load("digits").sign(PUBLISHER)
INITIAL = initial_checkpoint(DIGITS.manifest, 0)


class Broken(httpx.SyncByteStream):
    """A body whose connection breaks after some bytes."""

    def __init__(self, data: bytes, keep: int) -> None:
        self._data, self._keep = data, keep

    def __iter__(self) -> Iterator[bytes]:
        yield self._data[: self._keep]
        raise httpx.ReadError("connection reset")


@dataclass
class FakeServer(httpx.BaseTransport):
    """`failure`, if set, is asked with every request and may raise, `after` when its answer is made; `break_after`
    cuts the next blob; `group` is that of every secure assignment, `lie` may change what it asks.
    """

    clock: ManualClock
    keys: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    offers: list[Offer] = field(default_factory=list)
    assignments: dict[str, Assigned] = field(default_factory=dict)
    replies: list[ClaimReply] = field(default_factory=list)
    reports: dict[str, list[bytes]] = field(default_factory=dict)
    states: dict[str, Receipt] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    releases: dict[str, tuple[int, SignedRelease]] = field(default_factory=dict)
    deployed: dict[str, SignedRelease] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    failure: Callable[[httpx.Request], None] | None = None
    after: Callable[[httpx.Request], None] | None = None
    break_after: int | None = None
    group: PlayedGroup | None = None
    lie: Callable[[GroupReply], GroupReply] | None = None
    skew_s: float = 0.0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.log.append(f"{request.method} {request.url.path}")
        try:
            if self.failure is not None:
                self.failure(request)
            body = request.read()
            self._authenticate(request, body)
            response = self._route(request, body)
            if self.after is not None:
                self.after(request)
            return response
        except HomespunError as error:
            return httpx.Response(error.http_status, content=encode_problem(error))

    def _authenticate(self, request: httpx.Request, body: bytes) -> None:
        name = request.headers[DEVICE_HEADER]
        if request.url.path == "/v1/enroll":
            key = base64.b64decode(messages.decode(body, Enroll).public_key)
        elif name in self.keys:
            key = self.keys[name]
        else:
            raise NotAuthentic("unknown device", hint="enrol")
        verify_request(
            key,
            request.method,
            request.url.path,
            request.headers[TIME_HEADER],
            request.headers[SIGNATURE_HEADER],
            digest(body),
            self.clock.now() + self.skew_s,
        )

    def _route(self, request: httpx.Request, body: bytes) -> httpx.Response:
        match request.url.path.split("/")[2:]:
            case ["enroll"]:
                return self._answer(self._enroll(messages.decode(body, Enroll)))
            case ["check-in"]:
                messages.decode(body, CheckIn)
                notices = [ReleaseNotice(slot=s, sequence=n) for s, (n, _) in self.releases.items()]
                return self._answer(
                    CheckInReply(offers=tuple(self.offers), releases=tuple(notices), retry=RETRY)
                )
            case ["claim"]:
                return self._answer(self._claim(messages.decode(body, Claim)))
            case ["blobs", address]:
                return self._blob(request, address)
            case ["assignments", name, "report"]:
                return self._answer(self._report(name, body))
            case ["assignments", name, "abort"]:
                self.aborted.append(messages.decode(body, Abort).assignment_id)
                return self._answer(Receipt(assignment_id=name, state=ReportState.VOID))
            case ["assignments", name, "group", *step]:
                key = self.keys[request.headers[DEVICE_HEADER]]
                return self._answer(self._group(name, key, body, *step))
            case ["assignments", name]:
                if name not in self.states:
                    raise NotFound("no such assignment")
                return self._answer(self.states[name])
            case ["releases", _, slot]:
                return self._answer(self.releases[slot][1])
            case ["releases", _, slot, "deployed"] if slot in self.deployed:
                return self._answer(self.deployed[slot])
        raise NotFound("no such route")

    def _answer(self, message: Any) -> httpx.Response:
        return httpx.Response(200, content=messages.encode(message))

    def _enroll(self, message: Enroll) -> Enrolled:
        if message.token != TOKEN:
            raise NotAuthentic("the token is not valid", hint="ask for a new one")
        key = base64.b64decode(message.public_key)
        self.keys[device_id(key)] = key
        publisher = base64.b64encode(PUBLISHER.public_key().public_bytes_raw()).decode()
        return Enrolled(
            device_id=device_id(key), population=message.population, publisher_keys=(publisher,)
        )

    def _claim(self, message: Claim) -> ClaimReply:
        if self.replies:
            return self.replies.pop(0)
        name = f"{message.task_id}-{message.round_number}-{message.attempt}"
        if name in self.assignments and name not in self.aborted:
            return self.assignments[name]
        return Rejected(reason="round_closed", retry=RETRY)

    def _blob(self, request: httpx.Request, address: str) -> httpx.Response:
        if address not in self.blobs:
            raise NotFound("no such blob")
        data, status = self.blobs[address], 200
        if asked := request.headers.get("Range"):
            data, status = data[int(asked.removeprefix("bytes=").removesuffix("-")) :], 206
        if self.break_after is not None:
            keep, self.break_after = self.break_after, None
            return httpx.Response(status, stream=Broken(data, keep))
        return httpx.Response(status, content=data)

    def _report(self, name: str, body: bytes) -> Receipt:
        received = self.reports.setdefault(name, [])
        if received and received[0] != body:
            raise ReportConflict("another report was received")
        received.append(body)
        receipt = Receipt(assignment_id=name, state=ReportState.ACKNOWLEDGED, digest=digest(body))
        return self.states.setdefault(name, receipt)

    def _group(self, name: str, key: bytes, body: bytes, step: str = "") -> GroupReply:
        assert self.group is not None
        if step == "advertise-keys" or (step and self.group.knows(key)):
            self.group.answer(key, step, body)  # else it was meant for another group
        reply = self.group.asks(key)
        if reply is None:
            receipt = Receipt(assignment_id=name, state=ReportState.ACKNOWLEDGED)
            reply = Settled(receipt=self.states.setdefault(name, receipt))
        return self.lie(reply) if self.lie else reply

    # --- what the operator does ---------------------------------------------------------------------------

    def put(self, data: bytes) -> str:
        self.blobs[digest(data)] = data
        return digest(data)

    def open_round(
        self,
        number: int = 1,
        *,
        attempt: int = 1,
        kind: TaskKind = TaskKind.TRAIN,
        plan: bytes | None = None,
        checkpoints: Sequence[bytes] = (),
        criteria: Criteria | None = None,
        encoding: Encoding | None = None,
        deadline_s: float = 600.0,
        aggregation: Aggregation = Aggregation.PLAIN,
        min_group: int = 3,
        max_staleness: int = 0,
    ) -> Offer:
        """Offer one round, in place of any other, with an assignment for whoever claims it."""
        packed = plan or DIGITS.to_bytes()
        train = kind is TaskKind.TRAIN
        manifest = DIGITS.manifest
        offer = Offer(
            task_id=str(kind),
            task_name=f"{kind}-digits",
            kind=kind,
            round_number=number,
            attempt=attempt,
            plan_hash=self.put(packed),
            criteria=criteria or Criteria(min_examples=3),
            aggregation=aggregation,
            min_group=min_group,
            download_bytes=len(packed),
            upload_bytes=frame_size(32, 7, manifest.num_parameters),
            max_staleness=max_staleness,
        )
        self.offers = [offer]
        name = f"{kind}-{number}-{attempt}"
        self.assignments[name] = Assigned(
            assignment_id=name,
            kind=kind,
            round_number=number,
            attempt=attempt,
            plan_hash=offer.plan_hash,
            checkpoints=tuple(self.put(c) for c in checkpoints or [encode_tree(INITIAL)]),
            encoding=encoding
            or Encoding(
                clip_norm=manifest.clip_norm if train else 1.0,
                max_weight=manifest.max_weight,
                max_group=10,
                bits=32,
            ),
            aggregation=aggregation,
            seed=7,
            deadline_s=deadline_s,
            max_staleness=max_staleness,
        )
        return offer

    def open_secure_round(
        self,
        number: int = 1,
        *,
        kind: TaskKind = TaskKind.TRAIN,
        num_real: int = 1,
        num_played: int = 3,
        min_group: int = 3,
        deadline_s: float = 600.0,
        watch: Watch | None = None,
        max_staleness: int = 0,
    ) -> Terms:
        """Offer a round whose devices form one group: so many real ones, the others are played."""
        train, manifest = kind is TaskKind.TRAIN, DIGITS.manifest
        metrics = ("loss", *manifest.metrics)
        evaluated = watched_names() if watch else paired_names(metrics, 2)
        codec = ContributionCodec(
            dimension=manifest.num_parameters if train else 0,
            clip_norm=manifest.clip_norm if train else 1.0,
            max_weight=manifest.max_weight if train else 0,
            metrics=metrics if train else evaluated,
            max_group=12,
            bits=14,
            rotation_seed=5 if train else None,
        )
        worse = {name: np.zeros_like(array) for name, array in INITIAL.items()}
        offer = self.open_round(
            number,
            kind=kind,
            checkpoints=[encode_tree(tree) for tree in ((INITIAL,) if train else (INITIAL, worse))],
            encoding=Encoding(
                bits=codec.bits,
                clip_norm=codec.clip_norm,
                max_weight=codec.max_weight,
                max_group=codec.max_group,
                rotation_seed=codec.rotation_seed,
            ),
            deadline_s=deadline_s,
            aggregation=Aggregation.SECURE,
            min_group=min_group,
            max_staleness=max_staleness,
        )
        self.offers = [msgspec.structs.replace(offer, watch=watch)]
        terms = Terms(
            task=offer.task_name,
            round_number=number,
            attempt=1,
            checkpoint_hash=checkpoints_hash(self.assignments[f"{kind}-{number}-1"].checkpoints),
            plan_hash=offer.plan_hash,
            bits=codec.bits,
            dimension=codec.dimension,
            num_aux=len(codec.aux_names),
            schema=codec.schema,
            clip=codec.clip,
            n_min=min_group,
            n_max=codec.max_group,
            max_staleness=max_staleness,
        )
        self.group = PlayedGroup(terms, num_real, num_played)
        return terms

    def carry(self, *heads: str, attempt: int = 1) -> Carried:
        """The assignment of round 1 is in a later round now, which `heads` lead up to, with another rotation."""
        assert self.group is not None
        assigned, manifest = self.assignments["train-1-1"], DIGITS.manifest
        encoding = replace(assigned.encoding, rotation_seed=6 + len(heads))
        codec = ContributionCodec(
            dimension=manifest.num_parameters,
            clip_norm=encoding.clip_norm,
            max_weight=encoding.max_weight,
            metrics=("loss", *manifest.metrics),
            max_group=encoding.max_group,
            bits=encoding.bits,
            rotation_seed=encoding.rotation_seed,
        )
        terms = replace(
            self.group.terms,
            round_number=1 + len(heads),
            attempt=attempt,
            checkpoint_hash=(*assigned.checkpoints, *heads)[-1],
            schema=codec.schema,
        )
        carried = Carried(terms=terms, encoding=encoding, ancestry=(*assigned.checkpoints, *heads))
        self.group = PlayedGroup(terms, 1, 3, carried)
        return carried

    def release(
        self,
        plan: Plan,
        checkpoint: bytes,
        sequence: int,
        *,
        slot: str = "default",
        key: Ed25519PrivateKey = PUBLISHER,
        population: str = POPULATION,
        fraction: float = 1.0,
        control: float = 0.0,
        release_id: str = "",
        stage_salt: str = "",
    ) -> SignedRelease:
        """Publish a release, or a stage of one; devices see it at their next check-in."""
        manifest = ReleaseManifest(
            population=population,
            slot=slot,
            sequence=sequence,
            version=f"v{sequence}",
            plan_hash=self.put(plan.to_bytes()),
            checkpoint=self.put(checkpoint),
            release_id=release_id,
            fraction=fraction,
            control=control,
            stage_salt=stage_salt,
            issued_at=self.clock.now(),
        )
        data = messages.encode(manifest)
        signed = SignedRelease(
            manifest=base64.b64encode(data).decode(),
            signature=base64.b64encode(key.sign(RELEASE_CONTEXT + data)).decode(),
        )
        self.releases[slot] = (sequence, signed)
        if fraction == 1:
            self.deployed[slot] = signed
        return signed


class Player:
    """A device without a process: it follows the protocol with vectors of its own."""

    def __init__(self, number: int, terms: Terms) -> None:
        self.identity = Identity(bytes([number]) * 32)
        draw = np.random.default_rng(number)
        self.main = draw.integers(0, 2**terms.bits, terms.dimension).astype(word(terms.bits))
        self.aux = draw.integers(0, 2**40, terms.num_aux).astype("<u8")
        self._state: secagg.DeviceState | None = None

    def join(self, terms: Terms) -> AdvertiseKeys:
        names = ("task", "round_number", "attempt", "plan_hash", "bits", "dimension", "num_aux")
        same = {name: getattr(terms, name) for name in (*names, "schema", "clip", "n_max")}
        work = secagg.Work(**same, ancestry=(terms.checkpoint_hash,))
        demands = secagg.Demands(smallest_group=3, max_staleness=terms.max_staleness)
        me = self.identity
        self._state, keys = secagg.advertise_keys(terms, work, demands, me.public_key, me, urandom)
        return keys

    def answer(self, asked: Any) -> Any:
        state, me = self._state, self.identity
        answer: Any
        assert state is not None
        match asked:
            case ShareKeysRequest():
                self._state, answer = secagg.share_keys(state, asked, urandom)
            case MaskInputRequest():
                self._state, answer = secagg.mask_input(state, asked, self.main, self.aux, me)
            case AgreeRequest():
                self._state, answer = secagg.agree(state, asked, me)
            case UnmaskRequest():
                self._state, answer = secagg.unmask(state, asked)
        return answer


class PlayedGroup:
    """A real group. The players answer a step when all real devices did, and then it is closed.

    `received`: (step, body) of the real devices, repetitions too; `sums`: what was opened.
    """

    def __init__(
        self, terms: Terms, num_real: int, num_played: int, carried: Carried | None = None
    ) -> None:
        self.terms, self.group = terms, Group(terms)
        self.invitation = carried or terms
        self.players = [Player(100 + number, terms) for number in range(num_played)]
        self.received: list[tuple[str, bytes]] = []
        self.sums: Sums | None = None
        self._num_real = num_real

    def knows(self, key: bytes) -> bool:
        return key in [keys.identity for keys in self.group.state.roster]

    def asks(self, key: bytes) -> GroupReply | None:
        """What the group asks of a device now; None: nothing more."""
        state = self.group.state
        if self.sums is not None:
            return None
        if state.step is Step.ADVERTISE_KEYS:
            return WAITING if self.knows(key) else self.invitation
        index = self.group.index_of(key)
        return WAITING if index in self._answers() else self._request(index)

    def answer(self, key: bytes, step: str, body: bytes) -> None:
        self.received.append((step, body))
        terms = self.terms
        match step:
            case "advertise-keys":
                self.group.advertise_keys(messages.decode(body, AdvertiseKeys))
            case "mask-input":
                size = (terms.bits, terms.num_aux, terms.dimension)
                self._take(key, step, decode_masked_input(body, *size))
            case _:
                kind = {"share-keys": ShareKeys, "agree": Agree, "unmask": Unmask}[step]
                self._take(key, step, messages.decode(body, kind))
        if len(self._answers()) == self._num_real and self.sums is None:
            self._play()

    def _take(
        self, key: bytes, step: str, answer: ShareKeys | MaskedInput | Agree | Unmask
    ) -> None:
        getattr(self.group, step.replace("-", "_"))(self.group.index_of(key), answer)

    def _answers(self) -> Any:
        state = self.group.state
        found = (state.roster, state.shared, state.masked, state.agreed, state.unmasked)
        return found[list(Step).index(state.step)]

    def _request(self, index: int) -> GroupReply:
        match self.group.state.step:
            case Step.SHARE_KEYS:
                return self.group.share_keys_request(index)
            case Step.MASK_INPUT:
                return self.group.mask_input_request(index)
            case Step.AGREE:
                return self.group.agree_request()
        return self.group.unmask_request(index)

    def _play(self) -> None:
        step = self.group.state.step
        for player in self.players:
            if step is Step.ADVERTISE_KEYS:
                self.group.advertise_keys(player.join(self.terms))
            else:
                index = self.group.index_of(player.identity.public_key)
                getattr(self.group, step)(index, player.answer(self._request(index)))
        if step is Step.UNMASK:
            self.sums = self.group.open_sum()
        else:
            getattr(self.group, f"close_{step}")()


def images(count: int) -> list[dict[str, Any]]:
    """Distinct labelled digits, each with a stripe where its label says."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        label = number % 10
        pixels = draw.integers(0, 100, (28, 28), np.uint8)
        pixels[2 * label : 2 * label + 4] += 100
        found.append({"pixels": pixels.tobytes(), "label": label})
    return found


def try_here(directory: Path) -> bool:
    """Try a release in this process."""
    return try_model(directory, labour=work_on)


class Device:
    """A device over a directory, whose process can be killed and started again.

    It works in this process; `labour` may be replaced.
    """

    def __init__(
        self,
        root: Path,
        server: FakeServer,
        num_examples: int = 60,
        seed: int = 1,
        policy: Policy | None = None,
    ) -> None:
        self.home, self.server, self.clock = Home(root), server, server.clock
        self.conditions: ConditionSource = ScriptedConditions((), self.clock.now())
        self.stop = Stop()
        self.labour: Labour = work_on
        identity = Identity.load_or_create(self.home.identity_file, seed)
        enrolled = self._connection(identity).enroll(POPULATION, TOKEN)
        self.settings = Settings(
            server="http://server",
            population=POPULATION,
            device_id=enrolled.device_id,
            publisher_keys=enrolled.publisher_keys,
            seed=seed,
            policy=policy or Policy(allow_plain=True, min_group=3),
            conditions=(Span(),),
            transient_error=RetryWindow(earliest_s=30.0, latest_s=40.0),
        )
        self.home.write_settings(self.settings)
        store = open_examples(self.home, self.settings)
        store.add_many(images(num_examples), self.clock.now())
        store.close()
        self._runtime: Runtime | None = None

    def _connection(self, identity: Identity) -> Connection:
        client = httpx.Client(transport=self.server, base_url="http://server")
        return Connection(client, identity, self.clock, self.stop)

    @property
    def runtime(self) -> Runtime:
        """The running process; started if there is none."""
        if self._runtime is None:
            self.stop = Stop()
            connection = self._connection(Identity.load(self.home.identity_file))
            self._runtime = Runtime(
                self.home, connection, self.conditions, self.clock, self.stop, self.labour
            )
        return self._runtime

    @property
    def state(self) -> SessionState:
        return self.runtime.session.state

    def kill(self) -> None:
        """End the process as `kill -9` does: nothing is written, locks are gone."""
        if self._runtime is not None:
            self._runtime._journal.close()
            self._runtime._examples.close()
            self._runtime = None

    def run_to(self, state: SessionState) -> None:
        """Step, moving the clock instead of waiting, until the session is in `state`."""
        for _ in range(60):
            if self.state is state:
                return
            self.step()
        raise AssertionError(f"the device stays in {self.state} and does not reach {state}")

    def run_session(self) -> None:
        """Step until one more session has ended."""
        before = self.runtime.num_sessions
        for _ in range(60):
            self.step()
            if self.runtime.num_sessions > before:
                return
        raise AssertionError(f"no session ended; the device is in {self.state}")

    def step(self) -> None:
        self.clock.advance(self.runtime.step())

    def files(self) -> set[str]:
        """Every file of the directory, SQLite's own companions left out."""
        return {
            path.relative_to(self.home.root).as_posix()
            for path in self.home.root.rglob("*")
            if path.is_file() and not path.name.endswith(("-wal", "-shm", "-journal"))
        }


def children() -> list[psutil.Process]:
    """Of this process, without the fork server and the resource tracker that `multiprocessing` keeps once used."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() == psutil.STATUS_ZOMBIE
        or not any("multiprocessing" in word for word in child.cmdline())
    ]
