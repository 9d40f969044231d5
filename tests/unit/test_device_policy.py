"""The device's own rules: set by the person, followed at once, and stronger than anything a server asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from homespun.clock import ManualClock
from homespun.device.conditions import RECHECK_S
from homespun.device.enrolment import enroll
from homespun.device.home import Settings
from homespun.device.policy import in_words, policy_of, set_policy
from homespun.device.status import read_status
from homespun.errors import InvalidConfig, NotAllowed
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import TaskKind
from homespun.protocol.session import SessionState as S
from tests.unit.device_server import DIGITS, INITIAL, Device, FakeServer
from tests.unit.test_device_cli import enrolled, invoke

PARAMETER = DIGITS.manifest.parameters[0].name


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def device(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    yield device
    device.kill()


def refused(device: Device) -> list[str]:
    status = read_status(device.home)
    assert status is not None
    return [reason.code for reason in status.refusals]


# --- setting it ---------------------------------------------------------------------------------------


def test_every_rule_can_be_set_and_is_shown_as_it_is_set(tmp_path: Path):
    home = enrolled(tmp_path)
    wanted = {
        "is_enabled": ("no", False),
        "populations": ("phones,cars", ("phones", "cars")),
        "allow_plain": ("yes", True),
        "min_group": ("12", 12),
        "private_tensors": ("embedding.*,head.?", ("embedding.*", "head.?")),
        "unknown_is_met": ("yes", True),
        "max_daily_participations": ("3", 3),
        "max_daily_bytes": ("1000000", 1_000_000),
        "max_memory_bytes": ("300000000", 300_000_000),
        "max_cpu_share": ("0.25", 0.25),
    }
    assert set(wanted) == set(Policy.__struct_fields__)
    policy = set_policy(home, [f"{name}={text}" for name, (text, _) in wanted.items()])
    for name, (text, value) in wanted.items():
        assert getattr(policy, name) == value
        (shown,) = [row for row in in_words(policy) if row[0] == name]
        assert shown[1] == text
    assert home.settings().policy == policy
    assert set_policy(home, ["populations="]).populations == ()


def test_every_rule_has_words():
    for policy in (Policy(), Policy(is_enabled=False, private_tensors=("a",), allow_plain=True)):
        assert all(words for _, _, words in in_words(policy))


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("min_group", "sets no rule"),
        ("min_groop=3", "sets no rule"),
        ("min_group=three", "cannot be changed so.*min_group"),
        ("min_group=yes", "cannot be changed so.*min_group"),
        ("min_group=none", "cannot be changed so.*min_group"),
        ("min_group=3.5", "cannot be changed so.*min_group"),
        ("min_group=0", "cannot be changed so.*min_group"),
        ("max_daily_bytes=-1", "cannot be changed so.*max_daily_bytes"),
        ("is_enabled=perhaps", "cannot be changed so.*is_enabled"),
        ("populations=Not A Name", "cannot be changed so.*populations"),
    ],
)
def test_what_cannot_be_set_changes_nothing(assignment: str, says: str, tmp_path: Path):
    home = enrolled(tmp_path)
    before = home.settings_file.read_bytes()
    with pytest.raises(InvalidConfig, match=says):
        set_policy(home, ["allow_plain=yes", assignment])
    assert home.settings_file.read_bytes() == before


def test_the_command(tmp_path: Path):
    enrolled(tmp_path)
    shown = invoke("policy", "--dir", tmp_path, "--set", "min_group=4", "--set", "is_enabled=off")
    assert "is only part of sums over 4 devices or more" in shown
    assert "never contacts the server" in shown
    found = json.loads(invoke("policy", "--dir", tmp_path, "--json"))
    assert (found["min_group"], found["is_enabled"]) == (4, False)


# --- following it -------------------------------------------------------------------------------------


def test_switched_off_the_device_contacts_nobody(device: Device, server: FakeServer):
    device.run_to(S.REJECTED)
    set_policy(device.home, ["is_enabled=no"])
    requests = len(server.log)
    device.clock.advance(3600)
    for _ in range(30):
        device.step()
    assert refused(device) == ["switched_off"]
    assert len(server.log) == requests
    set_policy(device.home, ["is_enabled=yes"])
    server.open_round()
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_switched_off_during_training_stops_it(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.TRAINING)
    set_policy(device.home, ["is_enabled=no"])
    for _ in range(5):
        device.step()
    assert server.reports == {}
    assert refused(device) == ["switched_off"]


def test_what_a_server_may_not_ask(device: Device, server: FakeServer):
    """Each rule against an offer that is good otherwise; the reason is said, and nothing is claimed."""
    for rule, code in [
        ("allow_plain=no", "plain_aggregation"),
        ("min_group=4", "small_group"),
        ("max_daily_participations=0", "daily_participations"),
        ("max_daily_bytes=1000", "daily_bytes"),
    ]:
        device.home.write_settings(device.settings)
        set_policy(device.home, [rule])
        server.open_round()
        device.run_to(S.REJECTED)
        assert refused(device) == [code]
        device.step()
        device.run_to(S.ELIGIBLE)
    assert "POST /v1/claim" not in server.log
    device.home.write_settings(device.settings)
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_a_population_that_is_not_served_is_not_even_asked(device: Device, server: FakeServer):
    set_policy(device.home, ["populations=elsewhere"])
    requests = len(server.log)
    for _ in range(5):
        device.step()
    assert refused(device) == ["population_not_served"]
    assert len(server.log) == requests


@pytest.mark.parametrize("rule", ["is_enabled=no", "populations=elsewhere"])
def test_what_is_forbidden_while_it_trains_is_given_back(
    rule: str, device: Device, server: FakeServer
):
    def work(job: object, should_stop: Callable[[], bool]) -> None:
        set_policy(device.home, [rule])
        device.clock.advance(RECHECK_S)
        assert should_stop()

    device.labour = work
    server.open_round()
    device.run_session()
    assert (server.reports, server.aborted) == ({}, ["train-1-1"])
    assert not list(device.home.work.iterdir())


@pytest.mark.parametrize("rule", ["is_enabled=no", "populations=elsewhere"])
def test_what_is_forbidden_in_a_group_is_left(rule: str, device: Device, server: FakeServer):
    server.open_secure_round()
    device.run_to(S.REPORTING)
    set_policy(device.home, [rule])
    device.run_session()
    status = read_status(device.home)
    assert status is not None
    assert status.sessions[0].outcome == "void"
    assert server.aborted == ["train-1-1"]
    assert not list(device.home.work.iterdir())


# --- tensors that never leave -------------------------------------------------------------------------


def test_a_plan_that_sends_a_private_tensor_does_not_run(device: Device, server: FakeServer):
    set_policy(device.home, [f"private_tensors=nothing,{PARAMETER[:3]}*"])
    server.open_round()
    device.run_session()
    assert server.reports == {}
    assert server.aborted == ["train-1-1"]
    status = read_status(device.home)
    assert status is not None
    assert (
        f"sends {PARAMETER}, which the device's policy keeps private" in status.sessions[0].reason
    )
    blobs = [line for line in server.log if line.startswith("GET /v1/blobs")]
    assert len(blobs) == 1  # the plan; no model was fetched for it
    server.open_round(2)
    device.run_to(S.REJECTED)
    assert refused(device) == ["refused_plan"]


def test_evaluating_sends_no_tensor(device: Device, server: FakeServer):
    from homespun.tensors.codec import encode_tree

    set_policy(device.home, ["private_tensors=*"])
    server.open_round(kind=TaskKind.EVALUATE, checkpoints=[encode_tree(INITIAL)] * 2)
    device.run_session()
    assert len(server.reports["evaluate-1-1"]) == 1


@pytest.mark.parametrize("running", [True, False])
def test_a_refused_plan_is_looked_at_again_under_another_policy(
    running: bool, device: Device, server: FakeServer
):
    set_policy(device.home, ["private_tensors=*"])
    server.open_round()
    device.run_session()
    if not running:
        device.kill()
    set_policy(device.home, ["private_tensors="])
    server.open_round(2)
    device.run_session()
    assert len(server.reports["train-2-1"]) == 1


# --- enrolling again ----------------------------------------------------------------------------------


def test_the_policy_survives_what_else_is_damaged(tmp_path: Path):
    home = enrolled(tmp_path)
    set_policy(home, ["min_group=7"])
    data = json.loads(home.settings_file.read_bytes())
    home.settings_file.write_text(json.dumps({**data, "poll_s": "soon", "unknown": 1}))
    assert policy_of(home).min_group == 7
    home.settings_file.write_text("{")
    assert policy_of(home) == Policy()
    home.settings_file.unlink()
    assert policy_of(home) == Policy()


def test_enrolling_elsewhere_needs_the_persons_leave(tmp_path: Path):
    home = enrolled(tmp_path)
    settings: Settings = msgspec.structs.replace(
        home.settings(), population="elsewhere", policy=Policy(populations=("tests",))
    )
    with pytest.raises(NotAllowed, match="its policy serves tests") as caught:
        enroll(home, settings, "token", ManualClock(), None)
    assert "policy --set" in caught.value.hint
