"""Parity: where devices and server run, in which order, and how they are summed, changes no bit of any checkpoint.

One training task goes through devices and a server in one process on a clock that is moved by hand, through
processes over HTTP, and through a server that is killed in the middle of every step of a group. Every round's
checkpoint and its chain are the same, and the same as without secure aggregation.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from homespun import zoo
from homespun.device.conditions import ScriptedConditions
from homespun.device.connection import Connection
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.labour import work_on
from homespun.device.runtime import Runtime
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.eligibility import Policy
from homespun.protocol.group import GroupState
from homespun.protocol.messages import Aggregation, RetryWindow, TaskKind
from homespun.protocol.tasks import GroupSpec, OptimizerSpec, TaskSpec
from homespun.protocol.views import CheckpointView, RoundSummary
from homespun.tensors.codec import encode_tree
from tests.e2e.processes import MIN_GROUP, Device, Server, eventually, try_
from tests.e2e.wiretap import Wiretap
from tests.fleet.device import POPULATION as WORLD_POPULATION
from tests.fleet.world import World
from tests.unit.device_server import images

NUM_DEVICES = 6
NUM_ROUNDS = 3
EXAMPLES = [images(45 * NUM_DEVICES)[index::NUM_DEVICES] for index in range(NUM_DEVICES)]
RETRY = RetryWindow(earliest_s=0.1, latest_s=0.2)

History = list[tuple[int, str, str]]
"""Of every committed round: its number, checkpoint and chain."""


def task(seed: int = 5, aggregation: Aggregation = Aggregation.SECURE) -> dict[str, Any]:
    """Every device takes part in every round, or there is none."""
    return {
        "name": "digits",
        "kind": TaskKind.TRAIN,
        "num_rounds": NUM_ROUNDS,
        "goal": NUM_DEVICES,
        "minimum": NUM_DEVICES,
        "over_selection": 1.0,
        "pool_target": NUM_DEVICES,
        "selection_s": 600.0,
        "deadline_s": 600.0,
        "retry": RETRY,
        "aggregation": aggregation,
        "min_group": MIN_GROUP,
        "groups": GroupSpec(step_s=600.0),
        "optimizer": OptimizerSpec(name="FedAdam", settings={"learning_rate": 0.02}),
        "seed": seed,
    }


def history(checkpoints: list[CheckpointView]) -> History:
    found = [(c.round_number, c.hash, c.chain) for c in checkpoints if c.round_number]
    return sorted(found)


def assert_whole(rounds: list[RoundSummary], aggregation: Aggregation = Aggregation.SECURE) -> None:
    """Every round went well the first time, in one group of all devices if it was secure."""
    assert [summary.attempt for summary in rounds] == [1] * NUM_ROUNDS
    for summary in rounds:
        groups = [(group.state, group.num_masked) for group in summary.groups]
        secure = aggregation is Aggregation.SECURE
        assert groups == ([(GroupState.OPENED, NUM_DEVICES)] if secure else [])


# --- in one process -----------------------------------------------------------------------------------


def join(world: World, root: Path, index: int, policy: Policy) -> tuple[Runtime, httpx.Client]:
    """One device of the world, from nothing to a runtime that can be stepped."""
    home, clock = Home(root), world.clock
    identity = Identity.load_or_create(home.identity_file, seed=index)
    client = httpx.Client(transport=world.transport, base_url="http://homespun")
    connection = Connection(client, identity, clock)
    enrolled = connection.enroll(WORLD_POPULATION, world.token())
    settings = Settings(
        server="http://homespun",
        population=WORLD_POPULATION,
        device_id=enrolled.device_id,
        publisher_keys=enrolled.publisher_keys,
        seed=index,
        policy=policy,
        conditions=(),
        poll_s=0.0,
    )
    home.write_settings(settings)
    store = open_examples(home, settings)
    store.add_many(EXAMPLES[index], clock.now())
    store.close()
    conditions = ScriptedConditions((), clock.now())
    return Runtime(home, connection, conditions, clock, labour=work_on), client


def in_process(
    root: Path,
    order: Callable[[list[Runtime]], object] = lambda devices: None,
    seed: int = 5,
    aggregation: Aggregation = Aggregation.SECURE,
) -> History:
    """The task in one process; `order` puts the devices in the order of each turn."""
    world = World(root / "server", plan=zoo.load("digits"))
    policy = Policy(min_group=MIN_GROUP, allow_plain=aggregation is Aggregation.PLAIN)
    with ExitStack() as stack:
        stack.callback(world.stop)
        view = world.create_task(**task(seed, aggregation))
        runtimes = []
        for index in range(NUM_DEVICES):
            runtime, client = join(world, root / f"device-{index}", index, policy)
            runtimes.append(runtime)
            stack.callback(client.close)
            stack.callback(runtime.close)
        for _ in range(1000):
            if world.task(view).state != "active":
                break
            order(runtimes)
            for runtime in runtimes:
                runtime.step()
            world.settle()
            world.clock.advance(0.05)
        assert world.task(view).state == "finished"
        assert_whole(world.rounds(view), aggregation)
        return history(world.operate(list[CheckpointView], "GET", "/models"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> History:
    """What every other way must give, too."""
    return in_process(tmp_path_factory.mktemp("expected"))


def test_the_order_of_the_devices_does_not_matter(tmp_path: Path, expected: History):
    assert [number for number, _, _ in expected] == [1, 2, 3]
    assert len({checkpoint for _, checkpoint, _ in expected}) == NUM_ROUNDS
    other = in_process(tmp_path / "other", seed=6, aggregation=Aggregation.PLAIN)
    assert other != expected  # so the devices' work is in it
    assert in_process(tmp_path / "shuffled", random.Random(1).shuffle) == expected


def test_masks_leave_no_trace_in_the_sum(tmp_path: Path, expected: History):
    assert in_process(tmp_path, aggregation=Aggregation.PLAIN) == expected


# --- in processes -------------------------------------------------------------------------------------


class Fleet:
    """A server process and the directories of its devices, ready to be started."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.server, self._stack = Server(root / "server"), stack
        stack.callback(self.server.kill)
        self._token, self._root = self.server.token(), root

    def device(self, index: int, url: str) -> Device:
        """A running device that finds the server at `url`."""
        root = self._root / f"device-{index}"
        device = Device.enrolled(root, url, self._token, EXAMPLES[index], seed=index)
        device.start()
        self._stack.callback(device.process.kill)
        return device

    def create_task(self) -> str:
        plan, client = zoo.load("digits"), self.server.client
        plan_hash = client.push_plan(plan.to_bytes()).hash
        initial = encode_tree(initial_checkpoint(plan.manifest, 0))
        checkpoint = client.push_checkpoint(initial, plan_hash).hash
        spec = TaskSpec(
            population="tests", plan_hash=plan_hash, checkpoints=(checkpoint,), **task()
        )
        return client.create_task(spec).task_id

    def round(self, task_id: str) -> RoundSummary:
        """The newest round attempt."""
        return self.server.client.rounds(task_id)[-1]

    def finish(self, task_id: str, devices: Sequence[Device]) -> History:
        """Wait for the end of the task; then everything stops in good order."""
        client = self.server.client
        eventually(lambda: client.task(task_id).state != "active", "the task ends")
        assert client.task(task_id).state == "finished"
        assert_whole(client.rounds(task_id))
        found = history(client.checkpoints())
        for device in devices:
            device.stop()
        self.server.stop()
        return found


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_processes_over_http_give_the_same_checkpoints(
    tmp_path: Path, expected: History, stack: ExitStack
):
    fleet = Fleet(tmp_path, stack)
    devices = [fleet.device(index, fleet.server.url) for index in range(NUM_DEVICES)]
    assert fleet.finish(fleet.create_task(), devices) == expected


class Gate:
    """Holds back the first answer to each of these steps that comes its way, in their order."""

    def __init__(self, steps: Sequence[str]) -> None:
        self._steps = {step: (threading.Event(), threading.Event()) for step in steps}

    def __call__(self, data: bytes) -> None:
        request = data.partition(b"\r\n")[0]
        for step, (reached, opened) in self._steps.items():
            if not reached.is_set():
                if request.startswith(b"PUT ") and f"/group/{step} ".encode() in request:
                    reached.set()
                    assert opened.wait(60)
                return

    def wait(self, step: str) -> None:
        """Until it holds back an answer to `step`."""
        assert self._steps[step][0].wait(60)

    def open(self, step: str) -> None:
        self._steps[step][1].set()

    def stay_open(self) -> None:
        for events in self._steps.values():
            for event in events:
                event.set()


HELD = {
    "advertise-keys": "num_devices",
    "share-keys": "num_shared",
    "mask-input": "num_masked",
    "agree": "num_agreed",
}
"""Steps that wait for every device, and what its answers are counted in. The last step does not wait for all."""


def test_a_server_killed_in_the_middle_of_every_step_gives_the_same_checkpoints(
    tmp_path: Path, expected: History, stack: ExitStack
):
    fleet, gate = Fleet(tmp_path, stack), Gate(tuple(HELD))
    task_id = fleet.create_task()
    devices = [fleet.device(index, fleet.server.url) for index in range(NUM_DEVICES - 1)]
    eventually(lambda: fleet.round(task_id).num_waiting == NUM_DEVICES - 1, "all but one claimed")
    fleet.server.restart()

    tap = Wiretap(fleet.server.port, gate)
    stack.callback(tap.close)
    stack.callback(gate.stay_open)
    devices.append(fleet.device(NUM_DEVICES - 1, tap.url))
    for step, count in HELD.items():
        gate.wait(step)

        def all_but_one(step: str = step, count: str = count) -> bool:
            found = try_(lambda: fleet.round(task_id).groups)
            progress = [(str(group.state), getattr(group, count)) for group in found or ()]
            return progress == [(step.replace("-", "_"), NUM_DEVICES - 1)]

        eventually(all_but_one, f"all but one answered {step}")
        fleet.server.restart()
        gate.open(step)
    assert fleet.finish(task_id, devices) == expected
