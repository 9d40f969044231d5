"""Devices and the real server, over real HTTP: rounds, an evaluation, a release. The devices share this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from homespun import zoo
from homespun.cli.client import OperatorClient, connect
from homespun.clock import SystemClock
from homespun.device.cleaning import left_over
from homespun.device.conditions import ScriptedConditions, Span
from homespun.device.connection import Connection, http_client
from homespun.device.enrolment import enroll
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.device.labour import work_on
from homespun.device.models import open_models
from homespun.device.runtime import Runtime
from homespun.device.status import Status, read_status
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import Aggregation, RetryWindow, TaskKind
from homespun.protocol.tasks import TaskSpec
from homespun.tensors.codec import encode_tree
from tests.unit.device_server import images

RETRY = RetryWindow(earliest_s=0.05, latest_s=0.1)
CLOCK = SystemClock()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[OperatorClient]:
    """A server process, and its operator."""
    data = tmp_path / "server"
    command = ["-m", "homespun.cli.main", "serve", "--data", str(data), "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, *command, "--until-eof"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert "ready" in server.stdout.readline()
        client = connect(None, None, data)
        yield client
        client._http.close()
    finally:
        server.communicate(timeout=20)


class Fleet:
    """Three devices of one population, stepped in turn whenever one is due."""

    def __init__(self, root: Path, client: OperatorClient) -> None:
        client.create_population("tests")
        token = client.create_token("tests").token
        assert token is not None
        self.homes = [Home(root / f"device-{number}") for number in range(3)]
        self.settings: list[Settings] = []
        self.runtimes: list[Runtime] = []
        self.clients: list[httpx.Client] = []
        for number, home in enumerate(self.homes):
            wanted = Settings(
                server=client.url,
                population="tests",
                policy=Policy(allow_plain=True, min_group=3),
                conditions=(Span(),),
                transient_error=RETRY,
                poll_s=0.0,
            )
            settings = enroll(home, wanted, token, CLOCK, seed=number)
            store = open_examples(home, settings)
            store.add_many(images(60)[number::3] * 3, CLOCK.now())
            store.close()
            identity = Identity.load(home.identity_file)
            self.clients.append(http_client(client.url))
            connection = Connection(self.clients[-1], identity, CLOCK)
            conditions = ScriptedConditions((), CLOCK.now())
            self.settings.append(settings)
            self.runtimes.append(Runtime(home, connection, conditions, CLOCK, labour=work_on))

    def run_until(self, done: Callable[[], bool]) -> None:
        due = [0.0] * len(self.runtimes)
        give_up_at = CLOCK.now() + 30
        while not done():
            assert CLOCK.now() < give_up_at, [self.status(n).verdict for n in range(3)]
            for number, runtime in enumerate(self.runtimes):
                if CLOCK.now() >= due[number]:
                    due[number] = CLOCK.now() + min(runtime.step(), 0.1)

    def close(self) -> None:
        for runtime, client in zip(self.runtimes, self.clients, strict=True):
            runtime.close()
            client.close()

    def status(self, number: int) -> Status:
        found = read_status(self.homes[number])
        assert found is not None
        return found


@pytest.mark.parametrize("aggregation", Aggregation)
def test_whole_sessions_with_the_real_server(
    aggregation: Aggregation, tmp_path: Path, client: OperatorClient
):
    fleet = Fleet(tmp_path, client)
    plan_hash = client.push_plan(zoo.load("digits").to_bytes()).hash
    manifest = zoo.load("digits").manifest
    initial = client.push_checkpoint(encode_tree(initial_checkpoint(manifest, 0)), plan_hash).hash

    def spec(name: str, kind: TaskKind, checkpoints: tuple[str, ...], rounds: int) -> TaskSpec:
        return TaskSpec(
            name=name,
            population="tests",
            kind=kind,
            plan_hash=plan_hash,
            checkpoints=checkpoints,
            num_rounds=rounds,
            goal=3,
            minimum=3,
            over_selection=1.0,
            pool_target=3,
            selection_s=20.0,
            deadline_s=20.0,
            retry=RETRY,
            aggregation=aggregation,
            min_group=3,
        )

    train = client.create_task(spec("train", TaskKind.TRAIN, (initial,), 3)).task_id
    fleet.run_until(lambda: client.task(train).state == "finished")
    head = client.task(train).head
    assert head is not None
    test = client.create_task(spec("test", TaskKind.EVALUATE, (head, initial), 1)).task_id
    fleet.run_until(lambda: client.task(test).state == "finished")
    client.create_release(
        population="tests",
        slot="default",
        plan_hash=plan_hash,
        checkpoint=head,
        version="v1",
    )
    fleet.run_until(lambda: all(fleet.status(number).served for number in range(3)))
    fleet.close()
    for number, (home, settings) in enumerate(zip(fleet.homes, fleet.settings, strict=True)):
        status = fleet.status(number)
        assert status.served["default"].checkpoint == head
        outcomes = [(p.task_name, p.round_number, p.outcome) for p in status.sessions]
        assert sorted(outcomes) == [
            ("test", 1, "included"),
            *(("train", round_number, "included") for round_number in (1, 2, 3)),
        ]
        assert left_over(home, open_models(home, settings)) == []
        assert not list(home.work.iterdir())
