"""Reporting: from INTENT on the same bytes go to the server, in one piece or in a group's steps, until it says what
became of them, or until nobody has answered for too long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from homespun.device.connection import Connection
from homespun.device.passage import RECHECK_S, Passage
from homespun.device.sealing import Seal
from homespun.device.secure import MASK_INPUT, Member, Request, carry
from homespun.device.work import Work
from homespun.errors import (
    Conflict,
    Expired,
    HomespunError,
    NotAuthentic,
    ReportConflict,
    StorageFailure,
    Unreachable,
    WeakTerms,
    WrongStep,
)
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import (
    Aggregation,
    Carried,
    GroupReply,
    Receipt,
    ReportState,
    Settled,
    Waiting,
)
from homespun.protocol.session import SessionEvent, SessionState

log = logging.getLogger(__name__)
S, E = SessionState, SessionEvent


class Reporting:
    """The report of the session under way. Each call is one exchange; seconds to wait before the next one."""

    def __init__(
        self,
        passage: Passage,
        connection: Connection,
        policy: Callable[[], Policy],
        seal: Seal,
        poll_s: float,
    ) -> None:
        self._passage, self._connection = passage, connection
        self._policy, self._seal, self._poll_s = policy, seal, poll_s
        self._asked: Request | None = None  # by the group, in its last reply

    # --- in one piece -------------------------------------------------------------------------------------

    def send(self, work: Work) -> float:
        """The whole report, as often as it takes: the server counts it once."""
        passage = self._passage
        try:
            body = work.report(passage.session.digest)
            return self._settle(self._connection.report(passage.assigned, body))
        except Unreachable:
            if not passage.is_unanswered:
                raise
            return passage.end(E.TOO_LATE, ReportState.LATE, "the server never answered")
        except (Expired, Conflict, ReportConflict) as error:
            return passage.end(E.TOO_LATE, ReportState.LATE, error.message)
        except (NotAuthentic, StorageFailure):
            raise
        except HomespunError as error:
            return passage.end(E.GIVE_UP, ReportState.VOID, f"refused: {error.message}")

    def _settle(self, receipt: Receipt) -> float:
        match receipt.state:
            case ReportState.LATE:
                event = E.TOO_LATE
            case ReportState.VOID:
                event = E.GIVE_UP
            case ReportState.EXPECTED:
                raise Unreachable("the server does not know of the report that it was just sent")
            case _:
                event = E.ACKNOWLEDGE
        return self._passage.end(event, receipt.state, receipt.reason)

    # --- in a group ---------------------------------------------------------------------------------------

    @property
    def others_wait(self) -> bool:
        """Whether this device holds up a group by staying away."""
        passage = self._passage
        return (
            passage.session.state is S.REPORTING
            and passage.assigned.aggregation is Aggregation.SECURE
            and not passage.is_expired
        )

    def take_part(self, work: Work) -> float:
        """One exchange with the group.

        What is asked is answered by the next call. It is forgotten if that fails: the server says again, and
        `Member` knows what it answered before.
        """
        asked, self._asked = self._asked, None
        try:
            reply = self._exchange(asked, work)
            if isinstance(reply, Settled):
                return self._settle(reply.receipt)
        except Unreachable:
            if not self._passage.is_unanswered:
                raise
            return self._leave("the server never answered")
        except (NotAuthentic, StorageFailure):
            raise
        except HomespunError as error:
            if isinstance(error, WeakTerms):  # they are the task's: the next round has the same
                self._passage.refuse_plan(error.message)
            return self._leave(f"refused: {error.message}")
        if isinstance(reply, Waiting):
            return min(RECHECK_S, reply.retry.earliest_s)
        self._asked = reply
        return 0

    def _exchange(self, asked: Request | None, work: Work) -> GroupReply:
        passage, connection = self._passage, self._connection
        if asked is None:
            return connection.group(passage.assigned, self._poll_s)
        if isinstance(asked, Carried):
            work = self._carry(asked, work)
        step, body = self._member(work).answer(asked)
        if step == MASK_INPUT:
            passage.go(E.MASK, masked=True)
        try:
            return connection.answer_group(passage.assigned, step, body, self._poll_s)
        except (Unreachable, NotAuthentic):
            raise
        except HomespunError:  # too late for this step; the device may still be in the sum
            reply = connection.group(passage.assigned, self._poll_s)
            if reply == asked:
                raise
            return reply

    def _carry(self, carried: Carried, work: Work) -> Work:
        """Encode the same update for the round that the assignment is in now, durably, before joining its group.

        Raises `WrongStep` if the contribution may have left already, masked: there must never be two of it.
        """
        session = self._passage.session
        if session.masked:
            raise WrongStep("carried into another round after the masked input had left")
        assigned = carry(work.assigned, session.ancestry, carried)
        carried_work = replace(work, assigned=assigned)
        digest = carried_work.encode_again(len(carried.ancestry) - 1)
        self._passage.go(E.CARRY, assigned=assigned, ancestry=carried.ancestry, digest=digest)
        return carried_work

    def _member(self, work: Work) -> Member:
        session = self._passage.session
        return Member(
            work,
            self._passage.offer.task_name,
            session.digest,
            session.ancestry,
            self._policy().min_group,
            self._connection.identity,
            self._seal,
        )

    # --- not at all ---------------------------------------------------------------------------------------

    def stay_away(self, reason: str, *, for_good: bool) -> float:
        """The person needs the device: neither poll nor answer the group, and leave it when nobody can wait longer."""
        self._asked = None
        return self._leave(reason) if for_good or self._passage.is_unanswered else RECHECK_S

    def _leave(self, reason: str) -> float:
        """Take no further part in the group; nobody has to wait. What may be in a sum counts, whatever comes."""
        if self._passage.session.masked:
            self.abort()
            return self._passage.end(E.TOO_LATE, ReportState.LATE, reason)
        return self._passage.give_up(reason)

    def abort(self) -> None:
        """Tell the server that nothing comes any more."""
        try:
            self._connection.abort(self._passage.assigned)
        except HomespunError as error:  # its deadline will tell the server the same
            log.info("the server was not told that a session ended: %s", error)
