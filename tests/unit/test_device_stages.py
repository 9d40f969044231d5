"""Stages: which devices serve a release is decided here, sticks, and never downloads anything twice."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from homespun.clock import ManualClock
from homespun.device.errands import fetch_releases
from homespun.device.models import Models
from homespun.device.serving import PROBATION
from homespun.device.slots import Slots, content_of
from homespun.errors import NotAuthentic, NotFound, NumericFailure
from homespun.protocol.messages import ReleaseManifest, ReleaseNotice, SignedRelease
from homespun.protocol.selection import arm
from homespun.rng import unit_interval
from tests.unit.device_server import DIGITS, POPULATION, PUBLISHER, FakeServer, try_here
from tests.unit.test_device_models import FINE, FIRST, KEYBOARD, NAN, SECOND, THIRD

KEY = base64.b64encode(PUBLISHER.public_key().public_bytes_raw()).decode()
EARLY, LATE = (
    next(str(n) for n in range(1000) if low <= unit_interval("", str(n)) < high)
    for low, high in ((0.0, 0.1), (0.9, 1.0))
)
"""Salts of a device that is in every stage, and of one that is in none but the last."""


class Phone:
    """A device's models, and what it has downloaded."""

    def __init__(self, root: Path, server: FakeServer, salt: str) -> None:
        self.models = Models(root, POPULATION, (KEY,), salt)
        self.server = server
        self.fetched: list[str] = []

    def fetch(self, address: str, path: Path, max_bytes: int) -> bool:
        self.fetched.append(address)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.server.blobs[address])
        return True

    def install(self, signed: SignedRelease) -> bool:
        self.fetched.clear()
        return self.models.install(
            "default", signed, self.fetch, lambda: self.server.deployed.get("default"), try_here
        )

    @property
    def slots(self) -> Slots:
        return self.models.slots("default")

    def can_go_back(self) -> bool:
        self.models.settle()
        return self.slots.previous is not None

    def serves(self, checkpoint: bytes) -> bool:
        active = self.slots.active
        return active is not None and active.checkpoint == self.server.put(checkpoint)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def early(server: FakeServer, tmp_path: Path) -> Phone:
    phone = Phone(tmp_path / "early", server, EARLY)
    phone.install(server.release(KEYBOARD, FIRST, 1, release_id="a"))
    return phone


@pytest.fixture
def late(server: FakeServer, tmp_path: Path) -> Phone:
    phone = Phone(tmp_path / "late", server, LATE)
    phone.install(server.release(KEYBOARD, FIRST, 1, release_id="a"))
    return phone


def test_a_later_stage_changes_the_record_only(early: Phone):
    release = early.server.release
    assert early.install(release(KEYBOARD, SECOND, 2, release_id="b", fraction=0.1))
    assert len(early.fetched) == 2
    previous = early.slots.previous
    for sequence, fraction in ((3, 0.5), (4, 1.0)):
        assert early.install(release(KEYBOARD, SECOND, sequence, release_id="b", fraction=fraction))
        assert early.fetched == []
        assert early.slots.active is not None
        assert (early.slots.active.fraction, early.slots.sequence) == (fraction, sequence)
    assert early.slots.previous == previous is not None


def test_a_rollback_downloads_nothing_and_leaves_nothing_of_the_candidate(early: Phone):
    release = early.server.release
    before = early.models.predict("thank you")
    early.install(release(KEYBOARD, SECOND, 2, release_id="b", fraction=0.1))
    assert early.models.predict("thank you") != before
    assert early.install(release(KEYBOARD, FIRST, 3, release_id="a"))
    assert early.fetched == []
    assert early.models.predict("thank you") == before
    assert early.slots.previous is None
    assert early.slots.active is not None
    kept = early.models._root / "default"
    assert [path.name for path in kept.iterdir()] == [content_of(early.slots.active)]


def test_a_release_for_others_is_not_downloaded(late: Phone):
    before = late.slots.active
    assert not late.install(late.server.release(KEYBOARD, SECOND, 2, release_id="b", fraction=0.5))
    assert late.fetched == []
    assert (late.slots.active, late.slots.sequence) == (before, 2)
    assert late.install(late.server.release(KEYBOARD, SECOND, 3, release_id="b"))


def test_a_new_device_outside_the_stage_serves_what_is_deployed(server: FakeServer, tmp_path: Path):
    server.release(KEYBOARD, FIRST, 1, release_id="a")
    canary = server.release(KEYBOARD, SECOND, 2, release_id="b", fraction=0.1)
    late = Phone(tmp_path / "late", server, LATE)
    assert not late.install(canary)
    assert late.serves(FIRST)
    early = Phone(tmp_path / "early", server, EARLY)
    assert early.install(canary)
    assert early.serves(SECOND)


def test_a_new_device_may_find_nothing_that_is_for_it(server: FakeServer, tmp_path: Path):
    phone = Phone(tmp_path, server, LATE)
    assert not phone.install(server.release(KEYBOARD, FIRST, 1, fraction=0.1))
    with pytest.raises(NotFound):
        phone.models.predict("thank you")


def test_a_device_that_missed_a_deployment_catches_up(late: Phone):
    late.server.release(KEYBOARD, SECOND, 2, release_id="b")
    assert not late.install(late.server.release(KEYBOARD, THIRD, 3, release_id="c", fraction=0.1))
    assert late.serves(SECOND)


def test_what_failed_here_does_not_come_back_at_a_later_stage(early: Phone):
    release, server = early.server.release, early.server
    with pytest.raises(NumericFailure):
        early.install(release(DIGITS, NAN, 2, release_id="b", fraction=0.1))
    assert early.serves(FIRST)
    for sequence, fraction in ((3, 0.5), (4, 1.0)):
        assert not early.install(release(DIGITS, NAN, sequence, release_id="b", fraction=fraction))
        assert early.fetched == []
        assert early.serves(FIRST)
    assert early.install(release(DIGITS, FINE, 5, release_id="b2"))
    assert early.serves(FINE)
    assert server.deployed["default"] == server.releases["default"][1]


def test_what_is_deployed_cannot_be_replayed(server: FakeServer, tmp_path: Path):
    phone = Phone(tmp_path, server, LATE)
    old = server.release(KEYBOARD, FIRST, 1)
    phone.install(server.release(KEYBOARD, SECOND, 2))
    canary = server.release(KEYBOARD, THIRD, 3, fraction=0.1)
    for wrong in (old, canary):  # older, or not for every device
        with pytest.raises(NotAuthentic, match="older"):
            phone.models.install("default", canary, phone.fetch, lambda wrong=wrong: wrong)  # type: ignore[misc]
    assert phone.serves(SECOND)
    assert phone.slots.sequence == 2  # the true answer may still come


def test_a_deployed_release_must_be_trusted_before_the_one_before_goes(early: Phone):
    early.install(early.server.release(KEYBOARD, SECOND, 2, release_id="b"))
    for _ in range(PROBATION):
        assert early.can_go_back()
        early.models.predict("thank you")
    assert not early.can_go_back()


def test_the_one_before_goes_once_its_successor_is_deployed_and_trusted(early: Phone):
    release = early.server.release
    early.install(release(KEYBOARD, SECOND, 2, release_id="b", fraction=0.1))
    for _ in range(PROBATION):
        assert early.can_go_back()
        early.models.predict("thank you")
    assert early.can_go_back()  # it may still be rolled back everywhere
    early.install(release(KEYBOARD, SECOND, 3, release_id="b"))
    assert not early.can_go_back()
    assert len(list((early.models._root / "default").iterdir())) == 1


def test_stage_and_control_band_are_the_ends_of_one_line():
    def place(salt: str, fraction: float, control: float) -> str | None:
        release = ReleaseManifest(
            population="p",
            slot="s",
            sequence=1,
            version="1",
            plan_hash="0" * 64,
            checkpoint="0" * 64,
            fraction=fraction,
            control=control,
            stage_salt="x",
            issued_at=0.0,
        )
        return arm(release, salt)

    salts = [str(number) for number in range(400)]
    for fraction in (0.0, 0.1, 0.3):
        arms = [place(salt, fraction, fraction) for salt in salts]
        assert arms.count("stage") == sum(unit_interval("x", s) < fraction for s in salts)
        assert arms.count("control") == sum(unit_interval("x", s) >= 1 - fraction for s in salts)
    assert {place(salt, 1.0, 0.0) for salt in salts} == {"stage"}
    assert not {s for s in salts if place(s, 0.1, 0.1) == "stage" != place(s, 0.5, 0.5)}


def test_the_errand_asks_for_what_is_deployed_only_if_it_must(late: Phone):
    asked = []

    class Server:
        def release(self, population: str, slot: str) -> SignedRelease:
            return late.server.releases[slot][1]

        def deployed(self, population: str, slot: str) -> SignedRelease:
            asked.append(slot)
            return late.server.deployed[slot]

    def errand(sequence: int) -> list[str]:
        notice = ReleaseNotice(slot="default", sequence=sequence)
        return fetch_releases([notice], late.models, Server(), POPULATION, try_here, lambda: False)  # type: ignore[arg-type]

    late.server.release(KEYBOARD, SECOND, 2, release_id="b", fraction=0.1)
    assert (errand(2), asked) == ([], ["default"])
    assert (errand(2), asked) == ([], ["default"])  # once is enough
    late.server.release(KEYBOARD, FIRST, 3, release_id="a")
    assert (errand(3), asked) == ([], ["default"])
    assert late.serves(FIRST)
