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
from collections.abc import Callable
from functools import partial
from pathlib import Path

from homespun.clock import Clock
from homespun.device import child, cleaning
from homespun.device.conditions import ConditionSource, Watch
from homespun.device.connection import Connection
from homespun.device.current import CurrentSettings
from homespun.device.errands import fetch_releases, resolve_receipts
from homespun.device.examples import open_examples
from homespun.device.home import Home
from homespun.device.journal import Journal
from homespun.device.models import open_models
from homespun.device.offers import Judge, Reason, in_words, is_forbidden, reasons_of
from homespun.device.passage import RECHECK_S, REFUSE_FOR_S, Passage
from homespun.device.reporting import Reporting
from homespun.device.sealing import Seal
from homespun.device.status import Board
from homespun.device.stopping import Stop, Stopped
from homespun.device.wanted import Wanted
from homespun.device.watching import Watcher
from homespun.device.work import Work, check_assignment
from homespun.errors import (
    HomespunError,
    InvalidInput,
    NotAllowed,
    NotAuthentic,
    PlanCrashed,
    PlanError,
    StorageFailure,
    TooLarge,
    Unreachable,
)
from homespun.protocol.eligibility import Conditions, check_conditions, check_population
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    CheckIn,
    Claim,
    Criteria,
    ReportState,
    RetryWindow,
    Waiting,
)
from homespun.protocol.session import (
    BEFORE_INTENT,
    MAX_RESTARTS,
    Session,
    SessionEvent,
    SessionState,
)
from homespun.types import Hash

LONGEST_PAUSE_S = 60.0
LONGEST_RETRY_S = 7 * 86_400.0
"""A time to come back that is further away means that the clock was set back."""
IN_GROUP = RetryWindow(earliest_s=1.0, latest_s=5.0)
"""When to come back to a server that went away in the middle of a group, whose other devices wait."""
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
        """Open the directory and put in order what a crash left; `labour` runs the plans.

        Raises `Conflict` while another process runs it.
        """
        self._home, self._connection = home, connection
        self._conditions, self._clock = conditions, clock
        self._stop, self._labour = stop or Stop(), labour
        self._settings = settings = home.settings()
        self._trusted = tuple(base64.b64decode(key) for key in settings.publisher_keys)
        self._journal = Journal(home.journal_file)
        self._examples = open_examples(home, settings)
        self._models = open_models(home, settings)
        self._current = CurrentSettings(home, settings)
        self._policy = self._current.policy
        self._judge = Judge(
            settings.device_id, self._policy, self._journal, self._examples, self._models
        )
        self._board = Board(
            home, settings, self._journal, self._examples, self._models, self._judge
        )
        self._passage = passage = Passage(settings, self._journal, self._board, clock)
        seal = Seal(home.store_key_file)
        self._reporting = Reporting(passage, connection, self._policy, seal, settings.poll_s)
        self._clean_at = 0.0
        if self.session.state in BEFORE_INTENT:
            self._carry_on()
        self._steps: dict[SessionState, Callable[[], float]] = {
            S.WAITING: self._wait,
            S.ELIGIBLE: self._check_in,
            S.CHECKED_IN: self._claim,
            S.REJECTED: passage.start_over,
            S.ASSIGNED: partial(passage.go, E.DOWNLOAD),
            S.DOWNLOADING: self._download,
            S.VERIFIED: partial(passage.go, E.TRAIN),
            S.TRAINING: self._train,
            S.PACKAGED: partial(passage.go, E.INTEND),
            S.INTENT: self._start_report,
            S.REPORTING: self._report,
            S.ACKNOWLEDGED: self._clean,
            S.LATE: self._clean,
            S.VOID: self._clean,
            S.CLEANED: self._finish,
        }

    def _carry_on(self) -> None:
        """The process was killed before anything was sent: go on, unless that is too late or leads nowhere."""
        num_restarts = self.session.num_restarts + 1
        if self._passage.is_expired:
            self._passage.give_up("the device was interrupted until after the deadline")
        elif num_restarts > MAX_RESTARTS:
            self._passage.give_up(f"interrupted {num_restarts} times while {self.session.state}")
        else:
            self._passage.go(E.RESTART, num_restarts=num_restarts)

    @property
    def session(self) -> Session:
        """The record of the session under way."""
        return self._passage.session

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
                        self._current.sleep(self._clock, min(pause, LONGEST_PAUSE_S))
        except Stopped:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Leave in good order: a session that has sent nothing is given back, its files are removed."""
        try:
            if self.session.state in BEFORE_INTENT:
                self._passage.give_up("the device was stopped")
            if self.session.state in _ENDED:
                self._clean()
                self._finish()
            self._board.verdict = "stopped"
            self._board.write(self.session, self._clock.now(), state="stopped")
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
        if (before := self._current.take_change()) is not None:
            if before.policy != self._policy():
                self._journal.reconsider_plans()
            self._board.refuse(self._unmet(CHECK_IN_REQUIRES))
        pause = self._journal.retry_at - now
        if not 0 < pause <= LONGEST_RETRY_S or self.session.state in _ENDED:
            pause = self._attempt()
            self._journal.add_traffic(now, *self._connection.take_traffic())
        self._board.write(self.session, self._clock.now())
        return pause

    def _tidy(self, now: float) -> None:
        """What a crash left, and what is too old, goes: at every start and on a timer."""
        try:
            self._examples.expire(now)
            cleaning.clean(self._home, self._models, self.session.session_id)
        except StorageFailure as error:
            log.warning("not everything could be cleaned; trying again later: %s", error)

    def _attempt(self) -> float:
        """One step, with every failure turned into what the device does about it."""
        settings = self._settings
        try:
            return self._steps[self.session.state]()
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
        return self._passage.go(E.CONDITIONS_MET)

    def _check_in(self) -> float:
        if self._unmet(CHECK_IN_REQUIRES):
            return self._passage.go(E.CONDITIONS_LOST)
        self._say("ready; waiting for the server's offers")
        settings = self._settings
        reply = self._connection.check_in(
            CheckIn(population=settings.population, wait_s=settings.poll_s)
        )
        watch = self._watch(CHECK_IN_REQUIRES)
        trial = partial(
            child.try_model, policy=self._policy(), should_stop=watch, labour=self._labour
        )
        self._board.release_problems = tuple(
            fetch_releases(
                reply.releases,
                self._models,
                self._connection,
                settings.population,
                trial,
                watch,
            )
        )
        resolve_receipts(self._journal, self._connection)
        accepted, against = self._judge.choose(
            reply.offers, self._read_conditions(), self._clock.now()
        )
        self._board.refuse(against)
        self._passage.go(E.CHECK_IN, offer=accepted)
        return 0 if accepted else self._turn_away(reply.retry, given=True)

    def _claim(self) -> float:
        offer = self.session.offer
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
            self._passage.go(
                E.ASSIGN, assigned=reply, expires_at=self._clock.now() + reply.deadline_s
            )
            self._say(f"takes part in round {offer.round_number} of {offer.task_name}")
            return 0
        self._say(f"not this time: {reply.reason}")
        return self._turn_away(reply.retry, given=True)

    def _turn_away(self, window: RetryWindow, *, given: bool = False) -> float:
        self._passage.come_back_in(window, given=given)
        return self._passage.go(E.TURN_AWAY)

    # --- the work -----------------------------------------------------------------------------------------

    def _download(self) -> float:
        watch = self._watch(self._passage.offer.criteria.requires)

        def fetch(address: Hash, path: Path, max_bytes: int) -> bool:
            return self._connection.fetch(address, path, max_bytes, watch)

        try:
            complete = self._work.download(fetch)
        except (PlanError, TooLarge) as error:
            return self._refuse_plan(error, for_s=None)
        if not complete:
            return self._passage.give_up(watch.reason)
        return self._passage.go(E.VERIFY)

    def _train(self) -> float:
        """Work in a child while the conditions hold; wait for them, until the deadline, while they do not."""
        offer = self._passage.offer
        if self._passage.is_expired:
            return self._passage.give_up("the deadline has passed")
        unmet = self._unmet(offer.criteria.requires, offer.task_name)
        self._board.refuse(unmet)
        if is_forbidden(unmet):
            return self._passage.give_up(in_words(unmet))
        if unmet:
            self._board.verdict = f"paused: {self._board.verdict}"
            return RECHECK_S
        if self.session.is_paused:
            self._passage.go(E.RESUME, is_paused=False)
            self._board.num_resumes += 1
        self._say(f"works for round {offer.round_number} of {offer.task_name}")
        job = child.Perform.of(self._home, self.session, self._policy())
        watch = self._watch(offer.criteria.requires)
        wanted = Wanted(self._connection, self._passage.assigned)
        try:
            digest = self._labour(job, lambda: watch() or not wanted())
        except (InvalidInput, PlanCrashed) as error:
            if isinstance(error, PlanCrashed) and self._withdraws(error):
                return 0  # and says so in another child
            return self._refuse_plan(error, for_s=REFUSE_FOR_S)
        except PlanError as error:
            return self._refuse_plan(error, for_s=None)
        if digest is not None:
            return self._passage.go(E.PACKAGE, digest=digest)
        if wanted.receipt is not None:
            return self._passage.end(
                E.TOO_LATE, ReportState.LATE, "the server wants no more reports"
            )
        self._board.stopped(self._clock.now() - watch.said_at)
        return self._passage.go(E.PAUSE, is_paused=True)

    def _withdraws(self, crash: PlanCrashed) -> bool:
        """Whether it was what the device serves that crashed, and that is news."""
        watch = self._passage.offer.watch
        before = None if watch is None else self._models.slots(watch.slot)
        if watch is None or before is None or before.active is None:
            return False
        return self._models.withdraw(watch.slot, before.active, crash) != before

    def _start_report(self) -> float:
        if self._passage.is_expired:
            return self._passage.end(E.TOO_LATE, ReportState.LATE, "too late to be sent")
        return self._passage.go(E.REPORT)

    def _report(self) -> float:
        """Take the report to the server; in a group, one exchange while the person does not need the device."""
        offer, assigned = self._passage.offer, self._passage.assigned
        if assigned.aggregation is not Aggregation.SECURE:
            return self._reporting.send(self._work)
        unmet = self._unmet(offer.criteria.requires, offer.task_name)
        self._board.refuse(unmet)
        if unmet:
            return self._reporting.stay_away(in_words(unmet), for_good=is_forbidden(unmet))
        self._say(f"in a group of round {assigned.round_number} of {offer.task_name}")
        return self._reporting.take_part(self._work)

    def _clean(self) -> float:
        cleaning.clean(self._home, self._models)
        if self.session.outcome is None:  # nothing that counts has left
            self._reporting.abort()
        return self._passage.go(E.CLEAN, outcome=self.session.outcome or str(ReportState.VOID))

    def _finish(self) -> float:
        reason = f" ({self.session.reason})" if self.session.reason else ""
        self._board.verdict = f"the last session ended: {self.session.outcome}{reason}"
        self._board.num_sessions += 1
        return self._passage.start_over()

    # --- failing ------------------------------------------------------------------------------------------

    def _wait_for_server(self, error: Unreachable) -> float:
        """The server is away: stay in this state and come back, unless the deadline is sooner."""
        self._board.verdict = error.message
        window = self._settings.transient_error
        if self._reporting.others_wait:
            window = min(window, IN_GROUP, key=lambda each: each.latest_s)
        pause = self._passage.come_back_after_failure(window)
        if (
            self.session.state in BEFORE_INTENT
            and self._clock.now() + pause >= self._passage.expires_at
        ):
            return self._passage.give_up(error.message)
        return pause

    def _failed(self, reason: str, window: RetryWindow) -> float:
        """It will not get better by itself: end what can be ended, come back later."""
        self._board.verdict = reason
        pause = self._passage.come_back_after_failure(window)
        if self.session.state in BEFORE_INTENT:
            return self._passage.give_up(reason)
        if self.session.state is S.CHECKED_IN:
            self._passage.go(E.TURN_AWAY)
        elif self.session.state is S.ELIGIBLE:
            self._passage.go(E.CONDITIONS_LOST)
        return pause

    def _refuse_plan(self, error: HomespunError, for_s: float | None) -> float:
        self._passage.refuse_plan(error.message, for_s)
        return self._passage.give_up(f"plan refused: {error.message}")

    # --- what a step needs --------------------------------------------------------------------------------

    @property
    def _work(self) -> Work:
        directory, watch = self._home.work / self.session.session_id, self._passage.offer.watch
        watcher = Watcher(self._models, watch) if watch else None
        private = self._policy().private_tensors
        return Work(directory, self._passage.assigned, self._trusted, private, watcher)

    def _watch(self, requires: tuple[str, ...]) -> Watch:
        until = self.session.expires_at or float("inf")
        return Watch(lambda: in_words(self._unmet(requires)), self._clock, self._stop, until)

    def _read_conditions(self) -> Conditions:
        """How they are now; what has changed is told at once, because a step may take long."""
        now = self._clock.now()
        conditions, start = self._conditions.read(now), self._conditions.script_start
        if (conditions, start) != (self._board.conditions, self._board.script_start):
            self._board.conditions, self._board.script_start = conditions, start
            self._board.write(self.session, now)
        return conditions

    def _unmet(self, requires: tuple[str, ...], task: str | None = None) -> tuple[Reason, ...]:
        policy = self._policy()
        served = check_population(policy, self._settings.population)
        checks = check_conditions(requires, self._read_conditions(), policy)
        return reasons_of((served, *checks), task)

    def _say(self, verdict: str) -> None:
        """Tell the person now: what follows may take a while."""
        self._board.verdict = verdict
        self._board.write(self.session, self._clock.now())
