"""Whatever happens and whenever: the exact sum of those whose receipt says so, or a named end. Never stuck."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from random import Random

import pytest

from homespun.errors import HomespunError
from homespun.protocol.group import GroupState
from homespun.protocol.messages import Aggregation, GroupReply, Settled
from homespun.protocol.tasks import GroupSpec
from tests.fleet.member import STEP_S, STEPS, included, plain_checkpoint, play
from tests.fleet.test_crashes import PowerCut

SECURE = {"aggregation": Aggregation.SECURE}
FINAL = {"included", "void", "late"}
MOST_TURNS = 150


def repeat(member, rng):
    """An earlier request once more, byte for byte: it is answered with what is asked now, or that it is late."""
    if member.asked == "advertise-keys":
        return  # of a group that came to nothing: the same answer would join the next one
    step = rng.choice(list(member.sent))
    try:
        reply = member.put(step, member.sent[step])
    except HomespunError as error:
        assert error.code in ("expired", "secagg_wrong_step")  # noqa: PT017
        return
    assert isinstance(reply, GroupReply)
    if member.last is not None and not isinstance(reply, Settled):
        assert member.asked is None or type(reply) is type(member.last)


def rough(world, task, members, rng, impatient):
    """Random order, repetitions, crashes, and pauses that end a step early, until the round is over."""
    for _ in range(MOST_TURNS):
        if world.rounds(task)[0].state in ("scrubbed", "abandoned"):
            return
        turn = [m for m in members if not m.through and rng.random() < 0.8]
        rng.shuffle(turn)
        for member in turn:
            member.step()
            if rng.random() < 0.1:
                other = rng.choice(members)
                if other.sent:
                    repeat(other, rng)
            if rng.random() < 0.01:
                world.restart()
        for member in members:
            if member.asked is None and not member.through:
                member.ask()
        waiting = not any(member.asked and not member.gone for member in members)
        if waiting or (impatient and rng.random() < 0.05):
            world.pass_time(STEP_S)
        elif rng.random() < 0.2:
            world.settle()
    raise AssertionError("the round is stuck")


@pytest.mark.parametrize("seed", range(18))
def test_any_course_of_events_gives_the_exact_sum_or_a_named_end(make_world, seed):
    rng = Random(seed)
    num_devices = rng.randint(3, 12)
    goal = rng.randint(3, num_devices)
    world = make_world(num_devices)
    task = world.create_task(
        goal=goal,
        minimum=3,
        over_selection=num_devices / goal,
        groups=GroupSpec(size=rng.choice([3, 4, 6, 12])),
        bits=rng.choice([12, 16, 32]),
        **SECURE,
    )
    members = world.members(task)
    hardship = rng.choice([0.0, 0.1, 0.25])
    for member in members:
        if rng.random() < hardship:
            member.leaves_at = rng.choice(STEPS)
    rough(world, task, members, rng, impatient=hardship > 0)
    summary = world.rounds(task)[0]
    receipts = [member.device.receipt(member.assigned) for member in members]
    assert {receipt.state for receipt in receipts} <= FINAL
    assert all(receipt.reason for receipt in receipts if receipt.state != "included")
    counted = included(members)
    opened = [group for group in summary.groups if group.state == "opened"]
    assert all(g.state == "void" and g.reason for g in summary.groups if g not in opened)
    if summary.state == "scrubbed":
        assert summary.num_reported == len(counted) == sum(group.num_masked for group in opened)
        assert summary.checkpoint == plain_checkpoint(world, counted)
    else:
        assert (counted, summary.checkpoint) == ([], None)
        assert hardship


def test_a_restart_after_every_exchange_changes_nothing(make_world):
    world = make_world(4)
    names = ("undisturbed", "disturbed")
    tasks = [world.create_task(name=name, goal=4, minimum=4, **SECURE) for name in names]
    world.run_round(tasks[0])
    members = world.members(tasks[1])
    while not all(member.through for member in members):
        for member in members:
            member.step()
            world.restart()
            for step, body in list(member.sent.items())[-1:]:
                assert type(member.put(step, body)) is type(member.last) or member.through
    views = [world.rounds(task)[0] for task in tasks]
    assert views[0].checkpoint == views[1].checkpoint is not None
    assert [group.state for group in views[1].groups] == ["opened"]


def rig(owner, name, moment, when=lambda *_: True):
    """Cut the power at the first call of a method for which `when` holds."""
    cut, method = threading.Event(), getattr(owner, name)

    def rigged(*arguments):
        chosen = not cut.is_set() and when(*arguments)
        result = method(*arguments) if moment == "after" or not chosen else None
        if chosen:
            cut.set()
            raise PowerCut
        return result

    setattr(owner, name, rigged)
    return cut


LIVE = [GroupState(step.replace("-", "_")) for step in STEPS]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("where", [*LIVE, "open"])
def test_a_power_cut_in_a_group_commit_counts_nobody_twice(make_world, where, moment):
    world = make_world(4)
    names = ("undisturbed", "disturbed")
    tasks = [world.create_task(name=name, goal=4, minimum=4, **SECURE) for name in names]
    world.run_round(tasks[0])
    members = world.members(tasks[1])
    groups = world.deployment.store.groups
    if where == "open":
        cut = rig(groups, "open", moment)
    else:
        cut = rig(groups, "record", moment, lambda *call: call[3].state == where)
    with ThreadPoolExecutor(1) as fleet:
        playing = fleet.submit(play, world, members)
        assert cut.wait(30)
        world.crash()
        with pytest.raises((CancelledError, PowerCut)):
            playing.result(timeout=30)
    world.start()
    play(world, members)
    views = [world.rounds(task)[0] for task in tasks]
    assert views[0].checkpoint == views[1].checkpoint is not None
    assert {member.device.receipt(member.assigned).state for member in members} == {"included"}
