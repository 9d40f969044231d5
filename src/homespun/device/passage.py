"""The session under way: its record, durable before anything else happens, and the time to come back.

`protocol.session` says what may follow what; here it is journalled, with the clock and the dice of this device.
"""

from __future__ import annotations

import secrets

from homespun.clock import Clock
from homespun.device.home import Settings
from homespun.device.journal import DAY_S, Journal
from homespun.device.status import Board
from homespun.protocol.messages import Assigned, Offer, ReportState, RetryWindow
from homespun.protocol.pacing import draw_retry, latest_when_away
from homespun.protocol.session import Session, SessionEvent, SessionState
from homespun.rng import stream

RECHECK_S = 1.0
"""How often a device that waits for its conditions, or for others, looks again."""
REPORT_FOR_S = 86_400.0
"""A report that nobody answers is given up this long after its deadline."""
REFUSE_FOR_S = 86_400.0
"""A plan that this device's examples do not fit, or that crashed, is not claimed again for so long."""

S, E = SessionState, SessionEvent


class Passage:
    """The passage of one device through one round after the other; `session`: the record of this one.

    What moves it returns the seconds to wait before its next step: 0.
    """

    def __init__(self, settings: Settings, journal: Journal, board: Board, clock: Clock) -> None:
        self._settings, self._journal = settings, journal
        self._board, self._clock = board, clock
        self.session = journal.session() or self._new()

    def _new(self) -> Session:
        return Session(
            session_id=secrets.token_hex(8),
            population=self._settings.population,
            state=S.WAITING,
            started_at=self._clock.now(),
        )

    # --- what it is about ---------------------------------------------------------------------------------

    @property
    def offer(self) -> Offer:
        assert self.session.offer is not None
        return self.session.offer

    @property
    def assigned(self) -> Assigned:
        assert self.session.assigned is not None
        return self.session.assigned

    @property
    def expires_at(self) -> float:
        assert self.session.expires_at is not None
        return self.session.expires_at

    @property
    def is_expired(self) -> bool:
        """Whether the deadline of the assignment has passed."""
        return self._clock.now() >= self.expires_at

    @property
    def is_unanswered(self) -> bool:
        """Whether the server has had all the time that it gets for a report."""
        return self._clock.now() >= self.expires_at + REPORT_FOR_S

    # --- where it goes ------------------------------------------------------------------------------------

    def go(self, event: SessionEvent, **changes: object) -> float:
        """Follow the table and make the new record durable before anything else happens."""
        after = self.session.after(event, **changes)
        self._journal.save(after, self._clock.now())
        self.session = after
        return 0

    def give_up(self, reason: str) -> float:
        """End it; nothing that counts has left."""
        self._board.verdict = reason
        return self.go(E.GIVE_UP, reason=reason)

    def end(self, event: SessionEvent, outcome: ReportState, reason: str) -> float:
        """End it: this became of the report."""
        return self.go(event, outcome=str(outcome), reason=reason)

    def start_over(self) -> float:
        """Forget the record of a session that is over."""
        self.session.after(E.WAIT)
        self._journal.finish(self.session)
        self.session = self._new()
        return 0

    def refuse_plan(self, reason: str, for_s: float | None = REFUSE_FOR_S) -> None:
        """Claim nothing with this plan for so long (None: for good)."""
        until = None if for_s is None else self._clock.now() + for_s
        self._journal.refuse_plan(self.assigned.plan_hash, reason, until)

    # --- when to come back --------------------------------------------------------------------------------

    def come_back_in(self, window: RetryWindow, *, given: bool = False) -> float:
        """Draw the time to come back, once; it is kept over restarts. Seconds until then.

        `given`: by the server, so errors keep to this pace.
        """
        now = self._clock.now()
        at = draw_retry(window, now, stream(self._settings.seed, "retry", repr(now)))
        self._journal.set_retry(at, window.latest_s if given else None)
        return at - now

    def come_back_after_failure(self, window: RetryWindow) -> float:
        """`come_back_in`; no sooner, with an empty hand, than the pace at which the server last had the device come."""
        if self.session.state in (S.WAITING, S.ELIGIBLE, S.CHECKED_IN):  # nothing is waited for
            latest_s = latest_when_away(window, min(self._journal.given_s, DAY_S))
            window = RetryWindow(earliest_s=window.earliest_s, latest_s=latest_s)
        return self.come_back_in(window)
