"""Async tasks: devices come and go at any time, every full group is one update, and each says how far behind it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from homespun.errors import BadSignature, Expired, WrongStep
from homespun.learning.contribution import AUX_SCALE
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Mode,
    Rejected,
    ReportState,
    Settled,
    Waiting,
)
from homespun.protocol.views import RoundSummary, TaskView
from homespun.server.store.reports import receipt_id
from homespun.server.store.schema import assignments, metadata, receipts, rounds
from homespun.tensors import tree as trees
from tests.fleet.member import Member, plain_checkpoint
from tests.fleet.test_invariants import SLOW
from tests.fleet.world import World, scratch


def create(world: World, **fields) -> TaskView:
    return world.create_task(
        aggregation=Aggregation.SECURE,
        mode=Mode.ASYNC,
        **{
            "goal": 3,
            "minimum": 3,
            "concurrency": 5,
            "max_staleness": 3,
            "num_rounds": 4,
            **fields,
        },
    )


@dataclass
class Flow:
    """A world in which an async task runs, and what its devices remember."""

    world: World
    task: TaskView
    members: list[Member] = field(default_factory=list)
    origins: dict[str, int] = field(default_factory=dict)

    @property
    def running(self) -> RoundSummary:
        return self.world.rounds(self.task)[-1]

    def claim(self, index: int) -> Member:
        """A device asks for a place in the round that runs, and gets it."""
        member = self.try_to_claim(index)
        assert member is not None
        return member

    def try_to_claim(self, index: int) -> Member | None:
        """A device asks for a place in the round that runs; None: it gets none that is new."""
        now = self.running
        reply = self.world.devices[index].claim(self.task, now.round_number, now.attempt)
        if not isinstance(reply, Assigned):
            assert isinstance(reply, Rejected)
            return None
        if reply.assignment_id in self.origins:
            return None
        member = Member(self.world.devices[index], reply, self.task.spec.name)
        self.members.append(member)
        self.origins[reply.assignment_id] = now.round_number
        return member

    def state(self, member: Member) -> ReportState:
        return member.device.receipt(member.assigned).state

    def exchange(self, *members: Member) -> None:
        """These go on as far as they can without anybody else."""
        busy = True
        while busy:
            busy = False
            for member in members:
                if not member.through:
                    member.step()
                    busy |= not isinstance(member.last, Waiting | Settled)
            self.world.settle()

    # --- what must hold -----------------------------------------------------------------------------------

    def check(self) -> None:
        spec, summaries = self.task.spec, self.world.rounds(self.task)
        task = self.world.task(self.task)
        found = {id(m): m.device.receipt(m.assigned) for m in self.members}
        base, counted = spec.checkpoints[0], 0
        committed = [s for s in summaries if s.state in ("committed", "scrubbed")]
        assert [s.round_number for s in committed] == list(range(1, task.rounds_committed + 1))  # 1
        for summary in committed:
            assert summary.base_checkpoint == base
            base = summary.checkpoint or ""
            members = [m for m in self.members if found[id(m)].checkpoint == base]
            counted += len(members)
            assert len(members) == summary.num_reported >= spec.minimum  # 4
            for member in members:
                behind = summary.round_number - self.origins[member.assigned.assignment_id]
                assert member.staleness == behind <= spec.max_staleness
            assert base == plain_checkpoint(self.world, members)  # 2, 5
        assert base == task.head
        states = Counter(str(receipt.state) for receipt in found.values())
        assert states["included"] == counted
        if task.state != "active":  # 3
            assert not states["expected"] + states["acknowledged"]
        self.check_rows()

    def check_rows(self) -> int:
        """7, and the number of devices that the server waits for, which is bounded."""
        ids = {device.device_id for device in self.world.devices}
        now, places = self.world.clock.now(), assignments.c
        with self.world.deployment.store.database.read() as connection:
            placed = list(
                connection.execute(
                    select(assignments, rounds.c.state).join(
                        rounds, rounds.c.round_id == places.round_id
                    )
                )
            )
            expected = set(
                connection.scalars(
                    select(receipts.c.receipt_id).where(receipts.c.state == ReportState.EXPECTED)
                )
            )
            for table in metadata.tables.values():
                if table.name not in ("assignments", "devices"):
                    for row in connection.execute(select(table)):
                        assert not ids & set(map(str, row))
        assert all(row.state not in ("scrubbed", "abandoned", "cancelled") for row in placed)
        assert max(Counter(row.device_id for row in placed).values(), default=0) <= 1
        waited_for = sum(
            row.group_id is None
            and row.expires_at > now
            and receipt_id(row.assignment_id) in expected
            for row in placed
        )
        assert waited_for <= self.task.spec.concurrency
        return int(waited_for)


@contextmanager
def new_flow(num_devices: int, **fields) -> Iterator[Flow]:
    with scratch() as directory:
        world = World(Path(directory), num_devices)
        try:
            yield Flow(world, create(world, **fields))
        finally:
            world.stop()


# --- letting in ---------------------------------------------------------------------------------------------


def test_devices_are_let_in_as_they_come_up_to_the_concurrency():
    with new_flow(7) as flow:
        world = flow.world
        assert flow.running.state == "running"
        offer = world.devices[0].check_in().offers[0]
        assert (offer.mode, offer.max_staleness, offer.round_number) == ("async", 3, 1)
        members = [flow.claim(index) for index in range(5)]
        reply = world.devices[5].claim(flow.task, 1)
        assert isinstance(reply, Rejected)
        assert reply.reason == "full"
        assert world.devices[0].claim(flow.task, 1) == members[0].assigned  # again: the same place
        members[0].device.abort(members[0].assigned)
        flow.claim(5)  # there is a place again
        assert flow.try_to_claim(0) is None
        flow.check()


def test_who_gave_up_may_come_again_in_the_same_round():
    """Nothing ends the round but reports: it must not run out of devices."""
    with new_flow(3, concurrency=3) as flow:
        first = flow.claim(0)
        first.device.abort(first.assigned)
        again = flow.claim(0)
        assert again.assigned.assignment_id != first.assigned.assignment_id
        others = [flow.claim(1), flow.claim(2)]
        flow.exchange(again, *others)
        flow.check()
        assert flow.world.task(flow.task).rounds_committed == 1


def test_who_never_comes_back_loses_its_place():
    with new_flow(6, concurrency=3, deadline_s=100.0) as flow:
        lost = [flow.claim(index) for index in range(3)]
        assert flow.try_to_claim(3) is None
        flow.world.pass_time(100.0)
        others = [flow.claim(index) for index in range(3, 6)]
        lost[0].ask()
        assert flow.state(lost[0]) is ReportState.LATE
        flow.exchange(*others)
        flow.check()
        assert flow.state(lost[1]) is ReportState.LATE


def test_a_device_that_forgot_its_place_gets_another_once_the_first_cannot_count():
    with new_flow(5) as flow:
        first = flow.claim(0)
        first.step()
        first.step()  # it waits in a group that is forming, and forgets
        assert flow.try_to_claim(0) is None  # the same round: the same place
        others = [flow.claim(1), flow.claim(2), flow.claim(3)]
        others[0].leaves_at = "share-keys"  # so that the group comes to nothing
        flow.exchange(*others[:2])
        flow.world.pass_time(60.0)
        flow.exchange(*others[1:], flow.claim(4))
        assert flow.running.round_number == 2
        again = flow.claim(0)
        first.last = None
        first.ask()
        assert flow.state(first) is ReportState.VOID
        assert flow.state(again) is ReportState.EXPECTED
        flow.check()


def test_the_next_round_begins_with_who_is_out():
    with new_flow(6) as flow:
        members = [flow.claim(index) for index in range(5)]
        flow.exchange(*members[:3])
        now = flow.running
        assert (now.round_number, now.state, now.num_carried) == (2, "running", 2)
        flow.claim(5)
        flow.exchange(*members[3:], flow.members[-1])
        flow.check()
        assert flow.running.round_number == 3
        assert [member.staleness for member in flow.members] == [0, 0, 0, 1, 1, 0]


def test_a_group_that_lost_devices_is_an_update_all_the_same():
    with new_flow(6, goal=5, minimum=4) as flow:
        members = [flow.claim(index) for index in range(5)]
        members[0].leaves_at = "mask-input"
        flow.exchange(*members)
        flow.world.pass_time(60.0)
        flow.exchange(*members)
        flow.check()
        assert flow.world.rounds(flow.task)[0].num_reported == 4
        assert flow.state(members[0]) is ReportState.LATE


def test_too_far_behind_is_late():
    with new_flow(8, max_staleness=1) as flow:
        slow = flow.claim(7)
        for first in (0, 3):
            flow.exchange(*(flow.claim(index) for index in range(first, first + 3)))
        receipt = slow.device.receipt(slow.assigned)
        assert (receipt.state, receipt.reason) == (
            "late",
            "the round had closed, and it is too late for the next",
        )
        flow.check()


def test_stopping_voids_what_is_out():
    with new_flow(3) as flow:
        members = [flow.claim(index) for index in range(3)]
        flow.world.operate(dict, "POST", f"/tasks/{flow.task.task_id}/stop")
        flow.world.settle()
        assert {flow.state(member) for member in members} == {ReportState.VOID}
        flow.check()


# --- FedBuff --------------------------------------------------------------------------------------------------


def heavy_tail(rng: Random) -> float:
    """Seconds of training: most are quick, some take thirty times as long."""
    return min(10.0 * rng.paretovariate(1.2), 300.0)


def test_twenty_at_once_and_buffers_of_five_are_fedbuff():
    """Every checkpoint is the one before plus sum(s w u) / sum(s w), s = 1 / sqrt(1 + staleness).

    The server is killed again and again in one of two lives, which end with the same bytes.
    """
    assert live(killed=True) == live(killed=False)


def live(killed: bool) -> str:
    """A task from its start to its end, as devices of very different speed make it; its last checkpoint."""
    rng, fate = Random(5), Random(6)
    num_devices, num_rounds = 40, 6
    fields = {"goal": 5, "minimum": 5, "concurrency": 20, "max_staleness": 3}
    with new_flow(num_devices, num_rounds=num_rounds, deadline_s=1_000.0, **fields) as flow:
        world, task = flow.world, flow.task
        begun = world.clock.now()
        at = {index: rng.uniform(0, 30) for index in range(num_devices)}  # when it acts next
        training: dict[int, Member] = {}
        finished: list[Member] = []
        most = 0
        while world.task(task).state == "active":
            index = min(at, key=lambda each: (at[each], each))
            now = at.pop(index)
            world.clock.advance(now - (world.clock.now() - begun))
            if index in training:
                finished.append(training.pop(index))
                at[index] = now + rng.uniform(1, 20)
            elif (member := flow.try_to_claim(index)) is not None:
                training[index] = member
                at[index] = now + heavy_tail(rng)
            else:
                at[index] = now + rng.uniform(5, 15)
            most = max(most, flow.check_rows())
            flow.exchange(*finished)
            finished = [member for member in finished if not member.through]
            if killed and fate.random() < 0.05:
                world.restart()
        flow.check()
        assert most == 20
        found = {id(m): m.device.receipt(m.assigned) for m in flow.members}
        included = [m for m in flow.members if found[id(m)].state is ReportState.INCLUDED]
        assert len(included) == 5 * num_rounds
        assert {m.staleness for m in included} >= {0, 1, 2}
        assert ReportState.LATE in {receipt.state for receipt in found.values()}
        # First come, first served, but nobody starves.
        assert len({member.device.index for member in flow.members}) >= 0.9 * num_devices
        for summary in world.rounds(task):
            buffer = [m for m in included if found[id(m)].checkpoint == summary.checkpoint]
            assert moved(world, summary) == pytest.approx(fedbuff(buffer), abs=5e-3)
        return world.task(task).head


def fedbuff(buffer: list[Member]) -> np.ndarray:
    """The step of one buffer in floating point, from the updates as their devices made them."""
    total, weights = np.zeros(10), 0.0
    for member in buffer:
        fresh = member.device.contribution(member.assigned)
        update = member.device.codec(member.assigned).decode(fresh).mean_update
        weight = fresh.aux[0] / AUX_SCALE / sqrt(1 + member.staleness)
        total, weights = total + weight * update, weights + weight
    return np.asarray(total / weights)


def moved(world: World, summary: RoundSummary) -> np.ndarray:
    shapes, library = world.plan.manifest.shapes, world.deployment.library
    assert summary.base_checkpoint is not None
    assert summary.checkpoint is not None
    before = trees.flatten(library.checkpoint(summary.base_checkpoint), shapes)
    return trees.flatten(library.checkpoint(summary.checkpoint), shapes) - before


# --- whatever happens -----------------------------------------------------------------------------------------

NUM_DEVICES = 8
REFUSALS = (BadSignature, Expired, WrongStep)
"""Of what came to a round or a step that is over."""
devices = st.integers(0, NUM_DEVICES - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), devices),
        st.tuples(st.just("claim_all"), st.just(0)),
        st.tuples(st.just("step"), devices),
        st.tuples(st.just("step_all"), st.just(0)),
        st.tuples(st.just("exchange"), devices),
        st.tuples(st.just("abort"), devices),
        st.tuples(st.just("wait"), st.sampled_from([5, 30, 60, 90])),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("stop"), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


def do(flow: Flow, name: str, argument: int) -> None:
    busy = {m.device.index: m for m in flow.members if not m.through}
    match name:
        case "claim" if flow.running.state == "running" and argument not in busy:
            flow.try_to_claim(argument)
        case "claim_all":
            for index in range(NUM_DEVICES):
                do(flow, "claim", index)
        case "step" if argument in busy:
            busy[argument].step()
        case "step_all":
            for member in busy.values():
                member.step()
        case "exchange":
            flow.exchange(*(member for index, member in busy.items() if index <= argument))
        case "abort" if argument in busy:
            busy[argument].device.abort(busy[argument].assigned)
            busy[argument].ask()
        case "wait":
            flow.world.clock.advance(argument)
        case "restart":
            flow.world.restart()
        case "stop" if flow.task.spec.seed == 1:
            flow.world.operate(dict, "POST", f"/tasks/{flow.task.task_id}/stop")
    flow.world.settle()


@settings(SLOW, max_examples=10)
@given(operations, st.integers(0, 1))
def test_invariants_hold_after_every_operation(todo, seed):
    with new_flow(NUM_DEVICES, deadline_s=80.0, num_rounds=3, seed=seed) as flow:
        for name, argument in todo:
            with suppress(*REFUSALS):
                do(flow, name, argument)
            flow.check()


def test_the_invariants_hold_over_a_long_rough_life():
    """One long list that reaches the end, so that the check above is known to see committed rounds."""
    todo = [
        ("claim_all", 0), ("exchange", 2), ("restart", 0), ("claim_all", 0), ("step_all", 0), ("abort", 4),
        ("wait", 30), ("claim_all", 0), ("exchange", 7), ("wait", 90), ("claim_all", 0), ("step_all", 0),
        ("restart", 0), ("step_all", 0), ("step_all", 0), ("exchange", 7), ("claim_all", 0), ("exchange", 7),
        ("claim_all", 0), ("exchange", 7),
    ]  # fmt: skip
    with new_flow(NUM_DEVICES, deadline_s=80.0, num_rounds=3) as flow:
        for name, argument in todo:
            do(flow, name, argument)
            flow.check()
        assert flow.world.task(flow.task).state == "finished"
        assert any(member.staleness for member in flow.members)
