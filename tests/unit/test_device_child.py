"""Work in real child processes: the same bytes, ended at any moment, crashing alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from homespun.clock import ManualClock
from homespun.device import child, labour
from homespun.device.child import Perform
from homespun.errors import InvalidInput, NumericFailure, PlanCrashed, PlanError
from homespun.plan.package import Plan
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import ExampleQuery, TaskKind
from homespun.protocol.session import SessionState as S
from homespun.tensors.codec import digest, encode_tree
from tests.unit.device_server import (
    DIGITS,
    INITIAL,
    PUBLISHER,
    Device,
    FakeServer,
    children,
    images,
)

LONG_EPOCHS = 300
LONG = DIGITS.with_settings(local_epochs=LONG_EPOCHS, momentum=0.5).sign(PUBLISHER)
ENDLESS = DIGITS.with_settings(local_epochs=1000).sign(PUBLISHER)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "device", FakeServer(ManualClock()))
    yield device
    device.kill()
    assert children() == []


def job(
    device: Device, plan: Plan = DIGITS, kind: TaskKind = TaskKind.TRAIN, **changes: object
) -> Perform:
    """What a device is about to do that has downloaded `plan`."""
    checkpoints = [encode_tree(INITIAL)] * (1 if kind is TaskKind.TRAIN else 2)
    device.server.open_round(plan=plan.to_bytes(), kind=kind, checkpoints=checkpoints)
    device.run_to(S.TRAINING)
    of = Perform.of(device.home, device.runtime.session, Policy())
    return msgspec.structs.replace(of, **changes)


def never() -> bool:
    return False


def the_child() -> psutil.Process:
    (found,) = children()
    return found


def cpu_s() -> float:
    used = the_child().cpu_times()
    return float(used.user + used.system)


def after_its_start(act: Callable[[], bool]) -> Callable[[], bool]:
    """A `should_stop` that does not act before the child has loaded what it needs, and works."""
    return lambda: cpu_s() > 0.8 and act()


def num_steps(of: Perform) -> int:
    data = (Path(of.root) / "work" / of.session_id / "step.bin").read_bytes()
    return int(msgspec.json.decode(data.partition(b"\n")[0])["num_steps"])


@pytest.mark.parametrize("kind", [TaskKind.TRAIN, TaskKind.EVALUATE])
def test_a_child_gives_the_same_bytes_as_this_process(kind: TaskKind, device: Device):
    of = job(device, kind=kind)
    assert child.work_on(of, never) == labour.work_on(of, never)


def test_training_that_is_stopped_again_and_again_gives_the_same_bytes(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(child, "GRACE_S", 60.0)  # on a busy machine, the lowest priority takes long
    of, stops = job(device, LONG), [0]
    while (found := child.work_on(of, after_its_start(lambda: True))) is None:
        stops.append(num_steps(of))
        assert stops[-1] > stops[-2]  # it went on where the one before it was
    assert len(stops) > 2
    assert stops[-1] < 3 * LONG_EPOCHS
    assert found == labour.work_on(of, never)


def test_a_child_has_the_lowest_priority_one_thread_for_work_and_a_session_of_its_own(
    device: Device,
):
    seen: dict[str, object] = {}

    def look() -> bool:
        process = the_child()
        seen.update(nice=process.nice(), ionice=process.ionice()[0], threads=process.num_threads())
        seen["session"] = Path(f"/proc/{process.pid}/stat").read_text().split()[5] == str(
            process.pid
        )
        return True

    assert child.work_on(job(device, ENDLESS), after_its_start(look)) is None
    threads = seen.pop("threads")
    assert isinstance(threads, int)
    assert (
        threads <= 3
    )  # one works, one watches the lifeline, one may be the runtime library's and sleeps
    assert seen == {
        "nice": 19,
        "ionice": psutil.IOPRIO_CLASS_IDLE,
        "session": True,
    }


def test_a_child_that_cannot_stop_is_killed_in_time(device: Device):
    """It is halted in the middle of a step that never ends."""
    since: list[float] = []

    def halt() -> bool:
        the_child().suspend()
        since.append(time.monotonic())
        return True

    assert child.work_on(job(device, ENDLESS), after_its_start(halt)) is None
    assert time.monotonic() - since[0] < 1.5


def test_a_child_ends_when_its_lifeline_does(device: Device):
    started = child._Child(job(device, ENDLESS))
    try:
        assert started._process.stdin is not None
        started._process.stdin.close()
        assert started.has_ended(60.0)
        with pytest.raises(PlanCrashed, match="exit code 1"):
            started.outcome()
    finally:
        started.kill()


def test_what_the_work_raises_arrives_with_all_it_says(device: Device):
    of = job(device)
    (device.home.work / of.session_id / "checkpoint-0.safetensors").write_bytes(
        encode_tree({**INITIAL, "hidden.bias": INITIAL["hidden.bias"] * float("nan")})
    )
    with pytest.raises(NumericFailure) as inside:
        labour.work_on(of, never)
    with pytest.raises(NumericFailure) as outside:
        child.work_on(of, never)
    for name in ("message", "hint", "details"):
        assert getattr(outside.value, name) == getattr(inside.value, name)


def test_a_device_without_examples_and_one_without_a_plan(device: Device):
    of = job(device)
    with pytest.raises(InvalidInput, match="no rows"):
        child.work_on(msgspec.structs.replace(of, query=ExampleQuery(collection="nothing")), never)
    with pytest.raises(PlanError, match="cannot be read"):
        child.work_on(msgspec.structs.replace(of, session_id="another"), never)


def test_a_child_that_is_killed_is_a_reason_and_nothing_more(device: Device):
    def kill() -> bool:
        the_child().kill()
        return False

    with pytest.raises(PlanCrashed, match="ended by signal 9"):
        child.work_on(job(device, ENDLESS), after_its_start(kill))


def test_a_plan_that_needs_too_much_memory_is_told_so(device: Device):
    """The library and the model need some 80 MB, the rows of so many examples 50 MB more."""
    device.runtime._examples.add_many(images(15_000), device.clock.now())
    of = job(device)
    with pytest.raises(PlanCrashed, match="needs more than 100 MB"):
        child.work_on(msgspec.structs.replace(of, max_memory_bytes=100_000_000), never)
    assert child.work_on(of, never) is not None


def test_a_child_uses_no_more_than_its_share(device: Device):
    began, seen = time.monotonic(), [0.0]

    def used_enough() -> bool:
        seen.append(cpu_s())
        return seen[-1] > 0.8

    of = job(device, ENDLESS, max_cpu_share=0.25)
    assert child.work_on(of, used_enough) is None
    assert time.monotonic() - began > 0.8 / 0.25 - 0.5


# --- the trial of a release --------------------------------------------------------------------------------


def model(directory: Path, factor: float = 1.0) -> Path:
    (directory / "plan.zip").write_bytes(DIGITS.to_bytes())
    checkpoint = {name: array * factor for name, array in INITIAL.items()}
    (directory / "checkpoint.safetensors").write_bytes(encode_tree(checkpoint))
    return directory


def test_a_model_is_tried_and_one_without_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert child.try_model(model(tmp_path))
    with pytest.raises(NumericFailure, match="not finite"):
        child.try_model(model(tmp_path, float("inf")))
    monkeypatch.setattr(child, "LEAST_GRACE_S", 0.0)
    monkeypatch.setattr(child, "GRACE_S", 0.0)
    assert not child.try_model(model(tmp_path), should_stop=lambda: True)


def test_a_model_that_never_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(child, "TRIAL_S", 0.0)
    monkeypatch.setattr(child, "LEAST_GRACE_S", 0.0)
    monkeypatch.setattr(child, "GRACE_S", 0.0)
    with pytest.raises(PlanCrashed, match="no prediction within"):
        child.try_model(model(tmp_path))


def test_trying_gives_the_digest_of_what_was_tried(tmp_path: Path):
    trial = child.Trial(directory=str(model(tmp_path)), max_memory_bytes=10**9, max_cpu_share=1.0)
    assert labour.work_on(trial, never) == digest(encode_tree(INITIAL))
