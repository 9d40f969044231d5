"""What a person decides about their device while its process runs: its policy, its data, and proof of what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from homespun.protocol.messages import Comparison, Criteria, RetryWindow, TaskKind
from homespun.protocol.tasks import TaskSpec
from homespun.tensors.codec import encode_tree
from tests.e2e.companions import companions
from tests.e2e.processes import CLOCK, Device, Server, assert_fails, eventually, homespun, printed
from tests.e2e.test_device_process import (
    INITIAL,
    KEYBOARD,
    create_task,
    make_device,
    start_endless_training,
    train,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("device-owner") / "server")
    yield server
    server.kill()


@pytest.fixture
def device(server: Server, tmp_path: Path) -> Iterator[Device]:
    device = make_device(tmp_path / tmp_path.name, server)
    device.start()
    yield device
    device.process.kill()


def why(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        printed("device", "why", "--dir", device.home.root, "--json")
    )
    return found


def policy(device: Device, rule: str) -> None:
    printed("device", "policy", "--dir", device.home.root, "--set", rule)


def test_switched_off_in_the_middle_of_training_it_stops_within_two_seconds(
    server: Server, device: Device
):
    start_endless_training(server, device)
    policy(device, "is_enabled=no")
    eventually(
        lambda: [r.code for r in device.status().refusals] == ["switched_off"], "it has stopped"
    )
    assert CLOCK.now() - device.home.settings_file.stat().st_mtime < 2.0
    eventually(lambda: not list(device.home.work.iterdir()), "its files are gone")
    found = why(device)
    assert found["is_running"]
    assert found["text"][0] == "not asking the server for work: taking part is switched off"
    printed("device", "verify", "--dir", device.home.root)
    asked_at = device.status().checked_in_at
    policy(device, "is_enabled=yes")
    eventually(lambda: device.status().checked_in_at != asked_at, "it asks again")
    assert device.log.read_text() == ""


def test_what_a_task_asks_and_the_device_lacks_is_said_and_can_be_changed(
    server: Server, device: Device
):
    """Too few, then undeclared, then too strict a policy, then it takes part."""
    where = (Comparison(field="stars", op=">=", value=4),)
    spec = spec_of(server, device, Criteria(collection="reviews", where=where, min_examples=5))
    task = server.client.create_task(spec)
    eventually(lambda: device.status().refusals, "the task is refused")
    assert "there is no collection 'reviews'" in why(device)["text"][0]
    add = ("device", "add", "--dir", device.home.root, "--collection", "reviews")
    printed(*add, "--declare", "stars=integer")
    texts = [f"thank you for the number {n}" for n in range(40)]
    printed(*add, *texts, "--field", "stars=2")
    eventually(
        lambda: "0 relevant examples, the task needs 5" in device.status().verdict, "none fits"
    )
    policy(device, "min_group=50")
    printed(*add, *texts, "--field", "stars=5")
    eventually(
        lambda: [r.code for r in device.status().refusals] == ["small_group"],
        "the examples are there, the policy forbids it",
    )
    assert "the device's policy asks for 50" in why(device)["text"][0]
    policy(device, "min_group=3")
    with companions(server, KEYBOARD) as others:
        others.take_part(task)
    eventually(lambda: ("reviews", 1, "included") in device.outcomes(), "it took part")


def spec_of(server: Server, device: Device, criteria: Criteria) -> TaskSpec:
    plan_hash = server.client.push_plan(KEYBOARD.to_bytes()).hash
    checkpoint = server.client.push_checkpoint(encode_tree(INITIAL), plan_hash).hash
    return TaskSpec(
        name="reviews",
        population=device.home.settings().population,
        kind=TaskKind.TRAIN,
        plan_hash=plan_hash,
        checkpoints=(checkpoint,),
        goal=3,
        minimum=3,
        min_group=3,
        over_selection=1.0,
        pool_target=3,
        selection_s=600.0,
        deadline_s=600.0,
        retry=RetryWindow(earliest_s=0.1, latest_s=0.2),
        criteria=criteria,
    )


def test_verifying_and_forgetting_while_it_trains(server: Server, device: Device):
    start_endless_training(server, device)
    found = json.loads(printed("device", "verify", "--dir", device.home.root, "--json"))
    (session,) = device.home.work.iterdir()
    assert (found["under_way"], found["num_files_under_way"]) == (session.name, 2)
    assert found["left"] == []
    (device.home.work / "0123456789abcdef").mkdir()
    (device.home.work / "0123456789abcdef" / "plan.zip").write_bytes(b"of another session")
    done = homespun("device", "verify", "--dir", device.home.root)
    assert done.returncode == 1
    assert "work/0123456789abcdef" in done.stdout
    assert "work/" + session.name not in done.stdout
    refused = homespun("device", "forget", "--dir", device.home.root, "--yes")
    assert_fails(refused, "conflict", "another process is running the device")
    assert why(device)["text"][0] == "taking part in round 1 of train: training"
    device.process.terminate()
    printed("device", "forget", "--dir", device.home.root, "--yes")
    assert not list(device.home.root.glob("examples.db*"))
    printed("device", "verify", "--dir", device.home.root)


def test_verifying_all_the_time_finds_nothing_while_the_device_lives(
    server: Server, device: Device
):
    """Every file comes and goes in a life; whenever one looks, nothing of the past is there."""
    plan_hash = server.client.push_plan(KEYBOARD.to_bytes()).hash
    create_task(server, device, plan_hash, "idle")  # nobody fills it
    looks = [homespun("device", "verify", "--dir", device.home.root) for _ in range(3)]
    assert [done.returncode for done in looks] == [0, 0, 0], looks


def test_data_can_be_deleted_while_the_device_runs(server: Server, device: Device):
    train(server, device)
    assert "80 deleted" in printed(
        "device", "data", "delete", "--all", "--yes", "--dir", device.home.root
    )
    eventually(lambda: device.status().num_examples == 0, "the device knows")
    device.process.check()


def test_enrolling_again_keeps_the_policy(server: Server, tmp_path: Path):
    device = make_device(tmp_path / tmp_path.name, server)
    policy(device, "max_daily_participations=7")
    again = (
        *("device", "enroll", "--dir", device.home.root, "--server", server.url),
        *("--population", device.home.root.name, "--token", server.token(device.home.root.name)),
    )
    printed(*again)
    kept = device.home.settings().policy
    assert (kept.max_daily_participations, kept.min_group) == (7, 3)
    printed(*again, "--min-group", 12, "--allow-plain")
    told = device.home.settings().policy
    assert (told.max_daily_participations, told.min_group, told.allow_plain) == (7, 12, True)
