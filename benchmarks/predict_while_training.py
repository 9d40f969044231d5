"""Does a person who types notice that the device trains?

A keyboard asks for the next word 50 times a second, in an app process of ordinary priority. Beside it runs nothing
(`alone`), or a device whose child process trains the same keyboard's model without an end (`training`). On any core,
and, as the worst case, with all processes pinned to one. Rows `p50` and `p99` are seconds per prediction, one value a
repeat; the goal is a p99 below 10 ms.

Rows `start` are seconds of processor time: a whole child that is asked to stop before its first step, the same work
without a process of its own, and an interpreter that does nothing.
"""

from __future__ import annotations

import base64
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec
import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.harness import Options, Row, parse_options, report, rows
from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.device import child
from homespun.device.child import Perform
from homespun.device.examples import open_examples
from homespun.device.home import Home, Settings
from homespun.plan.initial import initial_checkpoint
from homespun.plan.package import Plan
from homespun.plan.suggest import Suggester
from homespun.protocol.eligibility import Policy
from homespun.protocol.messages import Aggregation, Assigned, Encoding, ExampleQuery, TaskKind
from homespun.tensors.codec import digest, encode_tree

TEXTS = [f"thank you for the {n} fish and the bread that you gave to the cat" for n in range(200)]
KEY_EVERY_S = 0.02
STARTED_S = 1.0
"""Processor time after which a child surely trains."""


def keyboard() -> Plan:
    words = Vocabulary.build(TEXTS, 4000)
    return zoo.load("keyboard").with_assets({"vocabulary": words.to_bytes()})


def make_device(root: Path, local_epochs: int) -> Perform:
    """A device's directory in the middle of a session, and its job."""
    key, plan, policy = Ed25519PrivateKey.generate(), keyboard(), Policy()
    plan = plan.with_settings(local_epochs=local_epochs).sign(key)
    trusted = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    home = Home(root)
    settings = Settings(server="http://nowhere", population="none", publisher_keys=(trusted,))
    home.write_settings(settings)
    store = open_examples(home, settings)
    now = time.time()
    store.add_many(({"text": text} for text in TEXTS), now)
    store.close()
    session = home.work / "session"
    session.mkdir(parents=True)
    checkpoint = encode_tree(initial_checkpoint(plan.manifest, 0))
    (session / "plan.zip").write_bytes(plan.to_bytes())
    (session / "checkpoint-0.safetensors").write_bytes(checkpoint)
    manifest = plan.manifest
    assigned = Assigned(
        assignment_id="none",
        kind=TaskKind.TRAIN,
        round_number=1,
        attempt=1,
        plan_hash=digest(plan.to_bytes()),
        checkpoints=(digest(checkpoint),),
        encoding=Encoding(
            clip_norm=manifest.clip_norm, max_weight=manifest.max_weight, max_group=10
        ),
        aggregation=Aggregation.SECURE,
        seed=1,
        deadline_s=600.0,
    )
    return Perform(
        root=str(root),
        session_id=session.name,
        assigned=assigned,
        as_of=now,
        query=ExampleQuery(),
        watch=None,
        max_memory_bytes=policy.max_memory_bytes,
        max_cpu_share=policy.max_cpu_share,
    )


@contextmanager
def training(job: Perform) -> Iterator[None]:
    """A device process, whose child trains when this begins, and is gone when it ends."""
    command = [sys.executable, "-m", "benchmarks.predict_while_training", "device"]
    device = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert device.stdin is not None
    device.stdin.write(msgspec.json.encode(job))
    device.stdin.close()
    try:
        while sum(_worker(device.pid).cpu_times()[:2]) < STARTED_S:
            time.sleep(0.05)
        yield
    finally:
        device.terminate()
        device.wait()


def _worker(device_pid: int) -> psutil.Process:
    while not (found := psutil.Process(device_pid).children()):
        time.sleep(0.05)
    return found[0]


def type_keys(suggester: Suggester, count: int) -> list[float]:
    """Seconds per prediction, at the pace of somebody who is in a hurry."""
    texts, taken = [text.split() for text in TEXTS], []
    for number in range(count):
        words = texts[number % len(texts)]
        began = time.perf_counter()
        suggester.suggest(" ".join(words[: 1 + number % len(words)]), 3)
        taken.append(time.perf_counter() - began)
        time.sleep(KEY_EVERY_S)
    return taken


def predictions(case: str, options: Options) -> list[Row]:
    """p50 and p99 of predictions, alone and while a child trains, taking turns."""
    plan = keyboard()
    suggester = Suggester(plan, initial_checkpoint(plan.manifest, 1))
    count, repeats = (50, 1) if options.quick else (500, 5)
    type_keys(suggester, 20)
    found: dict[str, list[list[float]]] = {"alone": [], "training": []}
    with tempfile.TemporaryDirectory() as folder:
        job = make_device(Path(folder), local_epochs=1000)
        for _ in range(repeats):
            for side, taken in found.items():
                with training(job) if side == "training" else nullcontext():
                    taken.append(type_keys(suggester, count))
    return [
        row
        for share in (50, 99)
        for row in rows(
            f"{case} p{share}",
            {
                side: [float(np.percentile(t, share)) for t in taken]
                for side, taken in found.items()
            },
            floor="alone",
        )
    ]


def starts(options: Options) -> list[Row]:
    """Processor time of a child, and of what it does."""
    from homespun.device import labour

    def at_once() -> bool:
        return True

    def spent(who: int, call: Callable[[], object]) -> float:
        before = resource.getrusage(who)
        call()
        after = resource.getrusage(who)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    child.GRACE_S = 600.0
    taken: dict[str, list[float]] = {"child": [], "in process": [], "interpreter": []}
    with tempfile.TemporaryDirectory() as folder:
        job = make_device(Path(folder), local_epochs=1)
        nothing = [sys.executable, "-c", "pass"]
        labour.work_on(job, at_once)
        for _ in range(2 if options.quick else 15):
            children, here = resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF
            taken["child"].append(spent(children, lambda: child.work_on(job, at_once)))
            taken["in process"].append(spent(here, lambda: labour.work_on(job, at_once)))
            taken["interpreter"].append(
                spent(children, lambda: subprocess.run(nothing, check=True))
            )
    return rows("start", taken, floor="in process")


def device() -> None:
    """Work like a device until terminated."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Perform)
    child.work_on(job, lambda: False)


def main() -> None:
    options = parse_options(__doc__)
    results = starts(options) + predictions("any core", options)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        results += predictions("one core", options)
    report(results, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["device"]:
        device()
    else:
        main()
