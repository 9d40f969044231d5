"""Devices that come back after their round closed, and a task that never waits for a round: as real processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from homespun import zoo
from homespun.device.conditions import ScriptedConditions
from homespun.device.connection import Connection, http_client
from homespun.device.identity import Identity
from homespun.device.runtime import Runtime
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Contribution
from homespun.learning.optimizers import server_optimizer
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import Assigned, Mode, RetryWindow, TaskKind
from homespun.protocol.session import SessionState
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import RoundSummary, TaskView
from homespun.server.aggregation import contribution_codec, encoding, round_seed
from homespun.tensors.codec import decode_tree, digest, encode_tree
from tests.e2e.processes import CLOCK, MIN_GROUP, POPULATION, Device, Server, eventually, try_
from tests.e2e.recomputed import contribution, encoded_again, examples_for
from tests.unit.device_server import images

PLAN = zoo.load("digits")
IMAGES = images(180)
NUM_DEVICES = 6
NEVER_S = 600.0


class Fleet:
    """A server and devices that are not running yet."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root, self.server = root, Server(root / "server")
        stack.callback(self.server.kill)
        token = self.server.token()
        self.devices = [
            Device.enrolled(
                root / f"device-{i}", self.server.url, token, IMAGES[i::NUM_DEVICES], seed=i
            )
            for i in range(NUM_DEVICES)
        ]
        self.examples = [examples_for(device, TaskKind.TRAIN) for device in self.devices]
        self._stack = stack

    def start(self, index: int) -> None:
        self.devices[index].start()
        self._stack.callback(self.devices[index].kill)

    def create_task(self, **fields: object) -> TaskView:
        client = self.server.client
        plan_hash = client.push_plan(PLAN.to_bytes()).hash
        initial = encode_tree(initial_checkpoint(PLAN.manifest, 0))
        spec = TaskSpec(
            name="digits",
            population=POPULATION,
            kind=TaskKind.TRAIN,
            plan_hash=plan_hash,
            checkpoints=(client.push_checkpoint(initial, plan_hash).hash,),
            min_group=MIN_GROUP,
            retry=RetryWindow(earliest_s=0.1, latest_s=0.2),
            deadline_s=NEVER_S,
            **{"goal": MIN_GROUP, "minimum": MIN_GROUP, **fields},  # type: ignore[arg-type]
        )
        return client.create_task(spec)

    def rounds(self, task: TaskView) -> list[RoundSummary]:
        return try_(lambda: self.server.client.rounds(task.task_id)) or []

    def committed(self, task: TaskView, number: int) -> RoundSummary:
        """A round, once it has a checkpoint."""

        def look() -> RoundSummary | None:
            found = [r for r in self.rounds(task) if r.round_number == number and r.checkpoint]
            return found[0] if found else None

        summary = eventually(look, f"round {number} is committed")
        assert summary is not None
        return summary

    def assigned(self, task: TaskView, summary: RoundSummary) -> Assigned:
        spec, place = task.spec, (summary.round_number, summary.attempt)
        assert summary.base_checkpoint is not None
        return Assigned(
            assignment_id="",
            kind=spec.kind,
            round_number=summary.round_number,
            attempt=summary.attempt,
            plan_hash=spec.plan_hash,
            checkpoints=(summary.base_checkpoint,),
            encoding=encoding(spec, PLAN.manifest, *place),
            aggregation=spec.aggregation,
            seed=round_seed(spec, *place),
            deadline_s=spec.deadline_s,
            max_staleness=spec.max_staleness,
        )


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


def run_to_intent(device: Device) -> None:
    """The device works until its report is ready, and dies before a byte of it has left."""
    client = http_client(device.home.settings().server)
    connection = Connection(client, Identity.load(device.home.identity_file), CLOCK)
    runtime = Runtime(device.home, connection, ScriptedConditions((), 0.0), CLOCK)
    try:
        eventually(
            lambda: runtime.step() >= 0 and runtime.session.state is SessionState.INTENT,
            "it has trained",
        )
    finally:
        runtime._journal.close()  # as a process that is gone
        runtime._examples.close()
        client.close()


def outcomes(device: Device, number: int) -> list[str]:
    return [outcome for _, round_number, outcome in device.outcomes() if round_number == number]


def ended(device: Device, number: int) -> list[str]:
    """How its sessions of that round ended, as far as the device knows it for good."""
    return [o for o in outcomes(device, number) if o in ("included", "late")]


def test_a_straggler_is_in_the_next_checkpoint_with_less_weight(fleet: Fleet):
    *others, extra, slow = range(NUM_DEVICES)
    for index in others:
        fleet.start(index)
    task = fleet.create_task(
        num_rounds=2,
        goal=4,
        over_selection=1.25,
        pool_target=5,
        selection_s=NEVER_S,
        max_staleness=1,
    )
    run_to_intent(fleet.devices[slow])
    first = fleet.committed(task, 1)
    assert (first.num_assigned, first.num_reported, first.num_late) == (5, 4, 0)
    fleet.start(slow)  # it carries on, after its round has closed
    eventually(lambda: fleet.devices[slow].status().state == "reporting", "it asks for a group")
    fleet.start(extra)  # now five are there, and the next round begins
    second = fleet.committed(task, 2)
    assert (second.num_carried, second.num_reported) == (1, 4)
    eventually(lambda: outcomes(fleet.devices[slow], 2) == ["included"], "it knows")

    # The straggler took one of the five places of the draw: one of five devices was not drawn, and one is late.
    assert second.num_assigned == 4
    rest = [fleet.devices[index] for index in (*others, extra)]
    eventually(
        lambda: sum(ended(device, 2) != [] for device in rest) == 4, "all who were drawn know"
    )
    included = [i for i in (*others, extra) if ended(fleet.devices[i], 2) == ["included"]]
    assert len(included) == 3
    straggler = encoded_again(
        fleet.devices[slow],
        fleet.assigned(task, first),
        fleet.assigned(task, second),
        fleet.examples[slow],
        fleet.server,
        fleet.root / "scratch-slow",
    )
    said: list[Contribution] = [straggler]
    for index in included:
        scratch, examples = fleet.root / f"scratch-{index}", fleet.examples[index]
        assigned = fleet.assigned(task, second)
        said.append(contribution(fleet.devices[index], assigned, examples, fleet.server, scratch))
    codec = contribution_codec(task.spec, PLAN.manifest, 2, 1)
    algorithm = Algorithm(PLAN.manifest.shapes, codec, server_optimizer("FedAvg", {}))
    downloaded = fleet.root / f"scratch-{included[0]}" / "checkpoint-0.safetensors"
    base = decode_tree(downloaded.read_bytes())
    moved, _, _ = algorithm.server_update(base, {}, *said)
    assert second.checkpoint == digest(encode_tree(moved))
    assert not list(fleet.devices[slow].home.work.iterdir())


def test_an_async_task_to_its_end(fleet: Fleet):
    """Six devices, four of them at work at any time; the server dies on the way."""
    for index in range(NUM_DEVICES):
        fleet.start(index)
    num_rounds = 6
    task = fleet.create_task(mode=Mode.ASYNC, concurrency=4, max_staleness=5, num_rounds=num_rounds)
    fleet.committed(task, 2)
    fleet.server.restart()
    fleet.committed(task, num_rounds)
    assert fleet.server.client.task(task.task_id).state == "finished"
    rounds = fleet.rounds(task)
    assert [r.round_number for r in rounds] == list(range(1, num_rounds + 1))
    for before, after in pairwise(rounds):
        assert after.base_checkpoint == before.checkpoint
    included: Counter[int] = Counter()
    for device in fleet.devices:

        def settled(device: Device = device) -> bool:
            busy = list(device.home.work.iterdir())
            return not busy and all(
                o in ("included", "late", "void") for *_, o in device.outcomes()
            )

        eventually(settled, "every device knows how it ended, and keeps nothing")
        included.update(number for _, number, o in device.outcomes() if o == "included")
    assert included == {r.round_number: r.num_reported for r in rounds}
    assert min(included.values()) >= MIN_GROUP
