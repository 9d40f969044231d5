"""Whole sessions of a device, step by step, killed between any two, and against a server that misbehaves."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from homespun.clock import ManualClock
from homespun.device import wanted
from homespun.device.child import Perform, ShouldStop, Trial
from homespun.device.cleaning import left_over
from homespun.device.conditions import ScriptedConditions, Span
from homespun.device.labour import work_on
from homespun.device.models import open_models
from homespun.device.policy import set_policy
from homespun.device.status import Status, read_status
from homespun.errors import Conflict, NotAllowed, PlanCrashed, StorageFailure
from homespun.learning.contribution import ContributionCodec
from homespun.learning.metrics import paired_names
from homespun.protocol.eligibility import Conditions
from homespun.protocol.frame import decode_contribution
from homespun.protocol.messages import (
    Bucket,
    Criteria,
    Encoding,
    Receipt,
    Rejected,
    ReportState,
    TaskKind,
    Waiting,
)
from homespun.protocol.session import MAX_RESTARTS
from homespun.protocol.session import SessionState as S
from homespun.tensors.codec import digest, encode_tree
from homespun.types import Hash
from tests.unit.device_server import (
    DIGITS,
    INITIAL,
    PUBLISHER,
    RETRY,
    STRANGER,
    Device,
    FakeServer,
    images,
)

OWN_FILES = {
    "device.json",
    "identity.key",
    "examples.db",
    "store.key",
    "journal.db",
    "status.json",
}
IN_SESSION = (S.ASSIGNED, S.DOWNLOADING, S.VERIFIED, S.TRAINING, S.PACKAGED)
METRICS = ("loss", *DIGITS.manifest.metrics)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def device(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    yield device
    device.kill()


def status(device: Device) -> Status:
    found = read_status(device.home)
    assert found is not None
    return found


def codec(dimension: int = DIGITS.manifest.num_parameters) -> ContributionCodec:
    """What a server would use to read the reports of these rounds."""
    manifest = DIGITS.manifest
    if dimension:
        return ContributionCodec(dimension, manifest.clip_norm, manifest.max_weight, METRICS, 10)
    return ContributionCodec(0, 1.0, manifest.max_weight, paired_names(METRICS, 2), 10)


def unplug(request: httpx.Request) -> None:
    raise httpx.ConnectError("refused")


# --- a session that goes well ------------------------------------------------------------------------------


def test_a_session_contributes_and_leaves_nothing(device: Device, server: FakeServer):
    server.open_round()
    device.run_session()
    (body,) = server.reports["train-1-1"]
    contribution = decode_contribution(body)
    codec().check(contribution)
    aggregate = codec().decode(contribution)
    assert np.linalg.norm(aggregate.mean_update) > 0
    held_out = status(device).num_held_out
    assert aggregate.metrics["loss"].count == DIGITS.manifest.local_epochs * (60 - held_out)
    assert 0 < held_out < 30
    assert device.files() == OWN_FILES
    assert left_over(device.home, open_models(device.home, device.settings)) == []
    ended = status(device).sessions[0]
    assert (ended.task_name, ended.round_number, ended.outcome) == (
        "train-digits",
        1,
        "acknowledged",
    )


def test_the_directory_shows_the_training_files_while_they_are_needed(
    device: Device, server: FakeServer
):
    """The walk of the directory above could not fail if files were never there."""
    server.open_round()
    device.run_to(S.PACKAGED)
    work = f"work/{device.runtime.session.session_id}"
    assert device.files() - OWN_FILES == {
        f"{work}/plan.zip",
        f"{work}/checkpoint-0.safetensors",
        f"{work}/report.bin",
    }
    assert left_over(device.home, open_models(device.home, device.settings)) != []


def test_the_same_seeds_give_the_same_report(tmp_path: Path):
    bodies = []
    for name in ("a", "b"):
        server = FakeServer(ManualClock())
        device = Device(tmp_path / name, server)
        server.open_round()
        device.run_session()
        bodies += server.reports["train-1-1"]
        device.kill()
    assert bodies[0] == bodies[1]


def test_evaluation_compares_checkpoints_on_held_out_examples(device: Device, server: FakeServer):
    worse = {name: np.zeros_like(array) for name, array in INITIAL.items()}
    server.open_round(
        kind=TaskKind.EVALUATE, checkpoints=[encode_tree(INITIAL), encode_tree(worse)]
    )
    device.run_session()
    (body,) = server.reports["evaluate-1-1"]
    aggregate = codec(0).decode(decode_contribution(body))
    assert aggregate.mean_update.size == 0
    count = aggregate.metrics["0.loss"].count
    assert count == aggregate.metrics["1.loss"].count == status(device).num_held_out
    expected = aggregate.metrics["0.top1"].mean - aggregate.metrics["1.top1"].mean
    assert aggregate.metrics["difference"].sum == pytest.approx(expected, abs=1e-4)


def test_receipts_are_asked_for_until_they_are_final(device: Device, server: FakeServer):
    server.open_round()
    device.run_session()
    server.offers = []
    device.run_to(S.REJECTED)
    assert status(device).sessions[0].outcome == "acknowledged"
    server.states["train-1-1"] = Receipt(
        assignment_id="train-1-1", state=ReportState.INCLUDED, checkpoint="c" * 64
    )
    for _ in range(8):
        device.step()
    assert status(device).sessions[0].outcome == "included"
    assert status(device).sessions[0].checkpoint == "c" * 64
    asked = server.log.count("GET /v1/assignments/train-1-1")
    for _ in range(8):
        device.step()
    assert server.log.count("GET /v1/assignments/train-1-1") == asked


def test_a_void_participation_does_not_count(device: Device, server: FakeServer):
    """The round's first attempt is abandoned: the device may take part in the second."""
    server.open_round()
    device.run_session()
    server.states["train-1-1"] = Receipt(assignment_id="train-1-1", state=ReportState.VOID)
    server.open_round(attempt=2)
    device.run_session()
    assert len(server.reports["train-1-2"]) == 1


def test_a_round_is_taken_once(device: Device, server: FakeServer):
    server.open_round()
    device.run_session()
    server.open_round(attempt=2)  # while the first attempt's report still counts
    device.run_to(S.REJECTED)
    assert [r.code for r in status(device).refusals] == ["took_part_recently"]
    assert "train-1-2" not in server.reports


def test_traffic_is_counted(device: Device, server: FakeServer):
    server.open_round()
    device.run_session()
    found = status(device)
    sent = len(server.reports["train-1-1"][0])
    received = len(DIGITS.to_bytes()) + len(encode_tree(INITIAL))
    assert sent < found.bytes_up < sent + 2_000
    assert received < found.bytes_down < received + 4_000
    assert found.peak_memory_bytes > 10_000_000


# --- killed at any state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", IN_SESSION)
def test_killed_before_intent_carries_on(state: S, device: Device, server: FakeServer):
    server.open_round()
    device.run_to(state)
    device.kill()
    assert device.state is state
    device.run_session()
    assert server.aborted == []
    assert len(server.reports["train-1-1"]) == 1
    assert device.files() == OWN_FILES


def test_killed_until_after_the_deadline_gives_the_assignment_back(
    device: Device, server: FakeServer
):
    server.open_round(deadline_s=60.0)
    device.run_to(S.TRAINING)
    device.kill()
    device.clock.advance(60.0)
    device.run_session()
    assert server.aborted == ["train-1-1"]
    assert server.reports == {}
    assert (
        status(device).sessions[0].reason == "the device was interrupted until after the deadline"
    )
    assert device.files() == OWN_FILES


def test_a_session_that_is_killed_again_and_again_is_given_up(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.DOWNLOADING)
    for state in (S.DOWNLOADING, S.TRAINING):  # it counts for each state by itself
        device.run_to(state)
        for _ in range(MAX_RESTARTS):
            device.kill()
            assert device.state is state
    device.kill()
    device.run_session()
    assert status(device).sessions[0].reason == "interrupted 4 times while training"
    assert server.aborted == ["train-1-1"]
    assert device.files() == OWN_FILES


def test_a_download_that_a_power_cut_broke_is_made_again(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.DOWNLOADING)
    directory = device.home.work / device.runtime.session.session_id
    directory.mkdir(parents=True)
    for name in ("plan.zip", "checkpoint-0.safetensors"):
        (directory / name).write_bytes(b"")
    device.kill()
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


@pytest.mark.parametrize("state", [S.INTENT, S.REPORTING])
def test_killed_from_intent_on_sends_the_same_bytes(state: S, device: Device, server: FakeServer):
    server.open_round()
    device.run_to(state)
    sent = device.runtime.session.digest
    device.kill()
    downloads = len([line for line in server.log if "blobs" in line])
    device.run_session()
    (body,) = server.reports["train-1-1"]
    assert digest(body) == sent
    assert server.aborted == []
    assert len([line for line in server.log if "blobs" in line]) == downloads  # it did not train
    assert device.files() == OWN_FILES


def test_killed_before_the_receipt_was_kept_repeats_the_report(device: Device, server: FakeServer):
    """The server has the report, the device does not know: the same bytes, the same receipt."""
    server.open_round()
    device.run_to(S.REPORTING)
    session = device.runtime.session
    body = (device.home.work / session.session_id / "report.bin").read_bytes()
    server._report("train-1-1", body)
    device.kill()
    device.run_session()
    assert server.reports["train-1-1"] == [body, body]
    assert status(device).sessions[0].outcome == "acknowledged"


@pytest.mark.parametrize("state", [S.ACKNOWLEDGED, S.CLEANED])
def test_killed_after_the_receipt_sends_nothing_more(state: S, device: Device, server: FakeServer):
    server.open_round()
    device.run_to(state)
    device.kill()
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1
    assert device.files() == OWN_FILES


@pytest.mark.parametrize("state", [S.ELIGIBLE, S.CHECKED_IN])
def test_killed_before_the_assignment_carries_on(state: S, device: Device, server: FakeServer):
    server.open_round()
    device.run_to(state)
    device.kill()
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_the_time_to_come_back_outlives_a_restart(device: Device, server: FakeServer):
    device.run_to(S.REJECTED)
    at = device.runtime._journal.retry_at
    device.kill()
    assert device.runtime.step() == at - device.clock.now() > 0
    assert device.runtime._journal.retry_at == at


def test_an_outage_does_not_hurry_a_device_that_was_to_come_late(
    device: Device, server: FakeServer
):
    server.failure = unplug
    device.runtime._journal.set_retry(0.0, given_s=7200.0)
    pauses = []
    for _ in range(40):
        pause = device.runtime.step()
        pauses += [pause] if pause > 0 else []
        device.clock.advance(pause)
    assert len(pauses) >= 10
    assert min(pauses) >= 30.0  # where the window of this device's settings begins; it ends with 40
    assert 3600.0 < max(pauses) <= 2 * 7200.0


def test_a_damaged_report_is_never_made_again(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.REPORTING)
    report = device.home.work / device.runtime.session.session_id / "report.bin"
    report.write_bytes(report.read_bytes()[:-1])
    device.run_session()
    assert server.reports == {}
    assert status(device).sessions[0].outcome == "late"
    assert device.files() == OWN_FILES


def test_one_directory_is_one_process(device: Device):
    device.runtime.step()
    other = Device.__new__(Device)
    other.__dict__ = {**device.__dict__, "_runtime": None}
    with pytest.raises(Conflict, match="another process"):
        _ = other.runtime


# --- plans that must not run -------------------------------------------------------------------------------


def unknown_format() -> bytes:
    """A plan of a future format, properly packed."""
    manifest = DIGITS.manifest.to_bytes().replace(b'"format":1', b'"format":9')
    packed = DIGITS.to_bytes()
    return packed.replace(DIGITS.manifest.to_bytes(), manifest)


def tampered() -> bytes:
    """A plan with other settings under the old signature."""
    changed = DIGITS.with_settings(max_rows=10_000)
    return replace(changed, publisher=DIGITS.publisher, signature=DIGITS.signature).to_bytes()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (DIGITS.with_settings().to_bytes(), "not signed"),
        (DIGITS.with_settings().sign(STRANGER).to_bytes(), "not trusted"),
        (tampered(), "signature"),
        (unknown_format(), ""),
        (b"PK not a zip", "zip"),
    ],
    ids=["unsigned", "stranger", "tampered", "format", "garbage"],
)
def test_a_plan_that_is_not_ours_is_refused_once_and_for_all(
    plan: bytes, reason: str, device: Device, server: FakeServer
):
    server.open_round(plan=plan)
    device.run_session()
    assert server.aborted == ["train-1-1"]
    assert server.reports == {}
    ended = status(device).sessions[0]
    assert ended.outcome == "void"
    assert ended.reason.startswith("plan refused")
    assert reason in ended.reason
    assert device.files() == OWN_FILES
    server.open_round(2, plan=plan)
    claims = server.log.count("POST /v1/claim")
    device.run_to(S.REJECTED)
    assert "refused_plan" in [r.code for r in status(device).refusals]
    assert server.log.count("POST /v1/claim") == claims
    server.open_round(3)  # a good plan again: the device is still there
    device.run_session()
    assert len(server.reports["train-3-1"]) == 1


def test_an_encoding_that_the_plan_does_not_cover_is_refused(device: Device, server: FakeServer):
    server.open_round(encoding=Encoding(clip_norm=1e6, max_weight=1, max_group=10))
    device.run_session()
    assert server.reports == {}
    assert "clip bound" in status(device).sessions[0].reason


def test_examples_that_the_plan_cannot_read_are_no_reason_to_end(
    tmp_path: Path, server: FakeServer
):
    device = Device(tmp_path / "other", server, num_examples=0)
    device.runtime._examples.add_many(
        ({"text": f"number {n}"} for n in range(50)), device.clock.now()
    )
    server.open_round()
    device.run_session()
    assert "no field" in status(device).sessions[0].reason
    server.open_round(2)
    device.run_to(S.REJECTED)
    assert "refused_plan" in [r.code for r in status(device).refusals]
    device.kill()


# --- conditions and offers ---------------------------------------------------------------------------------


def test_a_device_in_use_does_not_check_in(device: Device, server: FakeServer):
    server.open_round()
    start = device.clock.now()
    device.conditions = ScriptedConditions((Span(to_s=60, idle=False, charging=False),), start)
    while device.clock.now() < start + 59:
        device.step()
    assert [line for line in server.log if "check-in" in line] == []
    assert [r.code for r in status(device).refusals] == ["not_idle", "not_charging"]
    assert status(device).refusal_counts == {"not_idle": 1, "not_charging": 1}
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


class Picked:
    """Conditions that end while the device trains, at its `at`-th look, and return after `for_s`."""

    script_start = None

    def __init__(self, device: Device, at: int, for_s: float = 1e9) -> None:
        self._device, self._at, self._for_s = device, at, for_s
        self.ended_at: float | None = None

    def read(self, now: float) -> Conditions:
        if self._device.state is S.TRAINING:
            self._at -= 1
            self._device.clock.advance(0.6)  # so that every step of training is measured
        if self._at == 0:
            self.ended_at = now
        holds = self.ended_at is None or now >= self.ended_at + self._for_s
        return dict.fromkeys(("idle", "charging", "unmetered"), holds)


ENDLESS = DIGITS.with_settings(local_epochs=1000).sign(PUBLISHER).to_bytes()
LONGER = DIGITS.with_settings(local_epochs=5, momentum=0.5).sign(PUBLISHER).to_bytes()


def undisturbed(root: Path, plan: bytes) -> bytes:
    """What this device reports when nobody picks it up."""
    server = FakeServer(ManualClock())
    other = Device(root, server)
    server.open_round(plan=plan)
    other.run_session()
    other.kill()
    (body,) = server.reports["train-1-1"]
    return body


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
def test_training_goes_on_where_it_was_when_conditions_return(
    killed: bool, device: Device, server: FakeServer, tmp_path: Path
):
    device.conditions = Picked(device, 6, for_s=60.0)
    server.open_round(plan=LONGER)
    device.run_to(S.TRAINING)
    while not device.runtime.session.is_paused:
        device.step()
    device.step()
    found = status(device)
    assert (found.state, found.num_pauses, found.num_resumes) == ("training", 1, 0)
    assert found.verdict.startswith("paused: the device is not idle")
    assert 0 <= found.longest_stop_s < 2.0
    step_file = device.home.work / device.runtime.session.session_id / "step.bin"
    steps = msgspec.json.decode(step_file.read_bytes().partition(b"\n")[0])["num_steps"]
    assert 0 < steps < 15
    if killed:
        device.kill()
        assert device.runtime.session.is_paused
    device.run_to(S.PACKAGED)
    assert status(device).num_resumes == 1
    device.run_session()
    assert server.reports["train-1-1"] == [undisturbed(tmp_path / "other", LONGER)]
    assert device.files() == OWN_FILES


def test_a_step_checkpoint_that_does_not_fit_is_as_if_there_were_none(
    device: Device, server: FakeServer, tmp_path: Path
):
    """Somebody else's bytes, then one of other examples: the report is that of the examples there are."""
    device.conditions = Picked(device, 6, for_s=60.0)
    server.open_round(plan=LONGER)
    device.run_to(S.TRAINING)
    while not device.runtime.session.is_paused:
        device.step()
    step_file = device.home.work / device.runtime.session.session_id / "step.bin"
    kept = step_file.read_bytes()
    for broken in (b"", kept[:-1], kept.replace(b'"rows":"', b'"rows":"0', 1)):
        step_file.write_bytes(broken)
        device.run_to(S.TRAINING)
    device.run_session()
    assert server.reports["train-1-1"] == [undisturbed(tmp_path / "other", LONGER)]


def test_examples_that_come_during_a_pause_are_for_the_next_session(
    device: Device, server: FakeServer, tmp_path: Path
):
    device.conditions = Picked(device, 6, for_s=60.0)
    server.open_round(plan=LONGER)
    device.run_to(S.TRAINING)
    while not device.runtime.session.is_paused:
        device.step()
    device.runtime._examples.add_many(images(80)[60:], device.clock.now())
    device.run_session()
    assert server.reports["train-1-1"] == [undisturbed(tmp_path / "other", LONGER)]


def test_conditions_that_do_not_return_before_the_deadline_end_the_session(
    device: Device, server: FakeServer
):
    device.conditions = Picked(device, 3)
    server.open_round()
    device.run_to(S.TRAINING)
    device.step()
    assert device.runtime.session.is_paused
    for _ in range(700):
        if device.state is S.VOID:
            break
        device.step()
    device.run_to(S.CLEANED)
    assert server.aborted == ["train-1-1"]
    assert server.reports == {}
    assert device.files() == OWN_FILES
    assert "deadline" in device.runtime.session.reason


def test_a_report_that_nobody_wants_any_more_is_not_made(
    device: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wanted, "ASK_EVERY_S", 0.0)
    server.open_round(plan=ENDLESS)
    device.run_to(S.TRAINING)
    server.states["train-1-1"] = Receipt(assignment_id="train-1-1", state=ReportState.LATE)
    device.step()
    assert device.state is S.LATE
    device.run_session()
    ended = status(device).sessions[0]
    assert (ended.outcome, ended.reason) == ("late", "the server wants no more reports")
    assert (server.reports, server.aborted) == ({}, [])
    assert device.files() == OWN_FILES


def test_a_server_that_does_not_say_whether_it_wants_the_report_gets_it(
    device: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wanted, "ASK_EVERY_S", 0.0)
    server.open_round(plan=LONGER)
    device.run_to(S.TRAINING)
    server.failure = unplug
    device.step()
    assert device.state is S.PACKAGED
    assert "GET /v1/assignments/train-1-1" in server.log
    server.failure = None
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_a_release_is_tried_while_the_conditions_hold_and_as_the_policy_allows(
    device: Device, server: FakeServer
):
    jobs: list[Perform | Trial] = []

    def work(job: Perform | Trial, should_stop: ShouldStop) -> Hash | None:
        if not jobs:  # picked up while the first trial runs
            device.conditions.script = (Span(idle=False),)  # type: ignore[attr-defined]
            device.clock.advance(1.0)
        jobs.append(job)
        return None if should_stop() else work_on(job, should_stop)

    device.labour = work
    set_policy(device.home, ["max_memory_bytes=300000000"])
    server.release(DIGITS, encode_tree(INITIAL), 1)
    device.run_to(S.REJECTED)
    assert status(device).served == {}
    device.conditions.script = ()  # type: ignore[attr-defined]
    for _ in range(10):
        device.step()
    assert status(device).served["default"].sequence == 1
    assert [job.max_memory_bytes for job in jobs] == [300_000_000] * 2


def test_a_plan_that_crashes_is_refused_for_a_day(device: Device, server: FakeServer):
    def crash(job: Perform | Trial, should_stop: ShouldStop) -> None:
        raise PlanCrashed("the process that ran the plan ended by signal 11")

    device.labour = crash
    server.open_round()
    device.run_session()
    assert status(device).sessions[0].reason.startswith("plan refused: the process that ran")
    server.open_round(2)
    device.run_to(S.REJECTED)
    assert [r.code for r in status(device).refusals] == ["refused_plan"]
    device.clock.advance(86_400.0)
    device.kill()
    device.labour = work_on
    device.run_session()
    assert len(server.reports["train-2-1"]) == 1


def test_the_deadline_ends_the_work(device: Device, server: FakeServer):
    server.open_round(deadline_s=5.0)
    device.run_to(S.VERIFIED)
    device.clock.advance(6.0)
    device.run_session()
    assert server.aborted == ["train-1-1"]
    assert "deadline" in status(device).sessions[0].reason


def test_a_round_that_was_given_back_is_not_claimed_again(device: Device, server: FakeServer):
    server.open_round(deadline_s=5.0)
    device.run_to(S.TRAINING)
    device.clock.advance(6.0)
    device.run_session()
    claims = server.log.count("POST /v1/claim")
    device.run_to(S.REJECTED)
    assert [r.code for r in status(device).refusals] == ["already_tried"]
    assert server.log.count("POST /v1/claim") == claims


def test_what_would_come_too_late_is_not_sent(device: Device, server: FakeServer):
    server.open_round(deadline_s=60.0)
    device.run_to(S.INTENT)
    device.clock.advance(61.0)
    device.run_session()
    assert server.reports == {}
    assert status(device).sessions[0].outcome == "late"
    assert device.files() == OWN_FILES


def test_a_clock_that_was_set_back_does_not_silence_the_device(device: Device, server: FakeServer):
    device.run_to(S.REJECTED)
    device.clock.advance(-365 * 86_400.0)
    server.open_round()
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_an_offer_for_others_is_not_claimed(device: Device, server: FakeServer):
    nobody = Bucket(salt="x", low=0.0, high=0.0)
    server.open_round(criteria=Criteria(min_examples=10_000, bucket=nobody))
    device.run_to(S.REJECTED)
    assert [r.code for r in status(device).refusals] == ["too_few_examples", "not_in_bucket"]
    assert "POST /v1/claim" not in server.log


def test_waiting_for_the_draw_and_not_being_drawn(device: Device, server: FakeServer):
    server.open_round()
    server.replies = [Waiting(retry=RETRY), Rejected(reason="not_drawn", retry=RETRY)]
    device.run_to(S.CHECKED_IN)
    states = []
    for _ in range(2):
        device.step()
        states.append(device.state)
    assert states == [S.CHECKED_IN, S.REJECTED]
    assert "not_drawn" in status(device).verdict


def test_an_assignment_that_differs_from_the_offer_is_not_taken(device: Device, server: FakeServer):
    server.open_round(kind=TaskKind.EVALUATE)
    server.replies = [server.assignments["evaluate-1-1"]]
    server.open_round()
    device.run_to(S.REJECTED)
    assert "another kind" in status(device).verdict


# --- servers and disks that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("state", [S.ELIGIBLE, S.CHECKED_IN, S.DOWNLOADING, S.REPORTING])
def test_a_server_that_vanishes_is_waited_for(state: S, device: Device, server: FakeServer):
    server.open_round()
    device.run_to(state)
    server.failure = unplug
    pause = device.runtime.step()
    assert 29 < pause < 41
    assert device.state is state
    assert "does not answer" in status(device).verdict
    server.failure = None
    device.clock.advance(pause)
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_a_server_that_stays_away_costs_only_the_session(device: Device, server: FakeServer):
    server.open_round(deadline_s=60.0)
    device.run_to(S.DOWNLOADING)
    server.failure = unplug
    device.run_session()
    assert device.files() == OWN_FILES
    assert status(device).sessions[0].outcome == "void"


def test_a_server_that_refuses_the_device_is_left_alone_for_long(
    device: Device, server: FakeServer
):
    server.keys.clear()
    device.run_to(S.ELIGIBLE)
    assert device.runtime.step() > 3 * 3600
    assert "unknown device" in status(device).verdict


@pytest.mark.parametrize(
    ("receipt", "outcome"),
    [(ReportState.LATE, "late"), (ReportState.VOID, "void"), (ReportState.INCLUDED, "included")],
)
def test_what_the_receipt_says_is_kept(
    receipt: ReportState, outcome: str, device: Device, server: FakeServer
):
    server.open_round()
    server.states["train-1-1"] = Receipt(assignment_id="train-1-1", state=receipt, reason="why")
    device.run_session()
    assert status(device).sessions[0].outcome == outcome
    assert server.aborted == []


def test_a_refused_report_ends_the_session(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.REPORTING)

    def refuse(request: httpx.Request) -> None:
        if request.method == "PUT":
            raise NotAllowed("this report is not wanted")

    server.failure = refuse
    device.run_session()
    assert status(device).sessions[0].outcome == "void"
    assert device.files() == OWN_FILES


def test_a_bug_ends_the_session_and_not_the_device(
    device: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    server.open_round()
    device.run_to(S.TRAINING)
    monkeypatch.setattr("homespun.device.work.encode_contribution", fail)
    device.run_session()
    assert "ZeroDivisionError" in status(device).sessions[0].reason
    monkeypatch.undo()
    server.open_round(2)
    device.run_session()
    assert len(server.reports["train-2-1"]) == 1


def test_a_full_disk_ends_the_session_and_leaves_nothing(
    device: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    server.open_round()
    device.run_to(S.TRAINING)
    whole = os.fdopen

    def full(descriptor: int, mode: str):
        file = whole(descriptor, mode)
        if "report" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(os, "fdopen", full)
    device.run_session()
    assert "No space left" in status(device).sessions[0].reason
    assert server.reports == {}
    assert device.files() == OWN_FILES


def test_nothing_is_sent_that_was_not_journalled(device: Device, server: FakeServer):
    """SQLite's own limit plays the full disk: at some round the journal cannot grow any more."""
    journal = device.runtime._journal
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(1, 25):
        server.open_round(number)
        for _ in range(16):
            with suppress(StorageFailure):
                device.step()
    assert 0 < len(server.reports) < 24
    taken = {
        f"train-{line.round_number}-1" for line in journal.recent(100) if line.outcome != "void"
    }
    assert set(server.reports) <= taken
    device.kill()
    server.open_round(25)  # with room again the device carries on
    for _ in range(30):
        device.step()
    assert "train-25-1" in server.reports


def test_a_status_that_cannot_be_written_hinders_nothing(device: Device, server: FakeServer):
    device.home.status_file.mkdir()  # nothing can be renamed over a directory
    server.open_round()
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_without_a_journal_there_is_no_device(
    device: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    def full(*arguments: object) -> None:
        raise StorageFailure("no room", hint="free some")

    server.open_round()
    device.run_to(S.TRAINING)
    monkeypatch.setattr(device.runtime._journal, "save", full)
    monkeypatch.setattr(device.runtime._journal, "set_retry", full)
    with pytest.raises(StorageFailure, match="no room"):
        device.step()
    assert server.reports == {}


# --- stopping ----------------------------------------------------------------------------------------------


def test_stopping_gives_the_assignment_back(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.VERIFIED)
    device.stop.request()
    device.runtime.run()
    assert server.aborted == ["train-1-1"]
    assert status(device).state == "stopped"
    assert device.files() == OWN_FILES


def test_stopping_after_intent_keeps_the_report(device: Device, server: FakeServer):
    server.open_round()
    device.run_to(S.INTENT)
    device.stop.request()
    device.runtime.run()
    assert server.aborted == []
    device._runtime = None
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1


def test_run_ends_after_so_many_sessions(device: Device, server: FakeServer):
    server.open_round()
    device.runtime.run(max_sessions=1)
    assert len(server.reports["train-1-1"]) == 1
