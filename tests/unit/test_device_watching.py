"""While a release is on its way, its stage and its control band say how the model does that they serve, once."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import pytest

from homespun.clock import ManualClock
from homespun.device import child
from homespun.device.child import Perform, ShouldStop, Trial
from homespun.device.home import SERVING_FILE
from homespun.device.labour import work_on
from homespun.device.models import open_models
from homespun.device.serving import Record
from homespun.device.slots import Failure, name_of
from homespun.device.status import read_status
from homespun.errors import PlanCrashed
from homespun.learning.contribution import ContributionCodec
from homespun.learning.metrics import MetricSum, watched_names
from homespun.protocol.frame import decode_contribution
from homespun.protocol.messages import Encoding, ReportState, TaskKind, Watch
from homespun.protocol.session import SessionState
from homespun.rng import unit_interval
from homespun.tensors.codec import encode_tree
from homespun.types import Hash
from tests.unit.device_server import DIGITS, INITIAL, Device, FakeServer, children
from tests.unit.test_device_models import FINE, NAN
from tests.unit.test_device_secure import check_sum, report

WORSE = encode_tree({name: np.zeros_like(array) for name, array in INITIAL.items()})
ENCODING = Encoding(clip_norm=1.0, max_weight=0, max_group=10, bits=32)
NOTHING = MetricSum(0.0, 0.0)
STAGE, CONTROL, NEITHER = (0.0, 0.1), (0.9, 1.0), (0.4, 0.6)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def device(tmp_path: Path, server: FakeServer):
    device = Device(tmp_path / "device", server)
    server.release(DIGITS, FINE, 1, release_id="old")
    yield device
    device.kill()


def canary(device: Device, place: tuple[float, float], checkpoint: bytes = WORSE) -> None:
    """Begin a release whose stage is the first tenth of all devices, with this device at `place`."""
    check_in(device)
    salt = open_models(device.home, device.settings).salt
    device.server.release(
        DIGITS,
        checkpoint,
        2,
        release_id="new",
        fraction=0.1,
        control=0.1,
        stage_salt=next(
            str(n) for n in count() if place[0] <= unit_interval(str(n), salt) < place[1]
        ),
    )


def check_in(device: Device) -> None:
    device.server.log.clear()
    while "POST /v1/check-in" not in device.server.log:
        device.step()


def watch(
    device: Device, number: int = 1, release_id: str = "new", min_predictions: int = 0
) -> str:
    """Open a round that watches; the name of its assignment."""
    offer = device.server.open_round(number, kind=TaskKind.EVALUATE, encoding=ENCODING)
    wanted = Watch(
        slot="default",
        release_id=release_id,
        max_latency_s=0.25,
        min_predictions=min_predictions,
    )
    device.server.offers = [msgspec.structs.replace(offer, watch=wanted)]
    return f"evaluate-{number}-1"


def reported(device: Device, assignment: str) -> dict[str, MetricSum]:
    """What the device says in this round."""
    device.run_session()
    (body,) = device.server.reports[assignment]
    codec = ContributionCodec(
        dimension=0, clip_norm=1.0, max_weight=0, metrics=watched_names(), max_group=10
    )
    return dict(codec.decode(decode_contribution(body)).metrics)


def refusals(device: Device) -> list[tuple[str, str]]:
    check_in(device)
    status = read_status(device.home)
    assert status is not None
    return [(reason.code, reason.text) for reason in status.refusals]


def predicted(device: Device, release: str, seconds: float) -> None:
    """As if the app had predicted with what is served."""
    record = Record(device.home.models / SERVING_FILE)
    record.finish(record.begin("default", release), "default", release, seconds)
    record.close()


@pytest.mark.parametrize(
    ("place", "arm", "other"), [(STAGE, "stage", "control"), (CONTROL, "control", "stage")]
)
def test_a_device_fills_its_own_arm(
    place: tuple[float, float], arm: str, other: str, device: Device, server: FakeServer
):
    canary(device, place)
    check_in(device)
    predicted(device, "new" if place == STAGE else "old", 0.125)
    assignment = watch(device)
    server.log.clear()
    said = reported(device, assignment)
    assert not [line for line in server.log if "/blobs/" in line]
    assert all(value == NOTHING for name, value in said.items() if name.startswith(other))
    assert said[f"{arm}.failed"] == MetricSum(0.0, 1.0)
    assert said[f"{arm}.latency"] == MetricSum(0.125, 1.0)
    assert said[f"{arm}.latency_squared"] == MetricSum(0.015625, 1.0)
    held_out = said[f"{arm}.primary"]
    assert held_out.count == 1
    assert 0 <= held_out.sum <= 1
    assert said[f"{arm}.primary_squared"].sum == pytest.approx(held_out.sum**2, abs=1e-4)


def test_stage_and_control_say_different_things(tmp_path: Path):
    means = []
    for place, arm in ((STAGE, "stage"), (CONTROL, "control")):
        server = FakeServer(ManualClock())
        device = Device(tmp_path / arm, server)
        server.release(DIGITS, FINE, 1, release_id="old")
        canary(device, place)
        check_in(device)
        means.append(reported(device, watch(device))[f"{arm}.primary"].sum)
        device.kill()
    assert means[0] != means[1]


def test_a_device_that_never_predicted_has_no_latency(device: Device):
    canary(device, STAGE)
    check_in(device)
    assert reported(device, watch(device))["stage.latency"] == NOTHING


def test_a_slow_prediction_counts_as_the_bound(device: Device):
    canary(device, STAGE)
    check_in(device)
    predicted(device, "new", 9.0)
    assert reported(device, watch(device))["stage.latency"] == MetricSum(0.25, 1.0)


def test_a_device_where_the_release_failed_says_so(device: Device):
    canary(device, STAGE, NAN)
    check_in(device)
    said = reported(device, watch(device))
    assert said["stage.failed"] == MetricSum(1.0, 1.0)
    assert said["stage.primary"].count == 1  # of what it serves instead


def test_numbers_that_are_not_finite_on_held_out_examples_are_a_failure(device: Device):
    huge = {name: np.sign(array) * np.float32(1e30) for name, array in INITIAL.items()}
    canary(device, STAGE, FINE)
    check_in(device)
    models = open_models(device.home, device.settings)
    active = models.slots("default").active
    assert active is not None
    place = models._directory("default", active) / "checkpoint.safetensors"
    place.write_bytes(encode_tree(huge))
    said = reported(device, watch(device))
    assert said["stage.failed"] == MetricSum(1.0, 1.0)
    assert said["stage.primary"] == NOTHING


def test_the_control_band_tells_failures_of_what_it_serves_since_then(device: Device):
    canary(device, CONTROL)
    check_in(device)
    before = Failure(release="old", version="v1", content="", during="old", reason="long ago")
    record = Record(device.home.models / SERVING_FILE)
    record.change("default", lambda s: msgspec.structs.replace(s, failed=(before,)))
    active = record.slots("default").active
    assert active is not None
    assert reported(device, watch(device))["control.failed"] == MetricSum(0.0, 1.0)
    assert record.fail("default", active, "now").active == active
    device.server.reports.clear()
    device.server.states["evaluate-1-1"] = msgspec.structs.replace(
        device.server.states["evaluate-1-1"], state=ReportState.VOID
    )
    assert reported(device, watch(device, 2))["control.failed"] == MetricSum(1.0, 1.0)


def test_a_device_reports_once_on_a_release_even_after_a_crash(device: Device, server: FakeServer):
    canary(device, STAGE)
    check_in(device)
    assert reported(device, watch(device))
    device.kill()
    watch(device, 2)
    assert refusals(device) == [("has_watched", "the device has reported on this release")]
    receipt = server.states["evaluate-1-1"]
    server.states["evaluate-1-1"] = msgspec.structs.replace(receipt, state=ReportState.VOID)
    assert reported(device, watch(device, 3))  # what came to nothing may be said again


def test_it_is_said_through_secure_aggregation(device: Device, server: FakeServer):
    canary(device, STAGE)
    check_in(device)
    watch = Watch(slot="default", release_id="new", min_predictions=0)
    server.open_secure_round(kind=TaskKind.EVALUATE, watch=watch)
    device.run_to(SessionState.INTENT)
    body = report(device)
    assert len(body.aux) == 3 + 2 * len(watched_names())
    device.run_session()
    check_sum(server, body)


@pytest.mark.parametrize(
    ("place", "release_id", "words"),
    [
        (NEITHER, "new", "nor compared"),
        (STAGE, "another", "not here yet"),
        (CONTROL, "another", "not here yet"),
    ],
)
def test_others_are_not_asked(
    place: tuple[float, float], release_id: str, words: str, device: Device
):
    canary(device, place)
    check_in(device)
    watch(device, release_id=release_id)
    ((code, text),) = refusals(device)
    assert code == "not_watched"
    assert words in text


def test_a_device_of_the_stage_waits_until_it_has_the_release(device: Device, server: FakeServer):
    canary(device, STAGE)
    server.blobs.pop(server.put(WORSE))
    watch(device)
    ((code, text),) = refusals(device)
    assert (code, text) == ("not_watched", "the release that is watched is not here yet")
    assert server.reports == {}


def test_a_control_device_that_serves_nothing_has_nothing_to_say(device: Device):
    device.server.releases.clear()
    canary(device, CONTROL)
    device.server.deployed.clear()
    check_in(device)
    watch(device)
    ((code, text),) = refusals(device)
    assert (code, text.split()[:4]) == ("not_watched", ["the", "device", "serves", "nothing"])


@pytest.mark.parametrize(("place", "release"), [(STAGE, "new"), (CONTROL, "old")])
def test_it_speaks_after_the_model_was_used(
    place: tuple[float, float], release: str, device: Device
):
    canary(device, place)
    check_in(device)
    for used in range(3):
        watch(device, min_predictions=3)
        text = f"{used} predictions; the device speaks after 3"
        assert refusals(device) == [("not_watched", text)]
        predicted(device, release, 0.01)
    assert reported(device, watch(device, min_predictions=3))


def test_or_after_it_failed(device: Device):
    canary(device, STAGE, NAN)
    check_in(device)
    said = reported(device, watch(device, min_predictions=3))
    assert said["stage.failed"] == MetricSum(1.0, 1.0)


# --- what it serves crashes the child ----------------------------------------------------------------------


class Crashing:
    """Labour whose children that evaluate one of `releases` end by a signal, as in a library's bug."""

    def __init__(self, device: Device, *releases: str) -> None:
        self.device, self.releases, self.num_crashes = device, releases, 0
        device.runtime._labour = self

    def __call__(self, job: Perform | Trial, should_stop: ShouldStop) -> Hash | None:
        slots = open_models(self.device.home, self.device.settings).slots("default")
        assert slots.active is not None
        evaluates = isinstance(job, Perform) and not slots.has_failed(slots.active)
        if evaluates and name_of(slots.active) in self.releases:
            self.num_crashes += 1
            raise PlanCrashed("the process that ran the plan ended by signal 11", hint="")
        return work_on(job, should_stop)


@pytest.mark.parametrize(("place", "arm"), [(STAGE, "stage"), (CONTROL, "control")])
def test_a_model_that_crashes_the_child_is_withdrawn_and_that_is_reported(
    place: tuple[float, float], arm: str, device: Device
):
    canary(device, place)
    check_in(device)
    crashes = Crashing(device, "new" if place == STAGE else "old")
    said = reported(device, watch(device))
    assert crashes.num_crashes == 1
    assert said[f"{arm}.failed"] == MetricSum(1.0, 1.0)
    slots = open_models(device.home, device.settings).slots("default")
    assert slots.active is not None
    assert name_of(slots.active) == "old"
    assert "signal 11" in slots.failed[-1].reason
    # In its stage the device says how the one before does; without one, nothing of the model that crashed.
    assert said[f"{arm}.primary"].count == (1.0 if place == STAGE else 0.0)


def test_the_model_before_it_may_crash_too(device: Device):
    canary(device, STAGE)
    check_in(device)
    crashes = Crashing(device, "new", "old")
    said = reported(device, watch(device))
    assert crashes.num_crashes == 2
    assert said["stage.failed"] == MetricSum(1.0, 1.0)
    assert said["stage.primary"] == NOTHING


def test_a_child_that_crashes_without_the_model_is_a_refused_plan(device: Device):
    """It cannot be what the device serves, and the device does not go round in circles."""
    canary(device, STAGE)
    check_in(device)
    assignment = watch(device)

    def crash(job: Perform | Trial, should_stop: ShouldStop) -> None:
        raise PlanCrashed("the process that ran the plan ended by signal 9", hint="")

    device.runtime._labour = crash
    device.run_session()
    assert assignment not in device.server.reports
    watch(device, 2)
    assert [code for code, _ in refusals(device)] == ["refused_plan"]


def test_a_real_child_crashes_and_another_one_says_so(device: Device):
    canary(device, STAGE)
    check_in(device)
    is_first = iter((True, False))

    def kill() -> bool:
        (started,) = children()
        started.kill()
        return False

    def work(job: Perform | Trial, should_stop: ShouldStop) -> Hash | None:
        return child.work_on(job, kill if next(is_first) else should_stop)

    device.runtime._labour = work
    said = reported(device, watch(device))
    assert said["stage.failed"] == MetricSum(1.0, 1.0)
    assert said["stage.primary"].count == 1
