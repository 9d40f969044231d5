"""status.json: what the device is doing and why, for the person whose device it is. It never leaves the device."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from homespun.device.examples import ExampleStore
from homespun.device.home import Home, Settings, storage_failure, write_atomically
from homespun.device.journal import Journal, Participation
from homespun.device.models import Models
from homespun.device.offers import Judge, Offered, Reason, in_words
from homespun.device.serving import PROBATION
from homespun.errors import StorageFailure
from homespun.protocol.eligibility import Conditions
from homespun.protocol.session import Session, SessionState
from homespun.types import Hash

IN_SESSION = frozenset(SessionState) - {
    SessionState.WAITING,
    SessionState.ELIGIBLE,
    SessionState.CHECKED_IN,
    SessionState.REJECTED,
}
"""States in which the device has been given something to do, or has yet to put away what it did."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """The release that a slot serves, and how it does here. `mean_s`: seconds of a prediction; `on_probation`: it is
    new, and the device would go back at once.
    """

    sequence: int
    version: str
    plan_hash: Hash
    checkpoint: Hash
    num_predictions: int = 0
    mean_s: float | None = None
    num_failures: int = 0
    on_probation: bool = False

    def in_words(self) -> str:
        """How it does here, for the person."""
        words = f"{self.num_predictions} predictions"
        if self.mean_s is not None:
            words += f" of {1000 * self.mean_s:.1f} ms"
        if self.num_failures:
            words += f", {self.num_failures} failed"
        return words + (", on probation" if self.on_probation else "")


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: of the session machine, or `stopped`; `verdict`: one sentence; `session_id`: names the files of the
    session under way; `script_start`: from when the times of a script of conditions count, if one is played; `offered`:
    at the last check-in; times are Unix seconds, sizes bytes.

    Since the start: `num_pauses`, `num_resumes` of training, and `longest_stop_s` from noticing that a condition had
    ended until nothing ran any more. `peak_memory_bytes` is of this process, `peak_child_memory_bytes` of training.
    """

    device_id: str
    population: str
    server: str
    updated_at: float
    state: str
    verdict: str
    session_id: str = ""
    task: str | None = None
    round_number: int | None = None
    refusals: tuple[Reason, ...] = ()
    refusal_counts: dict[str, int] = {}
    conditions: Mapping[str, bool | None] = {}
    script_start: float | None = None
    retry_at: float | None = None
    checked_in_at: float | None = None
    offered: tuple[Offered, ...] = ()
    num_sessions: int = 0
    sessions: tuple[Participation, ...] = ()
    served: dict[str, Served] = {}
    release_problems: tuple[str, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    num_examples: int = 0
    num_held_out: int = 0
    peak_memory_bytes: int = 0
    peak_child_memory_bytes: int = 0
    num_pauses: int = 0
    num_resumes: int = 0
    longest_stop_s: float = 0.0


class Board:
    """Keeps status.json current: what the runtime says of itself, and what its parts know."""

    def __init__(
        self,
        home: Home,
        settings: Settings,
        journal: Journal,
        examples: ExampleStore,
        models: Models,
        judge: Judge,
    ) -> None:
        self._home, self._settings = home, settings
        self._journal, self._examples, self._models = journal, examples, models
        self._judge = judge
        self._reasons: tuple[Reason, ...] = ()
        self._counts: Counter[str] = Counter()
        self.verdict = "starting"
        self.conditions: Conditions = {}
        self.script_start: float | None = None
        self.release_problems: tuple[str, ...] = ()
        self.num_sessions = self.num_pauses = self.num_resumes = 0
        self.longest_stop_s = 0.0
        with suppress(StorageFailure):  # `why` has an answer before the next check-in
            if (last := read_status(home)) is not None:
                judge.remember((each.offer for each in last.offered), last.checked_in_at)

    def refuse(self, reasons: tuple[Reason, ...]) -> None:
        """These reasons speak against taking part now; empty: none does. Counted when they change."""
        if reasons != self._reasons:
            self._counts.update(reason.code for reason in reasons)
        self._reasons = reasons
        if reasons:
            self.verdict = in_words(reasons)

    def stopped(self, stop_s: float) -> None:
        """Training was stopped `stop_s` after that was noticed to be due; nothing runs any more."""
        self.num_pauses += 1
        self.longest_stop_s = max(self.longest_stop_s, stop_s)

    def write(self, session: Session, now: float, state: str | None = None) -> None:
        """Replace status.json atomically; not synced, because it is made anew at every step."""
        up, down = self._journal.traffic()
        retry_at = self._journal.retry_at
        status = Status(
            device_id=self._settings.device_id,
            population=self._settings.population,
            server=self._settings.server,
            updated_at=now,
            state=state or str(session.state),
            verdict=self.verdict,
            session_id=session.session_id,
            task=session.offer.task_name if session.offer else None,
            round_number=session.offer.round_number if session.offer else None,
            refusals=self._reasons,
            refusal_counts=dict(self._counts),
            conditions=self.conditions,
            script_start=self.script_start,
            retry_at=retry_at if retry_at > now else None,
            checked_in_at=self._judge.checked_in_at,
            offered=self._judge.offered(now),
            num_sessions=self.num_sessions,
            sessions=tuple(self._journal.recent()),
            served=self._served(),
            release_problems=self._release_problems(),
            bytes_up=up,
            bytes_down=down,
            num_examples=self._examples.count(now),
            num_held_out=self._examples.count(now, held_out=True),
            peak_memory_bytes=peak_memory_bytes(),
            peak_child_memory_bytes=_peak_bytes(resource.RUSAGE_CHILDREN),
            num_pauses=self.num_pauses,
            num_resumes=self.num_resumes,
            longest_stop_s=self.longest_stop_s,
        )
        with suppress(
            StorageFailure
        ):  # a full disk keeps the person uninformed, not the device from work
            write_atomically(self._home.status_file, msgspec.json.encode(status), durable=False)

    def _release_problems(self) -> tuple[str, ...]:
        """Releases that have failed here, and what hindered the last check-in's."""
        failed = (
            f"release {failure.version} of {slot}: {failure.reason}"
            for slot, slots in self._models.served().items()
            for failure in slots.failed
        )
        return tuple(dict.fromkeys((*failed, *self.release_problems)))

    def _served(self) -> dict[str, Served]:
        served = {}
        for slot, slots in self._models.served().items():
            if slots.active is not None:
                usage = self._models.usage(slot, slots.active)
                served[slot] = Served(
                    sequence=slots.active.sequence,
                    version=slots.active.version,
                    plan_hash=slots.active.plan_hash,
                    checkpoint=slots.active.checkpoint,
                    num_predictions=usage.num_predictions,
                    mean_s=usage.mean_s,
                    num_failures=usage.num_failures,
                    on_probation=usage.num_predictions < PROBATION,
                )
        return served


def read_status(home: Home) -> Status | None:
    """The status that the device wrote last; None before its first run."""
    try:
        return msgspec.json.decode(home.status_file.read_bytes(), type=Status)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_failure(home.status_file, error) from error
    except msgspec.MsgspecError as error:
        raise StorageFailure(
            f"{home.status_file} is damaged: {error}", hint="the running device writes it again"
        ) from error


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    try:  # Linux: getrusage() also counts the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return _peak_bytes(resource.RUSAGE_SELF)


def _peak_bytes(of_whom: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(of_whom).ru_maxrss * unit
