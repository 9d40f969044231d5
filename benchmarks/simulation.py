"""How fast is a simulated round, against pfl, Flower, FedJAX and a plain PyTorch loop?

Every side trains the same clients from the same weights in the same order, in its framework's fast way: data in
memory, no evaluation, one round to warm up. First each trains two rounds in float64, and is refused if its weights are
then not the plain loop's (TOLERANCE in benchmarks/peers/simulation_report.py) or if it took another number of SGD
steps. Then they take turns in float32, each turn a fresh process, in alternating order. The floor is what the products
of training cost at the rate of this machine's matrix products. Nobody is tied to a core: Flower's server and actors
may use two where each has one thread.

    --tasks tiny,mlp       some of the tasks (benchmarks/peers/simulation_tasks.py)
    --peers pfl,Flower     some of the peers: eager, pfl, Flower, FedJAX
    --cores 2              two processes for us and pfl, two actors for Flower, two threads for FedJAX and, as another
                           side, for us
    --device cuda          us, eager, and pfl with 1, 2, 4 and 8 processes, on one GPU
    --plot FILE            an SVG of how many times faster than pfl each side is
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import torch

from benchmarks.harness import Options, option_parser, peer_python, report, take_turns
from benchmarks.peers.simulation_report import (
    ONE_CORE,
    ONE_GPU,
    OURS,
    PFL,
    ROUNDED,
    TOLERANCE,
    Figure,
    difference,
    figures,
    goals,
    plot,
    refusal,
    table,
)
from benchmarks.peers.simulation_run import Result
from benchmarks.peers.simulation_tasks import TASKS, Weights

ROOT = Path(__file__).parents[1]
EAGER, THREADS = "eager", "homespun threads"
TORCH = os.environ.get("HOMESPUN_TORCH", "torch==2.13.*").split()
REQUIREMENTS: Mapping[str, Sequence[str]] = {
    PFL: (*TORCH, "pfl==0.6.0", "psutil"),
    "Flower": (*TORCH, "flwr[simulation]==1.41.0", "psutil"),
    "FedJAX": ("fedjax==0.0.17", "jax==0.10.2", "psutil"),
}
QUICK = ("tiny", "logreg", "mlp")
QUICK_ROUNDS = 3
PROOF_ROUNDS = 1
"""In float64, after the one that warms up."""
TIMEOUT_S = 900
GPU_PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Choices(Options):
    """The options of this benchmark."""

    tasks: Sequence[str]
    peers: Sequence[str]
    cores: int
    device: str
    repeats: int
    plot: Path | None


def parse_choices(argv: Sequence[str] | None = None) -> Choices:
    parser = option_parser(__doc__)
    parser.add_argument("--tasks", type=known(TASKS))
    parser.add_argument("--peers", type=known([EAGER, *REQUIREMENTS]))
    parser.add_argument("--cores", type=int, choices=(1, 2), default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(argv)
    # A loop has no use for two cores: two threads only make it slower on such small batches.
    defaults = (EAGER, *REQUIREMENTS) if given.cores == 1 else tuple(REQUIREMENTS)
    if given.device != "cpu":
        defaults = (EAGER, PFL)
    return Choices(
        quick=given.quick,
        json=given.json,
        tasks=given.tasks or (QUICK if given.quick else tuple(TASKS)),
        peers=given.peers or defaults,
        cores=given.cores,
        device=given.device,
        repeats=given.repeats or (3 if given.quick else 5),
        plot=given.plot,
    )


def known(names: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads a list of some of `names`."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return chosen

    return parse


class RunnerError(Exception):
    """A side gave no result."""


@dataclass(frozen=True)
class Side:
    """One framework with `processes` processes of `threads` threads each. `python`: of its environment."""

    name: str
    runner: str
    python: Path
    processes: int = 1
    threads: int = 1

    def command(
        self, task: str, rounds: int, device: str, weights: Path, dtype: str = "float32"
    ) -> list[str]:
        arguments = [f"benchmarks.peers.simulation_{self.runner}", task, f"--dtype={dtype}"]
        arguments += [f"--rounds={rounds}", f"--device={device}"]
        arguments += [f"--processes={self.processes}", f"--threads={self.threads}"]
        launcher = ["-m"]
        if self.runner == "pfl" and self.processes > 1:
            count = f"--nproc-per-node={self.processes}"
            launcher = ["-m", "torch.distributed.run", "--standalone", count, "-m"]
        return [str(self.python), *launcher, *arguments, f"--weights={weights}"]


@dataclass(frozen=True)
class Trained:
    """What a finished runner left."""

    result: Result
    weights: Weights


def environment(device: str) -> dict[str, str]:
    """One thread per process, no telemetry, and no GPU where none is wanted."""
    added = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if device == "cpu":
        added["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **added}


def train(command: Sequence[str], weights: Path, device: str) -> Trained:
    """Runs it to its end. Raises `RunnerError` with its last words."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(device),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RunnerError(f"no end after {TIMEOUT_S} s") from error
    finally:
        if child.poll() is None:  # it, and the processes that it started
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    if child.returncode or not lines:
        raise RunnerError(" ".join(stderr.splitlines()[-3:]) or f"status {child.returncode}")
    with np.load(weights) as saved:
        return Trained(msgspec.convert(json.loads(lines[-1]), Result), dict(saved))


def gemm_rate(threads: int, device: str) -> float:
    """FLOP/s in the product of two 1024 x 1024 matrices (4096 on a GPU) of float32: the best of half a second."""
    size = 1024 if device == "cpu" else 4096
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(left, right)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2.0 * size**3 / best


@dataclass(frozen=True)
class Benchmark:
    """All tasks of the choices; what had to be left out and why is in `left_out`."""

    choices: Choices
    files: Path
    left_out: list[str]

    @cached_property
    def sides(self) -> list[Side]:
        choices, here = self.choices, Path(sys.executable)
        made = [Side(OURS, "homespun", here, choices.cores)]
        if choices.cores > 1:
            made.append(Side(THREADS, "homespun", here, threads=choices.cores))
        for peer in choices.peers:
            if peer == EAGER:
                made.append(Side(EAGER, "eager", here, choices.cores))
                continue
            try:
                python = peer_python(f"simulation-{peer.lower()}", REQUIREMENTS[peer])
            except subprocess.CalledProcessError:
                self.left_out.append(f"{peer}: pip could not install it, see .dev/bench/*.log")
                continue
            counts = GPU_PROCESSES if choices.device != "cpu" else (choices.cores,)
            made += [
                Side(f"{peer} x{n}" if n > 1 and len(counts) > 1 else peer, peer.lower(), python, n)
                for n in counts
            ]
        return made

    def measure(self, name: str) -> list[Figure]:
        """Who trains the same thing as the plain loop, fastest of many turns."""
        choices, task = self.choices, TASKS[name]
        rounds = min(task.num_rounds, QUICK_ROUNDS) if choices.quick else task.num_rounds
        exact = Proof(self, name, PROOF_ROUNDS, "float64", TOLERANCE)
        sides = [side for side in self.sides if exact.holds(side)]
        rounded = Proof(self, name, rounds, "float32", ROUNDED)
        rate = gemm_rate(choices.cores, choices.device)
        turns = take_turns({s.name: s for s in sides}, rounded.holds, choices.repeats, warmup=0)
        kept = {
            side: [result for result in results if result is not None]
            for side, results in turns.items()
            if side not in rounded.refused
        }
        apart = {side: (exact.apart[side], rounded.apart[side]) for side in kept}
        return figures(name, kept, apart, task.flops(), rate, peer=PFL)


class Proof:
    """That sides train the task to the weights of the plain loop on the CPU, within `tolerance`, in the order they
    use.
    """

    def __init__(
        self, benchmark: Benchmark, name: str, rounds: int, dtype: str, tolerance: float
    ) -> None:
        self._benchmark, self._name, self._rounds = benchmark, name, rounds
        self._dtype, self._tolerance = dtype, tolerance
        self._references = {order: self._reference(order) for order in ("stored", "homespun")}
        self.refused: set[str] = set()
        self.apart: dict[str, float] = {}

    def holds(self, side: Side) -> Result | None:
        """What it took; None if it failed or trained something else, now or before, which is told once."""
        if side.name in self.refused:
            return None
        task, device = TASKS[self._name], self._benchmark.choices.device
        try:
            trained = self._trained(side, device)
        except RunnerError as error:
            self._refuse(side, str(error))
            return None
        reference = self._references["homespun" if side.runner == "homespun" else "stored"]
        distance = difference(trained.weights, reference, task.initial())
        self.apart[side.name] = max(distance, self.apart.get(side.name, 0.0))
        steps = task.num_steps() * (self._rounds + 1)
        if reason := refusal(trained.result, distance, steps, self._tolerance):
            self._refuse(side, reason)
            return None
        print(f"{self._name} {side.name} {self._dtype}: {trained.result.seconds}", file=sys.stderr)
        return trained.result

    def _refuse(self, side: Side, reason: str) -> None:
        self.refused.add(side.name)
        self._benchmark.left_out.append(f"{self._name}, {side.name}, {self._dtype}: {reason}")

    def _reference(self, order: str) -> Weights:
        loop = Side(EAGER, "eager", Path(sys.executable))
        return self._trained(loop, "cpu", f"--order={order}").weights

    def _trained(self, side: Side, device: str, *more: str) -> Trained:
        weights = self._benchmark.files / "weights.npz"
        weights.unlink(missing_ok=True)
        command = side.command(self._name, self._rounds, device, weights, self._dtype)
        return train([*command, *more], weights, device)


def main() -> int:
    choices = parse_choices()
    if choices.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is to be seen here: use --device cpu", file=sys.stderr)
        return 1
    rows: list[Figure] = []
    with tempfile.TemporaryDirectory() as files:
        benchmark = Benchmark(choices, Path(files), [])
        for name in choices.tasks:
            try:
                rows += benchmark.measure(name)
            except RunnerError as error:
                benchmark.left_out.append(f"{name}: the reference: {error}")
    if choices.json:
        report(rows, choices)
    else:
        print(table(rows), end="\n\n")
        if choices.device == "cuda" or choices.cores == 1:
            print(goals(rows, ONE_GPU if choices.device == "cuda" else ONE_CORE))
    if choices.plot:
        choices.plot.write_text(plot(rows), encoding="utf-8")
    for reason in benchmark.left_out:
        print(f"REFUSED {reason}", file=sys.stderr)
    return 1 if benchmark.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
