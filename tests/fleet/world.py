"""A whole world in one process: the real server over a real data directory, a manual clock, synthetic devices.

Devices sign their requests and send real contributions; only their training is made up. `settle` carries out
everything that is due, so that no test sleeps.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import httpx

from homespun.clock import ManualClock
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
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Criteria,
    RetryWindow,
    TaskKind,
    decode,
    encode,
)
from homespun.protocol.problem import error_from_problem
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import ReleaseView, RoundSummary, Stored, TaskView
from homespun.server.app import create_app
from homespun.server.deployment import Deployment
from homespun.server.settings import Settings
from homespun.tensors import codec as tensors
from tests.fleet.device import POPULATION, Device
from tests.fleet.inprocess import InProcess
from tests.fleet.member import Member, play

NEVER_S = 1e6


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory for a server's data; in memory if there is such a place, because disks are slow to sync.

    What dies in these tests is at most a process, and never takes with it what the system holds.
    """
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


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


class World:
    """The server over `data_dir`, with an operator and enrolled devices."""

    def __init__(
        self, data_dir: Path, num_devices: int = 0, plan: Plan | None = None, **settings: Any
    ):
        self.clock = ManualClock()
        self.settings = Settings(
            data_dir=data_dir, **{"tick_s": NEVER_S, "batch_s": 0.0, **settings}
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
                "min_group": 3,
                "aggregation": Aggregation.PLAIN,
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

    def members(self, task: TaskView, number: int = 1, attempt: int = 1) -> list[Member]:
        """The drawn devices of a securely aggregated round, before they ask for a group."""
        cohort = self.gather(task, number, attempt)
        return [Member(device, assigned, task.spec.name) for device, assigned in cohort]

    def report(self, task: TaskView, cohort: list[tuple[Device, Assigned]]) -> None:
        """These devices report, as the task asks, and what is due then is carried out."""
        if task.spec.aggregation is Aggregation.SECURE:
            play(self, [Member(*pair, task.spec.name) for pair in cohort])
        else:
            for device, assigned in cohort:
                device.report(assigned)
        self.settle()

    def run_round(self, task: TaskView, number: int = 1) -> RoundSummary:
        """One whole round in which every drawn device reports."""
        self.report(task, self.gather(task, number))
        (summary,) = (
            view for view in self.rounds(task) if view.round_number == number and view.attempt == 1
        )
        return summary
