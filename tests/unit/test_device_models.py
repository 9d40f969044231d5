"""Serving: only a signed release changes it, it survives crashes, and it goes back by itself."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import numpy as np
import pytest

from homespun import zoo
from homespun.clock import ManualClock
from homespun.corpora.vocabulary import Vocabulary
from homespun.device.models import CHECKPOINT_FILE, Models, Trial
from homespun.device.slots import content_of
from homespun.device.status import read_status
from homespun.errors import (
    HomespunError,
    InvalidInput,
    NotAuthentic,
    NotFound,
    NumericFailure,
    ShapeMismatch,
    StorageFailure,
    Unreachable,
    UntrustedPlan,
)
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.protocol.messages import SignedRelease
from homespun.tensors.codec import encode_tree
from tests.unit.device_server import (
    DIGITS,
    INITIAL,
    POPULATION,
    PUBLISHER,
    STRANGER,
    Device,
    FakeServer,
    try_here,
)

WORDS = Vocabulary.build(["thank you for the cat and thank you for the hat"], 4000)
KEYBOARD = zoo.load("keyboard").with_assets({"vocabulary": WORDS.to_bytes()}).sign(PUBLISHER)
FIRST, SECOND, THIRD = (
    encode_tree(initial_checkpoint(KEYBOARD.manifest, seed)) for seed in (1, 2, 3)
)
FINE = encode_tree(INITIAL)
NAN = encode_tree({name: np.full_like(array, np.nan) for name, array in INITIAL.items()})


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def models(tmp_path: Path) -> Models:
    key = base64.b64encode(PUBLISHER.public_key().public_bytes_raw()).decode()
    return Models(tmp_path / "models", POPULATION, (key,), "salt")


def install(
    models: Models,
    server: FakeServer,
    signed: SignedRelease,
    slot: str = "default",
    trial: Trial = try_here,
) -> bool:
    def fetch(address: str, path: Path, max_bytes: int) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server.blobs[address])
        return True

    return models.install(slot, signed, fetch, trial=trial)


def folder(models: Models, slot: str = "default") -> Path:
    """Where the model lies that is served."""
    active = models.slots(slot).active
    assert active is not None
    return models._root / slot / content_of(active)


def contents(models: Models) -> set[str]:
    """The models whose files lie here."""
    return {path.name for path in (models._root / "default").iterdir()}


def reasons(models: Models) -> list[str]:
    return [failure.reason for failure in models.slots("default").failed]


def test_nothing_is_served_at_first(models: Models):
    with pytest.raises(NotFound) as caught:
        models.predict("thank you")
    assert "device run" in caught.value.hint


def test_a_release_is_served(models: Models, server: FakeServer):
    assert install(models, server, server.release(KEYBOARD, FIRST, 1))
    found = models.predict("Thank you for the", k=3)
    assert len({suggestion.word for suggestion in found}) == 3
    assert all(0 < suggestion.probability < 1 for suggestion in found)
    assert models.predict("", k=1, prefix="ca")[0].word == "cat"
    assert {path.name for path in folder(models).iterdir()} == {"plan.zip", CHECKPOINT_FILE}


def test_the_one_before_is_kept_and_no_other(models: Models, server: FakeServer):
    for sequence, checkpoint in enumerate([FIRST, SECOND, THIRD], start=1):
        install(models, server, server.release(KEYBOARD, checkpoint, sequence))
    slots = models.served()["default"]
    assert slots.active is not None
    assert slots.previous is not None
    assert (slots.active.sequence, slots.previous.sequence, slots.candidate) == (3, 2, None)
    assert contents(models) == {content_of(slots.active), content_of(slots.previous)}
    assert models.unserved() == []


def test_a_new_release_is_noticed_by_who_predicts(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    before = models.predict("thank you", k=5)
    other = Models(models._root, POPULATION, (), "salt")  # the app, in a process of its own
    assert other.predict("thank you", k=5) == before
    install(models, server, server.release(KEYBOARD, SECOND, 2))
    assert other.predict("thank you", k=5) == models.predict("thank you", k=5) != before


def altered(signed: SignedRelease) -> SignedRelease:
    data = base64.b64decode(signed.manifest).replace(b'"v2"', b'"v3"')
    return msgspec.structs.replace(signed, manifest=base64.b64encode(data).decode())


def test_only_our_publisher_changes_what_is_served(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    served = models.served()
    refused = [
        server.release(KEYBOARD, SECOND, 2, key=STRANGER),
        altered(server.release(KEYBOARD, SECOND, 2)),
        server.release(KEYBOARD, SECOND, 2, population="others"),
        server.release(KEYBOARD, SECOND, 2, slot="elsewhere"),
        server.release(KEYBOARD, SECOND, 1),  # not newer: a replay
    ]
    for signed in refused:
        with pytest.raises(NotAuthentic):
            install(models, server, signed)
    assert models.served() == served


@pytest.mark.parametrize(
    ("plan", "checkpoint", "error"),
    [
        (KEYBOARD.with_settings(), FIRST, UntrustedPlan),
        (DIGITS, FIRST, ShapeMismatch),
        (DIGITS, NAN, NumericFailure),
    ],
    ids=["unsigned plan", "another model's checkpoint", "not finite"],
)
def test_a_model_that_cannot_be_served_changes_nothing_and_is_not_tried_again(
    plan: Plan,
    checkpoint: bytes,
    error: type[HomespunError],
    models: Models,
    server: FakeServer,
):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    before = models.predict("thank you")
    with pytest.raises(error):
        install(models, server, server.release(plan, checkpoint, 2))
    assert models.predict("thank you") == before
    assert models.sequence("default") == 2
    assert len(reasons(models)) == 1
    assert models.unserved() == []
    assert install(models, server, server.release(KEYBOARD, SECOND, 3))


def test_a_download_that_breaks_is_tried_again(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    signed = server.release(KEYBOARD, SECOND, 2)

    def broken(address: str, path: Path, max_bytes: int) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        raise Unreachable("gone")

    with pytest.raises(Unreachable):
        models.install("default", signed, broken)
    assert models.sequence("default") == 1
    assert models.unserved() == []
    assert install(models, server, signed)


def test_a_trial_that_is_stopped_is_made_again(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    signed = server.release(KEYBOARD, SECOND, 2)
    assert not install(models, server, signed, trial=lambda directory: False)
    assert models.sequence("default") == 1
    assert models.unserved() == []
    assert install(models, server, signed)


def test_a_crash_while_installing_leaves_the_old_model(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    before = models.predict("thank you")
    (models._root / "default" / "half").mkdir()
    (models._root / "default" / "half" / "plan.zip").write_bytes(b"half")
    (models._root / "serving.db.tmp").write_bytes(b"half")
    again = Models(models._root, POPULATION, (), "salt")
    assert again.predict("thank you") == before
    again.remove_unserved()
    assert contents(models) == {folder(models).name}
    assert not (models._root / "serving.db.tmp").exists()


def test_a_model_that_breaks_is_replaced_by_the_one_before(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    before = models.predict("thank you")
    install(models, server, server.release(KEYBOARD, SECOND, 2))
    (folder(models) / CHECKPOINT_FILE).write_bytes(b"damaged by the disk")
    assert models.predict("thank you") == before
    slots = models.served()["default"]
    assert slots.active is not None
    assert slots.active.sequence == 1
    assert ["safetensors" in reason for reason in reasons(models)] == [True]
    with pytest.raises(NotAuthentic):  # and it does not come back
        install(models, server, server.release(KEYBOARD, SECOND, 2))


def test_numbers_that_are_not_finite_go_back_too(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    before = models.predict("thank you")
    install(models, server, server.release(KEYBOARD, SECOND, 2))
    huge = {
        name: np.sign(array) * np.float32(1e38)  # finite themselves, infinite when multiplied
        for name, array in initial_checkpoint(KEYBOARD.manifest, 0).items()
    }
    (folder(models) / CHECKPOINT_FILE).write_bytes(encode_tree(huge))
    assert models.predict("thank you") == before
    assert ["finite" in reason for reason in reasons(models)] == [True]


def test_without_another_model_the_failure_is_told(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    (folder(models) / CHECKPOINT_FILE).unlink()
    with pytest.raises(StorageFailure, match="checkpoint"):
        models.predict("thank you")


def test_a_model_for_something_else_is_no_failure(models: Models, server: FakeServer):
    install(models, server, server.release(DIGITS, FINE, 1))
    with pytest.raises(InvalidInput, match="does not read text"):
        models.predict("thank you")
    assert reasons(models) == []


def test_a_stage_is_decided_here_and_sticks(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("homespun.device.models.try_model", lambda directory: True)
    key = base64.b64encode(PUBLISHER.public_key().public_bytes_raw()).decode()
    inside = []
    for number in range(30):
        models = Models(tmp_path / str(number), POPULATION, (key,), str(number))
        small = install(models, server, server.release(DIGITS, FINE, 1, fraction=0.3))
        large = install(models, server, server.release(DIGITS, FINE, 2, fraction=0.7))
        assert large or not small  # each stage contains the one before
        inside.append((small, large))
    assert 2 < sum(small for small, _ in inside) < 17
    assert 13 < sum(large for _, large in inside) < 28


def test_several_slots_are_asked_for_by_name(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1))
    install(models, server, server.release(DIGITS, FINE, 1, slot="digits"), "digits")
    with pytest.raises(NotFound, match="default, digits"):
        models.predict("thank you")
    assert models.predict("thank you", slot="default")


def test_a_running_device_fetches_what_is_released(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    server.release(KEYBOARD, FIRST, 1)
    server.release(DIGITS, NAN, 1, slot="digits")
    for _ in range(6):
        device.step()
    status = read_status(device.home)
    assert status is not None
    assert {slot: served.version for slot, served in status.served.items()} == {"default": "v1"}
    assert any("not finite" in problem for problem in status.release_problems)
    server.open_round()  # and goes on taking part
    device.run_session()
    assert len(server.reports["train-1-1"]) == 1
    device.kill()
