"""The session: what its order promises to the person whose device it is."""

from __future__ import annotations

import msgspec
import pytest

from homespun.errors import Conflict
from homespun.protocol.session import SESSION, Session, SessionEvent, SessionState

S, E = SessionState, SessionEvent
HAPPY = (
    E.CONDITIONS_MET, E.CHECK_IN, E.ASSIGN, E.DOWNLOAD, E.VERIFY, E.TRAIN, E.PACKAGE, E.INTEND,
    E.REPORT, E.ACKNOWLEDGE, E.CLEAN, E.WAIT,
)  # fmt: skip
START = Session(session_id="s1", population="phones", state=S.WAITING, started_at=0.0)


def test_the_happy_path_visits_every_step_and_returns():
    session, visited = START, []
    for event in HAPPY:
        session = session.after(event)
        visited.append(session.state)
    assert [state.name for state in visited] == (
        "ELIGIBLE CHECKED_IN ASSIGNED DOWNLOADING VERIFIED TRAINING PACKAGED INTENT REPORTING "
        "ACKNOWLEDGED CLEANED WAITING"
    ).split()


def test_nothing_is_reported_without_a_durable_intent():
    sources = {row.source for row in SESSION.rows if row.target is S.REPORTING}
    assert sources == {S.INTENT, S.REPORTING}
    stays = {row.event for row in SESSION.rows if row.source is row.target}
    assert stays == {E.PAUSE, E.RESUME, E.RESTART, E.CARRY, E.MASK}


def test_nothing_trains_before_it_is_verified():
    sources = {row.source for row in SESSION.rows if row.target is S.TRAINING}
    assert sources == {S.VERIFIED, S.TRAINING}


def test_after_the_intent_nothing_trains_again():
    after, reach = {S.INTENT}, 0
    while len(after) > reach:
        reach = len(after)
        after |= {r.target for r in SESSION.rows if r.source in after and r.source != S.CLEANED}
    assert after == {S.INTENT, S.REPORTING, S.ACKNOWLEDGED, S.LATE, S.VOID, S.CLEANED}


def test_whoever_was_assigned_cleans_before_the_next_session():
    touched = {S.ASSIGNED, S.DOWNLOADING, S.VERIFIED, S.TRAINING, S.PACKAGED, S.INTENT}
    touched |= {S.REPORTING, S.ACKNOWLEDGED, S.LATE, S.VOID}
    ways_out = [r for r in SESSION.rows if r.source in touched and r.target not in touched]
    assert {row.target for row in ways_out} == {S.CLEANED}
    assert {row.event for row in ways_out} == {E.CLEAN}


@pytest.mark.parametrize("state", [S.ASSIGNED, S.DOWNLOADING, S.VERIFIED, S.TRAINING, S.PACKAGED])
def test_a_session_can_be_given_up_until_the_intent(state):
    assert SESSION.next(state, E.GIVE_UP) is S.VOID


def test_an_intent_is_not_given_up_in_silence():
    with pytest.raises(Conflict):
        SESSION.next(S.INTENT, E.GIVE_UP)


def test_a_step_keeps_the_record_and_takes_changes():
    session = START.after(E.CONDITIONS_MET, reason="idle and charging")
    assert (session.session_id, session.reason) == ("s1", "idle and charging")
    assert START.state is S.WAITING  # a record is never changed in place


def test_a_step_out_of_order_is_a_conflict():
    with pytest.raises(Conflict, match="waiting does not take train"):
        START.after(E.TRAIN)


def test_the_record_survives_the_journal():
    session = START.after(E.CONDITIONS_MET).after(E.CHECK_IN)
    assert msgspec.json.decode(msgspec.json.encode(session), type=Session) == session
