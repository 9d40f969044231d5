"""The release: what can reach a person's device, and what cannot."""

from __future__ import annotations

from homespun.protocol.release import (
    RELEASE,
    RESUMED_BY,
    ReleaseEvent,
    ReleaseState,
)

R, E = ReleaseState, ReleaseEvent
SERVED = {R.CANARY, R.RAMP, R.DEPLOYED}


def walk(*events: ReleaseEvent) -> list[str]:
    state, visited = RELEASE.initial, []
    for event in events:
        state = RELEASE.next(state, event)
        visited.append(state.name)
    return visited


def test_the_way_without_stages():
    assert walk(E.CHECK, E.EVALUATE, E.PASS, E.DEPLOY, E.SUPERSEDE) == (
        "CHECKED EVALUATING PASSED DEPLOYED SUPERSEDED".split()
    )


def test_the_way_by_stages_and_back():
    up = (E.CHECK, E.EVALUATE, E.PASS, E.START_CANARY, E.START_RAMP, E.DEPLOY)
    assert walk(*up)[-3:] == ["CANARY", "RAMP", "DEPLOYED"]
    assert walk(*up, E.ROLL_BACK, E.ROLLED_BACK)[-2:] == ["ROLLING_BACK", "ROLLED_BACK"]


def test_nothing_is_served_that_did_not_pass():
    ways_in = {r.source for r in RELEASE.rows if r.target in SERVED and r.source not in SERVED}
    # Both were served before: a held release goes on only where it was, see `store.releases`.
    assert ways_in == {R.PASSED, R.SUPERSEDED, R.HELD}


def test_whatever_a_person_holds_goes_on_where_it_was():
    holdable = {row.source for row in RELEASE.rows if row.event is E.HOLD}
    assert holdable == set(RESUMED_BY)
    assert {RELEASE.next(R.HELD, event): state for state, event in RESUMED_BY.items()} == {
        state: state for state in RESUMED_BY
    }
    assert RELEASE.next(R.HELD, E.ROLL_BACK) is R.ROLLING_BACK


def test_whatever_is_served_can_be_taken_back():
    assert all(RELEASE.next(state, E.ROLL_BACK) is R.ROLLING_BACK for state in SERVED)


def test_what_was_rejected_never_comes_back():
    assert [row for row in RELEASE.rows if row.source is R.REJECTED] == []
