"""One plain round's server time and memory as the model grows and the cohort grows.

A real server process is driven over HTTP: enrolment before, then claims, draw, reports, aggregation, commit.
Time is the processor time of the server process for the round; memory is the largest it was during the round, beyond
what it was before, which must not grow with the cohort. The floor reads the same bodies once, hashes them and adds
them with numpy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.harness import Options, Row, parse_options, report, rows
from homespun.learning.contribution import ContributionCodec
from homespun.learning.metrics import MetricSum
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import (
    GRAPHS,
    ClientOptimizer,
    Manifest,
    Normal,
    ParameterSpec,
    TensorFeature,
    TensorSpec,
)
from homespun.plan.package import Plan
from homespun.protocol import signing
from homespun.protocol.frame import decode_contribution, encode_contribution
from homespun.protocol.messages import (
    Aggregation,
    Assigned,
    Claim,
    ClaimReply,
    Criteria,
    Enroll,
    TaskKind,
    decode,
    encode,
)
from homespun.protocol.tasks import TaskSpec
from homespun.tensors import codec as tensors

BITS = 32
CASES = tuple((d, n) for d in (100_000, 1_000_000, 10_000_000) for n in (10, 100, 1000))
QUICK = ((100_000, 10), (100_000, 100), (1_000_000, 10))
THREADS = 8
SERVE = """
import sys
from pathlib import Path
from homespun.server.app import serve
from homespun.server.settings import Settings
serve(Settings(data_dir=Path(sys.argv[1]), port=0))
"""


class Device:
    """Signs requests; its training is made up."""

    def __init__(self, http: httpx.Client, index: int) -> None:
        self._http = http
        self._key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % index).digest())
        self.public = self._key.public_key().public_bytes_raw()

    def send(self, method: str, path: str, body: bytes, body_hash: str) -> bytes:
        now = f"{time.time():.3f}"
        text = signing.request_text(method, path, now, body_hash)
        headers = {
            signing.DEVICE_HEADER: signing.device_id(self.public),
            signing.TIME_HEADER: now,
            signing.SIGNATURE_HEADER: base64.b64encode(self._key.sign(text)).decode(),
        }
        return (
            self._http.request(method, path, content=body, headers=headers)
            .raise_for_status()
            .content
        )

    def post(self, path: str, message: object) -> bytes:
        body = encode(message)
        return self.send("POST", path, body, tensors.digest(body))


@dataclass(frozen=True)
class Measured:
    """Of one round: processor seconds and wall seconds of the server, bytes beyond what it held before."""

    cpu_s: float
    wall_s: float
    peak_bytes: float


def plan_of(dimension: int) -> Plan:
    """A plan with one parameter of this size; nobody here runs its graphs."""
    empty = hashlib.sha256(b"").hexdigest()
    batch = (TensorSpec(name="x", dtype="float32", shape=(1, 1)),)
    manifest = Manifest(
        name="benchmark",
        parameters=(ParameterSpec(name="p", shape=(dimension,), initial=Normal(std=1.0)),),
        inputs=batch,
        predict_inputs=batch,
        features=(TensorFeature(field="x", input="x", dtype="float32", shape=(1,)),),
        optimizer=ClientOptimizer(learning_rate=1.0),
        batch_size=1,
        max_rows=100,
        clip_norm=5.0,
        max_weight=100,
        metrics=("accuracy",),
        graphs=dict.fromkeys(GRAPHS, empty),
    )
    return Plan(manifest, dict.fromkeys(GRAPHS, b""))


@contextmanager
def server(data_dir: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server process and its URL."""
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield psutil.Process(child.pid), json.loads((data_dir / "server.json").read_text())["url"]
    finally:
        child.terminate()
        child.communicate()


def body_of(codec: ContributionCodec) -> bytes:
    """A contribution like any other; every device sends this one."""
    rng = np.random.default_rng(0)
    update = rng.standard_normal(codec.dimension, np.float32) / np.float32(codec.dimension**0.5)
    metrics = {name: MetricSum(1.0, 2.0) for name in codec.metrics}
    return encode_contribution(codec.encode(update, 50, metrics, rng))


def measure(dimension: int, cohort: int) -> Measured:
    """One round of `cohort` devices with a model of `dimension` parameters."""
    plan = plan_of(dimension)
    with (
        tempfile.TemporaryDirectory() as directory,
        server(Path(directory)) as (process, url),
        httpx.Client(base_url=url, timeout=600, trust_env=False) as http,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        token = (Path(directory) / "operator.token").read_text().strip()

        def operate(path: str, body: bytes) -> Any:
            headers = {"Authorization": f"Bearer {token}"}
            answer = http.post(f"/v1/operator{path}", content=body, headers=headers)
            return answer.raise_for_status().json()

        operate("/populations", b'{"name":"p"}')
        plan_hash = operate("/plans", plan.to_bytes())["hash"]
        initial = tensors.encode_tree(initial_checkpoint(plan.manifest, 0))
        checkpoint = operate(f"/checkpoints?plan_hash={plan_hash}", initial)["hash"]
        join = operate("/populations/p/tokens", b"{}")["token"]
        devices = [Device(http, index) for index in range(cohort)]

        def enroll(device: Device) -> None:
            public = base64.b64encode(device.public).decode()
            device.post("/v1/enroll", Enroll(population="p", token=join, public_key=public))

        list(pool.map(enroll, devices))
        spec = TaskSpec(
            name="t",
            population="p",
            kind=TaskKind.TRAIN,
            plan_hash=plan_hash,
            checkpoints=(checkpoint,),
            goal=cohort,
            minimum=cohort,
            over_selection=1.0,
            pool_target=cohort,
            selection_s=3600,
            deadline_s=36000,
            criteria=Criteria(requires=()),
            aggregation=Aggregation.PLAIN,
            bits=BITS,
            rotate=False,
        )
        task = operate("/tasks", encode(spec))["task_id"]
        codec = ContributionCodec(
            dimension=dimension,
            clip_norm=plan.manifest.clip_norm,
            max_weight=plan.manifest.max_weight,
            metrics=("loss", "accuracy"),
            max_group=cohort,
            bits=BITS,
        )
        body = body_of(codec)
        body_hash = tensors.digest(body)
        claim = Claim(task_id=task, round_number=1, attempt=1, wait_s=0.0)

        def ask(device: Device) -> ClaimReply:
            return decode(device.post("/v1/claim", claim), ClaimReply)

        def take_part(device: Device) -> None:
            reply = ask(device)
            while not isinstance(
                reply, Assigned
            ):  # the draw follows the last claim within a moment
                time.sleep(0.01)
                reply = ask(device)
            device.send("PUT", f"/v1/assignments/{reply.assignment_id}/report", body, body_hash)

        before = reset_peak(process)
        cpu, wall = sum(process.cpu_times()[:2]), time.perf_counter()
        list(pool.map(ask, devices))
        list(pool.map(take_part, devices))
        headers = {"Authorization": f"Bearer {token}"}
        while http.get(f"/v1/operator/tasks/{task}", headers=headers).json()["state"] == "active":
            time.sleep(0.02)
        wall = time.perf_counter() - wall
        cpu = sum(process.cpu_times()[:2]) - cpu
        return Measured(cpu, wall, peak(process) - before)


def reset_peak(process: psutil.Process) -> float:
    """Start counting the largest resident memory anew; bytes held now (Linux)."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return float(process.memory_info().rss)


def peak(process: psutil.Process) -> float:
    """Largest resident memory since `reset_peak`, bytes (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024.0 * int(line.split()[1])


def floor(dimension: int, cohort: int) -> float:
    """Seconds to read `cohort` bodies once, hash them and add them up."""
    codec = ContributionCodec(dimension, 5.0, 100, ("loss", "accuracy"), max(cohort, 2), BITS)
    body = body_of(codec)
    incoming = bytearray(len(body))

    def once() -> None:
        incoming[:] = body
        tensors.digest(incoming)
        codec.add(total, decode_contribution(incoming))

    total = codec.empty()
    repeats = max(3, min(cohort, 10**7 // dimension))
    return seconds(once, repeats) * cohort


def seconds(call: Callable[[], None], repeats: int) -> float:
    """Processor seconds of one call, the mean over `repeats`."""
    call()
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def run(options: Options) -> list[Row]:
    """Rows for every case: time with its floor, memory with the size of one sum as its floor."""
    results: list[Row] = []
    for dimension, cohort in QUICK if options.quick else CASES:
        repeats = 1 if options.quick or dimension * cohort > 10**9 else 3
        measured = [measure(dimension, cohort) for _ in range(repeats)]
        case = f"d={dimension:.0e} cohort={cohort}"
        floors = [floor(dimension, cohort) for _ in range(repeats)]
        sides = {"homespun": [m.cpu_s for m in measured], "floor": floors}
        results += rows(f"{case}, processor", sides, floor="floor")
        results += rows(f"{case}, wall", {"homespun": [m.wall_s for m in measured]})
        sums = {"homespun": [m.peak_bytes for m in measured], "floor": [4.0 * dimension]}
        results += rows(f"{case}, memory", sums, floor="floor", unit="B")
    return results


if __name__ == "__main__":
    options = parse_options(__doc__)
    report(run(options), options)
