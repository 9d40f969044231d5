"""Groups form from devices as they finish; what comes to nothing is done again by whoever is there."""

from __future__ import annotations

import pytest

from homespun.errors import Expired
from homespun.protocol.messages import Aggregation, ReportState, Waiting, decode
from homespun.protocol.tasks import GroupSpec
from homespun.secagg.messages import AdvertiseKeys, ShareKeys, Unmask
from homespun.server.group import Arrival
from tests.fleet.member import STEP_S, included, plain_checkpoint, play


def secure(world, **fields):
    return world.create_task(aggregation=Aggregation.SECURE, **fields)


def until(step, *members):
    """These go on until the step is asked of all of them."""
    for _ in range(10):
        for member in members:
            if member.asked != step:
                member.step()
    assert {member.asked for member in members} == {step}


def states(members):
    return [str(member.device.receipt(member.assigned).state) for member in members]


def groups(world, task):
    return [(str(g.state), g.num_devices, g.num_masked) for g in world.rounds(task)[0].groups]


def reasons(world, task):
    return [group.reason for group in world.rounds(task)[0].groups]


def test_who_finishes_first_does_not_wait_for_who_finishes_last(make_world):
    world = make_world(6)
    task = secure(world, goal=6, minimum=6, groups=GroupSpec(size=3))
    members = world.members(task)
    play(world, members[:3])
    assert groups(world, task) == [("opened", 3, 3)]
    assert states(members) == 3 * ["acknowledged"] + 3 * ["expected"]
    assert world.rounds(task)[0].state == "running"
    play(world, members[3:])
    assert groups(world, task) == 2 * [("opened", 3, 3)]
    assert states(members) == 6 * ["included"]
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, members)


def test_a_slow_device_joins_the_next_group(make_world):
    world = make_world(7)
    task = secure(world, goal=6, minimum=6, over_selection=7 / 6, groups=GroupSpec(size=3))
    *members, slow = world.members(task)
    slow.ask()
    assert slow.asked == "advertise-keys"
    until("share-keys", *members[:3])
    slow.step()  # the group that it was asked for is closed: it waits in another
    assert isinstance(slow.last, Waiting)
    play(world, [*members[:3], slow, *members[3:5]])
    assert states([*members[:5], slow]) == 6 * ["included"]
    assert states(members[5:]) == ["late"]


def test_more_than_were_wanted_wait_and_are_late_when_the_round_closes(make_world):
    world = make_world(6)
    task = secure(world, goal=4, over_selection=1.5)
    members = world.members(task)
    play(world, members)
    assert states(members) == 4 * ["included"] + 2 * ["late"]
    summary = world.rounds(task)[0]
    assert (summary.num_reported, summary.num_late) == (4, 2)
    assert groups(world, task) == [("opened", 4, 4), ("void", 2, 0)]
    assert reasons(world, task) == ["", "the round had closed"]


def test_who_waited_steps_in_when_a_group_comes_to_nothing(make_world):
    world = make_world(8)
    task = secure(world, goal=4, over_selection=2.0)
    members = world.members(task)
    first, reserve = members[:4], members[4:]
    until("share-keys", *first)
    for member in reserve:
        member.ask()
        member.step()
        assert isinstance(member.last, Waiting)
    assert groups(world, task) == [("share_keys", 4, 0), ("advertise_keys", 4, 0)]
    for member in first[:2]:
        member.step()
    world.pass_time(STEP_S)
    assert groups(world, task) == [("void", 4, 0), ("share_keys", 4, 0)]
    assert reasons(world, task)[0] == "too few devices shared keys"
    play(world, reserve)
    assert states(reserve) == 4 * ["included"]
    assert states(first) == 4 * ["late"]
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, reserve)


def test_at_the_deadline_a_group_with_enough_devices_goes_on(make_world):
    world = make_world(6)
    task = secure(world, goal=6, minimum=3, deadline_s=100.0)
    members = world.members(task)
    for member in members[:3]:
        member.ask()
        member.step()
    late = members[3]
    late.ask()
    world.pass_time(99.0)
    assert groups(world, task) == [("advertise_keys", 3, 0)]
    world.pass_time(1.0)
    assert groups(world, task) == [("share_keys", 3, 0)]
    with pytest.raises(Expired, match="takes no more devices"):
        late.put(*late.answer(late.last))
    late.ask()
    assert isinstance(late.last, Waiting)  # nobody is asked to join any more
    play(world, members[:4])
    assert states(members) == 3 * ["included"] + 3 * ["late"]
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, members[:3])


def test_at_the_deadline_fewer_than_n_min_are_not_used(make_world):
    world = make_world(7)
    task = secure(world, goal=7, minimum=4, groups=GroupSpec(size=4), deadline_s=100.0)
    members = world.members(task)
    play(world, members[:4])
    assert world.rounds(task)[0].state == "running"
    for member in members[4:6]:
        member.ask()
        member.step()
    world.pass_time(100.0)
    assert states(members) == 4 * ["included"] + 3 * ["late"]
    assert groups(world, task) == [("opened", 4, 4), ("void", 2, 0)]
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, members[:4])


@pytest.mark.parametrize("step", ["share-keys", "mask-input", "agree", "unmask"])
def test_members_of_a_void_group_start_anew_and_count_once(make_world, step):
    world = make_world(9)
    task = secure(world, goal=6, minimum=6, over_selection=1.5, groups=GroupSpec(size=6))
    members = world.members(task)
    first, late = members[:6], members[6:]
    until(step, *first)
    keys = [member.sent["advertise-keys"] for member in first]
    first[0].step()  # one answers, nobody else does
    fixed = step in ("agree", "unmask")  # then the reports are in, and the round closes
    world.pass_time(STEP_S)
    assert reasons(world, task)[0].startswith("too few")
    if fixed:
        assert states(first) + states(late) == 6 * ["void"] + 3 * ["late"]
        assert [view.state for view in world.rounds(task)] == ["abandoned", "open"]
        return
    assert states(members) == 9 * ["expected"]
    until("advertise-keys", *first)
    play(world, [*first, *late])
    assert not {*keys} & {member.sent["advertise-keys"] for member in first}
    counted = included(members)
    assert len(counted) == 6
    summary = world.rounds(task)[0]
    assert (summary.state, summary.num_reported) == ("scrubbed", 6)
    assert summary.checkpoint == plain_checkpoint(world, counted)


def test_void_while_the_round_still_runs_gives_the_reports_back(make_world):
    """The survivors of the first group were fixed, then too few of them agreed."""
    world = make_world(8)
    task = secure(world, goal=8, minimum=4, groups=GroupSpec(size=4))
    members = world.members(task)
    first = members[:4]
    until("agree", *first)
    world.settle()
    assert world.rounds(task)[0].num_reported == 4
    assert states(first) == 4 * ["acknowledged"]
    world.pass_time(STEP_S)
    assert world.rounds(task)[0].num_reported == 0
    assert states(first) == 4 * ["expected"]
    play(world, members)
    assert states(members) == 8 * ["included"]
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, members)


def test_a_round_outlives_a_group_that_comes_to_nothing_after_the_fence(make_world):
    world = make_world(8)
    task = secure(world, goal=8, minimum=4, groups=GroupSpec(size=4))
    members = world.members(task)
    kept, lost = members[:4], members[4:]
    until("agree", *kept)
    until("agree", *lost)
    world.settle()
    assert world.rounds(task)[0].state == "unmasking"
    play(world, kept)
    assert world.rounds(task)[0].state == "unmasking"
    assert states(members) == 8 * ["acknowledged"]
    world.pass_time(STEP_S)
    assert states(members) == 4 * ["included"] + 4 * ["void"]
    assert groups(world, task) == [("opened", 4, 4), ("void", 4, 4)]
    summary = world.rounds(task)[0]
    assert (summary.state, summary.num_reported) == ("scrubbed", 4)
    assert summary.checkpoint == plain_checkpoint(world, kept)
    for member in lost:
        assert member.ask().receipt.reason.startswith("too few")


def test_when_all_groups_come_to_nothing_the_next_attempt_makes_up_for_it(make_world):
    world = make_world(4)
    task = secure(world, goal=4, minimum=4)
    members = world.members(task)
    until("unmask", *members)
    world.pass_time(STEP_S)
    assert [view.state for view in world.rounds(task)] == ["abandoned", "open"]
    assert states(members) == 4 * ["void"]
    again = world.members(task, attempt=2)
    play(world, again)
    assert states(again) == 4 * ["included"]
    view = world.rounds(task)[1]
    assert (view.state, view.attempt) == ("scrubbed", 2)
    assert view.checkpoint == plain_checkpoint(world, again)
    assert not {m.sent["advertise-keys"] for m in members} & {
        m.sent["advertise-keys"] for m in again
    }


def test_stopping_the_task_ends_its_groups(make_world):
    world = make_world(7)
    task = secure(world, goal=7, groups=GroupSpec(size=4))
    members = world.members(task)
    until("agree", *members[:4])
    for member in members[4:6]:
        member.ask()
        member.step()
    world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    world.settle()
    assert states(members) == 7 * ["void"]
    assert {state for state, *_ in groups(world, task)} == {"void"}
    for member in members:
        assert member.ask().receipt.state is ReportState.VOID
    for member in members[:4]:  # an answer that is under way changes nothing
        reply = member.put("mask-input", member.sent["mask-input"])
        assert reply.receipt.state is ReportState.VOID
    assert list(world.deployment.private.scopes()) == []


@pytest.mark.parametrize("step", ["advertise-keys", "share-keys", "mask-input", "agree", "unmask"])
def test_a_device_that_gives_up_in_a_group(make_world, step):
    world = make_world(6)
    task = secure(world, goal=5, minimum=4, over_selection=1.2)
    *members, extra = world.members(task)
    until(step, *members)
    quitter = members[0]
    receipt = quitter.device.abort(quitter.assigned)
    masked = step in ("agree", "unmask")
    assert receipt.state == ("acknowledged" if masked else "void")
    assert quitter.ask() is not None
    if not masked:
        assert quitter.receipt == receipt
    play(world, [*members[1:], extra])
    if not masked:
        assert quitter.device.receipt(quitter.assigned) == receipt
    counted = included([*members, extra])
    assert len(counted) == (5 if masked or step == "advertise-keys" else 4)
    assert (quitter in counted) == masked
    summary = world.rounds(task)[0]
    assert (summary.state, summary.num_reported) == ("scrubbed", len(counted))
    assert summary.checkpoint == plain_checkpoint(world, counted)


def test_joining_twice_at_once_is_joining_once(make_world):
    """The same answer came twice; the second was looked at before, and added after, its group had closed."""
    world = make_world(7)
    task = secure(world, goal=6, minimum=6, over_selection=7 / 6, groups=GroupSpec(size=3))
    members = world.members(task)
    twice = members[0]
    twice.ask()
    path, desk = twice.assigned.assignment_id, world.deployment.groups
    before = world.deployment.store.reports.expectation(path, twice.device.device_id)
    until("share-keys", *members[:3])
    keys = twice.sent["advertise-keys"]
    answer = desk.answer

    async def late(expected, *rest):
        return await answer(before, *rest)

    desk.answer = late
    twice.put("advertise-keys", keys)
    desk.answer = answer
    assert groups(world, task)[1:] in ([], [("advertise_keys", 0, 0)])
    play(world, members)
    assert included(members) == members[:6]
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, members[:6])


@pytest.mark.parametrize("ends", ["opened", "void"])
def test_an_answer_that_meets_the_end_of_its_group_changes_nothing(make_world, ends):
    """It was in the queue already when the group ended: nobody is to blame, and no group begins anew."""
    world = make_world(4)
    task = secure(world, goal=4)
    *members, last = world.members(task)
    until("unmask", *members, last)
    ((live, queue),) = world.deployment.groups._live.values()
    answers = [
        Arrival(last.assigned.assignment_id, last.device.public, decode(body, kind))
        for kind, body in (
            (AdvertiseKeys, last.sent["advertise-keys"]),
            (ShareKeys, last.sent["share-keys"]),
            (Unmask, last.answer(last.last)[1]),
        )
    ]
    if ends == "opened":
        for member in members:
            member.step()
    else:
        world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    world.settle()
    for answer in answers:
        assert world.transport.run(queue.add(answer)) is None
    assert live.take(answers) == {}
    assert [state for state, *_ in groups(world, task)] == [ends]
    expected = {"opened": "included", "void": "void"}[ends]
    assert states([*members, last]) == 4 * [expected]


def test_who_helped_to_open_a_group_joins_no_other(make_world):
    """The group came to nothing when its shares were on their way: the server might open it yet."""
    world = make_world(8)
    task = secure(world, goal=8, minimum=4, groups=GroupSpec(size=4))
    members = world.members(task)
    first, second = members[:4], members[4:]
    until("unmask", *first)
    first[0].step()
    world.pass_time(STEP_S)
    assert reasons(world, task) == ["too few neighbours gave up their shares"]
    play(world, members)
    for member in first:
        assert member.gone
        assert member.asked == "advertise-keys"
        assert member.device.abort(member.assigned).state is ReportState.VOID
    world.settle()
    assert included(members) == second
    assert world.rounds(task)[0].checkpoint == plain_checkpoint(world, second)
