"""How fast is one training step on a device, and what does it cost in memory and loading?

ONNX Runtime against PyTorch eager on the same batch: the model, loss, clipping and SGD as anybody would
write them in PyTorch. Steps alternate in this process with one thread; peak memory is of processes of
their own, one that never sees PyTorch and one that never sees ONNX Runtime. Rows named `step` are seconds
per step, `process` the peak of a process that trains, `load` the seconds until the first step can run.

Needs the `author` extra (PyTorch) in this environment.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Row, alternate, parse_options, report, rows, run_child
from homespun import zoo
from homespun.plan.initial import initial_checkpoint
from homespun.plan.manifest import Manifest, TextFeature
from homespun.plan.package import Plan
from homespun.types import AnyArray

CASES = ("keyboard", "keyboard_2018", "digits")
CHILD_STEPS = 20


def example_batch(manifest: Manifest) -> dict[str, AnyArray]:
    """Random rows for the plan's inputs, every position counting."""
    draw = np.random.default_rng(0)
    text = next((f for f in manifest.features if isinstance(f, TextFeature)), None)
    largest = text.vocabulary_size if text else 10
    smallest = 16 if text else 0  # ids of words
    return {
        spec.name: draw.random(spec.shape, np.float32)
        if spec.dtype == "float32"
        else draw.integers(smallest, largest, spec.shape, np.int32)
        for spec in manifest.inputs
    }


def onnx_step(directory: Path) -> Callable[[], object]:
    """A call that makes one step of the plan in `directory`."""
    from homespun.plan.engine import Trainer  # only here: PyTorch's process must not load it

    plan = Plan.read(directory)
    trainer = Trainer(plan.manifest, plan.graphs["train"])
    trainer.start(initial_checkpoint(plan.manifest, 0))
    batch = example_batch(plan.manifest)
    weight = np.ones(plan.manifest.batch_size, np.float32)
    return lambda: trainer.step(batch, weight)


def torch_step(case: str, batch: dict[str, AnyArray]) -> Callable[[], object]:
    """A call that makes the same step in PyTorch eager. Metrics cost nothing here: there are none."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_

    from homespun.zoo import models

    torch.set_num_threads(1)
    x, y = torch.from_numpy(batch["x"]), torch.from_numpy(batch["y"]).long()
    model: torch.nn.Module
    if case == "digits":
        model = models.Digits()
    else:
        x = x.long()
        model = models.NextWord(models.DEMO if case == "keyboard" else models.HARD_2018)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        sgd.zero_grad()
        loss: torch.Tensor = cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), 5.0)
        sgd.step()

    return step


@contextmanager
def plans(cases: tuple[str, ...]) -> Iterator[dict[str, Path]]:
    """A directory with the plan of each case; the large keyboard is built, the others are shipped."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for case in cases:
            found[case] = Path(folder) / case
            if case == "keyboard_2018":
                from homespun.zoo import keyboard, models

                keyboard.build(models.HARD_2018, case).write(found[case])
            else:
                zoo.load(case).write(found[case])
        yield found


def measure(case: str, directory: Path, options: Options) -> list[Row]:
    """Speed of a step, peak memory of a process, and loading."""
    manifest = Plan.read(directory).manifest
    steps = alternate(
        {
            "homespun": onnx_step(directory),
            "pytorch": torch_step(case, example_batch(manifest)),
        },
        repeats=10 if options.quick else 100,
        warmup=3,
    )
    repeats = 1 if options.quick else 3
    children = {
        side: [
            run_child(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.device_step",
                    "child",
                    side,
                    case,
                    str(directory),
                ]
            )
            for _ in range(repeats)
        ]
        for side in ("homespun", "pytorch")
    }
    peaks = {side: [run.peak_bytes / 2**20 for run in done] for side, done in children.items()}
    loads = {side: [float(run.stdout) for run in done] for side, done in children.items()}
    return [
        *rows(f"{case} step", steps, peer="pytorch"),
        *rows(f"{case} process", peaks, peer="pytorch", unit="MiB"),
        *rows(f"{case} load", loads, peer="pytorch"),
    ]


def child(side: str, case: str, directory: Path) -> None:
    """Train a few steps in a process of its own; print the seconds that loading took."""
    batch = example_batch(Plan.read(directory).manifest)
    began = time.perf_counter()
    step = onnx_step(directory) if side == "homespun" else torch_step(case, batch)
    print(time.perf_counter() - began)
    for _ in range(CHILD_STEPS):
        step()


def main() -> None:
    options = parse_options(__doc__)
    cases = tuple(case for case in CASES if not (options.quick and case == "keyboard_2018"))
    with plans(cases) as directories:
        results = [row for case in cases for row in measure(case, directories[case], options)]
    report(results, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main()
