"""Releases: evidence from other devices decides; devices get a signed manifest whose number only grows."""

from __future__ import annotations

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from homespun.errors import Conflict, InvalidConfig, NotFound
from homespun.learning.metrics import MetricSum
from homespun.protocol import signing
from homespun.protocol.messages import (
    ReleaseManifest,
    ReleaseNotice,
    SignedRelease,
    TaskKind,
    decode,
)
from homespun.protocol.views import ReleaseView
from homespun.server.releases import mean_and_error
from homespun.server.store.records import ReleaseRequest
from tests.fleet.device import POPULATION

PATH = f"/v1/releases/{POPULATION}/default"


def served(world):
    """The manifest that a device gets, after checking who signed it."""
    signed = world.devices[0].call(SignedRelease, "GET", PATH)
    data = base64.b64decode(signed.manifest)
    public = world.deployment.keys.publisher_public
    signing.verify(public, signed.signature, signing.RELEASE_CONTEXT + data)
    return decode(data, ReleaseManifest)


@pytest.fixture
def shipped(make_world):
    """A world whose slot serves checkpoint 0, and the hashes of plan and checkpoints 0, 1, 2."""
    world = make_world(5)
    plan = world.push_plan().hash
    checkpoints = [world.push_checkpoint(plan, seed).hash for seed in range(3)]
    assert world.release(plan, checkpoints[0], "1").state == "deployed"
    return world, plan, checkpoints


def evaluate(world, plan, checkpoints, name="evaluate", **fields):
    task = world.create_task(
        TaskKind.EVALUATE,
        plan_hash=plan,
        checkpoints=tuple(checkpoints),
        goal=5,
        name=name,
        **fields,
    )
    world.run_round(task)
    return task


def test_the_first_release_needs_no_evidence(shipped):
    world, plan, checkpoints = shipped
    manifest = served(world)
    assert (manifest.sequence, manifest.checkpoint, manifest.plan_hash) == (1, checkpoints[0], plan)
    assert world.devices[0].check_in().releases == (ReleaseNotice(slot="default", sequence=1),)
    (view,) = world.operate(list[ReleaseView], "GET", "/releases")
    assert (view.reason, view.evidence) == ("the first release of its slot", None)


def test_a_better_candidate_is_deployed_and_supersedes(shipped, aggregation):
    world, plan, (old, new, _) = shipped
    task = evaluate(world, plan, (new, old), aggregation=aggregation)
    view = world.release(plan, new, "2", evaluation_task_id=task.task_id)
    assert view.state == "deployed"
    evidence = view.evidence
    assert (evidence.metric, evidence.num_devices, evidence.wins) == ("accuracy", 5, 3)
    # The devices report differences of -0.01, 0, 0.01, 0.02, 0.03.
    assert evidence.mean_difference == pytest.approx(0.01, abs=1e-4)
    assert evidence.standard_error == pytest.approx(0.0158 / 5**0.5, abs=1e-4)
    assert served(world).sequence == 2
    assert served(world).checkpoint == new
    states = [release.state for release in world.operate(list[ReleaseView], "GET", "/releases")]
    assert states == ["superseded", "deployed"]


def test_a_worse_candidate_is_rejected_and_nothing_changes(shipped):
    world, plan, (old, new, _) = shipped
    for device in world.devices:
        device.index *= 5  # every device finds the candidate 0.01 worse
    task = evaluate(world, plan, (new, old))
    view = world.release(plan, new, "2", evaluation_task_id=task.task_id)
    assert (view.state, view.sequence) == ("rejected", None)
    assert "worse" in view.reason
    assert view.evidence.mean_difference == pytest.approx(-0.01, abs=1e-4)
    assert served(world).checkpoint == old
    lenient = world.release(plan, new, "3", evaluation_task_id=task.task_id, margin=0.02)
    assert lenient.state == "deployed"


def test_a_release_waits_for_its_evaluation(shipped):
    world, plan, (old, new, third) = shipped
    task = world.create_task(TaskKind.EVALUATE, plan_hash=plan, checkpoints=(new, old), goal=5)
    view = world.release(plan, new, "2", evaluation_task_id=task.task_id)
    assert view.state == "evaluating"
    assert world.release(plan, new, "2", evaluation_task_id=task.task_id) == view
    with pytest.raises(Conflict, match="on its way"):
        world.release(plan, third, "3", evaluation_task_id=_evaluated(world, plan, third, old))
    world.restart()
    world.run_round(task)
    assert served(world).checkpoint == new


def _evaluated(world, plan, candidate, incumbent):
    spec = {"plan_hash": plan, "checkpoints": (candidate, incumbent), "name": "other"}
    return world.create_task(TaskKind.EVALUATE, goal=5, **spec).task_id


def test_a_release_whose_evaluation_is_stopped_is_rejected(shipped):
    world, plan, (old, new, _) = shipped
    task = world.create_task(TaskKind.EVALUATE, plan_hash=plan, checkpoints=(new, old), goal=5)
    world.release(plan, new, "2", evaluation_task_id=task.task_id)
    world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    world.settle()
    view = world.operate(list[ReleaseView], "GET", "/releases")[-1]
    assert (view.state, view.reason) == ("rejected", "its evaluation evaluate was stopped")


def test_evidence_must_be_about_this_release(shipped):
    world, plan, (old, new, third) = shipped
    with pytest.raises(InvalidConfig, match="evidence is needed"):
        world.release(plan, new, "2")
    task = evaluate(world, plan, (new, old))
    with pytest.raises(InvalidConfig, match="did not evaluate"):
        world.release(plan, third, "2", evaluation_task_id=task.task_id)
    alone = evaluate(world, plan, (new,), "alone")
    with pytest.raises(InvalidConfig, match="compares with nothing"):
        world.release(plan, new, "2", evaluation_task_id=alone.task_id)
    train = world.create_task(plan_hash=plan, checkpoints=(new,))
    with pytest.raises(InvalidConfig, match="no evaluation"):
        world.release(plan, new, "2", evaluation_task_id=train.task_id)
    with pytest.raises(NotFound):
        world.release(plan, new, "2", evaluation_task_id="0" * 32)
    other = evaluate(world, plan, (new, third), "with-another")
    view = world.release(plan, new, "2", evaluation_task_id=other.task_id)
    assert view.state == "rejected"
    assert "not what is served" in view.reason
    assert served(world).checkpoint == old


def test_a_version_means_one_thing(shipped):
    world, plan, (old, new, _) = shipped
    assert world.release(plan, old, "1").sequence == 1  # repeating it changes nothing
    task = evaluate(world, plan, (new, old))
    with pytest.raises(Conflict, match="version 1"):
        world.release(plan, new, "1", evaluation_task_id=task.task_id)
    with pytest.raises(NotFound, match="checkpoint"):
        world.release(plan, "9" * 64, "3", evaluation_task_id=None, slot="fresh")


def test_requests_and_the_scheduler_may_look_at_once(make_world):
    world = make_world(0)
    plan = world.push_plan().hash
    checkpoint = world.push_checkpoint(plan, 0).hash
    desk, start = world.deployment.desk, threading.Barrier(4)

    def ask(slot):
        start.wait()
        return desk.create(
            ReleaseRequest(
                population=POPULATION, slot=slot, version="1", plan_hash=plan, checkpoint=checkpoint
            ),
            world.clock.now(),
        ).state

    with ThreadPoolExecutor(4) as pool:
        for number in range(10):
            states = list(pool.map(ask, [f"slot{number}"] * 4))
            assert states == ["deployed"] * 4


def test_nothing_released_yet(make_world):
    world = make_world(1)
    with pytest.raises(NotFound):
        world.devices[0].call(SignedRelease, "GET", PATH)


def test_mean_and_standard_error():
    values = [0.1, 0.2, 0.4, 0.5]
    sums = MetricSum(sum(values), 4), MetricSum(sum(v * v for v in values), 4)
    mean, error = mean_and_error(*sums)
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx((0.1 / 3 / 4) ** 0.5)
    assert mean_and_error(MetricSum(0.7, 1), MetricSum(0.49, 1)) == (0.7, 0.0)
