"""How does a simulated round grow with its cohort, its population and the number of processes?

    cost of a client    rounds of 100 to 100,000 clients of the task `tiny`, a plain loop beside it where it is bearable
    memory              rounds of 100 clients out of 1,000 to 1,000,000, whose rows are memory-mapped files
    processes           rounds with one and with two: `ratio_to_floor` is 1 where two take half the time

Memory is what belongs to the process: pages of the mapped files are shown beside it, as the kernel counts them as
resident, too, but takes them back when it likes.

Each measurement is a process of its own that runs `homespun.simulate` as `./dev bench simulation` does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Options, Row, parse_options, report, rows, take_turns
from benchmarks.peers.simulation_run import Result
from benchmarks.peers.simulation_tasks import TASKS
from benchmarks.simulation import train

COHORTS = (100, 1_000, 10_000, 100_000)
POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
MOST_EAGER = 1_000
SCALED = ("tiny1k", "mlp", "cnn_s", "cnn_leaf", "cifar", "lstm256")
GOAL_PER_PROCESS = 0.9


@dataclass(frozen=True)
class Run:
    """One process: `options` are of `benchmarks.peers.simulation_run`."""

    runner: str
    task: str
    options: tuple[str, ...]

    def result(self) -> Result:
        with tempfile.TemporaryDirectory() as files:
            weights = Path(files) / "weights.npz"
            module = f"benchmarks.peers.simulation_{self.runner}"
            command = [sys.executable, "-m", module, self.task, *self.options]
            return train([*command, f"--weights={weights}"], weights, "cpu").result


def measured(runs: Mapping[str, Run], repeats: int) -> dict[str, list[Result]]:
    return take_turns(runs, Run.result, repeats, warmup=0)


def seconds(results: Mapping[str, Sequence[Result]], per: float = 1.0) -> dict[str, list[float]]:
    """Of every round, by side, divided by `per`."""
    return {
        side: [second / per for result in of_side for second in result.seconds]
        for side, of_side in results.items()
    }


def cost_per_client(cohort: int, rounds: int, repeats: int) -> list[Row]:
    options = (f"--clients={cohort}", f"--rounds={rounds}")
    runners = ("homespun", "eager") if cohort <= MOST_EAGER else ("homespun",)
    results = measured({name: Run(name, "tiny", options) for name in runners}, repeats)
    peer = "eager" if "eager" in results else None
    return rows(f"{cohort:,} clients", seconds(results, cohort), peer=peer, unit="s/client")


def memory(population: int, repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        data = TASKS["tiny"].with_clients(population).data(Path(folder))
        options = (
            f"--clients={population}",
            "--cohort=100",
            "--rounds=10",
            f"--data={folder}",
        )
        results = measured({"homespun": Run("homespun", "tiny", options)}, repeats)
    of_all = results["homespun"]
    sides = {
        "homespun": [float(result.own_bytes or result.peak_bytes) for result in of_all],
        "with pages of files": [float(result.peak_bytes) for result in of_all],
        "rows": [float(data.x.nbytes + data.y.nbytes + data.offsets.nbytes)],
    }
    case = f"100 of {population:,} clients"
    return [*rows(case, sides, unit="B"), *rows(case, seconds(results), unit="s/round")]


def processes(task: str, repeats: int) -> list[Row]:
    """Seconds times processes: equal to one process's where a second one doubles the speed."""
    runs = {
        f"{count} process{'es' if count > 1 else ''}": Run(
            "homespun", task, (f"--processes={count}",)
        )
        for count in (1, 2)
    }
    results = measured(runs, repeats)
    one, two = seconds(results).values()
    names = tuple(runs)
    spent = {names[0]: one, names[1]: [2 * second for second in two]}
    return rows(f"{task}, processes", spent, floor=names[0], unit="s x processes")


def run(options: Options) -> list[Row]:
    repeats = 1 if options.quick else 5
    found: list[Row] = []
    for cohort in COHORTS[:2] if options.quick else COHORTS:
        found += cost_per_client(cohort, 3, repeats)
    for population in POPULATIONS[:2] if options.quick else POPULATIONS:
        found += memory(population, 1 if options.quick else 3)
    for task in SCALED[:2] if options.quick else SCALED:
        found += processes(task, repeats)
    return found


def main() -> None:
    options = parse_options(__doc__)
    found = run(options)
    report(found, options)
    for row in found:
        if row.side == "2 processes" and row.ratio_to_floor and not options.json:
            reached = 1 / row.ratio_to_floor
            word = "met" if reached >= GOAL_PER_PROCESS else "missed"
            print(f"{row.case}: {reached:.2f} per process, goal {GOAL_PER_PROCESS} {word}")


if __name__ == "__main__":
    main()
