"""The session: one device's passage through one round.

The record is journalled at every step, so that a device may be killed between any two and carries on.
INTENT is durable before the first byte of a report leaves: after it, a crash repeats the same bytes and
never trains again; before it, a crash goes on where the work was, if its deadline allows. A session that was
started over more than `MAX_RESTARTS` times in one state is given up, so that nothing crashes forever.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from homespun.protocol.machine import Machine, Row
from homespun.protocol.messages import Assigned, Offer, Sha256


class SessionState(StrEnum):
    WAITING = "waiting"
    ELIGIBLE = "eligible"
    CHECKED_IN = "checked_in"
    REJECTED = "rejected"
    ASSIGNED = "assigned"
    DOWNLOADING = "downloading"
    VERIFIED = "verified"
    TRAINING = "training"
    PACKAGED = "packaged"
    INTENT = "intent"
    REPORTING = "reporting"
    ACKNOWLEDGED = "acknowledged"
    LATE = "late"
    VOID = "void"
    CLEANED = "cleaned"


class SessionEvent(StrEnum):
    CONDITIONS_MET = "conditions_met"
    CONDITIONS_LOST = "conditions_lost"
    CHECK_IN = "check_in"
    TURN_AWAY = "turn_away"
    WAIT = "wait"
    ASSIGN = "assign"
    DOWNLOAD = "download"
    VERIFY = "verify"
    TRAIN = "train"
    PAUSE = "pause"
    RESUME = "resume"
    RESTART = "restart"
    PACKAGE = "package"
    INTEND = "intend"
    REPORT = "report"
    CARRY = "carry"
    MASK = "mask"
    ACKNOWLEDGE = "acknowledge"
    TOO_LATE = "too_late"
    GIVE_UP = "give_up"
    CLEAN = "clean"


S, E = SessionState, SessionEvent
MAX_RESTARTS = 3
BEFORE_INTENT = (S.ASSIGNED, S.DOWNLOADING, S.VERIFIED, S.TRAINING, S.PACKAGED)
_ENDED = (S.ACKNOWLEDGED, S.LATE, S.VOID)

SESSION: Machine[SessionState, SessionEvent] = Machine(
    "session",
    S.WAITING,
    (
        Row(S.WAITING, E.CONDITIONS_MET, S.ELIGIBLE),
        Row(S.ELIGIBLE, E.CONDITIONS_LOST, S.WAITING),
        Row(S.ELIGIBLE, E.CHECK_IN, S.CHECKED_IN),
        Row(S.CHECKED_IN, E.TURN_AWAY, S.REJECTED, "no offer fits, or not drawn"),
        Row(S.REJECTED, E.WAIT, S.WAITING, "retry time drawn once, kept"),
        Row(S.CHECKED_IN, E.ASSIGN, S.ASSIGNED),
        Row(S.ASSIGNED, E.DOWNLOAD, S.DOWNLOADING),
        Row(S.DOWNLOADING, E.VERIFY, S.VERIFIED, "signature and hashes hold"),
        Row(S.VERIFIED, E.TRAIN, S.TRAINING),
        Row(S.TRAINING, E.PAUSE, S.TRAINING, "conditions lost, stopped within 2 s, step kept"),
        Row(S.TRAINING, E.RESUME, S.TRAINING, "conditions back before the deadline"),
        Row(S.TRAINING, E.TOO_LATE, S.LATE, "the server has enough reports"),
        Row(S.TRAINING, E.PACKAGE, S.PACKAGED, "clipped and encoded"),
        Row(S.PACKAGED, E.INTEND, S.INTENT, "durable before a byte leaves"),
        Row(S.INTENT, E.REPORT, S.REPORTING),
        Row(
            S.REPORTING, E.CARRY, S.REPORTING, "encoded anew for a later round, nothing was masked"
        ),
        Row(S.REPORTING, E.MASK, S.REPORTING, "durable before the masked input leaves"),
        Row(S.REPORTING, E.ACKNOWLEDGE, S.ACKNOWLEDGED),
        Row(S.REPORTING, E.TOO_LATE, S.LATE),
        Row(
            S.REPORTING,
            E.GIVE_UP,
            S.VOID,
            "the server proves that it is void, or nothing was masked",
        ),
        *(
            Row(state, E.RESTART, state, f"killed, at most {MAX_RESTARTS} times, deadline ahead")
            for state in BEFORE_INTENT
        ),
        *(
            Row(state, E.GIVE_UP, S.VOID, "conditions lost, refused, failed or expired")
            for state in BEFORE_INTENT
        ),
        Row(S.INTENT, E.TOO_LATE, S.LATE),
        *(Row(state, E.CLEAN, S.CLEANED, "no file of the session remains") for state in _ENDED),
        Row(S.CLEANED, E.WAIT, S.WAITING),
    ),
)


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """The journalled record. `reason` says why it ended, for the person; `digest` is of the report's bytes.

    `masked`: securely aggregated, and the masked input may have left; it counts from then on. `is_paused`: it waits
    for its conditions to return; `num_restarts`: in this state, after the process was killed; `ancestry`: after it was
    carried, the checkpoint that the device trained from and those that followed, up to the base of its round now.
    """

    session_id: str
    population: str
    state: SessionState
    started_at: float
    offer: Offer | None = None
    assigned: Assigned | None = None
    expires_at: float | None = None
    digest: str | None = None
    masked: bool = False
    is_paused: bool = False
    num_restarts: int = 0
    ancestry: tuple[Sha256, ...] = ()
    outcome: str | None = None
    reason: str = ""

    def after(self, event: SessionEvent, **changes: object) -> Session:
        """The record after `event`. Raises `Conflict` when the table does not allow it."""
        state = SESSION.next(self.state, event)
        restarts = self.num_restarts if state is self.state else 0
        return msgspec.structs.replace(
            self, **{"state": state, "num_restarts": restarts, **changes}
        )
