"""Task descriptions: what an operator asks of a population. The same record in TOML, JSON and the database."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from homespun.errors import InvalidConfig
from homespun.learning.contribution import ContributionCodec
from homespun.learning.optimizers import server_optimizer
from homespun.protocol.eligibility import CONDITIONS
from homespun.protocol.messages import (
    Aggregation,
    Count,
    Criteria,
    Message,
    Name,
    Positive,
    RetryWindow,
    Seconds,
    Sha256,
    TaskKind,
)
from homespun.protocol.round import cohort_size


class OptimizerSpec(Message, frozen=True, kw_only=True):
    """A server optimizer and its settings. `name`: which one; `settings`: those that differ from its defaults."""

    name: str = "FedAvg"
    settings: dict[str, float] = {}


class TaskSpec(Message, frozen=True, kw_only=True):
    """One computation for one population.

    `name`: of the task; `checkpoints`: the initial one to train from, or those to evaluate (candidate,
    incumbent, others); `num_rounds`: committed rounds after which it is finished; `goal`: reports that close
    a round; `minimum`: fewest reports that are used at all; `over_selection`: devices drawn per report wanted;
    `pool_target`: waiting devices that end the window early (0: it always runs out); `selection_s`:
    window in which devices gather before the draw; `deadline_s`: from the draw to the end of waiting;
    `retry`: when devices that were not drawn come back; `min_group`: fewest contributions that are ever
    decoded together; `bits`: of a word of the encoding; `optimizer`: the server's step, of train tasks;
    `seed`: of the draws and of training.
    """

    name: Name
    population: Name
    kind: TaskKind
    plan_hash: Sha256
    checkpoints: Annotated[tuple[Sha256, ...], Meta(min_length=1, max_length=8)]
    num_rounds: Positive = 1
    goal: Positive
    minimum: Positive
    over_selection: Annotated[float, Meta(ge=1, le=10)] = 1.3
    pool_target: Count = 0
    selection_s: Seconds = 60.0
    deadline_s: Annotated[float, Meta(gt=0, le=1e9)] = 600.0
    retry: RetryWindow = RetryWindow(earliest_s=60.0, latest_s=300.0)
    criteria: Criteria = Criteria()
    aggregation: Aggregation = Aggregation.PLAIN
    min_group: Positive = 3
    bits: Literal[16, 32] = 32
    optimizer: OptimizerSpec = OptimizerSpec()
    seed: Count = 0

    def validate(self) -> None:
        """Raise `InvalidConfig` for values that cannot go together."""
        if self.minimum > self.goal:
            raise InvalidConfig(
                "minimum is above goal", expected=f"<= {self.goal}", got=self.minimum
            )
        if self.minimum < self.min_group:
            raise InvalidConfig(
                "minimum is below min_group: a sum over so few devices says too much about one",
                expected=f">= {self.min_group}",
                got=self.minimum,
            )
        if self.kind is TaskKind.TRAIN and len(self.checkpoints) != 1:
            raise InvalidConfig(
                "a training task starts from one checkpoint", got=len(self.checkpoints)
            )
        if self.kind is TaskKind.ANALYZE:
            raise InvalidConfig("analyze tasks are not available yet", hint="use train or evaluate")
        if self.aggregation is Aggregation.SECURE:
            raise InvalidConfig(
                "secure aggregation is not available yet", hint='set aggregation = "plain"'
            )
        if self.retry.latest_s < self.retry.earliest_s:
            raise InvalidConfig("retry window ends before it begins", got=self.retry.latest_s)
        if unknown := [name for name in self.criteria.requires if name not in CONDITIONS]:
            raise InvalidConfig(
                f"no device can measure the condition {unknown[0]!r}",
                hint=f"one of: {', '.join(CONDITIONS)}",
            )
        bucket = self.criteria.bucket
        if bucket is not None and bucket.low >= bucket.high:
            raise InvalidConfig(
                "the bucket is empty", expected=f"high above {bucket.low}", got=bucket.high
            )
        server_optimizer(self.optimizer.name, self.optimizer.settings)
        # The plan adds dimension, clip bound and metrics; whether the cohort fits the words shows here.
        ContributionCodec(
            dimension=0,
            clip_norm=1.0,
            max_weight=0,
            metrics=(),
            max_group=self.cohort_size,
            bits=self.bits,
        )

    @property
    def cohort_size(self) -> int:
        return cohort_size(self.goal, self.over_selection)

    @property
    def pool_size(self) -> int:
        """Waiting devices that end the selection window early, at least as many as are drawn; 0: none do."""
        return max(self.pool_target, self.cohort_size) if self.pool_target else 0


def parse(data: object) -> TaskSpec:
    """A task from plain data (TOML, JSON). Raises `InvalidConfig` naming the field that is wrong."""
    try:
        spec = msgspec.convert(data, TaskSpec)
    except msgspec.ValidationError as error:
        raise InvalidConfig(
            f"task description: {error}", hint="see docs/reference/task.md"
        ) from error
    spec.validate()
    return spec
