"""A device in a group of secure aggregation: whole rounds, killed anywhere, and a server that cheats."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from msgspec.structs import replace

from homespun.clock import ManualClock
from homespun.device import secure
from homespun.device.cleaning import left_over
from homespun.device.home import write_atomically
from homespun.device.models import open_models
from homespun.device.passage import REFUSE_FOR_S, REPORT_FOR_S
from homespun.device.secure import Member
from homespun.errors import StorageFailure, WrongStep
from homespun.learning.contribution import Contribution
from homespun.protocol.eligibility import Conditions, Policy
from homespun.protocol.frame import decode_contribution
from homespun.protocol.messages import (
    Encoding,
    GroupReply,
    Receipt,
    ReportState,
    TaskKind,
)
from homespun.protocol.session import SessionState as S
from homespun.secagg import device as secagg
from homespun.secagg.graph import Adversary
from homespun.secagg.messages import (
    AgreeRequest,
    MaskInputRequest,
    ShareKeysRequest,
    UnmaskRequest,
)
from homespun.secagg.transcript import bitmap
from tests.unit.device_server import Device, FakeServer, PlayedGroup, Player
from tests.unit.test_device_runtime import OWN_FILES, status, unplug

STEPS = ("advertise-keys", "share-keys", "mask-input", "agree", "unmask")
OTHER = "f" * 64


class Killed(BaseException):
    """The process ends here."""


class Switch:
    """Conditions that the test turns on and off."""

    holds = True
    script_start = None

    def read(self, now: float) -> Conditions:
        return dict.fromkeys(("idle", "charging", "unmetered"), self.holds)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def device(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    yield device
    device.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a device that has trained for `open_secure_round()` and sent nothing yet."""
    root = tmp_path_factory.mktemp("trained") / "device"
    server = FakeServer(ManualClock())
    device = Device(root, server)
    server.open_secure_round()
    device.run_to(S.INTENT)
    device.kill()
    return root


@pytest.fixture
def ready(trained: Path, tmp_path: Path, server: FakeServer):
    """A device that goes on from `trained`, with the same round at `server`."""
    shutil.copytree(trained, tmp_path / "ready")
    device = Device(tmp_path / "ready", server, num_examples=0)
    server.open_secure_round()
    yield device
    device.kill()


def group(server: FakeServer) -> PlayedGroup:
    assert server.group is not None
    return server.group


def report(device: Device) -> Contribution:
    """What the device is about to mask, in clear."""
    session = device.runtime.session
    return decode_contribution((device.home.work / session.session_id / "report.bin").read_bytes())


def state_file(device: Device) -> Path:
    return device.home.work / device.runtime.session.session_id / "group.bin"


def member_of(device: Device) -> Member:
    return device.runtime._reporting._member(device.runtime._work)


def stored(device: Device) -> secagg.DeviceState | None:
    return member_of(device)._load()


def check_sum(server: FakeServer, *reports: Contribution) -> None:
    """What was opened is the plain integer sum, so every report is in it exactly once."""
    played = group(server)
    assert played.sums is not None
    main, aux = played.sums
    everybody: list[Player | Contribution] = [*played.players, *reports]
    expected = np.sum([each.main for each in everybody], axis=0, dtype=np.int64)
    np.testing.assert_array_equal(main, expected % 2**played.terms.bits)
    np.testing.assert_array_equal(aux, np.sum([each.aux for each in everybody], axis=0))


def run_to_step(device: Device, step: str) -> None:
    """Until `step` is asked of the device and not answered yet."""
    for _ in range(30):
        asked = device.runtime._reporting._asked
        if asked is not None and asked.__struct_config__.tag == step.replace("-", "_"):
            return
        device.step()
    raise AssertionError(f"{step} is not asked")


def sent(server: FakeServer) -> list[str]:
    return [step for step, _ in group(server).received]


# --- rounds that go well -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TaskKind.TRAIN, TaskKind.EVALUATE])
def test_a_whole_round(kind: TaskKind, device: Device, server: FakeServer):
    server.open_secure_round(kind=kind)
    device.run_to(S.INTENT)
    body = report(device)
    assert body.bits == 14
    server.log.clear()
    device.run_session()
    check_sum(server, body)
    path = f"/v1/assignments/{kind}-1-1/group"
    assert server.log == [f"GET {path}", *(f"PUT {path}/{step}" for step in STEPS)]
    ended = status(device).sessions[0]
    assert (ended.outcome, ended.reason) == ("acknowledged", "")
    assert server.reports == {}  # nothing in clear
    assert server.aborted == []
    assert device.files() == OWN_FILES
    assert left_over(device.home, open_models(device.home, device.settings)) == []
    server.states[f"{kind}-1-1"] = Receipt(
        assignment_id=f"{kind}-1-1", state=ReportState.INCLUDED, checkpoint=OTHER
    )
    device.run_to(S.REJECTED)
    assert status(device).sessions[0].outcome == "included"


def test_real_devices_wait_for_each_other(tmp_path: Path, server: FakeServer):
    devices = [Device(tmp_path / str(seed), server, seed=seed) for seed in (1, 2)]
    server.open_secure_round(num_real=2)
    for device in devices:
        device.run_to(S.INTENT)
    reports = [report(device) for device in devices]
    assert (reports[0].main != reports[1].main).any()
    for _ in range(20):
        for device in devices:
            device.step()
    check_sum(server, *reports)
    for device in devices:
        assert status(device).sessions[0].outcome == "acknowledged"
        assert device.files() == OWN_FILES
        device.kill()


def test_the_server_is_told_how_long_it_may_wait(ready: Device, server: FakeServer):
    seen = []

    def look(request: httpx.Request) -> None:
        if "group" in request.url.path:
            seen.append((request.headers["Prefer"], request.extensions["timeout"]["read"]))

    server.failure = look
    ready.run_session()
    assert seen == [("wait=20", 40.0)] * 6


def test_traffic_of_a_group_is_counted(ready: Device, server: FakeServer):
    before = ready.runtime._journal.traffic()
    ready.run_session()
    up, down = (b - a for a, b in zip(before, ready.runtime._journal.traffic(), strict=True))
    assert up == sum(len(body) for _, body in group(server).received)
    assert down > 2_000


# --- killed anywhere ---------------------------------------------------------------------------------------


def test_killed_between_any_two_steps(trained: Path, tmp_path: Path):
    for number in range(12):
        server = FakeServer(ManualClock())
        shutil.copytree(trained, tmp_path / str(number))
        device = Device(tmp_path / str(number), server, num_examples=0)
        server.open_secure_round()
        body = report(device)
        for _ in range(number):
            device.step()
        device.kill()
        if device.state is S.WAITING:
            break
        device.run_session()
        check_sum(server, body)
        assert sent(server) == list(STEPS)
        assert status(device).sessions[0].outcome == "acknowledged"
        assert device.files() == OWN_FILES
        device.kill()
    assert number >= 8  # the loop saw the whole session


def once(kill: Callable[[], bool]) -> Callable[..., None]:
    """Ends the process when `kill` says so, but only the first time."""
    done: list[bool] = []

    def hook(*arguments: object) -> None:
        if not done and kill():
            done.append(True)
            raise Killed

    return hook


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("where", ["before_save", "after_save", "before_send", "lost", "kept"])
def test_killed_while_it_answers(
    step: str, where: str, ready: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    """`lost`: the bytes left, but the server does not remember them; `kept`: it does, and its reply is lost."""
    body, bodies = report(ready), []
    run_to_step(ready, step)
    save = write_atomically
    hook = once(lambda: True)

    def dying(path: Path, data: bytes) -> None:
        if where == "before_save":
            hook()
        save(path, data)
        if where == "after_save":
            hook()

    def failure(request: httpx.Request) -> None:
        if request.method != "PUT":
            return
        if where == "before_send":
            hook()
        bodies.append((request.url.path.split("/")[-1], request.read()))
        if where == "lost":
            hook()

    monkeypatch.setattr(secure, "write_atomically", dying)
    server.failure = failure
    if where == "kept":
        server.after = hook
    with pytest.raises(Killed):
        ready.step()
    ready.kill()
    ready.run_session()
    check_sum(server, body)
    assert status(ready).sessions[0].outcome == "acknowledged"
    assert ready.files() == OWN_FILES
    assert sent(server) == list(STEPS)
    assert ready.runtime._journal.daily_participations(server.clock.now()) == 1
    twice = [found for name, found in bodies if name == step]
    assert len(twice) == (2 if where == "lost" else 1)
    # The same bytes; but keys that the server does not know are made again.
    assert len(set(twice)) == (2 if where == "lost" and step == "advertise-keys" else 1)


def test_a_broken_connection_repeats_the_same_bytes(ready: Device, server: FakeServer):
    body, bodies = report(ready), []

    def failure(request: httpx.Request) -> None:
        if request.method == "PUT":
            bodies.append(request.read())
            if len(bodies) % 2:
                raise httpx.ReadError("reset")

    server.failure = failure
    ready.run_session()
    check_sum(server, body)
    assert bodies[::2] == bodies[1::2] == [body for _, body in group(server).received]


# --- the state on the disk ---------------------------------------------------------------------------------


def test_the_state_is_sealed_and_goes_with_the_session(
    ready: Device, server: FakeServer, tmp_path: Path
):
    run_to_step(ready, "agree")
    state, sealed = stored(ready), state_file(ready).read_bytes()
    assert isinstance(state, secagg.Masked)
    assert state_file(ready).stat().st_mode & 0o077 == 0
    for secret in (state.c_secret, state.s_secret, state.seed, b"secret", b"masked"):
        assert secret not in sealed
    member = member_of(ready)
    (elsewhere := tmp_path / "another-session").mkdir()
    shutil.copy(state_file(ready), elsewhere)
    moved = dataclasses.replace(member.work, directory=elsewhere)
    assert dataclasses.replace(member, work=moved)._load() is None
    ready.run_session()
    assert ready.files() == OWN_FILES


def test_the_state_is_on_the_disk_before_the_answer_leaves(
    ready: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    ready.run_to(S.REPORTING)
    synced: list[str] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def failure(request: httpx.Request) -> None:
        if request.method == "PUT":
            assert synced == ["group.bin.tmp", state_file(ready).parent.name]
            synced.clear()

    monkeypatch.setattr(os, "fsync", watched)
    server.failure = failure
    ready.run_session()
    assert sent(server) == list(STEPS)


@pytest.mark.parametrize("damage", ["gone", "flipped", "empty", "foreign key"])
def test_a_state_that_does_not_open_is_none(damage: str, ready: Device, server: FakeServer):
    run_to_step(ready, "share-keys")
    file = state_file(ready)
    before = stored(ready)
    ready.kill()
    match damage:
        case "gone":
            file.unlink()
        case "flipped":
            file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
        case "empty":
            file.write_bytes(b"")
        case "foreign key":
            ready.home.store_key_file.unlink()  # the person forgot everything
    server.open_secure_round()  # its keys were never heard of
    body = report(ready)
    ready.run_session()
    check_sum(server, body)
    keys = group(server).group.state.roster
    assert before is not None
    assert before.keys not in keys


def test_a_group_that_it_does_not_remember_is_not_answered(ready: Device, server: FakeServer):
    run_to_step(ready, "share-keys")
    state_file(ready).unlink()
    ready.run_session()
    check_refused(ready, server, "does not know", outcome="void")
    assert sent(server) == ["advertise-keys"]


# --- another group -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_new_group_gets_fresh_keys(step: str, ready: Device, server: FakeServer):
    """The first group is void before it was opened: the same report, other keys, other masks."""
    run_to_step(ready, step)
    first, before = stored(ready), group(server)
    body = report(ready)
    assert first is not None
    ready.kill()
    server.open_secure_round()
    ready.run_session()
    check_sum(server, body)
    second = next(
        keys for keys in group(server).group.state.roster if keys.identity == first.keys.identity
    )
    for name in ("c_key", "s_key", "nonce", "signature"):
        assert getattr(second, name) != getattr(first.keys, name)
    old, new = dict(before.received), dict(group(server).received)
    assert [name for name, sent in old.items() if sent == new[name]] == []
    assert status(ready).sessions[0].outcome == "acknowledged"


def test_who_helped_to_open_a_group_joins_no_other(ready: Device, server: FakeServer):
    """The second sum, over all but one of the first's devices, would give that one away."""
    run_to_step(ready, "unmask")
    server.lie = lambda reply: server.open_secure_round()
    ready.run_session()
    check_refused(ready, server, "helped to open its first", outcome="late")
    assert sent(server) == []


# --- a server that cheats ----------------------------------------------------------------------------------


def check_refused(device: Device, server: FakeServer, reason: str, outcome: str) -> None:
    """The session is over, for this reason; only what may be in a sum counts; nobody waits for the device."""
    ended = status(device).sessions[0]
    assert ended.outcome == outcome
    assert reason in ended.reason
    counted = int(outcome == "late")
    assert server.aborted == ["train-1-1"]
    assert device.runtime._journal.daily_participations(server.clock.now()) == counted
    assert reason in status(device).verdict
    assert device.files() == OWN_FILES
    assert server.reports == {}
    assert group(server).sums is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_min": 3}, "smaller than this device accepts"),
        ({"adversary": Adversary.SEMI_HONEST}, "fewer corrupt devices"),
        ({"corrupt_fraction": 0.01}, "fewer corrupt devices"),
        ({"max_staleness": 1}, "mixes base checkpoints"),
        ({"checkpoint_hash": OTHER}, "checkpoint is not the one"),
        ({"plan_hash": OTHER}, "plan_hash"),
        ({"task": "other"}, "task"),
        ({"round_number": 2}, "round_number"),
        ({"attempt": 2}, "attempt"),
        ({"bits": 16}, "bits"),
        ({"dimension": 1}, "dimension"),
        ({"num_aux": 1}, "num_aux"),
        ({"schema": "none"}, "schema"),
        ({"clip": 1e6}, "clip"),
        ({"n_max": 100}, "n_max"),
        ({"suite": "rot13"}, "suite"),
    ],
    ids=str,
)
def test_terms_that_are_wrong_or_weak(
    changes: dict[str, object], reason: str, trained: Path, tmp_path: Path, server: FakeServer
):
    shutil.copytree(trained, tmp_path / "device")
    device = Device(tmp_path / "device", server, num_examples=0, policy=Policy(min_group=4))
    terms = server.open_secure_round(min_group=4, num_played=4)
    server.lie = lambda reply: replace(terms, **changes)
    device.run_session()
    check_refused(device, server, reason, outcome="void")
    assert sent(server) == []
    device.kill()


def test_weak_terms_are_not_trained_for_again(ready: Device, server: FakeServer):
    terms = server.open_secure_round()
    weak = replace(terms, adversary=Adversary.SEMI_HONEST)
    server.lie = lambda reply: weak
    ready.run_session()
    server.open_secure_round(2)
    claims = server.log.count("POST /v1/claim")
    ready.run_to(S.REJECTED)
    (refusal,) = status(ready).refusals
    assert (refusal.code, refusal.task) == ("refused_plan", "train-digits")
    assert "fewer corrupt devices" in refusal.text
    assert server.log.count("POST /v1/claim") == claims
    server.lie = None  # the operator learned
    ready.clock.advance(REFUSE_FOR_S)
    ready.run_session()
    assert status(ready).sessions[0].outcome == "acknowledged"


def asked_instead(kind: type, change: Callable[..., GroupReply]) -> Callable[..., GroupReply]:
    """A lie in the place of one request."""
    return lambda reply: change(reply) if isinstance(reply, kind) else reply


def others(reply: AgreeRequest | UnmaskRequest) -> GroupReply:
    """All survived but one."""
    return replace(reply, survivors=bytes([reply.survivors[0] & (reply.survivors[0] - 1)]))


NO_SHARERS = MaskInputRequest(shared=bitmap([], 4), sealed=())


@pytest.mark.parametrize(
    ("lie", "answered", "reason", "outcome"),
    [
        (asked_instead(ShareKeysRequest, lambda r: NO_SHARERS), 1, "too early", "void"),
        (
            asked_instead(ShareKeysRequest, lambda r: replace(r, entries=r.entries[1:])),
            1,
            "other neighbours",
            "void",
        ),
        (
            asked_instead(ShareKeysRequest, lambda r: replace(r, num_devices=2)),
            1,
            "not what the terms promise",
            "void",
        ),
        (asked_instead(MaskInputRequest, lambda r: NO_SHARERS), 2, "not among those", "void"),
        (
            asked_instead(MaskInputRequest, lambda r: replace(r, sealed=(bytes(80),) * 3)),
            2,
            "does not open",
            "void",
        ),
        (
            asked_instead(AgreeRequest, lambda r: replace(r, survivors=bitmap([], 4))),
            3,
            "not among those",
            "late",
        ),
        (asked_instead(UnmaskRequest, others), 4, "another survivor set", "late"),
        (
            asked_instead(UnmaskRequest, lambda r: replace(r, signers=b"\0", signatures=())),
            4,
            "too few neighbours signed",
            "late",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_are_refused(
    lie: Callable[..., GroupReply],
    answered: int,
    reason: str,
    outcome: str,
    ready: Device,
    server: FakeServer,
):
    server.lie = lie
    ready.run_session()
    check_refused(ready, server, reason, outcome)
    assert sent(server) == list(STEPS[:answered])


def test_one_unmasking_even_after_a_restart(ready: Device, server: FakeServer):
    """The answer left; killed; then the server asks for the shares under another survivor set."""
    run_to_step(ready, "unmask")

    def failure(request: httpx.Request) -> None:
        if request.method == "PUT":
            bodies.append(request.read())
            raise Killed

    bodies: list[bytes] = []
    server.failure = failure
    with pytest.raises(Killed):
        ready.step()
    ready.kill()
    server.lie = asked_instead(UnmaskRequest, others)
    ready.run_session()
    check_refused(ready, server, "another survivor set", outcome="late")
    assert len(bodies) == 1
    assert sent(server) == list(STEPS[:4])


def test_one_survivor_set_even_after_a_restart(ready: Device, server: FakeServer):
    run_to_step(ready, "unmask")  # it has signed one
    asked = AgreeRequest(survivors=group(server).group.agree_request().survivors)
    ready.kill()
    server.lie = lambda reply: others(asked)
    ready.run_session()
    check_refused(ready, server, "another survivor set", outcome="late")
    assert sent(server) == list(STEPS[:4])


def test_one_roster_even_after_a_restart(ready: Device, server: FakeServer):
    run_to_step(ready, "mask-input")
    index = group(server).group.index_of(ready.runtime._connection.identity.public_key)
    asked = group(server).group.share_keys_request(index)
    ready.kill()
    server.lie = lambda reply: replace(asked, root=bytes(32))
    ready.run_session()
    check_refused(ready, server, "another roster", outcome="void")


def test_what_was_masked_for_a_void_group_still_counts(ready: Device, server: FakeServer):
    """The server's word that a group is void is not proof: a refusal in the next one does not undo the first."""
    run_to_step(ready, "agree")
    server.open_secure_round()
    server.lie = asked_instead(ShareKeysRequest, lambda r: replace(r, entries=()))
    ready.run_session()
    check_refused(ready, server, "other neighbours", outcome="late")
    assert sent(server) == ["advertise-keys"]


@pytest.mark.parametrize("outcome", [ReportState.INCLUDED, ReportState.LATE])
def test_an_answer_that_comes_too_late(outcome: ReportState, ready: Device, server: FakeServer):
    """The step is over; whether the device is in the sum all the same is for the server to say."""
    run_to_step(ready, "agree")

    def failure(request: httpx.Request) -> None:
        if request.method == "PUT":
            group(server).sums = (np.zeros(0), np.zeros(0))  # the others went on
            raise WrongStep("the group is not at agree")

    server.failure = failure
    server.states["train-1-1"] = Receipt(assignment_id="train-1-1", state=outcome)
    ready.run_session()
    assert status(ready).sessions[0].outcome == outcome
    assert server.aborted == []
    assert ready.files() == OWN_FILES


@pytest.mark.parametrize(("step", "outcome"), [("share-keys", "void"), ("agree", "late")])
def test_a_server_that_refuses_an_answer(
    step: str, outcome: str, ready: Device, server: FakeServer
):
    run_to_step(ready, step)

    def failure(request: httpx.Request) -> None:
        if request.method == "PUT":
            raise WrongStep("another answer after the first")

    server.failure = failure
    ready.run_session()
    check_refused(ready, server, "another answer", outcome)


def test_a_damaged_report_is_not_masked(ready: Device, server: FakeServer):
    run_to_step(ready, "mask-input")
    file = state_file(ready).with_name("report.bin")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    ready.run_session()
    check_refused(ready, server, "not the one that was journalled", outcome="void")
    assert sent(server) == list(STEPS[:2])


def test_plain_tasks_need_the_persons_leave(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server, policy=Policy(min_group=3))
    server.open_round()
    device.run_to(S.REJECTED)
    assert [refusal.code for refusal in status(device).refusals] == ["plain_aggregation"]
    assert "POST /v1/claim" not in server.log
    device.kill()


def test_a_secure_offer_does_not_become_a_plain_assignment(device: Device, server: FakeServer):
    server.open_round()
    server.replies = [server.assignments["train-1-1"]]
    server.open_secure_round()
    device.run_to(S.REJECTED)
    assert "another aggregation" in status(device).verdict


def test_the_encoding_must_leave_room_for_the_smallest_group(device: Device, server: FakeServer):
    small = Encoding(bits=14, clip_norm=1.0, max_weight=1, max_group=4)
    offer = server.open_round(encoding=small, min_group=5)
    assert offer.min_group == 5
    device.run_to(S.REJECTED)
    assert "too small a group" in status(device).verdict


# --- the person comes first --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["advertise-keys", "mask-input", "unmask", "waiting"])
def test_no_exchange_while_conditions_do_not_hold(step: str, ready: Device, server: FakeServer):
    ready.conditions = switch = Switch()
    body = report(ready)
    if step == "waiting":
        group(server)._num_real = 2  # the other one does not come yet
        for _ in range(4):
            ready.step()
    else:
        run_to_step(ready, step)
    switch.holds = False
    server.log.clear()
    for _ in range(20):
        assert ready.runtime.step() == 1.0
        ready.clock.advance(1.0)
    assert server.log == []
    assert [refusal.code for refusal in status(ready).refusals][:1] == ["not_idle"]
    assert "not idle" in status(ready).verdict
    switch.holds = True
    group(server)._num_real = 1
    if step == "waiting":
        group(server)._play()
    ready.run_session()
    assert server.log[0] == "GET /v1/assignments/train-1-1/group"  # whether it is still wanted
    check_sum(server, body)
    assert status(ready).sessions[0].outcome == "acknowledged"


def test_who_is_no_longer_wanted_hears_it(ready: Device, server: FakeServer):
    ready.conditions = switch = Switch()
    run_to_step(ready, "mask-input")
    switch.holds = False
    ready.step()
    switch.holds = True
    group(server).sums = (np.zeros(0), np.zeros(0))  # it was opened without this device
    server.states["train-1-1"] = Receipt(
        assignment_id="train-1-1", state=ReportState.LATE, reason="dropped out"
    )
    ready.run_session()
    ended = status(ready).sessions[0]
    assert (ended.outcome, ended.reason) == ("late", "dropped out")
    assert sent(server) == list(STEPS[:2])


@pytest.mark.parametrize(("step", "outcome"), [("share-keys", "void"), ("agree", "late")])
@pytest.mark.parametrize("away", ["server", "person"])
def test_nobody_waits_for_ever(
    step: str, outcome: str, away: str, ready: Device, server: FakeServer
):
    ready.conditions = switch = Switch()
    run_to_step(ready, step)
    if away == "server":
        server.failure = unplug
    else:
        switch.holds = False
    assert ready.runtime.step() >= 1.0
    assert ready.state is S.REPORTING
    ready.clock.advance(600.0 + REPORT_FOR_S)
    ready.run_session()
    assert status(ready).sessions[0].outcome == outcome
    assert ready.files() == OWN_FILES


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_vanishes_is_waited_for(step: str, ready: Device, server: FakeServer):
    body = report(ready)
    run_to_step(ready, step)
    server.failure = unplug
    pause = ready.runtime.step()
    assert 1 <= pause <= 5  # the others of the group wait
    assert "does not answer" in status(ready).verdict
    server.failure = None
    ready.clock.advance(pause)
    ready.run_session()
    check_sum(server, body)


def test_after_the_deadline_nobody_hurries(ready: Device, server: FakeServer):
    run_to_step(ready, "agree")
    server.failure = unplug
    ready.clock.advance(600.0)
    assert 29 < ready.runtime.step() < 41  # as for every server that is away


def test_stopping_in_a_group_keeps_the_report(ready: Device, server: FakeServer):
    body = report(ready)
    run_to_step(ready, "mask-input")
    ready.stop.request()
    ready.runtime.run()
    assert server.aborted == []
    ready._runtime = None
    ready.run_session()
    check_sum(server, body)


def test_a_state_that_cannot_be_kept_sends_nothing(
    ready: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    body = report(ready)
    run_to_step(ready, "mask-input")

    def full(path: Path, data: bytes) -> None:
        raise StorageFailure("no room", hint="free some")

    with monkeypatch.context() as patch:
        patch.setattr(secure, "write_atomically", full)
        ready.step()
    assert sent(server) == list(STEPS[:2])
    assert "no room" in status(ready).verdict
    ready.run_session()
    check_sum(server, body)
