"""A whole world in one process: the real server over a real data directory, a manual clock, synthetic devices.

Devices sign their requests and send real contributions; only their training is made up. `settle` carries out
everything that is due, so that no test sleeps.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.clock import ManualClock
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.metrics import MetricSum, paired_names
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import (
    ClientOptimizer,
    Manifest,
    Normal,
    ParameterSpec,
    TensorFeature,
    TensorSpec,
)
from homespun.plan.package import Plan
from homespun.protocol.frame import encode_contribution
from homespun.protocol.messages import (
    Abort,
    Assigned,
    CheckIn,
    CheckInReply,
    Claim,
    ClaimReply,
    Criteria,
    Enroll,
    Enrolled,
    Receipt,
    RetryWindow,
    TaskKind,
    decode,
    encode,
)
from homespun.protocol.problem import error_from_problem
from homespun.protocol.signing import device_id, request_headers
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import ReleaseView, RoundSummary, Stored, TaskView
from homespun.rng import stream
from homespun.server.app import create_app
from homespun.server.deployment import Deployment
from homespun.server.settings import Settings
from homespun.tensors import codec as tensors
from tests.fleet.inprocess import InProcess

POPULATION = "phones"
NEVER_S = 1e6


def synthetic_plan(sizes: tuple[int, ...] = (6, 4), clip_norm: float = 2.0) -> Plan:
    """A plan with parameters of these sizes; its graphs are empty, since nobody here runs them."""
    empty = hashlib.sha256(b"").hexdigest()
    manifest = Manifest(
        name="synthetic",
        parameters=tuple(
            ParameterSpec(name=f"p{i}", shape=(size,), initial=Normal(std=1.0))
            for i, size in enumerate(sizes)
        ),
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2)),),
        predict_inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2)),),
        features=(TensorFeature(field="x", input="x", dtype="float32", shape=(2,)),),
        optimizer=ClientOptimizer(learning_rate=1.0),
        batch_size=1,
        max_rows=100,
        clip_norm=clip_norm,
        max_weight=50,
        metrics=("accuracy",),
        graphs=dict.fromkeys(("train", "evaluate", "predict"), empty),
    )
    return Plan(manifest, dict.fromkeys(("train", "evaluate", "predict"), b""))


@dataclass
class Device:
    """One synthetic device. `index` is all its randomness."""

    world: World
    index: int

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

    def contribution(self, assigned: Assigned) -> Contribution:
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
        return codec.encode(update, int(rng.integers(1, 80)), metrics, rng)

    def codec(self, assigned: Assigned) -> ContributionCodec:
        manifest, how = self.world.plan.manifest, assigned.encoding
        train = assigned.kind is TaskKind.TRAIN
        names = ("loss", *manifest.metrics)
        return ContributionCodec(
            dimension=manifest.num_parameters if train else 0,
            clip_norm=how.clip_norm,
            max_weight=how.max_weight,
            metrics=names if train else paired_names(names, len(assigned.checkpoints)),
            max_group=how.max_group,
            bits=how.bits,
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


class World:
    """The server over `data_dir`, with an operator and enrolled devices."""

    def __init__(
        self, data_dir: Path, num_devices: int = 0, plan: Plan | None = None, **settings: Any
    ):
        self.clock = ManualClock()
        self.settings = Settings(
            data_dir=data_dir, **{"tick_s": NEVER_S, "group_s": 0.0, **settings}
        )
        self.plan = plan or synthetic_plan()
        self.start()
        self.operate(dict, "POST", "/populations", {"name": POPULATION})
        self.devices = [Device(self, index) for index in range(num_devices)]
        if num_devices:
            token = self.token()
            for device in self.devices:
                device.enroll(token)

    # --- the server's life ------------------------------------------------------------------------

    def start(self) -> None:
        self.app = create_app(self.settings, self.clock)
        self.deployment: Deployment = self.app.state.deployment
        self.transport = InProcess(self.app)
        self.http = httpx.Client(transport=self.transport, base_url="http://homespun")
        self.settle()

    def stop(self) -> None:
        self.http.close()
        self.transport.stop()

    def crash(self) -> None:
        self.http.close()
        self.transport.crash()
        self.deployment.store.close()

    def restart(self) -> None:
        self.crash()
        self.start()

    def settle(self) -> None:
        """Carry out everything that is due now."""
        self.transport.run(self.deployment.scheduler.settle())

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    # --- the operator -----------------------------------------------------------------------------

    def operate(self, kind: Any, method: str, path: str, body: Any = None, **params: Any) -> Any:
        content = body if isinstance(body, bytes) or body is None else encode(body)
        response = self.http.request(
            method,
            f"/v1/operator{path}",
            content=content,
            params=params,
            headers={"Authorization": f"Bearer {self.deployment.keys.operator_token}"},
        )
        if not response.is_success:
            raise error_from_problem(response.status_code, response.content)
        return None if response.status_code == 204 else decode(response.content, kind)

    def token(self, **limits: Any) -> str:
        view = self.operate(dict, "POST", f"/populations/{POPULATION}/tokens", limits)
        return str(view["token"])

    def push_plan(self) -> Stored:
        stored: Stored = self.operate(Stored, "POST", "/plans", self.plan.to_bytes())
        return stored

    def push_checkpoint(self, plan_hash: str, seed: int = 0) -> Stored:
        data = tensors.encode_tree(initial_checkpoint(self.plan.manifest, seed))
        stored: Stored = self.operate(Stored, "POST", "/checkpoints", data, plan_hash=plan_hash)
        return stored

    def create_task(self, kind: TaskKind = TaskKind.TRAIN, **fields: Any) -> TaskView:
        plan_hash = self.push_plan().hash
        if "checkpoints" not in fields:
            seeds = (0,) if kind is TaskKind.TRAIN else (0, 1)
            fields["checkpoints"] = tuple(self.push_checkpoint(plan_hash, s).hash for s in seeds)
        spec = TaskSpec(
            **{
                "name": str(kind),
                "population": POPULATION,
                "kind": kind,
                "plan_hash": plan_hash,
                "goal": 4,
                "minimum": 3,
                "over_selection": 1.0,
                "pool_target": 1,  # the window ends as soon as the cohort is there
                "selection_s": 60.0,
                "deadline_s": 600.0,
                "retry": RetryWindow(earliest_s=1.0, latest_s=2.0),
                "criteria": Criteria(requires=()),
                "seed": 7,
                **fields,
            }
        )
        task: TaskView = self.operate(TaskView, "POST", "/tasks", spec)
        return task

    def task(self, task: TaskView) -> TaskView:
        view: TaskView = self.operate(TaskView, "GET", f"/tasks/{task.task_id}")
        return view

    def rounds(self, task: TaskView) -> list[RoundSummary]:
        views: list[RoundSummary] = self.operate(
            list[RoundSummary], "GET", f"/tasks/{task.task_id}/rounds"
        )
        return views

    def release(self, plan_hash: str, checkpoint: str, version: str, **fields: Any) -> ReleaseView:
        request = {
            "population": POPULATION,
            "slot": "default",
            "plan_hash": plan_hash,
            "checkpoint": checkpoint,
            "version": version,
            **fields,
        }
        view: ReleaseView = self.operate(ReleaseView, "POST", "/releases", request)
        return view

    # --- rounds -----------------------------------------------------------------------------------

    def gather(
        self, task: TaskView, number: int = 1, attempt: int = 1, devices: list[Device] | None = None
    ) -> list[tuple[Device, Assigned]]:
        """Let devices claim, end the selection window, and return those that were drawn."""
        pool = self.devices if devices is None else devices
        for device in pool:
            device.claim(task, number, attempt)
        self.settle()
        if self.rounds(task)[-1].state == "open":
            self.clock.advance(task.spec.selection_s)
            for device in pool:  # still there
                device.claim(task, number, attempt)
            self.settle()
        replies = [(device, device.claim(task, number, attempt)) for device in pool]
        return [(device, reply) for device, reply in replies if isinstance(reply, Assigned)]

    def run_round(self, task: TaskView, number: int = 1) -> RoundSummary:
        """One whole round in which every drawn device reports."""
        for device, assigned in self.gather(task, number):
            device.report(assigned)
        self.settle()
        (summary,) = (
            view for view in self.rounds(task) if view.round_number == number and view.attempt == 1
        )
        return summary
