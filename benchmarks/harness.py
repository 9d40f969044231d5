"""What every benchmark shares: fair timing, peak memory, environments for peers, and one format of results.

options = parse_options(__doc__)
timings = alternate({"numpy": add, "homespun": sum_contributions}, repeats=5 if options.quick else 25)
report(rows("sum 1e6", timings, floor="numpy"), options)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

Side = TypeVar("Side")
Result = TypeVar("Result")

ENVIRONMENTS = Path(__file__).parents[1] / ".dev" / "bench"


@dataclass(frozen=True)
class Options:
    """What every benchmark understands."""

    quick: bool
    json: bool


@dataclass(frozen=True)
class Row:
    """One side of one case. Ratios are of medians: `ratio_to_floor` times the floor, `ratio_to_peer` times
    better than the peer.
    """

    case: str
    side: str
    median: float
    unit: str
    ratio_to_floor: float | None
    peer: str | None
    ratio_to_peer: float | None
    raw: tuple[float, ...]


@dataclass(frozen=True)
class ChildRun:
    """A finished process: wall time, and the largest resident memory of it or of a child it waited for."""

    wall_s: float
    peak_bytes: int
    stdout: str


def parse_options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Options from the command line."""
    arguments = option_parser(description).parse_args(argv)
    return Options(quick=arguments.quick, json=arguments.json)


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """For a benchmark that adds options of its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small and short, to see that it works"
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")
    return parser


def alternate(
    sides: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds per call, `repeats` for each side, the sides taking turns (A B, B A, A B, ...)."""

    def seconds(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return take_turns(sides, seconds, repeats, warmup)


def alternate_commands(
    sides: Mapping[str, Sequence[str]], *, repeats: int, warmup: int = 1
) -> dict[str, list[ChildRun]]:
    """The same with processes: each side is a command line."""
    return take_turns(sides, run_child, repeats, warmup)


def take_turns(
    sides: Mapping[str, Side], measure: Callable[[Side], Result], repeats: int, warmup: int
) -> dict[str, list[Result]]:
    """`measure(side)` as often as `repeats` says, the sides in order, then in reverse order, and so on."""
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for turn in range(-warmup, repeats):
        names = list(sides)
        for name in names if turn % 2 == 0 else reversed(names):
            result = measure(sides[name])
            if turn >= 0:
                results[name].append(result)
    return results


# A process inherits the high-water mark of the one it was forked from. So a small launcher stands between
# a benchmark, which may be large, and the command that it measures.
_LAUNCHER = """
import resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.call(sys.argv[1:])
wall_s = time.perf_counter() - began
unit = 1 if sys.platform == "darwin" else 1024
peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
print(f"\\n{wall_s} {peak_bytes}")
sys.exit(status)
"""


def run_child(argv: Sequence[str]) -> ChildRun:
    """Runs a command to its end. Raises CalledProcessError, with its output, if it fails."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *argv],
        capture_output=True,
        text=True,
        check=True,
    )
    stdout, _, figures = done.stdout.removesuffix("\n").rpartition("\n")
    wall_s, peak_bytes = figures.split()
    return ChildRun(wall_s=float(wall_s), peak_bytes=int(peak_bytes), stdout=stdout)


def rows(
    case: str,
    measurements: Mapping[str, Sequence[float]],
    *,
    floor: str | None = None,
    peer: str | None = None,
    unit: str = "s",
) -> list[Row]:
    """A row for each side; `floor` and `peer` name sides to compare with."""
    medians = {side: statistics.median(values) for side, values in measurements.items()}
    return [
        Row(
            case=case,
            side=side,
            median=medians[side],
            unit=unit,
            ratio_to_floor=medians[side] / medians[floor] if floor else None,
            peer=peer,
            ratio_to_peer=medians[peer] / medians[side] if peer else None,
            raw=tuple(values),
        )
        for side, values in measurements.items()
    ]


def report(results: Sequence[Row], options: Options) -> None:
    """Prints the rows, for people or as JSON lines."""
    if options.json:
        for row in results:
            print(json.dumps(asdict(row)))
        return
    print("| case | side | median | x floor | x better than peer |\n|---|---|---|---|---|")
    for row in results:
        ratios = (
            f"{r:.2f}" if r is not None else "" for r in (row.ratio_to_floor, row.ratio_to_peer)
        )
        print(f"| {row.case} | {row.side} | {row.median:.4g} {row.unit} | {' | '.join(ratios)} |")


def peer_python(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of an environment that holds `requirements`, made on first use; what pip said is in a log beside
    it. Raises CalledProcessError if pip fails.
    """
    key = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()
    home = ENVIRONMENTS / name
    ready = home / "ready"
    python = home / "bin" / "python"
    if not ready.exists() or ready.read_text() != key:
        venv.create(home, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--no-input", *requirements]
        with home.with_suffix(".log").open("w") as log:
            subprocess.run(pip, check=True, stdout=log, stderr=subprocess.STDOUT)
        ready.write_text(key)
    return python
