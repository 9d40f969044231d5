"""A real server process, killed with SIGKILL again and again: what it acknowledged is in the sum once.

Once while plain reports come in, once while groups of secure aggregation go through their steps.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from homespun.clock import SystemClock
from homespun.learning.algorithm import Algorithm
from homespun.learning.optimizers import server_optimizer
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.group import GroupState
from homespun.protocol.messages import Aggregation, Assigned, Receipt, Waiting
from homespun.protocol.tasks import GroupSpec
from homespun.protocol.views import Event, TaskView
from homespun.tensors import codec as tensors
from tests.fleet.device import POPULATION, Device
from tests.fleet.member import STEPS, Member
from tests.fleet.world import World, synthetic_plan

PATIENCE_S = 60.0
PAUSE_S = 0.1

START = """
import sys
from pathlib import Path
from homespun.server.app import serve
from homespun.server.settings import Settings
serve(Settings(data_dir=Path(sys.argv[1]), port=int(sys.argv[2])))
"""
NUM_DEVICES = 24
GROUP_SIZE = 8


class RealWorld(World):
    """The same operator and devices, but the server is a process and the time is real."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.clock = SystemClock()  # type: ignore[assignment]
        self.plan = synthetic_plan((2000,))
        self.port = 0
        self.clients: list[httpx.Client] = []
        self.start()
        self.operate(dict, "POST", "/populations", {"name": POPULATION})
        self.devices = [Device(self, index) for index in range(NUM_DEVICES)]
        token = self.token()
        for device in self.devices:
            device.enroll(token)

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(self.data_dir), str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Homespun server ready at http://127.0.0.1:"), line
        ready = json.loads((self.data_dir / "server.json").read_text())
        assert (ready["pid"], ready["url"]) == (self.process.pid, line.split()[-1])
        self.port = int(ready["url"].rpartition(":")[2])
        # Connections to a server that was killed may still be in use by a device's thread.
        self.http = httpx.Client(base_url=ready["url"], timeout=30, trust_env=False)
        self.clients.append(self.http)

    def operate(self, kind, method, path, body=None, **params):
        self.deployment = Keyring((self.data_dir / "operator.token").read_text().strip())  # type: ignore[assignment]
        return super().operate(kind, method, path, body, **params)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)


class Keyring:
    """What `World.operate` takes from a deployment."""

    def __init__(self, operator_token: str) -> None:
        self.keys = self
        self.operator_token = operator_token


@pytest.fixture
def world(tmp_path: Path):
    world = RealWorld(tmp_path)
    yield world
    world.kill()
    for client in world.clients:
        client.close()


def insist(call):
    """Do as devices do: repeat until there is an answer, after a pause."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the server did not come back"
            time.sleep(PAUSE_S)


def claimed(world: RealWorld, task: TaskView) -> list[Assigned]:
    """Every device's ticket of the first round."""
    with ThreadPoolExecutor(NUM_DEVICES) as pool:
        tickets = list(pool.map(lambda device: device.claim(task, 1, 1, 20.0), world.devices))
    assert all(isinstance(ticket, Assigned) for ticket in tickets)
    return tickets


def test_kill_while_reports_come_in(world: RealWorld):
    task = world.create_task(goal=NUM_DEVICES, aggregation=Aggregation.PLAIN)
    tickets = claimed(world, task)
    acknowledged: list[Receipt] = []
    rng = random.Random(1)

    def report(pair: tuple[Device, Assigned]) -> Receipt:
        receipt: Receipt = insist(lambda: pair[0].report(pair[1]))
        acknowledged.append(receipt)
        return receipt

    def kill_again_and_again() -> None:
        for enough in (3, 9, 15):
            while len(acknowledged) < enough:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.01)
            world.kill()
            world.start()

    def slowly(pair: tuple[Device, Assigned]) -> Receipt:
        time.sleep(pair[0].index * 0.05)
        return report(pair)

    with ThreadPoolExecutor(NUM_DEVICES + 1) as pool:
        killing = pool.submit(kill_again_and_again)
        list(pool.map(slowly, zip(world.devices, tickets, strict=True)))
        killing.result(PATIENCE_S)
    assert_all_included(world, task, tickets)


def test_kill_while_groups_go_through_their_steps(world: RealWorld):
    task = world.create_task(
        goal=NUM_DEVICES,
        aggregation=Aggregation.SECURE,
        groups=GroupSpec(size=GROUP_SIZE, step_s=PATIENCE_S),
    )
    tickets = claimed(world, task)
    members = [
        Member(device, ticket, task.spec.name)
        for device, ticket in zip(world.devices, tickets, strict=True)
    ]
    answered: dict[str, list[int]] = {step: [] for step in STEPS}
    rng = random.Random(2)

    def kill_in_every_step() -> None:
        for step in STEPS:
            while len(answered[step]) < NUM_DEVICES // 3:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            world.kill()
            world.start()

    def take_part(member: Member) -> None:
        """As `device.runtime` does: what was asked before the connection broke is asked for again, or sent again."""
        forgetful = random.Random(member.device.index)
        while not member.through:
            asked = member.asked
            try:
                if asked is None or member.last is None or isinstance(member.last, Waiting):
                    member.ask(5)
                else:
                    step, body = member.answer(member.last)
                    time.sleep(member.device.index * 0.01)
                    member.sent[step] = body
                    if forgetful.random() < 0.3:
                        member.put(step, body)  # the reply is lost on its way
                    if forgetful.random() < 0.5:
                        member.send(step, body)
                    else:
                        insist(lambda step=step, body=body: member.send(step, body))
                    answered[step].append(member.device.index)
            except httpx.TransportError:
                member.last = None
                time.sleep(PAUSE_S)

    with ThreadPoolExecutor(NUM_DEVICES + 1) as pool:
        killing = pool.submit(kill_in_every_step)
        for taking_part in [pool.submit(take_part, member) for member in members]:
            taking_part.result(2 * PATIENCE_S)
        killing.result(PATIENCE_S)
    assert_all_included(world, task, tickets)
    (summary,) = world.rounds(task)
    assert [(group.state, group.num_masked) for group in summary.groups] == [
        (GroupState.OPENED, GROUP_SIZE)
    ] * (NUM_DEVICES // GROUP_SIZE)
    for member, ticket in zip(members, tickets, strict=True):
        sent = tensors.digest(member.sent["mask-input"])
        assert member.device.receipt(ticket).digest == sent


def assert_all_included(world: RealWorld, task: TaskView, tickets: list[Assigned]) -> None:
    """The round's checkpoint is of exactly the sum of what all devices have said, and they know."""
    deadline = time.monotonic() + PATIENCE_S
    while world.task(task).state == "active":
        assert time.monotonic() < deadline, "the task does not end"
        time.sleep(0.01)
    (summary,) = world.rounds(task)
    assert summary.num_reported == NUM_DEVICES
    assert summary.checkpoint == expected_checkpoint(world, tickets)
    for device, ticket in zip(world.devices, tickets, strict=True):
        receipt = device.receipt(ticket)
        assert (receipt.state, receipt.checkpoint) == ("included", summary.checkpoint)


def expected_checkpoint(world: RealWorld, tickets: list[Assigned]) -> str:
    manifest = world.plan.manifest
    codec = world.devices[0].codec(tickets[0])
    contributions = [
        device.contribution(ticket) for device, ticket in zip(world.devices, tickets, strict=True)
    ]
    algorithm = Algorithm(manifest.shapes, codec, server_optimizer("FedAvg", {}))
    initial = initial_checkpoint(manifest, 0)
    parameters, _, _ = algorithm.server_update(initial, {}, *contributions)
    return tensors.digest(tensors.encode_tree(parameters))


def test_a_graceful_stop_ends_long_polls_at_once(world: RealWorld):
    world.create_task(goal=NUM_DEVICES)
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        poll = pool.submit(world.operate, list[Event], "GET", "/events", after=10_000, wait_s=25.0)
        time.sleep(0.3)
        world.stop()
        assert world.process.returncode == 0
        assert poll.result(timeout=10) == []
    assert time.monotonic() - began < 15
    assert not (world.data_dir / "server.json").exists()


def test_the_process_is_small_and_idle_while_devices_wait(world: RealWorld):
    import psutil

    process = psutil.Process(world.process.pid)
    with ThreadPoolExecutor(NUM_DEVICES) as pool:
        polls = [pool.submit(device.check_in, 3.0) for device in world.devices]
        time.sleep(1.0)
        before = sum(process.cpu_times()[:2])
        time.sleep(1.0)
        used = sum(process.cpu_times()[:2]) - before
        for poll in polls:
            poll.result()
    assert used < 0.1
    assert process.memory_info().rss < 200e6
