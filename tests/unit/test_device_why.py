"""`why`: what speaks for and against taking part, now, in words and with the values; whether the device runs or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from homespun.clock import ManualClock
from homespun.device.conditions import ScriptedConditions, Span
from homespun.device.examples import open_examples
from homespun.device.policy import set_policy
from homespun.device.why import Why, explain
from homespun.protocol.messages import Bucket, Comparison, Criteria
from homespun.protocol.session import SessionState as S
from tests.unit.device_server import Device, FakeServer
from tests.unit.test_device_cli import enrolled, invoke

NEEDS_200 = Criteria(min_examples=200)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def device(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    yield device
    device.kill()


def why(device: Device) -> Why:
    return explain(device.home, device.clock)


def test_before_the_first_run(tmp_path: Path):
    found = explain(enrolled(tmp_path), ManualClock())
    assert not found.is_running
    assert found.text == ("it has not checked in yet, so no task is known",)
    assert found.waiting_for == "a process that runs the device: homespun device run"
    assert not (tmp_path / "journal.db").exists()


def test_too_few_examples(device: Device, server: FakeServer):
    server.open_round(criteria=NEEDS_200)
    device.run_to(S.REJECTED)
    held = open_examples(device.home, device.settings)
    num_training = held.count(device.clock.now(), held_out=False)
    found = why(device)
    assert found.is_running
    assert found.text == (
        f"not taking part in train-digits: {num_training} relevant examples, the task needs 200",
    )
    assert found.waiting_for.startswith("the next check-in, in 1")
    assert found.retry_at is not None
    (task,) = found.tasks
    assert not task.takes_part
    (check,) = [check for check in task.checks if check.code]
    assert (check.about, check.name, check.holds) == ("criterion", "min_examples", False)
    held.add_many(({"text": str(n)} for n in range(400)), device.clock.now())
    held.close()
    (task,) = why(device).tasks  # judged afresh, though the device has not looked yet
    assert task.takes_part
    assert task.text == "nothing speaks against taking part in train-digits"


def test_conditions(device: Device, server: FakeServer):
    server.open_round(criteria=NEEDS_200)
    device.run_to(S.REJECTED)
    device.kill()
    script = (Span(charging=False, unmetered=None),)
    device.settings = device.home.settings()
    device.home.write_settings(replace(device.settings, conditions=script))
    device.conditions = ScriptedConditions(script, device.clock.now())
    device.clock.advance(60.0)
    device.step()
    found = why(device)
    assert found.text[0] == (
        "not asking the server for work: the device is not charging; "
        "cannot tell whether the device is on an unmetered network"
    )
    assert found.text[1].startswith("not taking part in train-digits: the device is not charging; ")
    assert found.waiting_for == "the device to be charging and on an unmetered network"
    holds = {check.name: check.holds for check in found.checks}
    assert holds == {
        "populations": True, "is_enabled": True, "idle": True, "charging": False, "unmetered": None,
    }  # fmt: skip


def test_a_script_goes_on_where_the_running_device_is(device: Device):
    script = (Span(from_s=0, to_s=100, idle=False),)
    device.home.write_settings(replace(device.settings, conditions=script))
    device.conditions = ScriptedConditions(script, device.clock.now())
    device.step()
    assert "not idle" in why(device).text[0]
    device.clock.advance(100.0)
    assert "not idle" not in why(device).text[0]
    device.kill()
    assert "not idle" in why(device).text[0]  # started now, it would not be


def test_the_policy_of_now(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.CHECKED_IN)
    assert why(device).tasks[0].takes_part
    set_policy(device.home, ["is_enabled=no", "min_group=50"])
    found = why(device)
    device_line, task_line = found.text
    assert device_line == "not asking the server for work: taking part is switched off"
    assert task_line == (
        "not taking part in train-digits: taking part is switched off; "
        "sums over 3 devices; the device's policy asks for 50"
    )
    assert found.waiting_for == "its person: homespun device policy"


def test_in_a_session_and_after_it(device: Device, server: FakeServer):
    server.open_round(criteria=Criteria(min_examples=3, min_separation_s=86_400.0))
    device.run_to(S.TRAINING)
    found = why(device)
    assert found.text == ("taking part in round 1 of train-digits: training",)
    assert found.waiting_for == "the end of the round"
    device.run_session()
    for number in (1, 2):  # running, and after it was killed
        if number == 2:
            device.kill()
        (task,) = why(device).tasks
        assert "took part in this task" in task.text
        assert "24 h must lie between" in task.text
        assert "took part in round 1 of this task" in task.text


def test_unknown_is_said_with_its_reason(device: Device, server: FakeServer):
    where = (Comparison(field="stars", op=">", value=3),)
    server.open_round(criteria=Criteria(where=where, bucket=Bucket(salt="s")))
    device.run_to(S.REJECTED)
    (task,) = why(device).tasks
    assert "the field 'stars' of 'default' is not declared" in task.text
    assert {check.name: check.holds for check in task.checks if check.about == "criterion"} == {
        "min_examples": None, "bucket": True,
    }  # fmt: skip


def test_a_new_process_remembers_what_was_offered(device: Device, server: FakeServer):
    server.open_round(criteria=NEEDS_200)
    device.run_to(S.REJECTED)
    checked_in_at = why(device).checked_in_at
    device.kill()
    device.step()
    found = why(device)
    assert [task.task for task in found.tasks] == ["train-digits"]
    assert found.checked_in_at == checked_in_at


def test_nothing_was_offered(device: Device):
    device.run_to(S.REJECTED)
    device.clock.advance(7.0)
    assert why(device).text == ("the server had no task to offer at the last check-in, 7 s ago",)


def test_the_command(device: Device, server: FakeServer):
    server.open_round(criteria=NEEDS_200)
    device.run_to(S.REJECTED)
    printed = invoke("why", "--dir", device.home.root)
    assert printed.startswith("not taking part in train-digits: ")
    assert "relevant examples, the task needs 200" in printed
    found = json.loads(invoke("why", "--dir", device.home.root, "--json"))
    assert found["is_running"] is True
    assert found["tasks"][0]["takes_part"] is False
