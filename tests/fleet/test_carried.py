"""Stragglers: whose round closed without them goes into a later one, weighted by how far behind it is, or is late."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from sqlalchemy import func, select

from homespun.errors import BadSignature
from homespun.learning.contribution import AUX_SCALE
from homespun.protocol.messages import Aggregation, Assigned, Carried, Receipt, ReportState, Waiting
from homespun.protocol.tasks import GroupSpec
from homespun.protocol.views import Event
from homespun.secagg.messages import Terms
from homespun.server.store.schema import assignments, rates, receipts
from homespun.tensors import tree as trees
from tests.fleet.member import Member, plain_checkpoint, play


def tolerant(world, **fields):
    return world.create_task(
        aggregation=Aggregation.SECURE,
        **{"max_staleness": 1, "num_rounds": 4, "goal": 4, "over_selection": 1.25, **fields},
    )


def states(members):
    return [str(member.device.receipt(member.assigned).state) for member in members]


def next_round(world, task, number, busy=()):
    """The cohort of a round, drawn from those that are not at work for an earlier one."""
    names = {member.device.index for member in busy}
    free = [device for device in world.devices if device.index not in names]
    return [
        Member(device, assigned, task.spec.name)
        for device, assigned in world.gather(task, number, devices=free)
    ]


def test_a_straggler_goes_into_the_next_round_with_less_weight(make_world):
    world = make_world(10)
    task = tolerant(world)
    *first, slow = world.members(task)
    play(world, first)
    closed = world.rounds(task)[0]
    assert (closed.state, closed.num_reported, closed.num_late) == ("scrubbed", 4, 0)
    assert states([slow]) == ["expected"]
    assert isinstance(slow.ask(), Waiting)  # for the next round to begin
    events = world.operate(list[Event], "GET", "/events")
    assert [event.text for event in events if event.kind == "round.carried"] == [
        "1 may still join round 2.1"
    ]
    alone = slow.contribution

    fresh = next_round(world, task, 2, busy=[slow])
    asked = slow.ask()
    assert isinstance(asked, Carried)
    assert asked.ancestry == (task.spec.checkpoints[0], closed.checkpoint)
    assert asked.terms.checkpoint_hash == closed.checkpoint
    play(world, [slow, *fresh])
    second = world.rounds(task)[1]
    counted = [m for m in fresh if m.device.receipt(m.assigned).state is ReportState.INCLUDED]
    assert (second.num_carried, second.num_reported, len(counted)) == (1, 4, 3)
    receipt = slow.device.receipt(slow.assigned)
    assert (receipt.state, receipt.checkpoint) == (ReportState.INCLUDED, second.checkpoint)
    assert second.checkpoint == plain_checkpoint(world, [*counted, slow])

    # by hand: sum(s w u) / sum(s w), as far as words of 16 bits are exact
    before, weight = alone.aux[0] / AUX_SCALE, slow.contribution.aux[0] / AUX_SCALE
    assert weight == round(before / sqrt(2) * AUX_SCALE) / AUX_SCALE
    total, weights = np.zeros(10), 0.0
    for member, staleness in [*((m, 0) for m in counted), (slow, 1)]:
        codec = member.device.codec(member.assigned)
        update = codec.decode(member.device.contribution(member.assigned)).mean_update
        share = member.device.contribution(member.assigned).aux[0] / AUX_SCALE / sqrt(1 + staleness)
        total += share * update
        weights += share
    shapes = world.plan.manifest.shapes
    old, new = (
        trees.flatten(world.deployment.library.checkpoint(h), shapes)
        for h in (second.base_checkpoint, second.checkpoint)
    )
    assert new - old == pytest.approx(total / weights, abs=2e-3)
    assert second.weight == pytest.approx(weights, abs=1e-4)


def test_who_is_too_far_behind_is_late(make_world):
    world = make_world(16)
    task = tolerant(world, max_staleness=2)
    *first, slow = world.members(task)
    play(world, first)
    for number in (2, 3):
        assert states([slow]) == ["expected"]
        fresh = next_round(world, task, number, busy=[slow])
        assert world.rounds(task)[-1].num_carried >= 1
        play(world, fresh[:4])
    receipt = slow.device.receipt(slow.assigned)
    assert (receipt.state, receipt.reason) == (
        "late",
        "the round had closed, and it is too late for the next",
    )
    assert slow.ask().receipt == receipt


def test_a_task_without_staleness_has_no_stragglers(make_world):
    world = make_world(5)
    task = tolerant(world, max_staleness=0)
    *first, slow = world.members(task)
    play(world, first)
    assert states([slow]) == ["late"]
    assert world.rounds(task)[1].num_carried == 0


def test_in_the_last_round_everybody_else_is_late(make_world):
    world = make_world(5)
    task = tolerant(world, num_rounds=1)
    *first, slow = world.members(task)
    play(world, first)
    assert states([slow]) == ["late"]
    assert world.task(task).state == "finished"


def test_who_waits_in_a_forming_group_at_the_fence_is_carried_too(make_world):
    world = make_world(12)
    task = tolerant(world, over_selection=1.5)
    members = world.members(task)
    play_until_round_is_over = members[:4]
    for member in members[4:]:
        member.ask()
    for member in play_until_round_is_over:
        member.ask()
        member.step()
    for member in members[4:]:
        member.step()  # they join a second group, which waits
    play(world, play_until_round_is_over)
    summary = world.rounds(task)[0]
    assert [str(group.state) for group in summary.groups] == ["opened", "void"]
    assert (summary.num_late, states(members[4:])) == (0, ["expected", "expected"])
    fresh = next_round(world, task, 2, busy=members[4:])
    play(world, [*members[4:], *fresh])
    assert states(members[4:]) == ["included", "included"]
    assert [member.staleness for member in members[4:]] == [1, 1]


def test_a_failed_attempt_takes_its_stragglers_along(make_world):
    """The next attempt has the same base: nobody is any further behind, and nothing is trained again."""
    world = make_world(8)
    task = tolerant(world, deadline_s=100.0)
    members = world.members(task)
    world.pass_time(100.0)
    assert [view.state for view in world.rounds(task)] == ["abandoned", "open"]
    assert world.rounds(task)[1].num_carried == 5
    assert states(members) == 5 * ["expected"]
    busy = {member.device.index for member in members}
    world.gather(task, 1, 2, devices=[d for d in world.devices if d.index not in busy])
    asked = members[4].ask()
    assert isinstance(asked, Carried)
    assert (asked.terms.attempt, len(asked.ancestry)) == (2, 1)
    play(world, members[1:])
    summary = world.rounds(task)[1]
    assert (summary.state, summary.num_reported) == ("scrubbed", 4)
    assert [member.staleness for member in members[1:]] == [0, 0, 0, 0]
    assert summary.checkpoint == plain_checkpoint(world, members[1:])


def outcomes(world, task):
    """Reports and losses that the next draw goes by, when every deadline so far has passed."""
    world.pass_time(task.spec.deadline_s)
    query = select(func.sum(rates.c.num_reported), func.sum(rates.c.num_lost))
    with world.deployment.store.database.read() as connection:
        return tuple(connection.execute(query.where(rates.c.task_id == task.task_id)).one())


def test_a_straggler_counts_for_no_draw_unless_it_is_lost(make_world):
    """It is no loss of its own round, and no report of the next, whose draw it was not in."""
    world = make_world(14)
    task = tolerant(world, max_staleness=2, deadline_s=100.0, over_selection=1.75)
    *first, slow, slower, gone = world.members(task)
    play(world, first)
    assert outcomes(world, task) == (4, 0)
    fresh = next_round(world, task, 2, busy=[slow, slower, gone])
    play(world, [slow, *fresh[:3]])
    assert (states([slow]), world.rounds(task)[1].num_reported) == (["included"], 4)
    assert outcomes(world, task) == pytest.approx((4 + 3, 0), abs=0.01)
    assert states([fresh[3], slower]) == 2 * ["expected"]
    *third, tired = next_round(world, task, 3, busy=[fresh[3], slower, gone])
    play(world, [slower, *third])
    tired.device.abort(tired.assigned)  # carried on, and lost
    *fourth, last = next_round(world, task, 4, busy=[fresh[3], gone])
    play(world, fourth)
    assert states([fresh[3], last]) == 2 * ["late"]  # they hear of it; `gone` never asks again
    assert outcomes(world, task) == pytest.approx((4 + 3 + 3 + 4, 2), abs=0.01)


def test_who_is_carried_takes_places_of_the_draw_but_at_most_half(make_world):
    world = make_world(12)
    task = tolerant(world, over_selection=1.5)
    *first, slow, slower = world.members(task)
    play(world, first)
    assert len(next_round(world, task, 2, busy=[slow, slower])) == 6 - 2
    many = tolerant(world, over_selection=2.5, name="many")
    cohort = world.members(many)
    play(world, cohort[:4])
    assert len(next_round(world, many, 2, busy=cohort[4:])) == 10 / 2


def test_the_cohort_of_an_attempt_that_failed_is_not_lost_yet(make_world):
    world = make_world(8)
    task = tolerant(world, deadline_s=100.0)
    members = world.members(task)
    world.pass_time(100.0)
    assert world.rounds(task)[1].num_carried == len(members)
    assert outcomes(world, task) == (0, 0)


def test_a_device_that_takes_part_anew_has_no_second_place(make_world):
    """It lost its record and could not say so: what it was assigned before is void."""
    world = make_world(5)
    task = tolerant(world)
    *first, slow = world.members(task)
    play(world, first)
    again = next_round(world, task, 2, busy=first[:1])
    assert slow.device.index in {member.device.index for member in again}
    assert slow.ask().receipt == Receipt(
        assignment_id=slow.assigned.assignment_id,
        state=ReportState.VOID,
        reason="the device took part anew",
    )
    play(world, again)
    assert states([slow]) == ["void"]


def test_the_time_of_an_assignment_ends(make_world):
    world = make_world(10)
    task = tolerant(world, deadline_s=100.0)
    *first, slow = world.members(task)
    assert slow.assigned.deadline_s == 200.0  # of its own round and of the next
    play(world, first)
    world.pass_time(199.0)
    assert isinstance(slow.ask(), Waiting)
    world.pass_time(1.0)
    assert slow.ask().receipt.state is ReportState.LATE
    assert slow.device.receipt(slow.assigned).reason == "the time of the assignment was over"


def test_a_claim_is_answered_the_same_after_the_device_was_carried(make_world):
    world = make_world(5)
    task = tolerant(world)
    *first, slow = world.members(task)
    play(world, first)
    again = slow.device.claim(task, 1)
    assert isinstance(again, Assigned)
    assert again == slow.assigned


def test_keys_for_the_round_that_closed_meanwhile_are_not_taken(make_world):
    world = make_world(10)
    task = tolerant(world)
    *first, slow = world.members(task)
    slow.ask()
    assert isinstance(slow.last, Terms)
    step, body = slow.answer(slow.last)
    play(world, first)
    fresh = next_round(world, task, 2, busy=[slow])
    with pytest.raises(BadSignature):
        slow.put(step, body)
    slow.last = None
    play(world, [slow, *fresh])
    assert states([slow]) == ["included"]


@pytest.mark.parametrize("after", range(8))
def test_the_server_is_killed_anywhere_on_the_way(make_world, after):
    """The straggler is in the second checkpoint, once, whenever the server died."""
    world = make_world(8)
    task = tolerant(world, goal=3, minimum=3, over_selection=4 / 3)
    *first, slow = world.members(task)
    play(world, first)
    if after == 0:
        world.restart()
    fresh = next_round(world, task, 2, busy=[slow])[:2]
    turns = 0
    while world.rounds(task)[1].state != "scrubbed":
        turns += 1
        for member in (slow, *fresh):
            member.step()
        if turns == after:
            world.restart()
            for member in (slow, *fresh):
                member.last = None if not member.through else member.last
        world.settle()
        assert turns < 30
    assert states([slow, *fresh]) == 3 * ["included"]
    assert world.rounds(task)[1].checkpoint == plain_checkpoint(world, [*fresh, slow])


def test_nothing_of_a_carried_device_remains_when_it_is_through(make_world):
    world = make_world(10)
    task = tolerant(world, num_rounds=2, groups=GroupSpec(size=4))
    *first, slow = world.members(task)
    play(world, first)
    with world.deployment.store.database.read() as connection:
        rows = list(connection.execute(assignments.select()))
    assert [row.device_id for row in rows] == [slow.device.device_id]
    play(world, [slow, *next_round(world, task, 2, busy=[slow])])
    with world.deployment.store.database.read() as connection:
        assert list(connection.execute(assignments.select())) == []
        kept = {row.state for row in connection.execute(receipts.select())}
    assert kept <= {"included", "late"}
