"""Work in a child process: whatever executes a plan can be ended at any moment, and can take nothing else with it.

The child (`device.labour`) has the lowest priority, one thread, a memory cap and a share of one core. Its standard
input is its lifeline: the job, later perhaps the wish to stop, and when it closes, however that came about, the
child dies. Its standard output is the outcome. A child that is asked to stop ends after the step under way; one that
does not is killed, so that the device is the person's again within two seconds whatever a step takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from homespun.device.home import Home
from homespun.errors import PlanCrashed
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import Assigned, ExampleQuery, Watch
from homespun.protocol.problem import error_from_problem
from homespun.protocol.session import Session
from homespun.types import Hash

TICK_S = 0.1
"""How often it is asked whether to stop."""
GRACE_S = 1.0
"""What a child that is asked to stop gets for its step and its step checkpoint, less what it took to find that out."""
LEAST_GRACE_S = 0.2
TRIAL_S = 60.0
"""A model that has not given one prediction by then is not served."""
FAILED = 70
"""Exit code of a child whose outcome is a problem document."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""For what reads its environment; starting the threads of a pool that is never used costs as much as NumPy."""

ShouldStop = Callable[[], bool]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What every job says: how much of the machine it may take."""

    max_memory_bytes: int
    max_cpu_share: float


class Perform(Job, frozen=True, kw_only=True, tag=True):
    """Do a session's work in the device's directory `root`, with the examples of `query` there were at `as_of` (Unix
    seconds); with `watch`, say how the model does that is served.
    """

    root: str
    session_id: str
    assigned: Assigned
    as_of: float
    query: ExampleQuery
    watch: Watch | None

    @classmethod
    def of(cls, home: Home, session: Session, policy: Policy) -> Perform:
        """The job of an assigned session: the same after a pause and after a restart."""
        offer, assigned, expires_at = session.offer, session.assigned, session.expires_at
        assert offer is not None
        assert assigned is not None
        assert expires_at is not None
        return cls(
            root=str(home.root),
            session_id=session.session_id,
            assigned=assigned,
            as_of=expires_at - assigned.deadline_s,
            query=offer.criteria.relevant,
            watch=offer.watch,
            max_memory_bytes=policy.max_memory_bytes,
            max_cpu_share=policy.max_cpu_share,
        )


class Trial(Job, frozen=True, kw_only=True, tag=True):
    """One prediction on zeros with the plan and the checkpoint in `directory`: they load here and give numbers."""

    directory: str


Labour = Callable[[Perform | Trial, ShouldStop], Hash | None]
"""Does a job; the digest of what came of it, or None if `should_stop` ended it. `labour.work_on`: in this process."""


def work_on(job: Perform | Trial, should_stop: ShouldStop) -> Hash | None:
    """`labour.work_on` in a child process; when this returns or raises, the child is gone.

    Raises what the work raises, and `PlanCrashed` when the child ended without an outcome.
    """
    child = _Child(job)
    try:
        while not child.has_ended(TICK_S):
            began = time.monotonic()
            if should_stop():
                child.ask_to_stop()
                if child.has_ended(max(LEAST_GRACE_S, began + GRACE_S - time.monotonic())):
                    break
                return None
        return child.outcome()
    finally:
        child.kill()


def try_model(
    directory: Path,
    policy: Policy | None = None,
    should_stop: ShouldStop = lambda: False,
    labour: Labour = work_on,
) -> bool:
    """Whether the plan and the checkpoint in `directory` were tried, within the limits of `policy`; False if
    `should_stop` ended that.

    Raises why they cannot be served: `PlanError`, `ShapeMismatch`, `NumericFailure`.
    """
    limits, began = policy or Policy(), time.monotonic()

    def takes_too_long() -> bool:
        return time.monotonic() - began >= TRIAL_S

    job = Trial(
        directory=str(directory),
        max_memory_bytes=limits.max_memory_bytes,
        max_cpu_share=limits.max_cpu_share,
    )
    if labour(job, lambda: should_stop() or takes_too_long()) is not None:
        return True
    if takes_too_long():
        raise PlanCrashed(
            f"the model gave no prediction within {TRIAL_S:.0f} s", hint="it is not served"
        )
    return False


class _Child:
    """A started child: in a session of its own, so that Ctrl-C in a terminal is its parent's matter alone."""

    def __init__(self, job: Perform | Trial) -> None:
        place = job.root if isinstance(job, Perform) else job.directory
        self._process = subprocess.Popen(
            # -P: what lies in the current directory is not a module. The place is for the person who looks at `ps`.
            [sys.executable, "-P", "-m", "homespun.device.labour", place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )
        _step_back(self._process.pid)
        self._max_bytes = job.max_memory_bytes
        self._outcome = b""
        self._reader = threading.Thread(target=self._read, name="outcome", daemon=True)
        self._reader.start()
        self._send(msgspec.json.encode(job))

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._outcome = self._process.stdout.read()

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already; how it ended says why
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def ask_to_stop(self) -> None:
        self._send(b"stop")

    def has_ended(self, within_s: float) -> bool:
        """Waits so long at most. The outcome is complete when the child has closed its end."""
        self._reader.join(within_s)
        return not self._reader.is_alive()

    def outcome(self) -> Hash | None:
        """What the child that has ended gave or raised."""
        code = self._process.wait()
        if code == 0:
            return self._outcome.decode() or None
        if code == FAILED:
            raise error_from_problem(code, self._outcome)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise PlanCrashed(
            f"the process that ran the plan ended by {how}",
            hint=f"it crashed, or something in it needed more than {self._max_bytes // 10**6} MB",
        )

    def kill(self) -> None:
        """Be sure that nothing of it is left."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def _step_back(pid: int) -> None:
    """Let everything else go first: processor and, where there is such a thing, disk."""
    import psutil

    with suppress(psutil.Error, OSError):  # it may be dead, or the system may not allow it
        process = psutil.Process(pid)
        if sys.platform == "win32":
            process.nice(psutil.IDLE_PRIORITY_CLASS)
        else:
            process.nice(19)
        if sys.platform == "linux":
            process.ionice(psutil.IOPRIO_CLASS_IDLE)
            # Desktop kernels share the processor by session first, where nice does not count: a tenth of
            # another session's share, so that work ends before its deadline beside somebody's nightly job.
            Path(f"/proc/{pid}/autogroup").write_text("10")
