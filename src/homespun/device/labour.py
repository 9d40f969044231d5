"""What runs in the child process (`device.child` starts it): the only part of a device that executes plans.

`work_on` does a job in whatever process it is called; `python -m homespun.device.labour` is the process made for it.
"""

from __future__ import annotations

import base64
import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np

from homespun.device.child import FAILED, Perform, ShouldStop, Trial
from homespun.device.examples import open_examples
from homespun.device.home import Home, storage
from homespun.device.models import CHECKPOINT_FILE, PLAN_FILE, open_models
from homespun.device.watching import Watcher
from homespun.device.work import Work
from homespun.errors import HomespunError, NumericFailure, PlanCrashed
from homespun.plan import run
from homespun.plan.package import Plan
from homespun.protocol.messages import TaskKind
from homespun.protocol.problem import encode_problem
from homespun.tensors.codec import decode_tree, digest
from homespun.types import Hash

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def work_on(job: Perform | Trial, should_stop: ShouldStop) -> Hash | None:
    """Do a job; the digest of what came of it (the report, the model that was tried), or None if it was stopped.

    Raises what `Work.perform` and `Plan.read` raise, `NumericFailure`, and MemoryError.
    """
    return _perform(job, should_stop) if isinstance(job, Perform) else _try(Path(job.directory))


def _perform(job: Perform, should_stop: ShouldStop) -> Hash | None:
    home = Home(Path(job.root))
    settings = home.settings()
    trusted = tuple(base64.b64decode(key) for key in settings.publisher_keys)
    store = open_examples(home, settings)
    try:
        select = store.training if job.assigned.kind is TaskKind.TRAIN else store.held_out
        examples = select(job.as_of, job.query)
    finally:
        store.close()
    private = settings.policy.private_tensors
    with closing(open_models(home, settings)) as models:
        watcher = Watcher(models, job.watch) if job.watch else None
        work = Work(home.work / job.session_id, job.assigned, trusted, private, watcher)
        return work.perform(examples, settings.seed, should_stop)


def _try(directory: Path) -> Hash:
    plan = Plan.read(directory / PLAN_FILE)
    with storage(directory):
        checkpoint = (directory / CHECKPOINT_FILE).read_bytes()
    zeros = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in plan.manifest.predict_inputs}
    for name, values in run.predict(plan, decode_tree(checkpoint), zeros).items():
        if not np.isfinite(values).all():
            raise NumericFailure(
                f"the model's output {name!r} is not finite", hint="it is not served"
            )
    return digest(checkpoint)


def main() -> NoReturn:
    """Job in, outcome out. Everything that lasts is on the disk by then, so there is nothing to tidy."""
    _die_with_parent()
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Perform | Trial)
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), name="lifeline", daemon=True).start()
    _limit_memory(job.max_memory_bytes)
    code = 0
    try:
        outcome = (work_on(job, _paced(stop, job.max_cpu_share)) or "").encode()
    except MemoryError:
        code, outcome = FAILED, encode_problem(_too_large(job.max_memory_bytes))
    except HomespunError as error:
        code, outcome = FAILED, encode_problem(error)
    sys.stdout.buffer.write(outcome)
    sys.stdout.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Where the kernel does it: it also ends a process that is stuck inside a library."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listen(stop: threading.Event) -> None:
    """A line is the wish to stop; the end of input is the end of the parent."""
    while sys.stdin.buffer.readline():
        stop.set()
    os._exit(1)


def _limit_memory(max_bytes: int) -> None:
    """Of what the process allocates; what it maps from files is shared and can be dropped."""
    if sys.platform == "linux":  # elsewhere the limit exists and is not kept
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def _paced(stop: threading.Event, share: float) -> ShouldStop:
    """Asked between steps: rests there until no more than `share` of one core has been used since the start."""
    began = time.monotonic() - time.process_time()

    def should_stop() -> bool:
        elapsed_s = time.monotonic() - began
        return stop.wait(max(0.0, time.process_time() / share - elapsed_s))

    return should_stop


def _too_large(max_bytes: int) -> PlanCrashed:
    return PlanCrashed(
        f"the plan needs more than {max_bytes // 10**6} MB of memory",
        hint="the device's policy sets the limit: max_memory_bytes",
    )


if __name__ == "__main__":
    main()
