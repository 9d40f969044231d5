"""State machines as tables: every row of the session, the round, the group and the release is walked."""

from __future__ import annotations

from enum import StrEnum

import pytest

from homespun.errors import Conflict
from homespun.protocol.group import GROUP, GroupEvent, GroupState
from homespun.protocol.machine import Machine, Row
from homespun.protocol.release import RELEASE, ReleaseEvent, ReleaseState
from homespun.protocol.round import ROUND, RoundEvent, RoundState
from homespun.protocol.session import SESSION, SessionEvent, SessionState

MACHINES = (
    (SESSION, SessionState, SessionEvent),
    (ROUND, RoundState, RoundEvent),
    (GROUP, GroupState, GroupEvent),
    (RELEASE, ReleaseState, ReleaseEvent),
)
TERMINAL = {
    "session": set(),  # a device always comes back to WAITING
    "round": {"scrubbed", "abandoned", "cancelled"},
    "group": {"opened", "void"},
    "release": {"rejected", "rolled_back"},  # even a superseded one may be served again
}
EACH = pytest.mark.parametrize(
    ("machine", "states", "events"), MACHINES, ids=lambda value: getattr(value, "name", "")
)


class Light(StrEnum):
    RED = "red"
    GREEN = "green"
    OFF = "off"


class Press(StrEnum):
    GO = "go"
    BREAK = "break"


ROWS = (
    Row(Light.RED, Press.GO, Light.GREEN, "nobody crosses"),
    Row(Light.GREEN, Press.GO, Light.RED),
    Row(Light.GREEN, Press.BREAK, Light.OFF),
)
LIGHT = Machine("light", Light.RED, ROWS)


@EACH
def test_every_row_leads_where_it_says(machine, states, events):
    for row in machine.rows:
        assert machine.next(row.source, row.event) is row.target


@EACH
def test_whatever_is_not_in_the_table_is_a_conflict(machine, states, events):
    allowed = {(row.source, row.event) for row in machine.rows}
    for state in states:
        for event in events:
            if (state, event) not in allowed:
                with pytest.raises(Conflict, match=f"{machine.name} in state {state} does not"):
                    machine.next(state, event)


@EACH
def test_every_state_is_reached_and_every_event_used(machine, states, events):
    reached, before = {machine.initial}, 0
    while len(reached) > before:
        before = len(reached)
        reached |= {row.target for row in machine.rows if row.source in reached}
    assert reached == set(states)
    assert {row.event for row in machine.rows} == set(events)


@EACH
def test_the_ends_are_the_ends(machine, states, events):
    assert {
        state.value for state in states if all(row.source is not state for row in machine.rows)
    } == TERMINAL[machine.name]


@EACH
def test_an_end_is_in_reach_from_everywhere(machine, states, events):
    """No state traps: from each, a terminal state (of the session: WAITING) can be reached."""
    ends = {state for state in states if state.value in TERMINAL[machine.name]} or {machine.initial}
    good, before = set(ends), 0
    while len(good) > before:
        before = len(good)
        good |= {row.source for row in machine.rows if row.target in good}
    assert good == set(states)


def test_two_rows_for_one_state_and_event_are_refused():
    with pytest.raises(ValueError, match="light: two rows"):
        Machine("light", Light.RED, (*ROWS, Row(Light.RED, Press.GO, Light.OFF)))


def test_a_conflict_names_state_and_event():
    with pytest.raises(Conflict) as failure:
        LIGHT.next(Light.OFF, Press.GO)
    assert failure.value.details == {"state": "off", "event": "go"}


def test_the_diagram_draws_the_table():
    assert LIGHT.diagram().splitlines() == [
        "stateDiagram-v2",
        "    [*] --> RED",
        "    RED --> GREEN: go [nobody crosses]",
        "    GREEN --> RED: go",
        "    GREEN --> OFF: break",
        "    OFF --> [*]",
    ]


@EACH
def test_guards_do_not_break_the_diagram(machine, states, events):
    assert [row.guard for row in machine.rows if set(row.guard) & set(";:[]{}\n")] == []
