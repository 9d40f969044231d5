"""A small server that speaks the device protocol from memory, for tests of the device; and a device to test.

It is a transport for httpx: no sockets, no threads, no waiting. It verifies every signature, keeps what it
was sent, and fails on request.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun import zoo
from homespun.clock import ManualClock
from homespun.device.conditions import ConditionSource, ScriptedConditions, Span
from homespun.device.connection import Connection
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.runtime import Runtime
from homespun.device.stopping import Stop
from homespun.errors import HomespunError, NotAuthentic, NotFound, ReportConflict
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.protocol import messages
from homespun.protocol.eligibility import Policy
from homespun.protocol.frame import frame_size
from homespun.protocol.messages import (
    Abort,
    Aggregation,
    Assigned,
    CheckIn,
    CheckInReply,
    Claim,
    ClaimReply,
    Criteria,
    Encoding,
    Enroll,
    Enrolled,
    Offer,
    Receipt,
    Rejected,
    ReleaseManifest,
    ReleaseNotice,
    ReportState,
    RetryWindow,
    SignedRelease,
    TaskKind,
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
from homespun.tensors.codec import digest, encode_tree

POPULATION = "tests"
TOKEN = "let me in"
RETRY = RetryWindow(earliest_s=10.0, latest_s=20.0)
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
    """`failure`, if set, is asked with every request and may raise; `break_after` cuts the next blob."""

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
    log: list[str] = field(default_factory=list)
    failure: Callable[[httpx.Request], None] | None = None
    break_after: int | None = None
    skew_s: float = 0.0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.log.append(f"{request.method} {request.url.path}")
        try:
            if self.failure is not None:
                self.failure(request)
            body = request.read()
            self._authenticate(request, body)
            return self._route(request, body)
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
            case ["assignments", name]:
                if name not in self.states:
                    raise NotFound("no such assignment")
                return self._answer(self.states[name])
            case ["releases", _, slot]:
                return self._answer(self.releases[slot][1])
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
            aggregation=Aggregation.PLAIN,
            min_group=3,
            download_bytes=len(packed),
            upload_bytes=frame_size(32, 7, manifest.num_parameters),
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
            ),
            aggregation=Aggregation.PLAIN,
            seed=7,
            deadline_s=deadline_s,
        )
        return offer

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
    ) -> SignedRelease:
        """Publish a release; devices see it at their next check-in."""
        manifest = ReleaseManifest(
            population=population,
            slot=slot,
            sequence=sequence,
            version=f"v{sequence}",
            plan_hash=self.put(plan.to_bytes()),
            checkpoint=self.put(checkpoint),
            fraction=fraction,
            issued_at=self.clock.now(),
        )
        data = messages.encode(manifest)
        signed = SignedRelease(
            manifest=base64.b64encode(data).decode(),
            signature=base64.b64encode(key.sign(RELEASE_CONTEXT + data)).decode(),
        )
        self.releases[slot] = (sequence, signed)
        return signed


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


class Device:
    """A device over a directory, whose process can be killed and started again."""

    def __init__(self, root: Path, server: FakeServer, num_examples: int = 60) -> None:
        self.home, self.server, self.clock = Home(root), server, server.clock
        self.conditions: ConditionSource = ScriptedConditions((), self.clock.now())
        self.stop = Stop()
        identity = Identity.load_or_create(self.home.identity_file, seed=1)
        enrolled = self._connection(identity).enroll(POPULATION, TOKEN)
        self.settings = Settings(
            server="http://server",
            population=POPULATION,
            device_id=enrolled.device_id,
            publisher_keys=enrolled.publisher_keys,
            seed=1,
            policy=Policy(allow_plain=True),
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
            self._runtime = Runtime(self.home, connection, self.conditions, self.clock, self.stop)
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
