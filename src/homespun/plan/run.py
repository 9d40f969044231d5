"""Running a plan: train, evaluate, predict.

The same functions run on a phone, in a fleet of processes and in a test. Everything that could
differ is an argument: the rows, the seed that orders them, and the question whether to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from homespun import rng
from homespun.errors import InvalidInput, NumericFailure
from homespun.plan.engine import Evaluator, Predictor, Sums, Trainer
from homespun.plan.features import Rows, batches, num_rows
from homespun.plan.manifest import Manifest
from homespun.plan.package import Plan
from homespun.tensors.tree import check_finite, subtract
from homespun.types import AnyArray, FloatArray, Tree


@dataclass(frozen=True)
class Progress:
    """Where local training stands between two steps: with the plan, the checkpoint, the rows and the seed, all
    that the next step depends on.

    `state`: the optimizer's, parameters and momentum by the names of the train graph (views, valid until
    the next step); `metrics`: sums over all steps, each measured just before its step.
    """

    num_steps: int
    state: Tree
    metrics: Sums


@dataclass(frozen=True)
class TrainingResult:
    """What local training gives. `update` is local minus checkpoint, float32, not yet clipped.

    `num_examples` counts the rows used (at most `max_rows`), once however many epochs there are;
    `progress`: where it ended, which is where another call goes on if it was `interrupted`.
    """

    update: dict[str, FloatArray]
    num_examples: int
    progress: Progress
    interrupted: bool

    @property
    def num_steps(self) -> int:
        return self.progress.num_steps

    @property
    def metrics(self) -> Sums:
        return self.progress.metrics


def train(
    plan: Plan,
    checkpoint: Tree,
    rows: Mapping[str, AnyArray],
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
    trainer: Trainer | None = None,
    *,
    resume: Progress | None = None,
    after_step: Callable[[Progress], None] = lambda progress: None,
) -> TrainingResult:
    """Train locally from `checkpoint` on `rows` with the plan's client optimizer.

    `seed` orders the batches: step k sees the same batch on every machine, whatever happened
    before, so that `resume` gives what an uninterrupted run gives, to the last bit. `should_stop` is
    asked before every step, `after_step` hears of each. A `trainer` made for the same plan can be passed
    in to save loading the graph again.

    Raises InvalidInput without rows, InvalidExample for a label or token that the model cannot
    take, ShapeMismatch for another plan's checkpoint, NumericFailure when the loss or the update is
    not finite, MemoryError when there is no room for the model.
    """
    manifest = plan.manifest
    manifest.check_checkpoint(checkpoint)
    _check_rows(rows)
    trainer = trainer or Trainer(manifest, plan.graphs["train"])
    trainer.start(checkpoint, resume.state if resume else None)
    progress, interrupted = resume or Progress(0, trainer.state(), {}), False
    for batch, weight in islice(schedule(manifest, rows, seed), progress.num_steps, None):
        if interrupted := should_stop():
            break
        sums = trainer.step(batch, weight)
        if not np.isfinite(sums["loss"].sum):
            raise NumericFailure(
                f"the loss is not finite after {progress.num_steps} steps",
                hint="use a smaller learning rate, or max_grad_norm",
                step=progress.num_steps,
            )
        metrics = add_sums(progress.metrics, sums)
        progress = Progress(progress.num_steps + 1, trainer.state(), metrics)
        after_step(progress)
    update = subtract(trainer.parameters(), checkpoint)
    check_finite(update)
    return TrainingResult(
        update=update,
        num_examples=min(num_rows(rows), manifest.max_rows),
        progress=progress,
        interrupted=interrupted,
    )


def schedule(
    manifest: Manifest, rows: Mapping[str, AnyArray], seed: int
) -> Iterator[tuple[Rows, FloatArray]]:
    """All batches of one participation; each epoch has its own order of the same `max_rows` rows."""
    if num_rows(rows) > manifest.max_rows:
        chosen = rng.stream(seed, "rows").permutation(num_rows(rows))[: manifest.max_rows]
        rows = {name: array[chosen] for name, array in rows.items()}
    for epoch in range(manifest.local_epochs):
        yield from batches(rows, manifest.batch_size, rng.stream(seed, "batches", epoch))


def evaluate(
    plan: Plan,
    checkpoint: Tree,
    rows: Mapping[str, AnyArray],
    should_stop: Callable[[], bool] = lambda: False,
) -> Sums:
    """Loss and metrics of `checkpoint` on `rows`, as sums and counts.

    `should_stop` is asked before every batch; what was summed until then is returned.
    Raises InvalidInput without rows, ShapeMismatch for another plan's checkpoint, NumericFailure
    when a sum is not finite.
    """
    plan.manifest.check_checkpoint(checkpoint)
    _check_rows(rows)
    evaluator = Evaluator(plan.graphs["evaluate"], checkpoint)
    total: Sums = {}
    for batch, weight in batches(rows, plan.manifest.batch_size):
        if should_stop():
            break
        total = add_sums(total, evaluator.evaluate(batch, weight))
    bad = [name for name, value in total.items() if not np.isfinite(value.sum)]
    if bad:
        raise NumericFailure(
            f"{bad} are not finite on these rows",
            hint="the checkpoint is unusable; go back to an earlier one",
        )
    return total


def predict(plan: Plan, checkpoint: Tree, inputs: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """The predict graph's outputs by name, once; keep a `Predictor` to predict often."""
    plan.manifest.check_checkpoint(checkpoint)
    return Predictor(plan.graphs["predict"], checkpoint).predict(inputs)


def add_sums(total: Sums, more: Sums) -> Sums:
    """Element-wise sum; `total` may be empty."""
    if not total:
        return dict(more)
    return {name: total[name] + value for name, value in more.items()}


def _check_rows(rows: Mapping[str, AnyArray]) -> None:
    if not rows or num_rows(rows) == 0:
        raise InvalidInput(
            "there are no rows to work on", hint="the device needs more examples; see min_examples"
        )
