"""Whole rounds through the real application: train, evaluate, over-selection, goal, minimum, deadline."""

from __future__ import annotations

import random

import httpx
import numpy as np
import pytest

from homespun.errors import Expired
from homespun.learning.algorithm import Algorithm
from homespun.learning.optimizers import server_optimizer
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Bucket,
    Criteria,
    Rejected,
    TaskKind,
    Waiting,
)
from homespun.protocol.selection import in_bucket
from homespun.protocol.tasks import OptimizerSpec
from homespun.server.store.schema import metadata
from homespun.tensors import codec as tensors


def test_a_training_round_is_what_the_algorithm_says(make_world):
    world = make_world(4)
    optimizer = OptimizerSpec(name="FedAvgM", settings={"learning_rate": 0.5, "momentum": 0.9})
    task = world.create_task(num_rounds=2, optimizer=optimizer)
    manifest = world.plan.manifest
    parameters, state = initial_checkpoint(manifest, 0), None
    for number in (1, 2):
        cohort = world.gather(task, number)
        assert len(cohort) == 4
        codec = cohort[0][0].codec(cohort[0][1])
        total = codec.empty()
        for device, assigned in cohort:
            assert assigned.checkpoints == (tensors.digest(tensors.encode_tree(parameters)),)
            codec.add(total, device.contribution(assigned))
            assert device.report(assigned).state == "acknowledged"
        world.settle()
        rule = server_optimizer(optimizer.name, optimizer.settings)
        algorithm = Algorithm(manifest.shapes, codec, rule)
        parameters, state, aggregate = algorithm.server_update(
            parameters, state or rule.init(parameters), total
        )
        summary = world.rounds(task)[number - 1]
        assert summary.checkpoint == tensors.digest(tensors.encode_tree(parameters))
        assert summary.state == "scrubbed"
        assert (summary.num_assigned, summary.num_reported, summary.num_late) == (4, 4, 0)
        assert summary.metrics["loss"].sum == aggregate.metrics["loss"].sum
        assert summary.weight == aggregate.weight
        for device, assigned in cohort:
            receipt = device.receipt(assigned)
            assert (receipt.state, receipt.checkpoint) == ("included", summary.checkpoint)
    view = world.task(task)
    assert (view.state, view.rounds_committed, view.head) == ("finished", 2, summary.checkpoint)
    assert state is not None
    states = world.deployment.private.scope(f"task-{task.task_id}").addresses()
    assert list(states) == [tensors.digest(tensors.encode_tree(state))]


def test_an_evaluation_round_sums_metrics_only(make_world, aggregation):
    world = make_world(5)
    task = world.create_task(TaskKind.EVALUATE, aggregation=aggregation, goal=5)
    cohort = world.gather(task)
    for device, assigned in cohort:
        assert assigned.encoding.max_weight == 0
        assert assigned.checkpoints == task.spec.checkpoints
        assert device.contribution(assigned).main.size == 0
    world.report(task, cohort)
    (summary,) = world.rounds(task)
    assert summary.checkpoint is None
    assert summary.metrics["difference"].count == 5
    assert summary.metrics["difference"].sum == pytest.approx(0.05, abs=1e-3)
    assert summary.metrics["wins"].sum == 3
    assert world.task(task).state == "finished"
    assert cohort[0][0].receipt(cohort[0][1]).state == "included"


@pytest.mark.parametrize("seed", [1, 2])
def test_arrival_order_does_not_matter(make_world, aggregation, seed):
    hashes = []
    for order in (random.Random(seed), random.Random(seed + 100)):
        world = make_world(6)
        task = world.create_task(aggregation=aggregation, num_rounds=2, goal=6, name="train")
        for number in (1, 2):
            order.shuffle(world.devices)
            cohort = world.gather(task, number)
            order.shuffle(cohort)
            world.report(task, cohort)
        hashes.append([(view.checkpoint, view.base_checkpoint) for view in world.rounds(task)])
        (last,) = (
            model["chain"]
            for model in world.operate(list[dict[str, object]], "GET", "/models")
            if model["round_number"] == 2
        )
        hashes[-1].append(last)
    assert hashes[0] == hashes[1]


def test_the_checkpoint_can_be_downloaded_by_devices_and_operators(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation)
    summary = world.run_round(task)
    data = tensors.encode_tree(world.deployment.library.checkpoint(summary.checkpoint))
    path = f"/v1/blobs/{summary.checkpoint}"
    device = world.devices[0]
    whole = device.call(httpx.Response, "GET", path)
    assert (whole.status_code, whole.content) == (200, data)
    rest = device.call(httpx.Response, "GET", path, Range="bytes=10-")
    assert (rest.status_code, rest.content) == (206, data[10:])
    assert rest.headers["content-range"] == f"bytes 10-{len(data) - 1}/{len(data)}"
    part = device.call(httpx.Response, "GET", path, Range="bytes=3-5")
    assert part.content == data[3:6]
    beyond = device.call(httpx.Response, "GET", path, Range=f"bytes={len(data)}-")
    assert (beyond.status_code, beyond.content) == (200, data)


def test_over_selection_draws_more_and_closes_at_the_goal(make_world):
    world = make_world(9)
    task = world.create_task(goal=4, over_selection=1.5, pool_target=9)
    cohort = world.gather(task)
    assert len(cohort) == 6
    undrawn = next(d for d in world.devices if d not in [device for device, _ in cohort])
    assert undrawn.claim(task, 1).reason == "not_drawn"
    for device, assigned in cohort[:4]:
        device.report(assigned)
    world.settle()
    (summary,) = world.rounds(task)
    assert (summary.state, summary.num_reported, summary.num_late) == ("scrubbed", 4, 2)
    late_device, late = cohort[5]
    with pytest.raises(Expired):
        late_device.report(late)
    assert late_device.receipt(late).state == "late"


def test_the_same_pool_gives_the_same_cohort(make_world):
    cohorts = []
    for order in (1, -1):
        world = make_world(9)
        task = world.create_task(pool_target=9)
        cohorts.append({d.index for d, _ in world.gather(task, devices=world.devices[::order])})
    assert cohorts[0] == cohorts[1]
    assert len(cohorts[0]) == 4


def test_a_round_at_its_deadline_closes_with_the_minimum(make_world):
    world = make_world(4)
    task = world.create_task(deadline_s=100.0)
    cohort = world.gather(task)
    for device, assigned in cohort[:3]:
        device.report(assigned)
    world.pass_time(99.0)
    assert world.rounds(task)[0].state == "running"
    world.clock.advance(1.0)
    with pytest.raises(Expired, match="deadline"):
        cohort[3][0].report(cohort[3][1])
    world.settle()
    assert world.rounds(task)[0].num_reported == 3
    assert world.task(task).state == "finished"


def test_below_the_minimum_a_round_is_abandoned_and_tried_again(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation, deadline_s=100.0)
    cohort = world.gather(task)
    if aggregation is Aggregation.PLAIN:
        world.report(task, cohort[:2])
    world.pass_time(100.0)
    first, second = world.rounds(task)
    assert (first.state, first.attempt, first.metrics) == ("abandoned", 1, {})
    assert "reports; at least 3 are needed" in first.reason
    assert (second.state, second.round_number, second.attempt) == ("open", 1, 2)
    for device, assigned in cohort:
        receipt = device.receipt(assigned)
        assert (receipt.state, receipt.reason) == ("void", first.reason)
    again = world.gather(task, attempt=2)
    assert again[0][1].seed != cohort[0][1].seed
    world.report(task, again)
    view = world.task(task)
    assert (view.state, view.rounds_committed) == ("finished", 1)


def test_five_abandoned_attempts_halt_the_task(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation, deadline_s=10.0)
    for attempt in range(1, 6):
        assert world.task(task).state == "active"
        assert len(world.gather(task, attempt=attempt)) == 4
        world.pass_time(10.0)
    view = world.task(task)
    assert view.state == "halted"
    assert "5 attempts in a row" in view.reason
    assert {summary.state for summary in world.rounds(task)} == {"abandoned"}
    assert world.devices[0].check_in().offers == ()


def test_a_success_between_failures_starts_the_count_again(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation, num_rounds=2, deadline_s=10.0)
    for attempt in range(1, 5):
        world.gather(task, attempt=attempt)
        world.pass_time(10.0)
    world.report(task, world.gather(task, attempt=5))
    world.gather(task, 2)
    world.pass_time(10.0)
    assert world.task(task).state == "active"


def test_a_round_does_not_wait_for_devices_that_gave_up(make_world):
    world = make_world(4)
    task = world.create_task()
    cohort = world.gather(task)
    for device, assigned in cohort[:3]:
        device.report(assigned)
    device, assigned = cohort[3]
    assert device.abort(assigned).state == "void"
    assert device.abort(assigned).state == "void"
    world.settle()
    assert world.task(task).state == "finished"
    assert cohort[0][0].abort(cohort[0][1]).state == "included"


def test_a_claim_waits_lapses_and_is_refreshed(make_world):
    world = make_world(4)
    task = world.create_task(selection_s=100.0, goal=3)
    lapsed, *others = world.devices
    assert isinstance(lapsed.claim(task, 1), Waiting)
    world.pass_time(16.0)
    for device in others[:2]:
        assert isinstance(device.claim(task, 1), Waiting)
    world.settle()
    (summary,) = world.rounds(task)
    assert (summary.state, summary.num_waiting) == ("open", 2)
    others[2].claim(task, 1)
    world.settle()
    assert isinstance(others[0].claim(task, 1), Assigned)
    assert lapsed.claim(task, 1) == Rejected(reason="not_drawn", retry=task.spec.retry)


def test_claims_that_come_to_nothing_say_why(make_world):
    world = make_world(5)
    bucket = Bucket(salt="s", low=0.0, high=0.5)
    inside = [d for d in world.devices if in_bucket(bucket, d.device_id)]
    outside = [d for d in world.devices if not in_bucket(bucket, d.device_id)]
    assert inside
    assert outside
    task = world.create_task(criteria=Criteria(requires=(), bucket=bucket))
    assert outside[0].check_in().offers == ()
    assert len(inside[0].check_in().offers) == 1
    assert outside[0].claim(task, 1).reason == "not_in_bucket"
    assert inside[0].claim(task, 7).reason == "unknown_round"
    assert inside[0].check_in(plan_formats=(2,)).offers == ()


def test_stopping_a_task_cancels_its_round(make_world):
    world = make_world(4)
    task = world.create_task()
    cohort = world.gather(task)
    cohort[0][0].report(cohort[0][1])
    for _ in range(2):
        assert world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")["state"] == "stopped"
    (summary,) = world.rounds(task)
    assert summary.state == "cancelled"
    assert cohort[0][0].receipt(cohort[0][1]).state == "void"
    with pytest.raises(Expired):
        cohort[1][0].report(cohort[1][1])
    assert world.devices[0].claim(task, 1).reason == "round_closed"


def test_two_tasks_at_once_do_not_mix(make_world):
    world = make_world(4)
    tasks = [world.create_task(name=name, seed=3) for name in ("one", "two")]
    offers = world.devices[0].check_in().offers
    assert [offer.task_name for offer in offers] == ["one", "two"]
    cohorts = [world.gather(task) for task in tasks]
    for pairs in zip(*cohorts, strict=True):
        for device, assigned in pairs:
            device.report(assigned)
    world.settle()
    one, two = (world.rounds(task)[0] for task in tasks)
    # One seed, the same devices: the same numbers, whatever the tasks are called.
    assert one.checkpoint == two.checkpoint is not None
    assert one.num_reported == two.num_reported == 4


def test_after_the_round_nothing_names_its_devices(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation, num_rounds=2)
    for number in (1, 2):
        world.run_round(task, number)
    ids = {device.device_id for device in world.devices}
    with world.deployment.store.database.read() as connection:
        for table in metadata.tables.values():
            if table.name == "devices":
                continue
            assert "device_id" not in table.c or not connection.execute(table.select()).all()
            for row in connection.execute(table.select()):
                assert not ids & {str(value) for value in row}, table.name
    assert list(world.deployment.private.scopes()) == []


def test_the_first_checkpoint_and_updates_are_within_the_codec(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation, bits=16)
    summary = world.run_round(task)
    assert summary.state == "scrubbed"
    base = world.deployment.library.checkpoint(summary.base_checkpoint)
    moved = world.deployment.library.checkpoint(summary.checkpoint)
    assert not np.array_equal(base["p0"], moved["p0"])
