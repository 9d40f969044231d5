"""Securely aggregated rounds: the result is that of the plain sum, bit for bit, whoever drops out."""

from __future__ import annotations

import pytest

from homespun.protocol.messages import Aggregation, ReportState, TaskKind
from homespun.protocol.tasks import GroupSpec
from homespun.protocol.views import Event
from tests.fleet.member import STEP_S, STEPS, included, plain_checkpoint, play

SECURE = {"aggregation": Aggregation.SECURE}


def events(world, start):
    """Texts of the events whose kind begins so."""
    found = world.operate(list[Event], "GET", "/events")
    return [event.text for event in found if event.kind.startswith(start)]


def test_a_whole_round(make_world):
    world = make_world(6)
    task = world.create_task(goal=6, **SECURE)
    members = world.members(task)
    play(world, members)
    (summary,) = world.rounds(task)
    assert (summary.state, summary.num_reported, summary.num_late) == ("scrubbed", 6, 0)
    assert [event.kind for event in world.operate(list[Event], "GET", "/events")][2:] == [
        "round.opened",
        "round.selected",
        "round.closed",
        "group.opened",
        "round.committed",
        "task.finished",
    ]
    assert events(world, "group.opened") == ["group 1: 6 reports of 6 devices"]
    (group,) = summary.groups
    assert (group.number, group.state, group.reason) == (1, "opened", "")
    assert (group.num_devices, group.num_shared, group.num_masked, group.num_agreed) == (6, 6, 6, 6)
    assert group.num_unmasked == 5  # two thirds and one are enough to open every secret
    for member in members:
        receipt = member.device.receipt(member.assigned)
        assert (receipt.state, receipt.checkpoint) == ("included", summary.checkpoint)
        assert member.put("mask-input", member.sent["mask-input"]).receipt == receipt


def test_a_device_without_trouble_needs_one_get_and_five_puts(make_world):
    world = make_world(3)
    task = world.create_task(goal=3, **SECURE)
    first, second, last = world.members(task)
    calls, call = [], last.device.call

    def counted(kind, method, path, *rest, **headers):
        calls.append((method, path.rpartition("/")[2]))
        return call(kind, method, path, *rest, **headers)

    last.device.call = counted
    last.ask()
    for step in STEPS:
        for other in (first, second):
            while other.asked != step:
                other.step()
            other.step()
        assert last.asked == step
        last.step()
    assert last.receipt.state == "acknowledged"
    assert calls == [("GET", "group"), *(("PUT", step) for step in STEPS)]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (TaskKind.TRAIN, {}),
        (TaskKind.TRAIN, {"rotate": False}),
        (TaskKind.TRAIN, {"bits": 12}),
        (TaskKind.TRAIN, {"bits": 12, "rotate": False}),
        (TaskKind.TRAIN, {"bits": 32}),
        (TaskKind.TRAIN, {"bits": 32, "rotate": False}),
        (TaskKind.EVALUATE, {}),
    ],
)
def test_the_masked_sum_is_the_plain_sum(make_world, kind, fields):
    """The same devices and seeds in a plain and in a secure task give the same bytes."""
    world = make_world(5)
    results = []
    for aggregation in Aggregation:
        task = world.create_task(
            kind,
            name=f"task-{aggregation}",
            goal=5,
            aggregation=aggregation,
            num_rounds=2,
            **fields,
        )
        world.run_round(task, 1)
        world.run_round(task, 2)
        results.append(
            [
                (view.state, view.checkpoint, view.weight, view.clipped_share, view.metrics)
                for view in world.rounds(task)
            ]
        )
    secure, plain = results
    assert secure == plain
    assert [state for state, *_ in plain] == ["scrubbed", "scrubbed"]


@pytest.mark.parametrize("fields", [{}, {"bits": 12}, {"bits": 32, "rotate": False}])
def test_several_groups_make_one_sum(make_world, fields):
    world = make_world(9)
    task = world.create_task(goal=9, minimum=9, groups=GroupSpec(size=3), **SECURE, **fields)
    members = world.members(task)
    play(world, members)
    (summary,) = world.rounds(task)
    assert [(group.state, group.num_masked) for group in summary.groups] == 3 * [("opened", 3)]
    assert summary.num_reported == len(included(members)) == 9
    assert summary.checkpoint == plain_checkpoint(world, members)


@pytest.mark.parametrize("step", STEPS)
def test_who_drops_out_before_its_masked_input_is_not_in_the_sum(make_world, step):
    world = make_world(7)
    task = world.create_task(goal=7, minimum=5, **SECURE)
    members = world.members(task)
    lost = members[2]
    lost.leaves_at = step
    play(world, members)
    (summary,) = world.rounds(task)
    waited = world.clock.now() - summary.selected_at  # nobody knows whether who was drawn will come
    assert waited == task.spec.deadline_s if step == "advertise-keys" else waited <= STEP_S
    counts = included(members)
    assert (lost in counts) == (STEPS.index(step) > STEPS.index("mask-input"))
    assert [m for m in members if m not in counts] in ([], [lost])
    assert (summary.state, summary.num_reported) == ("scrubbed", len(counts))
    assert summary.checkpoint == plain_checkpoint(world, counts)
    receipt = lost.device.receipt(lost.assigned)
    assert receipt.state == ("included" if lost in counts else "late")
    told = {"advertise-keys": "the round had closed", "agree": "", "unmask": ""}
    assert receipt.reason == told.get(step, "dropped out of its group")
    (text,) = events(world, "group.opened")
    assert text == {
        "advertise-keys": "group 1: 6 reports of 6 devices",
        "share-keys": "group 1: 6 reports of 7 devices; 1 lost before, 0 after sharing keys",
        "mask-input": "group 1: 6 reports of 7 devices; 0 lost before, 1 after sharing keys",
    }.get(step, "group 1: 7 reports of 7 devices")


def test_the_receipt_follows_the_report(make_world):
    world = make_world(3)
    task = world.create_task(goal=3, **SECURE)
    members = world.members(task)

    def states():
        return {member.device.receipt(member.assigned).state for member in members}

    while any(member.asked != "mask-input" for member in members):
        for member in members:
            if member.asked != "mask-input":
                member.step()
    assert states() == {ReportState.EXPECTED}
    members[0].step()
    assert members[0].device.receipt(members[0].assigned).state == "acknowledged"
    assert members[1].device.receipt(members[1].assigned).state == "expected"
    play(world, members)
    assert {member.receipt.state for member in members} <= {"acknowledged", "included"}
    assert states() == {ReportState.INCLUDED}
