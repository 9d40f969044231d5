"""When devices are told to come back, and whose turn it is when tasks share a population."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import select

from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Bucket,
    Criteria,
    Mode,
    Rejected,
    RetryWindow,
)
from homespun.protocol.pacing import BIN_S, IDLE_DEMAND, MEETING_BINS
from homespun.protocol.selection import FULL_S
from homespun.protocol.views import TaskView
from homespun.server.store.schema import rates
from tests.fleet.device import POPULATION

MEETING_S = MEETING_BINS * BIN_S


def told(world, device) -> tuple[float, float]:
    """The minute in which a device is to come back, in Unix seconds."""
    now, window = world.clock.now(), device.check_in().retry
    return now + window.earliest_s, now + window.latest_s


def test_devices_that_came_apart_come_back_together(make_world):
    world = make_world(12)
    world.create_task(retry=None)
    world.clock.advance(MEETING_S - world.clock.now() % MEETING_S)
    meeting = world.clock.now() + MEETING_S
    minutes = []
    for device in world.devices:
        minutes.append(told(world, device))
        world.clock.advance(15.0)  # the last one comes 165 seconds after the first
    for begins, ends in minutes:
        assert abs(begins - meeting) < 1e-3
        assert abs(ends - meeting - BIN_S) < 1e-3


def test_more_than_are_wanted_are_spread_and_a_crash_does_not_gather_them(make_world):
    world = make_world(1)
    world.create_task(retry=None)
    first = Counter(round(told(world, world.devices[0])[0]) for _ in range(400))
    assert len(first) >= 5
    assert (
        max(first.values()) <= 100
    )  # 20 check-ins for each of the 4 that are wanted, if so few claim
    world.clock.advance(BIN_S)
    world.settle()  # once a minute
    world.restart()
    again = Counter(round(told(world, world.devices[0])[0]) for _ in range(100))
    assert min(again) >= max(first)  # the minutes that were full still are


def test_who_is_not_drawn_is_promised_a_minute_too(make_world):
    world = make_world(6)
    task = world.create_task(retry=None)
    replies = [device.claim(task, 1) for device in world.devices]
    world.settle()
    replies = [device.claim(task, 1) for device in world.devices]
    (window, other) = (reply.retry for reply in replies if not isinstance(reply, Assigned))
    assert window == other
    assert BIN_S <= window.earliest_s <= 2 * MEETING_S
    assert abs(window.latest_s - window.earliest_s - BIN_S) < 1e-3


def test_a_fixed_window_is_used_as_it_is(make_world):
    world = make_world(1, retry_earliest_s=3.0, retry_latest_s=4.0)
    (device,) = world.devices
    assert device.check_in().retry == RetryWindow(earliest_s=3.0, latest_s=4.0)
    steered = world.create_task(retry=None, name="steered")
    assert device.check_in().retry.latest_s > 60.0
    fixed = world.create_task()
    assert device.check_in().retry == fixed.spec.retry  # the quickest of the tasks says
    for task in (fixed, steered):
        world.operate(TaskView, "POST", f"/tasks/{task.task_id}/stop")
    assert device.check_in().retry == fixed.spec.retry  # the last one still does


def claim_first(world, devices, tasks) -> Counter[str]:
    """Each device checks in and claims the first offer it gets."""
    by_id, claimed = {task.task_id: task for task in tasks}, Counter[str]()
    for device in devices:
        task = by_id[device.check_in().offers[0].task_id]
        device.claim(task, 1)
        claimed[task.spec.name] += 1
    return claimed


def test_tasks_that_are_open_together_share_by_their_shares(make_world):
    world = make_world(30)
    tasks = [
        world.create_task(name="a", share=2.0, pool_target=1000),
        world.create_task(name="b", goal=40, pool_target=1000),  # its cohort does not matter
    ]
    assert claim_first(world, world.devices, tasks) == {"a": 20, "b": 10}


def test_devices_that_come_at_once_do_not_all_go_to_one_task(make_world):
    world = make_world(12)
    names = [world.create_task(name=name, pool_target=1000).spec.name for name in ("a", "b", "c")]
    first = [device.check_in().offers for device in world.devices]  # before anyone has claimed
    assert Counter(offers[0].task_name for offers in first) == dict.fromkeys(names, 4)
    assert all(len(offers) == 3 for offers in first)


def test_a_task_that_was_away_does_not_starve_the_others(make_world):
    world = make_world(40)
    early = world.create_task(name="early", pool_target=1000)
    claim_first(world, world.devices[:20], [early])
    world.clock.advance(3600.0)
    late = world.create_task(name="late", pool_target=1000)
    assert claim_first(world, world.devices[20:], [early, late]) == {"early": 10, "late": 10}


def create_async(world, **fields):
    return world.create_task(
        aggregation=Aggregation.SECURE,
        mode=Mode.ASYNC,
        **{"name": "async", "goal": 3, "concurrency": 100, "max_staleness": 3, **fields},
    )


def test_an_async_task_has_its_share_and_no_more(make_world):
    """Its devices have a place as soon as they claim one: that counts as their claim."""
    world = make_world(30)
    tasks = [create_async(world), world.create_task(name="b", share=2.0, pool_target=1000)]
    assert claim_first(world, world.devices, tasks) == {"async": 10, "b": 20}


def test_an_async_task_that_is_full_lets_the_others_go_first(make_world):
    world = make_world(8)
    full = create_async(world, concurrency=3, share=100.0)
    other = world.create_task(name="other", pool_target=1000)
    assert claim_first(world, world.devices[:4], [full, other]) == {"async": 3, "other": 1}
    offers = world.devices[4].check_in().offers
    assert offers[0].task_name == "async"  # it is far behind its share
    assert isinstance(world.devices[4].claim(full, 1), Rejected)
    assert claim_first(world, world.devices[5:7], [full, other]) == {"other": 2}
    world.clock.advance(FULL_S)
    assert world.devices[7].check_in().offers[0].task_name == "async"


def test_a_task_that_is_stopped_while_a_device_checks_in_is_not_offered(make_world):
    world = make_world(1)
    task = world.create_task()
    board, device_id = world.deployment.board, world.devices[0].device_id
    (offer,) = board.offers(POPULATION, device_id, (1,))
    world.operate(TaskView, "POST", f"/tasks/{task.task_id}/stop")
    assert board.reply(POPULATION, [offer], world.clock.now()).offers == ()


def demanded(world) -> float:
    return float(world.deployment.board.standing(POPULATION).demand)


def test_an_async_task_wants_as_many_devices_as_it_has_places(make_world):
    world = make_world(1)
    create_async(world, concurrency=2000, selection_s=120.0)
    assert 2000 / 2 <= demanded(world) <= 20 * 2000 / 2


def test_devices_outside_a_bucket_do_not_count_as_check_ins(make_world):
    world = make_world(1)
    task = world.create_task(goal=200, retry=None)
    whole = demanded(world)
    world.operate(TaskView, "POST", f"/tasks/{task.task_id}/stop")
    assert demanded(world) == IDLE_DEMAND
    tenth = Criteria(requires=(), bucket=Bucket(salt="s", low=0.5, high=0.6))
    world.create_task(goal=200, retry=None, criteria=tenth, name="tenth")
    assert abs(demanded(world) / whole - 10) < 0.01


def test_devices_that_are_no_longer_needed_hear_it_when_they_ask(make_world, aggregation):
    """Over-selected devices ask while they train; those that were heard of are no losses."""
    world = make_world(8)
    task = world.create_task(
        goal=3, over_selection=2.0, pool_target=8, num_rounds=2, aggregation=aggregation
    )
    cohort = world.gather(task)
    assert [device.receipt(assigned).state for device, assigned in cohort] == ["expected"] * 6
    world.report(task, cohort[:3])
    for device, assigned in cohort[3:5]:
        receipt = device.receipt(assigned)
        assert (receipt.state, receipt.reason) == ("late", "the round had closed")
    world.pass_time(task.spec.deadline_s)
    with world.deployment.store.database.read() as connection:
        (row,) = connection.execute(select(rates.c.num_reported, rates.c.num_lost))
    assert row == (3, 1)
