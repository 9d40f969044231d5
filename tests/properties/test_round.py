"""Laws of `due`, over every view that can occur."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from homespun.protocol.round import ROUND, RoundEvent, RoundState, RoundView, cohort_size, due

R, E = RoundState, RoundEvent
NOW = st.floats(0, 1000)


@st.composite
def views(draw, states) -> RoundView:
    goal = draw(st.integers(1, 20))
    over_selection = draw(st.floats(1, 3))
    num_assigned = draw(st.integers(0, cohort_size(goal, over_selection)))
    num_reported = draw(st.integers(0, num_assigned))
    return RoundView(
        state=draw(states),
        goal=goal,
        minimum=draw(st.integers(1, goal)),
        pool_target=draw(st.just(0) | st.integers(cohort_size(goal, over_selection), 60)),
        select_at=draw(st.floats(0, 500)),
        deadline_at=draw(st.floats(0, 1000)),
        num_waiting=draw(st.integers(0, 60)),
        num_assigned=num_assigned,
        num_open=draw(st.integers(0, num_assigned - num_reported)),
        num_reported=num_reported,
        is_async=draw(st.booleans()),
    )


ANY = views(st.sampled_from(R))
OPEN = views(st.just(R.OPEN))
RUNNING = views(st.just(R.RUNNING))


def in_rounds(view: RoundView) -> RoundView:
    return replace(view, is_async=False)


def in_async(view: RoundView) -> RoundView:
    return replace(view, is_async=True)


@given(ANY, NOW)
def test_what_is_due_is_in_the_table(view, now):
    event = due(view, now)
    if event is not None:
        ROUND.next(view.state, event)


@given(RUNNING.map(in_rounds), NOW)
def test_closing_means_goal_reached_or_nobody_left_to_wait_for(view, now):
    over = now >= view.deadline_at or view.num_open == 0
    if due(view, now) is E.CLOSE:
        assert view.num_reported >= view.minimum
        assert view.num_reported >= view.goal or over


@given(RUNNING, NOW)
def test_abandoning_means_below_the_minimum(view, now):
    if due(view, now) is E.ABANDON:
        assert view.num_reported < view.minimum
        assert now >= view.deadline_at or view.num_open == 0


@given(RUNNING.map(in_async), NOW)
def test_an_async_round_ends_with_a_full_group_and_is_never_abandoned(view, now):
    event = due(view, now)
    assert event is (E.CLOSE if view.num_reported >= view.minimum else None)


@given(RUNNING.map(in_rounds))
def test_every_running_round_ends_by_its_deadline(view):
    assert due(view, view.deadline_at) in (E.CLOSE, E.ABANDON)


@given(OPEN.map(in_rounds), NOW)
def test_nobody_is_drawn_from_too_small_a_pool(view, now):
    if due(view, now) is E.SELECT:
        assert view.num_waiting >= view.minimum
        assert 0 < view.pool_target <= view.num_waiting or now >= view.select_at


@given(ANY, NOW, st.floats(0, 1000))
def test_waiting_longer_never_takes_a_decision_back(view, now, more):
    event = due(view, now)
    assume(event is not None)
    assert due(view, now + more) is event


@given(st.integers(1, 10_000), st.floats(1, 10))
def test_the_cohort_covers_the_goal(goal, over_selection):
    size = cohort_size(goal, over_selection)
    assert goal <= size
    assert goal * over_selection - 1e-5 <= size < goal * over_selection + 1
