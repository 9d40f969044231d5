"""A straggler: the same update, encoded anew for a later round, and never two contributions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import httpx
import numpy as np
import pytest
from msgspec.structs import replace

from homespun.clock import ManualClock
from homespun.device import journal, secure, work
from homespun.device.home import write_atomically
from homespun.errors import BadSignature
from homespun.learning.contribution import AUX_SCALE, Contribution
from homespun.protocol.messages import Carried
from homespun.protocol.session import SessionState as S
from tests.unit.device_server import Device, FakeServer
from tests.unit.test_device_runtime import OWN_FILES, Picked, status
from tests.unit.test_device_secure import STEPS, Killed, check_sum, group, once, report, sent

FIRST, SECOND, THIRD = "b" * 64, "c" * 64, "d" * 64


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a device that has trained for a round whose stragglers may be two rounds behind."""
    root = tmp_path_factory.mktemp("trained") / "device"
    server = FakeServer(ManualClock())
    device = Device(root, server)
    server.open_secure_round(max_staleness=2)
    device.run_to(S.REPORTING)
    device.kill()
    return root


@pytest.fixture
def ready(trained: Path, tmp_path: Path, server: FakeServer):
    shutil.copytree(trained, tmp_path / "ready")
    device = Device(tmp_path / "ready", server, num_examples=0)
    server.open_secure_round(max_staleness=2)
    yield device
    device.kill()


def directory(device: Device) -> Path:
    return device.home.work / device.runtime.session.session_id


def decoded(device: Device, contribution: Contribution) -> tuple[np.ndarray, float]:
    """The update and the weight that a contribution says, as of the encoding that the session has now."""
    worker = device.runtime._work
    aggregate = worker.codec(worker.verified().manifest).decode(contribution)
    return aggregate.mean_update, aggregate.weight


def run_to_carried(device: Device) -> None:
    for _ in range(10):
        if device.runtime.session.ancestry:
            return
        device.step()
    raise AssertionError("it was not carried")


def test_the_same_update_goes_into_the_next_round_with_less_weight(
    ready: Device, server: FakeServer
):
    update, weight = decoded(ready, report(ready))
    carried = server.carry(FIRST)
    run_to_carried(ready)
    body = report(ready)
    again, lighter = decoded(ready, body)
    assert lighter == round(weight / sqrt(2) * AUX_SCALE) / AUX_SCALE
    np.testing.assert_allclose(again, update, atol=0.02)  # 14 bits, rotated in another way
    session = ready.runtime.session
    assert session.ancestry == carried.ancestry
    assert session.assigned is not None
    assert (session.assigned.round_number, session.assigned.encoding.rotation_seed) == (2, 7)
    ready.run_session()
    check_sum(server, body)
    ended = status(ready).sessions[0]
    assert (ended.outcome, ended.round_number) == ("acknowledged", 2)
    assert ready.files() == OWN_FILES


def test_it_may_fall_behind_more_than_once(ready: Device, server: FakeServer):
    _, weight = decoded(ready, report(ready))
    server.carry(FIRST)
    run_to_carried(ready)
    server.carry(FIRST, SECOND)
    ready.run_session()
    (share,) = {round(sqrt(3) * lighter, 3) for lighter in [weight_in_sum(server)]}
    assert share == round(weight, 3)
    assert status(ready).sessions[0].round_number == 3


def weight_in_sum(server: FakeServer) -> float:
    """What the real device's weight was: the sum without what the players said."""
    played = group(server)
    assert played.sums is not None
    _, aux = played.sums
    others = np.sum([player.aux for player in played.players], axis=0)
    return float((aux - others)[0] / AUX_SCALE)


def test_another_attempt_at_the_same_round_is_not_behind(ready: Device, server: FakeServer):
    _, weight = decoded(ready, report(ready))
    server.carry(attempt=2)
    ready.run_session()
    assert weight_in_sum(server) == weight
    assert status(ready).sessions[0].outcome == "acknowledged"


def test_an_update_is_kept_only_where_it_may_be_needed(tmp_path: Path, server: FakeServer):
    for staleness, kept in ((0, False), (1, True)):
        device = Device(tmp_path / str(staleness), server)
        server.open_secure_round(max_staleness=staleness)
        device.run_to(S.REPORTING)
        file = directory(device) / "update.bin"
        assert file.exists() is kept
        if kept:
            assert file.stat().st_mode & 0o077 == 0
        device.run_session()
        assert device.files() == OWN_FILES
        device.kill()


@pytest.mark.parametrize("killed", ["", "paused", "before_report"])
def test_training_that_was_interrupted_is_carried_as_if_it_had_not_been(
    killed: str, trained: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    device = Device(tmp_path / "device", server)
    device.conditions = Picked(device, 3, for_s=60.0)
    server.open_secure_round(max_staleness=2)
    device.run_to(S.TRAINING)
    while not device.runtime.session.is_paused:
        device.step()
    assert not (directory(device) / "update.bin").exists()
    assert (directory(device) / "step.bin").exists()
    if killed == "paused":
        device.kill()
    if killed == "before_report":
        save, hook = write_atomically, once(lambda: True)

        def report_file(path: Path, data: bytes) -> None:
            if path.name == "report.bin":
                hook()
            save(path, data)

        monkeypatch.setattr(work, "write_atomically", report_file)
        with pytest.raises(Killed):
            device.run_to(S.PACKAGED)
        device.kill()
    device.run_to(S.REPORTING)
    (undisturbed,) = trained.glob("work/*/update.bin")
    assert (directory(device) / "update.bin").read_bytes() == undisturbed.read_bytes()
    server.carry(FIRST)
    run_to_carried(device)
    body = report(device)
    device.run_session()
    check_sum(server, body)
    assert device.files() == OWN_FILES
    device.kill()


def test_the_round_may_move_on_while_it_answers(ready: Device, server: FakeServer):
    server.carry(FIRST)

    def failure(request: httpx.Request) -> None:
        if request.url.path.endswith("advertise-keys"):
            server.failure = None
            server.carry(FIRST, SECOND)
            raise BadSignature("the signature of advertised keys does not verify")

    server.failure = failure
    ready.run_session()
    assert status(ready).sessions[0].outcome == "acknowledged"
    assert status(ready).sessions[0].round_number == 3
    assert sent(server) == list(STEPS)


# --- killed anywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["before_report", "after_report", "before_journal", "after_journal", "keys"]
)
def test_killed_while_it_is_carried(
    where: str, ready: Device, server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    server.carry(FIRST)
    save, record, hook = write_atomically, journal.Journal.save, once(lambda: True)

    def encoding(path: Path, data: bytes) -> None:
        if where == "before_report":
            hook()
        save(path, data)
        if where == "after_report":
            hook()

    def joining(path: Path, data: bytes) -> None:
        if where == "keys":
            hook()
        save(path, data)

    def saving(self: journal.Journal, *arguments: object) -> None:
        if where == "before_journal":
            hook()
        record(self, *arguments)  # type: ignore[arg-type]
        if where == "after_journal":
            hook()

    ready.run_to(S.REPORTING)
    monkeypatch.setattr(work, "write_atomically", encoding)
    monkeypatch.setattr(secure, "write_atomically", joining)
    monkeypatch.setattr(journal.Journal, "save", saving)
    with pytest.raises(Killed):
        ready.run_session()
    ready.kill()
    run_to_carried(ready)
    body = report(ready)
    ready.run_session()
    check_sum(server, body)
    assert sent(server) == list(STEPS)
    assert ready.runtime._journal.daily_participations(server.clock.now()) == 1
    assert ready.files() == OWN_FILES


def test_killed_between_any_two_steps(trained: Path, tmp_path: Path):
    bodies = set()
    for number in range(12):
        server = FakeServer(ManualClock())
        shutil.copytree(trained, tmp_path / str(number))
        device = Device(tmp_path / str(number), server, num_examples=0)
        server.open_secure_round(max_staleness=2)
        server.carry(FIRST)
        for _ in range(number):
            device.step()
        device.kill()
        if device.state is S.WAITING:
            break
        if not device.runtime.session.outcome:
            run_to_carried(device)
            bodies.add(report(device).main.tobytes())
        device.run_session()
        assert sent(server) == list(STEPS)
        assert status(device).sessions[0].outcome == "acknowledged"
        assert device.files() == OWN_FILES
        device.kill()
    assert number >= 6
    assert len(bodies) == 1  # whenever it was killed, the bytes are the same


# --- what it refuses ---------------------------------------------------------------------------------------


def lie(change: Callable[[Carried], Carried]) -> Callable[..., object]:
    return lambda reply: change(reply) if isinstance(reply, Carried) else reply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: replace(c, ancestry=(FIRST, SECOND)), "does not follow"),
        (lambda c: replace(c, ancestry=c.ancestry[:1]), "does not follow"),
        (lambda c: replace(c, ancestry=(*c.ancestry, THIRD)), "does not follow"),
        (lambda c: replace(c, terms=replace(c.terms, round_number=3)), "does not follow"),
        (lambda c: replace(c, terms=replace(c.terms, checkpoint_hash=THIRD)), "does not follow"),
        (
            lambda c: replace(c, terms=replace(c.terms, checkpoint_hash=c.ancestry[0])),
            "does not follow",
        ),
        (lambda c: replace(c, terms=replace(c.terms, max_staleness=3)), "mixes base checkpoints"),
        (lambda c: replace(c, encoding=replace(c.encoding, rotation_seed=1)), "schema"),
        (lambda c: replace(c, encoding=replace(c.encoding, max_group=50)), "n_max"),
        (lambda c: replace(c, encoding=replace(c.encoding, clip_norm=9.0)), "signed plan"),
    ],
    ids=range(10),
)
def test_a_round_that_does_not_follow_is_refused(
    change: Callable[[Carried], Carried], reason: str, ready: Device, server: FakeServer
):
    server.carry(FIRST)
    server.lie = lie(change)  # type: ignore[assignment]
    ready.run_session()
    ended = status(ready).sessions[0]
    assert ended.outcome == "void"
    assert reason in ended.reason
    assert (sent(server), server.aborted) == ([], ["train-1-1"])
    assert ready.files() == OWN_FILES


def test_no_further_than_was_offered(ready: Device, server: FakeServer):
    server.carry(FIRST, SECOND, THIRD)
    ready.run_session()
    assert "further from the one" in status(ready).sessions[0].reason
    assert sent(server) == []


def test_what_may_have_left_masked_is_never_encoded_again(ready: Device, server: FakeServer):
    """The server says that the group came to nothing; a second contribution could be told from the first."""
    while not ready.runtime.session.masked:
        ready.step()
    server.carry(FIRST)
    ready.run_session()
    ended = status(ready).sessions[0]
    assert (ended.outcome, ended.round_number) == ("late", 1)
    assert "after the masked input had left" in ended.reason
    assert sent(server) == []
    assert ready.files() == OWN_FILES


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_update_that_is_lost_is_not_made_up(damage: str, ready: Device, server: FakeServer):
    server.carry(FIRST)
    file = directory(ready) / "update.bin"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    ready.run_session()
    assert "update on disk" in status(ready).sessions[0].reason
    assert sent(server) == []
    assert ready.files() == OWN_FILES
