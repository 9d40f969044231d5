"""Does the simulator learn what it should? Three configurations of examples/, run as anyone runs them.

Each is trained with `homespun simulate examples/NAME.toml --resume` in .dev/bench/learning/NAME, so that a run that was
cut off goes on. The curve is drawn with people set aside for it; the figures of the table are of all people of the
test, who took part in nothing before: not in training, not in the vocabulary, not in any decision. What is judged is
the mean of the checkpoints that a run keeps: at constant rates of learning every single model has noise.

    --cases next_word,digits    some of them
    --data FOLDER               where text_ubuntu_irc.parquet, text_shakespeare_pd.parquet and
                                image_mnist_by_writer.parquet are; benchmarks/README.md says what they are
    --rounds 100                other than in the files; what is there already stays
    --plot FILE.svg             the curves, and their figures beside it in FILE.json; other cases in there stay
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.harness import Options, Row, option_parser, report, rows
from benchmarks.peers.learning_plot import Curve, plot
from benchmarks.peers.trigram import Trigram, hits, streams
from homespun.simulation.arena import Arena
from homespun.simulation.checkpoints import Checkpoints
from homespun.simulation.cohort.engine import CohortEngine
from homespun.simulation.config import Config, read_config
from homespun.simulation.history import read_history

ROOT = Path(__file__).parents[1]
EXAMPLES, RUNS = ROOT / "examples", ROOT / ".dev" / "bench" / "learning"
QUICK_ROUNDS, QUICK_CLIENTS = 3, 20
OURS = "homespun"


@dataclass(frozen=True)
class Case:
    """A configuration of examples/, its data, and what it must reach on the people of the test."""

    file: str
    goal: Mapping[str, float]


CASES = {
    "next_word": Case("text_ubuntu_irc.parquet", {"top1": 0.157, "top3": 0.262}),
    "shakespeare": Case("text_shakespeare_pd.parquet", {"top1": 0.091, "top3": 0.175}),
    "digits": Case("image_mnist_by_writer.parquet", {"top1": 0.985}),
}


@dataclass(frozen=True)
class Choices(Options):
    """The options of this benchmark."""

    cases: Sequence[str]
    data: Path
    rounds: int | None
    plot: Path | None


def parse_choices(argv: Sequence[str] | None = None) -> Choices:
    parser = option_parser(__doc__)
    parser.add_argument("--cases", type=known, default=tuple(CASES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(argv)
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else None)
    return Choices(given.quick, given.json, given.cases, given.data, rounds, given.plot)


def known(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in CASES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CASES)}")
    return chosen


@dataclass(frozen=True)
class Trial:
    """One case with its file of data, trained in `directory`."""

    name: str
    path: Path
    directory: Path
    rounds: int | None

    @property
    def changes(self) -> list[str]:
        rounds = [] if self.rounds is None else [f"simulation.rounds={self.rounds}"]
        return [f"data.settings.path={json.dumps(str(self.path))}", *rounds]

    @property
    def config(self) -> Config:
        return read_config(EXAMPLES / f"{self.name}.toml", self.changes)

    @property
    def module(self) -> ModuleType:
        """The author's, beside the file."""
        sys.path.insert(0, str(EXAMPLES))
        try:
            return importlib.import_module(self.config.task.model.partition(":")[0])
        finally:
            sys.path.remove(str(EXAMPLES))

    def train(self) -> None:
        """What is missing of it; progress goes to stderr. Raises CalledProcessError."""
        command = [sys.executable, "-m", "homespun.cli.main", "simulate"]
        command += [str(EXAMPLES / f"{self.name}.toml"), "--resume"]
        command += [f"--directory={self.directory}"]
        for change in self.changes:
            command += ["--set", change]
        # One thread: two only get in each other's way where batches are as small as on devices.
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=sys.stderr, env=environment, check=True)

    def split(self) -> tuple[Arena, Arena, Arena]:
        """To train on, for the curve, and for the test."""
        found: tuple[Arena, Arena, Arena] = self.module.split(**self.config.data.settings)
        return found

    def measured(self, test: Arena, count: int) -> dict[str, float]:
        """Loss and metrics of the mean of the last `count` checkpoints."""
        task = self.module.task(**self.config.task.settings)
        checkpoints = Checkpoints(self.directory / "checkpoints")
        models = [checkpoints.load(number).model for number in checkpoints.rounds()[-count:]]
        names = [name for name, _ in task.model.named_parameters()]
        mean = [np.mean([model[name] for model in models], 0).reshape(-1) for name in names]
        sums = CohortEngine(task, test).evaluate(torch.from_numpy(np.concatenate(mean)))
        return {name: value.mean for name, value in sums.items()}

    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """Round -> measurements, where there are some."""
        history = read_history(self.directory / "history.jsonl")
        return [(record.round, record.evaluation) for record in history if record.evaluation]


def figures(trial: Trial, quick: bool) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Who -> its metrics on the people of the test."""
    trial.train()
    training, _, test = trial.split()
    if quick:
        test = test.subset(range(min(test.num_clients, QUICK_CLIENTS)))
    yield OURS, trial.measured(test, trial.config.simulation.keep)
    if trial.name != "digits":
        counted = Trigram(streams(training))
        for side, tokens in (("trigram", 2), ("bigram", 1), ("commonest words", 0)):
            yield side, hits(counted, streams(test), tokens)


def table(name: str, found: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """A row for every metric and side, in per cent."""
    everything = {**found, "goal": CASES[name].goal}
    return [
        row
        for metric in CASES[name].goal
        for row in rows(
            f"{name} {metric}",
            {side: [100 * values[metric]] for side, values in everything.items()},
            unit="%",
        )
    ]


def draw(path: Path, curves: Mapping[str, Curve]) -> None:
    """The plot and its figures; cases that were not run now stay as they are there."""
    kept = path.with_suffix(".json")
    before = json.loads(kept.read_text()) if kept.exists() else {}
    both = {name: Curve(**values) for name, values in before.items()} | dict(curves)
    ordered = {name: both[name] for name in CASES if name in both}
    plain = {name: curve.as_dict() for name, curve in ordered.items()}
    lines = ",\n".join(f'"{name}": {json.dumps(curve)}' for name, curve in plain.items())
    kept.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    path.write_text(plot(ordered), encoding="utf-8")


def main() -> int:
    choices = parse_choices()
    torch.set_num_threads(1)
    result: list[Row] = []
    curves: dict[str, Curve] = {}
    for name in choices.cases:
        path = choices.data / CASES[name].file
        if not path.is_file():
            print(f"{name}: there is no {path}; see benchmarks/README.md", file=sys.stderr)
            return 1
        folder = RUNS / (f"{name}-quick" if choices.quick else name)
        trial = Trial(name, path.resolve(), folder, choices.rounds)
        found = {side: dict(values) for side, values in figures(trial, choices.quick)}
        result += table(name, found)
        curves[name] = Curve(trial.curve(), found, CASES[name].goal)
    report(result, choices)
    if choices.plot:
        draw(choices.plot, curves)
    missed = [
        f"{name} {metric}"
        for name, curve in curves.items()
        for metric, goal in curve.goal.items()
        if curve.test[OURS][metric] < goal
    ]
    for miss in missed:
        print(f"BELOW ITS GOAL {miss}", file=sys.stderr)
    return 1 if missed and not choices.quick else 0


if __name__ == "__main__":
    sys.exit(main())
