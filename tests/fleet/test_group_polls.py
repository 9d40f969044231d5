"""Long polls of groups: every member learns at once what is asked next, whoever answered last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from homespun.protocol.messages import Aggregation, Waiting
from tests.fleet.member import STEPS
from tests.fleet.test_long_polls import LONG_S, when_waiting


def through(member):
    """One device as it is: it asks once, and every answer of its own waits for what comes next."""
    member.ask(int(LONG_S))
    steps = []
    while member.asked is not None:
        steps.append(member.asked)
        member.step(int(LONG_S))
    return steps


def test_everybody_goes_on_as_soon_as_everybody_answered(make_world):
    world = make_world(6, batch_s=0.01)
    task = world.create_task(goal=6, aggregation=Aggregation.SECURE)
    members = world.members(task)
    with ThreadPoolExecutor(6) as devices:
        steps = list(devices.map(through, members, timeout=LONG_S))
    assert steps == 6 * [list(STEPS)]
    assert {member.receipt.state for member in members} <= {"acknowledged", "included"}
    world.settle()
    assert world.rounds(task)[0].state == "scrubbed"


def waiting(world, members, pool, topic="group"):
    """Everybody asks; the answers are still to come when this returns."""
    polls = [pool.submit(member.ask, int(LONG_S)) for member in members]
    when_waiting(world, len(members), topic)
    return polls


def test_a_step_whose_time_is_over_wakes_who_waits(make_world):
    world = make_world(4)
    task = world.create_task(goal=4, aggregation=Aggregation.SECURE)
    *members, lost = world.members(task)
    for member in (*members, lost):
        member.ask()
        member.step()
    for member in members:
        member.ask()
        assert member.asked == "share-keys"
        member.step()
    with ThreadPoolExecutor() as pool:
        polls = waiting(world, members, pool)
        world.pass_time(60.0)
        for poll in polls:
            poll.result(timeout=10)
    assert {member.asked for member in members} == {"mask-input"}


def test_a_group_that_comes_to_nothing_wakes_who_waits(make_world):
    world = make_world(4)
    task = world.create_task(goal=4, aggregation=Aggregation.SECURE)
    *members, lost, other = world.members(task)
    for member in (*members, lost, other):
        member.ask()
        member.step()
    for member in members:
        member.ask()
        member.step()
    with ThreadPoolExecutor() as pool:
        polls = waiting(world, members, pool)
        world.pass_time(60.0)
        for poll in polls:
            poll.result(timeout=10)
    assert {member.asked for member in members} == {"advertise-keys"}


def test_the_end_of_the_round_wakes_who_waits_for_a_group(make_world):
    world = make_world(5)
    task = world.create_task(goal=3, over_selection=5 / 3, aggregation=Aggregation.SECURE)
    *members, fourth, fifth = world.members(task)
    for member in (*members, fourth, fifth):
        member.ask()
        member.step()
    extra = [fourth, fifth]
    with ThreadPoolExecutor() as pool:
        polls = waiting(world, extra, pool)
        while any(member.asked or isinstance(member.last, Waiting) for member in members):
            for member in members:
                member.step()
        world.settle()
        for poll in polls:
            poll.result(timeout=10)
    assert {member.receipt.state for member in extra} == {"late"}
    assert world.rounds(task)[0].state == "scrubbed"


def test_a_poll_that_waits_in_vain_says_so(make_world):
    world = make_world(3, max_wait_s=0.02)
    task = world.create_task(goal=3, aggregation=Aggregation.SECURE)
    member = world.members(task)[0]
    member.ask(1)
    member.step(1)
    assert isinstance(member.last, Waiting)
    assert member.last.retry.latest_s <= 1.0
