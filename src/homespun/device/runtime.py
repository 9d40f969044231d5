"""The device at work: one step of the session machine at a time, journalled before the next.

    conditions -> check in -> judge the offers here -> claim -> download, verify -> train or evaluate
    -> intent (durable) -> report, in one piece or in a group's steps -> receipt -> clean

`step` does what the journalled state calls for and says how long to wait, so that a test can drive a device
without sleeping and a crash between any two steps is only a new start, which carries on; from INTENT on it sends
the same bytes again and never trains again. Whatever executes a plan runs in a child process (`device.child`), which
is stopped when a condition ends and goes on from its step checkpoint when it returns.
In a group it never polls nor answers while the person needs the device.
A server that is away is waited for; whatever fails inside a session, the device goes on.
"""

from __future__ import annotations

import base64
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from homespun.clock import Clock
from homespun.device import child, cleaning
from homespun.device.conditions import ConditionSource, Watch
from homespun.device.connection import Connection
from homespun.device.errands import fetch_releases, resolve_receipts
from homespun.device.examples import open_examples
from homespun.device.home import Home
from homespun.device.journal import DAY_S, Journal
from homespun.device.models import open_models
from homespun.device.offers import Judge, Reason, reasons_of
from homespun.device.policy import CurrentPolicy
from homespun.device.sealing import Seal
from homespun.device.secure import MASK_INPUT, Member, Request, carry
from homespun.device.status import Board
from homespun.device.stopping import Stop, Stopped
from homespun.device.wanted import Wanted
from homespun.device.watching import Watcher
from homespun.device.work import Work, check_assignment
from homespun.errors import (
    Conflict,
    Expired,
    HomespunError,
    InvalidInput,
    NotAllowed,
    NotAuthentic,
    PlanCrashed,
    PlanError,
    ReportConflict,
    StorageFailure,
    TooLarge,
    Unreachable,
    WeakTerms,
    WrongStep,
)
from homespun.protocol.eligibility import Conditions, check_conditions, check_population
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Carried,
    CheckIn,
    Claim,
    Criteria,
    GroupReply,
    Offer,
    Receipt,
    ReportState,
    RetryWindow,
    Settled,
    Waiting,
)
from homespun.protocol.pacing import draw_retry, latest_when_away
from homespun.protocol.session import (
    BEFORE_INTENT,
    MAX_RESTARTS,
    Session,
    SessionEvent,
    SessionState,
)
from homespun.rng import stream
from homespun.types import Hash

RECHECK_S = 1.0
"""How often conditions are looked at while they do not hold."""
LONGEST_PAUSE_S = 60.0
LONGEST_RETRY_S = 7 * 86_400.0
"""A time to come back that is further away means that the clock was set back."""
REPORT_FOR_S = 86_400.0
"""A report that nobody answers is given up this long after its deadline."""
IN_GROUP = RetryWindow(earliest_s=1.0, latest_s=5.0)
"""When to come back to a server that went away in the middle of a group, whose other devices wait."""
REFUSE_FOR_S = 86_400.0
"""A plan that this device's examples do not fit, or that crashed, is not claimed again for so long."""
CHECK_IN_REQUIRES = Criteria().requires

log = logging.getLogger(__name__)
S, E = SessionState, SessionEvent
_ENDED = (S.ACKNOWLEDGED, S.LATE, S.VOID)


class Runtime:
    """One device over its directory. Close it, or let the process die: the next one carries on."""

    def __init__(
        self,
        home: Home,
        connection: Connection,
        conditions: ConditionSource,
        clock: Clock,
        stop: Stop | None = None,
        labour: child.Labour = child.work_on,
    ) -> None:
        """Open the directory and put in order what a crash left; `labour` does the sessions' work.

        Raises `Conflict` while another process runs it.
        """
        self._home, self._connection = home, connection
        self._conditions, self._clock = conditions, clock
        self._stop, self._labour = stop or Stop(), labour
        self._settings = home.settings()
        self._trusted = tuple(base64.b64decode(key) for key in self._settings.publisher_keys)
        self._journal = Journal(home.journal_file)
        self._examples = open_examples(home, self._settings)
        self._seal = Seal(home.store_key_file)
        self._asked: Request | None = None  # by the group, in its last reply
        self._models = open_models(home, self._settings)
        self._policy = CurrentPolicy(home, self._settings)
        self._judge = Judge(
            self._settings.device_id, self._policy, self._journal, self._examples, self._models
        )
        self._board = Board(
            home,
            self._settings,
            self._journal,
            self._examples,
            self._models,
            self._judge,
            clock.now(),
        )
        self._clean_at = 0.0
        self._session = self._journal.session() or self._new_session()
        if self._session.state in BEFORE_INTENT:
            self._carry_on()
        self._steps: dict[SessionState, Callable[[], float]] = {
            S.WAITING: self._wait,
            S.ELIGIBLE: self._check_in,
            S.CHECKED_IN: self._claim,
            S.REJECTED: self._start_over,
            S.ASSIGNED: self._start_download,
            S.DOWNLOADING: self._download,
            S.VERIFIED: self._start_training,
            S.TRAINING: self._train,
            S.PACKAGED: self._intend,
            S.INTENT: self._start_report,
            S.REPORTING: self._report,
            S.ACKNOWLEDGED: self._clean,
            S.LATE: self._clean,
            S.VOID: self._clean,
            S.CLEANED: self._finish,
        }

    def _carry_on(self) -> None:
        """The process was killed before anything was sent: go on, unless that is too late or leads nowhere."""
        num_restarts = self._session.num_restarts + 1
        if self._clock.now() >= self._expires_at:
            self._give_up("the device was interrupted until after the deadline")
        elif num_restarts > MAX_RESTARTS:
            self._give_up(f"interrupted {num_restarts} times while {self._session.state}")
        else:
            self._go(E.RESTART, num_restarts=num_restarts)

    @property
    def session(self) -> Session:
        """The record of the session under way."""
        return self._session

    @property
    def num_sessions(self) -> int:
        """Sessions that have ended since the start, however they ended."""
        return self._board.num_sessions

    def run(self, max_sessions: int | None = None) -> None:
        """Be a device until asked to stop, or until so many sessions have ended; then `close`.

        Raises `StorageFailure` when the device's own records cannot be kept.
        """
        try:
            while not self._stop.requested and self.num_sessions != max_sessions:
                pause = self.step()
                if pause > 0:
                    with self._stop.interruptible():
                        self._policy.sleep(self._clock, min(pause, LONGEST_PAUSE_S))
        except Stopped:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Leave in good order: a session that has sent nothing is given back, its files are removed."""
        try:
            if self._session.state in BEFORE_INTENT:
                self._give_up("the device was stopped")
            if self._session.state in _ENDED:
                self._clean()
                self._finish()
            self._board.verdict = "stopped"
            self._board.write(self._session, self._clock.now(), state="stopped")
        finally:
            self._journal.close()
            self._examples.close()
            self._models.close()

    def step(self) -> float:
        """Take one step; seconds to wait before the next one, 0 for none.

        Raises `StorageFailure` only when the journal itself cannot be written.
        """
        now = self._clock.now()
        if now >= self._clean_at:
            self._clean_at = now + cleaning.EVERY_S
            self._tidy(now)
        if self._policy.take_change():
            self._journal.reconsider_plans()
            self._board.refuse(self._unmet(CHECK_IN_REQUIRES))
        pause = self._journal.retry_at - now
        if not 0 < pause <= LONGEST_RETRY_S or self._session.state in _ENDED:
            pause = self._attempt()
            self._journal.add_traffic(now, *self._connection.take_traffic())
        self._board.write(self._session, self._clock.now())
        return pause

    def _tidy(self, now: float) -> None:
        """What a crash left, and what is too old, goes: at every start and on a timer."""
        try:
            self._examples.expire(now)
            cleaning.clean(self._home, self._models, self._session.session_id)
        except StorageFailure as error:
            log.warning("not everything could be cleaned; trying again later: %s", error)

    def _attempt(self) -> float:
        """One step, with every failure turned into what the device does about it."""
        settings = self._settings
        try:
            return self._steps[self._session.state]()
        except Unreachable as error:
            return self._wait_for_server(error)
        except (NotAuthentic, NotAllowed) as error:
            return self._failed(error.message, settings.permanent_error)
        except HomespunError as error:
            return self._failed(error.message, settings.transient_error)
        except Exception as error:
            log.exception("a session failed in a way it should not; the device goes on")
            return self._failed(f"internal: {type(error).__name__}", settings.transient_error)

    # --- finding something to do --------------------------------------------------------------------------

    def _wait(self) -> float:
        unmet = self._unmet(CHECK_IN_REQUIRES)
        self._board.refuse(unmet)
        if unmet:
            return RECHECK_S
        self._go(E.CONDITIONS_MET)
        return 0

    def _check_in(self) -> float:
        if self._unmet(CHECK_IN_REQUIRES):
            self._go(E.CONDITIONS_LOST)
            return 0
        self._say("ready; waiting for the server's offers")
        settings = self._settings
        reply = self._connection.check_in(
            CheckIn(population=settings.population, wait_s=settings.poll_s)
        )
        watch = self._watch(CHECK_IN_REQUIRES)
        self._board.release_problems = tuple(
            fetch_releases(
                reply.releases, self._models, self._connection, settings.population, watch
            )
        )
        resolve_receipts(self._journal, self._connection)
        accepted, against = self._judge.choose(
            reply.offers, self._read_conditions(), self._clock.now()
        )
        self._board.refuse(against)
        self._go(E.CHECK_IN, offer=accepted)
        return 0 if accepted else self._turn_away(reply.retry, given=True)

    def _claim(self) -> float:
        offer = self._session.offer
        if offer is None:  # a crash came between checking in and drawing the time to come back
            return self._turn_away(self._settings.transient_error)
        if unmet := self._unmet(offer.criteria.requires, offer.task_name):
            self._board.refuse(unmet)
            return self._turn_away(RetryWindow(earliest_s=0, latest_s=0))
        self._say(f"claimed round {offer.round_number} of {offer.task_name}")
        reply = self._connection.claim(
            Claim(
                task_id=offer.task_id,
                round_number=offer.round_number,
                attempt=offer.attempt,
                wait_s=self._settings.poll_s,
            )
        )
        if isinstance(reply, Waiting):
            return min(RECHECK_S, reply.retry.earliest_s)
        if isinstance(reply, Assigned):
            check_assignment(offer, reply)
            self._go(E.ASSIGN, assigned=reply, expires_at=self._clock.now() + reply.deadline_s)
            self._say(f"takes part in round {offer.round_number} of {offer.task_name}")
            return 0
        self._say(f"not this time: {reply.reason}")
        return self._turn_away(reply.retry, given=True)

    def _turn_away(self, window: RetryWindow, *, given: bool = False) -> float:
        self._come_back_in(window, given=given)
        self._go(E.TURN_AWAY)
        return 0

    def _start_over(self) -> float:
        """Forget the record of a session that is over."""
        self._session.after(E.WAIT)
        self._journal.finish(self._session)
        self._session = self._new_session()
        return 0

    # --- the work -----------------------------------------------------------------------------------------

    def _start_download(self) -> float:
        self._go(E.DOWNLOAD)
        return 0

    def _download(self) -> float:
        watch = self._watch(self._offer.criteria.requires)

        def fetch(address: Hash, path: Path, max_bytes: int) -> bool:
            return self._connection.fetch(address, path, max_bytes, watch)

        try:
            complete = self._work.download(fetch)
        except (PlanError, TooLarge) as error:
            return self._refuse_plan(error, until=None)
        if not complete:
            return self._give_up(watch.reason)
        self._go(E.VERIFY)
        return 0

    def _start_training(self) -> float:
        self._go(E.TRAIN)
        return 0

    def _train(self) -> float:
        """Work in a child while the conditions hold; wait for them, until the deadline, while they do not."""
        offer = self._offer
        if self._clock.now() >= self._expires_at:
            return self._give_up("the deadline has passed")
        unmet = self._unmet(offer.criteria.requires, offer.task_name)
        self._board.refuse(unmet)
        if unmet:
            self._board.verdict = f"paused: {self._board.verdict}"
            return RECHECK_S
        if self._session.is_paused:
            self._go(E.RESUME, is_paused=False)
            self._board.num_resumes += 1
        self._say(f"works for round {offer.round_number} of {offer.task_name}")
        job = child.Perform.of(self._home, self._session, self._policy())
        watch = self._watch(offer.criteria.requires)
        wanted = Wanted(self._connection, self._assigned)
        try:
            digest = self._labour(job, lambda: watch() or not wanted())
        except (InvalidInput, PlanCrashed) as error:
            if isinstance(error, PlanCrashed) and self._withdraws(error):
                return 0  # and says so in another child
            return self._refuse_plan(error, until=self._clock.now() + REFUSE_FOR_S)
        except PlanError as error:
            return self._refuse_plan(error, until=None)
        if digest is not None:
            self._go(E.PACKAGE, digest=digest)
            return 0
        if wanted.receipt is not None:
            return self._end(E.TOO_LATE, ReportState.LATE, "the server wants no more reports")
        self._board.stopped(self._clock.now() - watch.said_at)
        self._go(E.PAUSE, is_paused=True)
        return 0

    def _withdraws(self, crash: PlanCrashed) -> bool:
        """Whether it was what the device serves that crashed, and something else is served now."""
        watch = self._offer.watch
        active = None if watch is None else self._models.slots(watch.slot).active
        if watch is None or active is None:
            return False
        return self._models.withdraw(watch.slot, active, crash).active != active

    def _intend(self) -> float:
        self._go(E.INTEND)
        return 0

    def _start_report(self) -> float:
        if self._clock.now() >= self._expires_at:
            return self._end(E.TOO_LATE, ReportState.LATE, "too late to be sent")
        self._go(E.REPORT)
        return 0

    def _report(self) -> float:
        if self._assigned.aggregation is Aggregation.SECURE:
            return self._take_part()
        try:
            body = self._work.report(self._session.digest)
            return self._settle(self._connection.report(self._assigned, body))
        except Unreachable:
            if not self._waited_enough:
                raise
            return self._end(E.TOO_LATE, ReportState.LATE, "the server never answered")
        except (Expired, Conflict, ReportConflict) as error:
            return self._end(E.TOO_LATE, ReportState.LATE, error.message)
        except (NotAuthentic, StorageFailure):
            raise
        except HomespunError as error:
            return self._end(E.GIVE_UP, ReportState.VOID, f"refused: {error.message}")

    def _take_part(self) -> float:
        """One exchange with the group, while the person does not need the device.

        What is asked is answered in the next step. It is forgotten if that fails: the server says again, and
        `Member` knows what it answered before.
        """
        asked, self._asked = self._asked, None
        offer = self._offer
        unmet = self._unmet(offer.criteria.requires, offer.task_name)
        self._board.refuse(unmet)
        if unmet:
            return self._leave(unmet[0].text) if self._waited_enough else RECHECK_S
        self._say(f"in a group of round {self._assigned.round_number} of {offer.task_name}")
        try:
            reply = self._exchange(asked)
            if isinstance(reply, Settled):
                return self._settle(reply.receipt)
        except Unreachable:
            if not self._waited_enough:
                raise
            return self._leave("the server never answered")
        except (NotAuthentic, StorageFailure):
            raise
        except HomespunError as error:
            if isinstance(error, WeakTerms):  # they are the task's: the next round has the same
                until = self._clock.now() + REFUSE_FOR_S
                self._journal.refuse_plan(self._assigned.plan_hash, error.message, until)
            return self._leave(f"refused: {error.message}")
        if isinstance(reply, Waiting):
            return min(RECHECK_S, reply.retry.earliest_s)
        self._asked = reply
        return 0

    def _exchange(self, asked: Request | None) -> GroupReply:
        poll_s = self._settings.poll_s
        if asked is None:
            return self._connection.group(self._assigned, poll_s)
        if isinstance(asked, Carried):
            self._carry(asked)
        step, body = self._member.answer(asked)
        if step == MASK_INPUT:
            self._go(E.MASK, masked=True)
        try:
            return self._connection.answer_group(self._assigned, step, body, poll_s)
        except (Unreachable, NotAuthentic):
            raise
        except HomespunError:  # too late for this step; the device may still be in the sum
            reply = self._connection.group(self._assigned, poll_s)
            if reply == asked:
                raise
            return reply

    def _carry(self, carried: Carried) -> None:
        """Encode the same update for the round that the assignment is in now, durably, before joining its group.

        Raises `WrongStep` if the contribution may have left already, masked: there must never be two of it.
        """
        if self._session.masked:
            raise WrongStep("carried into another round after the masked input had left")
        assigned = carry(self._assigned, self._session.ancestry, carried)
        digest = replace(self._work, assigned=assigned).encode_again(len(carried.ancestry) - 1)
        self._go(E.CARRY, assigned=assigned, ancestry=carried.ancestry, digest=digest)

    @property
    def _others_wait(self) -> bool:
        """Whether this device holds up a group by staying away."""
        secure = (
            self._session.state is S.REPORTING and self._assigned.aggregation is Aggregation.SECURE
        )
        return secure and self._clock.now() < self._expires_at

    def _leave(self, reason: str) -> float:
        """Take no further part in the group; nobody has to wait. What may be in a sum counts, whatever comes."""
        if self._session.masked:
            self._abort()
            return self._end(E.TOO_LATE, ReportState.LATE, reason)
        return self._give_up(reason)

    def _settle(self, receipt: Receipt) -> float:
        match receipt.state:
            case ReportState.LATE:
                return self._end(E.TOO_LATE, receipt.state, receipt.reason)
            case ReportState.VOID:
                return self._end(E.GIVE_UP, receipt.state, receipt.reason)
            case ReportState.EXPECTED:
                raise Unreachable("the server does not know of the report that it was just sent")
        return self._end(E.ACKNOWLEDGE, receipt.state, receipt.reason)

    def _clean(self) -> float:
        cleaning.clean(self._home, self._models)
        if self._session.outcome is None:  # nothing that counts has left
            self._abort()
        self._go(E.CLEAN, outcome=self._session.outcome or str(ReportState.VOID))
        return 0

    def _abort(self) -> None:
        try:
            self._connection.abort(self._assigned)
        except HomespunError as error:  # its deadline will tell the server the same
            log.info("the server was not told that a session ended: %s", error)

    def _finish(self) -> float:
        reason = f" ({self._session.reason})" if self._session.reason else ""
        self._board.verdict = f"the last session ended: {self._session.outcome}{reason}"
        self._board.num_sessions += 1
        return self._start_over()

    # --- failing ------------------------------------------------------------------------------------------

    def _wait_for_server(self, error: Unreachable) -> float:
        """The server is away: stay in this state and come back, unless the deadline is sooner."""
        self._board.verdict = error.message
        window = self._settings.transient_error
        if self._others_wait:
            window = min(window, IN_GROUP, key=lambda each: each.latest_s)
        pause = self._come_back_in(self._unhurried(window))
        if self._session.state in BEFORE_INTENT and self._clock.now() + pause >= self._expires_at:
            return self._give_up(error.message)
        return pause

    def _failed(self, reason: str, window: RetryWindow) -> float:
        """It will not get better by itself: end what can be ended, come back later."""
        self._board.verdict = reason
        pause = self._come_back_in(self._unhurried(window))
        if self._session.state in BEFORE_INTENT:
            return self._give_up(reason)
        if self._session.state is S.CHECKED_IN:
            self._go(E.TURN_AWAY)
        elif self._session.state is S.ELIGIBLE:
            self._go(E.CONDITIONS_LOST)
        return pause

    def _refuse_plan(self, error: HomespunError, until: float | None) -> float:
        self._journal.refuse_plan(self._assigned.plan_hash, error.message, until)
        return self._give_up(f"plan refused: {error.message}")

    def _give_up(self, reason: str) -> float:
        self._go(E.GIVE_UP, reason=reason)
        self._board.verdict = reason
        return 0

    def _end(self, event: SessionEvent, outcome: ReportState, reason: str) -> float:
        self._go(event, outcome=str(outcome), reason=reason)
        return 0

    # --- the record and the clock -------------------------------------------------------------------------

    def _new_session(self) -> Session:
        return Session(
            session_id=secrets.token_hex(8),
            population=self._settings.population,
            state=S.WAITING,
            started_at=self._clock.now(),
        )

    def _go(self, event: SessionEvent, **changes: object) -> None:
        """Follow the table and make the new record durable before anything else happens."""
        after = self._session.after(event, **changes)
        self._journal.save(after, self._clock.now())
        self._session = after

    def _unhurried(self, window: RetryWindow) -> RetryWindow:
        """After an error: no sooner, with an empty hand, than the pace at which the server last had the device come."""
        if self._session.state not in (S.WAITING, S.ELIGIBLE, S.CHECKED_IN):
            return window  # it has something that is waited for
        latest_s = latest_when_away(window, min(self._journal.given_s, DAY_S))
        return RetryWindow(earliest_s=window.earliest_s, latest_s=latest_s)

    def _come_back_in(self, window: RetryWindow, *, given: bool = False) -> float:
        """Draw the time to come back, once; it is kept over restarts. Seconds until then.

        `given`: by the server, so errors keep to this pace.
        """
        now = self._clock.now()
        at = draw_retry(window, now, stream(self._settings.seed, "retry", repr(now)))
        self._journal.set_retry(at, window.latest_s if given else None)
        return at - now

    @property
    def _offer(self) -> Offer:
        assert self._session.offer is not None
        return self._session.offer

    @property
    def _assigned(self) -> Assigned:
        assert self._session.assigned is not None
        return self._session.assigned

    @property
    def _expires_at(self) -> float:
        assert self._session.expires_at is not None
        return self._session.expires_at

    @property
    def _work(self) -> Work:
        directory, watch = self._home.work / self._session.session_id, self._offer.watch
        watcher = Watcher(self._models, watch) if watch else None
        private = self._policy().private_tensors
        return Work(directory, self._assigned, self._trusted, private, watcher)

    @property
    def _member(self) -> Member:
        return Member(
            self._work,
            self._offer.task_name,
            self._session.digest,
            self._session.ancestry,
            self._policy().min_group,
            self._connection.identity,
            self._seal,
        )

    @property
    def _waited_enough(self) -> bool:
        return self._clock.now() >= self._expires_at + REPORT_FOR_S

    def _watch(self, requires: tuple[str, ...]) -> Watch:
        until = self._session.expires_at or float("inf")
        return Watch(self._conditions, requires, self._policy, self._clock, self._stop, until)

    def _read_conditions(self) -> Conditions:
        self._board.conditions = self._conditions.read(self._clock.now())
        return self._board.conditions

    def _unmet(self, requires: tuple[str, ...], task: str | None = None) -> tuple[Reason, ...]:
        policy = self._policy()
        served = check_population(policy, self._settings.population)
        checks = check_conditions(requires, self._read_conditions(), policy)
        return reasons_of((served, *checks), task)

    def _say(self, verdict: str) -> None:
        """Tell the person now: what follows may take a while."""
        self._board.verdict = verdict
        self._board.write(self._session, self._clock.now())
