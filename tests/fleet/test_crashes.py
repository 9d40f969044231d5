"""The server may die at any instant: rounds go on where they were, acknowledged reports count exactly once."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from homespun.errors import StorageFailure
from homespun.protocol.messages import Aggregation
from homespun.protocol.views import TaskView
from homespun.server.store.reports import receipt_id
from homespun.tensors import codec as tensors
from tests.fleet.world import World, scratch


class PowerCut(BaseException):
    """Nothing catches it: what it interrupts does not go on."""


def rig(owner: object, name: str, moment: str) -> threading.Event:
    """Cut the power once, at the next call of a method: before it begins, or after it is durable."""
    cut, method = threading.Event(), getattr(owner, name)

    def rigged(*arguments: object) -> object:
        result = None
        if moment == "after" or cut.is_set():
            result = method(*arguments)
        if not cut.is_set():
            cut.set()
            raise PowerCut
        return result

    setattr(owner, name, rigged)
    return cut


def play(
    world: World, cut: threading.Event, aggregation: Aggregation = Aggregation.PLAIN
) -> TaskView:
    """Everybody does what they want done; whoever got no answer will do it again."""
    task = world.create_task(num_rounds=2, aggregation=aggregation)
    for number in range(world.task(task).rounds_committed + 1, 3):
        world.report(task, world.gather(task, number))
        if cut.is_set():
            raise PowerCut
    return world.task(task)


@pytest.fixture(scope="module")
def undisturbed():
    with scratch() as directory:
        world = World(Path(directory), 4)
        try:
            return play(world, threading.Event()).head
        finally:
            world.stop()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "step", ["open", "select", "close", "unmask", "aggregate", "commit", "scrub"]
)
def test_a_power_cut_at_any_transition_changes_nothing(
    make_world, undisturbed, aggregation, step, moment
):
    if step == "unmask" and aggregation is Aggregation.PLAIN:
        return  # there is no such transition
    world = make_world(4)
    with pytest.raises(PowerCut):
        play(world, rig(world.deployment.store.rounds, step, moment), aggregation)
    world.restart()
    task = play(world, threading.Event(), aggregation)
    assert (task.head, task.state) == (undisturbed, "finished")
    assert [view.state for view in world.rounds(task)] == ["scrubbed", "scrubbed"]


def test_restarting_between_any_two_requests_changes_nothing(make_world, undisturbed):
    world = make_world(4)
    task = world.create_task(num_rounds=2)
    for number in (1, 2):
        for device in world.devices:
            device.claim(task, number)
            world.restart()
        for device in world.devices:
            assigned = device.claim(task, number)
            receipt = device.report(assigned)
            world.restart()
            again = device.report(assigned)
            assert again.digest == receipt.digest == tensors.digest(device.body(assigned))
    assert world.task(task).head == undisturbed


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("what", ["snapshot", "rows"])
def test_a_power_cut_in_a_group_commit_counts_nobody_twice(make_world, undisturbed, what, moment):
    world = make_world(4, batch_s=0.2, batch_size=2)
    task = world.create_task(num_rounds=2)
    cohort = world.gather(task)
    first, assigned = cohort[0]
    acknowledged = first.report(assigned)
    if what == "rows":
        cut = rig(world.deployment.store.reports, "record", moment)
    else:
        blobs = world.deployment.private.scope("round-1")
        cut = rig(blobs, "put", moment)
        world.deployment.intake._private = type(  # the intake finds the rigged directory
            "Rigged", (), {"scope": lambda _, name: blobs}
        )()
    with ThreadPoolExecutor() as devices:
        pending = [devices.submit(device.report, ticket) for device, ticket in cohort[1:3]]
        assert cut.wait(timeout=30)
        world.crash()
        for upload in pending:
            with pytest.raises((CancelledError, RuntimeError)):
                upload.result(timeout=30)
    world.start()
    durable = what == "rows" and moment == "after"
    states = [device.receipt(ticket).state for device, ticket in cohort]
    assert states == [
        "acknowledged",
        *(2 * ["acknowledged" if durable else "expected"]),
        "expected",
    ]
    assert first.receipt(assigned) == acknowledged
    for device, ticket in cohort:
        assert device.report(ticket).state == "acknowledged"
    world.settle()
    for device, ticket in cohort:
        assert device.receipt(ticket).state == "included"
    world.run_round(task, 2)
    assert world.task(task).head == undisturbed


def test_a_full_disk_refuses_reports_and_the_sum_is_untouched(make_world, undisturbed):
    world = make_world(4)
    task = world.create_task(num_rounds=2)
    cohort = world.gather(task)
    cohort[0][0].report(cohort[0][1])
    record = world.deployment.store.reports.record

    def full(*_: object) -> None:
        raise StorageFailure("the database failed: disk is full")

    world.deployment.store.reports.record = full
    device, assigned = cohort[1]
    for _ in range(2):
        with pytest.raises(StorageFailure, match="disk is full"):
            device.report(assigned)
    assert device.receipt(assigned).state == "expected"
    world.deployment.store.reports.record = record
    for device, assigned in cohort:
        device.report(assigned)
    world.settle()
    world.run_round(task, 2)
    assert world.task(task).head == undisturbed


def test_a_full_disk_while_aggregating_delays_the_round(make_world, undisturbed):
    world = make_world(4)
    task = world.create_task(num_rounds=2)
    cohort = world.gather(task)
    put = world.deployment.blobs.put

    def full(*_: object) -> None:
        raise StorageFailure("cannot store a blob: no space left on device")

    world.deployment.blobs.put = full
    for device, assigned in cohort:
        device.report(assigned)
    world.settle()
    assert world.rounds(task)[0].state == "closing"
    world.deployment.blobs.put = put
    world.settle()
    world.run_round(task, 2)
    assert world.task(task).head == undisturbed


def test_uploads_that_arrive_together_are_one_group(make_world):
    world = make_world(6, batch_s=5.0, batch_size=6)
    task = world.create_task(goal=6)
    cohort = world.gather(task)
    record, groups = world.deployment.store.reports.record, []

    def counted(*arguments):
        groups.append(len(arguments[3]))
        return record(*arguments)

    world.deployment.store.reports.record = counted
    with ThreadPoolExecutor(6) as devices:
        receipts = list(devices.map(lambda pair: pair[0].report(pair[1]), cohort))
    assert groups == [6]
    assert {receipt.state for receipt in receipts} <= {"acknowledged", "included"}


def test_one_report_sent_many_times_at_once_counts_once(make_world):
    world = make_world(4, batch_s=0.2)
    task = world.create_task(goal=4)
    cohort = world.gather(task)
    device, assigned = cohort[0]

    with ThreadPoolExecutor(5) as copies:
        sent = [copies.submit(device.report, assigned) for _ in range(5)]
        receipts = [copy.result() for copy in sent]
    assert {receipt.digest for receipt in receipts} == {tensors.digest(device.body(assigned))}
    assert world.rounds(task)[0].num_reported == 1


def test_a_group_leaves_out_what_is_not_expected_any_more(make_world):
    """Between looking at an assignment and adding its report, the device gave it up."""
    world = make_world(5, batch_s=0.3)
    task = world.create_task(num_rounds=2, goal=4, over_selection=1.25)
    assert task.spec.cohort_size == 5
    cohort = world.gather(task)
    quitter, ticket = cohort[4]
    check = world.deployment.intake.add

    async def late(*arguments):
        if arguments[2] == receipt_id(ticket.assignment_id):
            world.deployment.store.reports.void(ticket.assignment_id, "given up")
        return await check(*arguments)

    world.deployment.intake.add = late
    with ThreadPoolExecutor(2) as devices:
        good = devices.submit(cohort[0][0].report, cohort[0][1])
        bad = devices.submit(quitter.report, ticket)
        assert good.result().state == "acknowledged"
        with pytest.raises(Exception, match="given up"):
            bad.result()
    assert world.rounds(task)[0].num_reported == 1
    for device, assigned in cohort[1:4]:
        device.report(assigned)
    world.settle()
    summary = world.rounds(task)[0]
    assert (summary.state, summary.num_reported) == ("scrubbed", 4)
