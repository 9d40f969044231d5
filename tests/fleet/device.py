"""A synthetic device: it signs its requests and sends real contributions; only its training is made up."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.metrics import MetricSum, paired_names, watched_names
from homespun.protocol.frame import encode_contribution
from homespun.protocol.messages import (
    Abort,
    Assigned,
    CheckIn,
    CheckInReply,
    Claim,
    ClaimReply,
    Enroll,
    Enrolled,
    Receipt,
    TaskKind,
    Watch,
    decode,
    encode,
)
from homespun.protocol.problem import error_from_problem
from homespun.protocol.signing import device_id, request_headers
from homespun.protocol.views import TaskView
from homespun.rng import stream

if TYPE_CHECKING:
    from tests.fleet.world import World

POPULATION = "phones"


@dataclass
class Device:
    """One synthetic device. `index` is all its randomness; `watching`: what it was asked about a release, if it was."""

    world: World
    index: int
    watching: Watch | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        secret = hashlib.sha256(f"device {self.index}".encode()).digest()
        self.key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self.key.public_key().public_bytes_raw()
        self.device_id = device_id(self.public)

    def call(self, kind: Any, method: str, path: str, body: bytes = b"", **headers: str) -> Any:
        """A signed request. Raises the exception that a problem document stands for."""
        signed = request_headers(
            self.key, self.device_id, method, path, self.world.clock.now(), body
        )
        return self.send(kind, method, path, body, {**signed, **headers})

    def send(self, kind: Any, method: str, path: str, body: bytes, headers: dict[str, str]) -> Any:
        response = self.world.http.request(method, path, content=body, headers=headers)
        if not response.is_success:
            raise error_from_problem(response.status_code, response.content)
        return response if kind is httpx.Response else decode(response.content, kind)

    def enroll(self, token: str, population: str = POPULATION) -> Enrolled:
        public = base64.b64encode(self.public).decode()
        message = Enroll(population=population, token=token, public_key=public)
        reply: Enrolled = self.call(Enrolled, "POST", "/v1/enroll", encode(message))
        return reply

    def check_in(self, wait_s: float = 0.0, **fields: Any) -> CheckInReply:
        message = CheckIn(population=POPULATION, wait_s=wait_s, **fields)
        reply: CheckInReply = self.call(CheckInReply, "POST", "/v1/check-in", encode(message))
        return reply

    def claim(
        self, task: TaskView, number: int, attempt: int = 1, wait_s: float = 0.0
    ) -> ClaimReply:
        message = Claim(task_id=task.task_id, round_number=number, attempt=attempt, wait_s=wait_s)
        reply: ClaimReply = self.call(ClaimReply, "POST", "/v1/claim", encode(message))
        return reply

    def contribution(self, assigned: Assigned, staleness: int = 0) -> Contribution:
        """What this device says in this round: the same for the same round and attempt."""
        codec = self.codec(assigned)
        rng = stream(assigned.seed, self.index)
        update = rng.normal(0.0, 0.2, codec.dimension).astype(np.float32)
        metrics = {name: MetricSum(float(rng.integers(0, 50)), 50.0) for name in codec.metrics}
        if "difference" in metrics:
            value = (self.index % 5 - 1) / 100
            metrics["difference"] = MetricSum(value, 1.0)
            metrics["difference_squared"] = MetricSum(value * value, 1.0)
            metrics["wins"] = MetricSum(float(value > 0), 1.0)
        return codec.encode(update, int(rng.integers(1, 80)), metrics, rng, staleness)

    def codec(self, assigned: Assigned) -> ContributionCodec:
        manifest, how = self.world.plan.manifest, assigned.encoding
        train = assigned.kind is TaskKind.TRAIN
        names = ("loss", *manifest.metrics)
        paired = paired_names(names, len(assigned.checkpoints))
        evaluated = watched_names() if self.watching is not None else paired
        return ContributionCodec(
            dimension=manifest.num_parameters if train else 0,
            clip_norm=how.clip_norm,
            max_weight=how.max_weight,
            metrics=names if train else evaluated,
            max_group=how.max_group,
            bits=how.bits,
            rotation_seed=how.rotation_seed,
        )

    def body(self, assigned: Assigned) -> bytes:
        return encode_contribution(self.contribution(assigned))

    def report(self, assigned: Assigned, body: bytes | None = None) -> Receipt:
        path = f"/v1/assignments/{assigned.assignment_id}/report"
        content = self.body(assigned) if body is None else body
        receipt: Receipt = self.call(Receipt, "PUT", path, content)
        return receipt

    def receipt(self, assigned: Assigned) -> Receipt:
        path = f"/v1/assignments/{assigned.assignment_id}"
        receipt: Receipt = self.call(Receipt, "GET", path)
        return receipt

    def abort(self, assigned: Assigned) -> Receipt:
        path = f"/v1/assignments/{assigned.assignment_id}/abort"
        body = encode(Abort(assignment_id=assigned.assignment_id))
        receipt: Receipt = self.call(Receipt, "POST", path, body)
        return receipt
