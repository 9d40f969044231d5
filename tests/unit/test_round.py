"""What a round does next: a table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from homespun.errors import Conflict
from homespun.protocol.round import (
    ROUND,
    RoundEvent,
    RoundState,
    RoundView,
    cohort_size,
    due,
    may_carry,
)

R, E = RoundState, RoundEvent
SELECT_AT, DEADLINE = 100.0, 200.0
VIEW = RoundView(
    state=R.PLANNED,
    goal=4,
    minimum=3,
    pool_target=6,
    select_at=SELECT_AT,
    deadline_at=DEADLINE,
    num_waiting=0,
    num_assigned=0,
    num_open=0,
    num_reported=0,
)


@pytest.mark.parametrize(
    ("num_waiting", "now", "event"),
    [
        (0, 0.0, None),
        (5, 99.9, None),  # the window is open and the pool not full
        (6, 0.0, E.SELECT),  # the pool is full before the window ends
        (7, 0.0, E.SELECT),
        (3, 100.0, E.SELECT),  # the window is over, enough came
        (5, 150.0, E.SELECT),
        (2, 100.0, None),  # too few: wait on
        (2, 1e12, None),
        (0, 1e12, None),
    ],
)
def test_an_open_round(num_waiting, now, event):
    assert due(replace(VIEW, state=R.OPEN, num_waiting=num_waiting), now) is event


def test_without_a_target_the_draw_is_never_first_come_first_served():
    view = replace(VIEW, state=R.OPEN, pool_target=0, num_waiting=1000)
    assert due(view, SELECT_AT - 0.1) is None
    assert due(view, SELECT_AT) is E.SELECT


@pytest.mark.parametrize(
    ("num_reported", "num_open", "now", "event"),
    [
        (0, 6, 0.0, None),
        (3, 3, 199.9, None),  # the minimum is there, but others may still come
        (4, 2, 0.0, E.CLOSE),  # the goal
        (5, 1, 0.0, E.CLOSE),
        (4, 2, 300.0, E.CLOSE),
        (3, 3, 200.0, E.CLOSE),  # the deadline, and enough
        (2, 4, 200.0, E.ABANDON),  # the deadline, and too few
        (0, 6, 200.0, E.ABANDON),
        (3, 0, 0.0, E.CLOSE),  # nobody left to wait for, and enough
        (2, 0, 0.0, E.ABANDON),  # nobody left to wait for, and too few
        (0, 0, 0.0, E.ABANDON),
    ],
)
def test_a_running_round(num_reported, num_open, now, event):
    view = replace(VIEW, state=R.RUNNING, num_reported=num_reported, num_open=num_open)
    assert due(view, now) is event


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (R.PLANNED, E.OPEN),
        (R.CLOSING, E.AGGREGATE),
        (R.AGGREGATED, E.COMMIT),
        (R.COMMITTED, E.SCRUB),
        (R.SCRUBBED, None),
        (R.ABANDONED, None),
        (R.CANCELLED, None),
    ],
)
def test_the_other_states_do_not_look_at_the_clock(state, event):
    for now in (0.0, 150.0, 1e12):
        assert due(replace(VIEW, state=state), now) is event


SECURE = replace(VIEW, secure=True)


@pytest.mark.parametrize(
    ("num_collecting", "num_reported", "num_open", "now", "event"),
    [
        (1, 0, 0, 0.0, None),  # a group's reports are on the way
        (1, 4, 0, 1e12, None),  # its steps have deadlines of their own
        (0, 4, 2, 0.0, E.CLOSE),
        (0, 3, 2, 0.0, None),  # another group may form
        (0, 3, 0, 0.0, E.CLOSE),
        (0, 3, 2, 200.0, E.CLOSE),
        (0, 2, 2, 200.0, E.ABANDON),
        (0, 0, 0, 0.0, E.ABANDON),
    ],
)
def test_a_running_round_with_groups(num_collecting, num_reported, num_open, now, event):
    view = replace(
        SECURE,
        state=R.RUNNING,
        num_collecting=num_collecting,
        num_reported=num_reported,
        num_open=num_open,
    )
    assert due(view, now) is event


ASYNC = replace(SECURE, is_async=True)


def test_an_async_round_admits_at_once_and_as_long_as_it_runs():
    assert due(replace(ASYNC, state=R.OPEN), 0.0) is E.SELECT
    assert [s for s in R if replace(ASYNC, state=s).is_admitting] == [R.RUNNING]
    assert [s for s in R if replace(SECURE, state=s).is_admitting] == [R.OPEN]


@pytest.mark.parametrize(
    ("num_collecting", "num_reported", "num_open", "event"),
    [
        (0, 0, 0, None),  # nobody is there, but somebody may come
        (0, 2, 0, None),  # what survived of a group is too little
        (1, 3, 5, None),  # a group's reports are on the way
        (0, 3, 5, E.CLOSE),  # a group that lost devices is an update all the same
        (0, 4, 5, E.CLOSE),
    ],
)
def test_a_running_async_round_waits_for_a_group_not_for_the_clock(
    num_collecting, num_reported, num_open, event
):
    view = replace(
        ASYNC,
        state=R.RUNNING,
        num_collecting=num_collecting,
        num_reported=num_reported,
        num_open=num_open,
    )
    for now in (0.0, 1e12):
        assert due(view, now) is event


@pytest.mark.parametrize(
    ("origin", "number", "max_staleness", "carried"),
    [(1, 2, 0, False), (1, 1, 0, False), (1, 1, 1, True), (1, 2, 1, True), (1, 3, 1, False)],
)
def test_who_may_be_carried(origin, number, max_staleness, carried):
    assert may_carry(origin, number, max_staleness) is carried


@pytest.mark.parametrize(
    ("num_unopened", "num_reported", "event"),
    [(1, 4, None), (0, 4, E.AGGREGATE), (0, 3, E.AGGREGATE), (0, 2, E.ABANDON), (0, 0, E.ABANDON)],
)
def test_an_unmasking_round_waits_for_its_groups_not_for_the_clock(
    num_unopened, num_reported, event
):
    view = replace(SECURE, state=R.UNMASKING, num_unopened=num_unopened, num_reported=num_reported)
    for now in (0.0, 1e12):
        assert due(view, now) is event


def test_a_secure_round_unmasks_before_it_aggregates():
    assert due(replace(SECURE, state=R.CLOSING), 0.0) is E.UNMASK


def test_a_whole_round():
    view = replace(VIEW, num_waiting=6, num_open=2, num_reported=4)
    visited = []
    while (event := due(view, 0.0)) is not None:
        view = replace(view, state=ROUND.next(view.state, event))
        visited.append(view.state.name)
    assert visited == "OPEN RUNNING CLOSING AGGREGATED COMMITTED SCRUBBED".split()


def test_what_is_committed_cannot_be_cancelled():
    for state in (R.COMMITTED, R.SCRUBBED):
        with pytest.raises(Conflict):
            ROUND.next(state, E.CANCEL)
    assert ROUND.next(R.AGGREGATED, E.CANCEL) is R.CANCELLED


def test_only_what_was_aggregated_is_committed():
    assert [row.source for row in ROUND.rows if row.target is R.COMMITTED] == [R.AGGREGATED]


@pytest.mark.parametrize(
    ("goal", "over_selection", "size"),
    [
        (4, 1.5, 6),
        (10, 1.3, 13),
        (100, 1.1, 110),  # 100 * 1.1 is 110.00000000000001 in floats
        (3, 1.3, 4),
        (1, 1.0, 1),
        (100, 1.001, 101),
    ],
)
def test_the_cohort_is_rounded_up(goal, over_selection, size):
    assert cohort_size(goal, over_selection) == size
