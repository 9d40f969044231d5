"""Task descriptions: what an operator asks of a population. The same record in TOML, JSON and the database."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from homespun.errors import InvalidConfig
from homespun.learning.contribution import MAX_GROUP, ContributionCodec
from homespun.learning.optimizers import server_optimizer
from homespun.protocol import criteria
from homespun.protocol.eligibility import CONDITIONS
from homespun.protocol.group import group_size
from homespun.protocol.messages import (
    Aggregation,
    Bits,
    Count,
    Criteria,
    Message,
    Mode,
    Name,
    Positive,
    RetryWindow,
    Seconds,
    Sha256,
    TaskKind,
    Watch,
)
from homespun.protocol.round import cohort_size
from homespun.secagg.graph import Adversary, choose_shape
from homespun.secagg.messages import Fraction

MAX_NEIGHBOURS = 500
"""Of a device in its group. Each costs it a key agreement, a mask over the whole vector, and a share to send."""


class OptimizerSpec(Message, frozen=True, kw_only=True):
    """A server optimizer and its settings. `name`: which one; `settings`: those that differ from its defaults."""

    name: str = "FedAvg"
    settings: dict[str, float] = {}


class GroupSpec(Message, frozen=True, kw_only=True):
    """How securely aggregated reports are grouped and how well a group is protected.

    `size`: most devices of a group; `step_s`: longest that a step waits for its devices; `corrupt_fraction`:
    share of the devices that may work together with a server that lies about who survived (devices insist on
    0.05); `drop_out_fraction`: share that may be lost in groups of more than 64 (smaller ones bear just under a
    third).
    """

    size: Annotated[int, Meta(ge=3, le=10_000)] = 100
    step_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    corrupt_fraction: Annotated[float, Meta(ge=0.05, lt=1)] = 0.1
    drop_out_fraction: Fraction = 0.2


class TaskSpec(Message, frozen=True, kw_only=True):
    """One computation for one population.

    `name`: of the task; `checkpoints`: the initial one to train from, or those to evaluate (candidate,
    incumbent, others); `num_rounds`: committed rounds after which it is finished; `goal`: reports that close
    a round; `minimum`: fewest reports that are used at all; `over_selection`: devices drawn per report wanted
    (null: as few as reach the goal 99 times of 100, by what became of those drawn before); `max_over_selection`: bound
    of that; `pool_target`: waiting devices that end the window early (0: it always runs out); `selection_s`:
    window in which devices gather before the draw, async: in which free places are to be filled; `deadline_s`: from the
    draw, async: from being let in, to the end of waiting;
    `retry`: when devices that were not drawn come back (null: steered by what the population's tasks need);
    `share`: of the devices, next to that of the population's other tasks; `aggregation`: plain only if the server may
    see single reports; `min_group`: fewest contributions that are ever decoded together; `groups`: of secure
    aggregation; `bits`: of a word of the encoding; `rotate`: spread every update evenly over its entries before
    rounding, for few bits; `optimizer`: the server's step, of train tasks; `seed`: of the draws and of training;
    `mode`: rounds (each draws a cohort) or async (devices are let in at any time, and every full group is one update);
    `concurrency`: async only, most devices at work at once; `max_staleness`: most rounds that may be committed
    between the one a device was assigned in and the one its report goes into (0: it is late when its round closes);
    `difference_clip`: of evaluate tasks, largest difference between two models that a device reports; `watch`: of
    evaluate tasks that ask how the model does that devices serve.
    """

    name: Name
    population: Name
    kind: TaskKind
    plan_hash: Sha256
    checkpoints: Annotated[tuple[Sha256, ...], Meta(min_length=1, max_length=8)]
    num_rounds: Positive = 1
    goal: Positive
    minimum: Positive
    over_selection: Annotated[float, Meta(ge=1, le=10)] | None = None
    max_over_selection: Annotated[float, Meta(ge=1, le=10)] = 2.0
    pool_target: Count = 0
    selection_s: Seconds = 60.0
    deadline_s: Annotated[float, Meta(gt=0, le=1e9)] = 600.0
    retry: RetryWindow | None = None
    share: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    criteria: Criteria = Criteria()
    aggregation: Aggregation = Aggregation.SECURE
    min_group: Annotated[int, Meta(ge=3, lt=2**16)] = 10
    groups: GroupSpec = GroupSpec()
    bits: Bits = 16
    rotate: bool = True
    optimizer: OptimizerSpec = OptimizerSpec()
    seed: Count = 0
    difference_clip: Annotated[float, Meta(gt=0, le=1)] = 0.1
    watch: Watch | None = None
    mode: Mode = Mode.ROUNDS
    concurrency: Annotated[int, Meta(ge=0, le=10_000)] = 0
    max_staleness: Annotated[int, Meta(ge=0, le=1_000)] = 0

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
        if self.watch is not None and self.kind is not TaskKind.EVALUATE:
            raise InvalidConfig("only an evaluation can watch a release", got=str(self.kind))
        if self.kind is TaskKind.ANALYZE:
            raise InvalidConfig("analyze tasks are not available yet", hint="use train or evaluate")
        if self.aggregation is Aggregation.SECURE:
            self._validate_groups()
        if self.max_staleness > 0 and (
            self.aggregation is Aggregation.PLAIN or self.kind is not TaskKind.TRAIN
        ):
            raise InvalidConfig(
                "only the reports of securely aggregated training can go into a later round",
                hint='leave max_staleness at 0, or use aggregation = "secure" and kind = "train"',
                got=self.max_staleness,
            )
        if self.is_async:
            self._validate_async()
        elif self.concurrency:
            raise InvalidConfig(
                "concurrency is for async tasks",
                hint="over_selection says how many devices a round draws",
                got=self.concurrency,
            )
        if self.retry is not None and self.retry.latest_s < self.retry.earliest_s:
            raise InvalidConfig("retry window ends before it begins", got=self.retry.latest_s)
        if unknown := [name for name in self.criteria.requires if name not in CONDITIONS]:
            raise InvalidConfig(
                f"no device can measure the condition {unknown[0]!r}",
                hint=f"one of: {', '.join(CONDITIONS)}",
            )
        criteria.validate(self.criteria)
        bucket = self.criteria.bucket
        if bucket is not None and bucket.low >= bucket.high:
            raise InvalidConfig(
                "the bucket is empty", expected=f"high above {bucket.low}", got=bucket.high
            )
        server_optimizer(self.optimizer.name, self.optimizer.settings)
        if self.cohort_size > MAX_GROUP:
            raise InvalidConfig(
                "the cohort is too large for one round",
                expected=f"<= {MAX_GROUP}",
                got=self.cohort_size,
            )
        # The plan adds dimension, clip bound and metrics; whether a group fits the words shows here.
        ContributionCodec(
            dimension=0,
            clip_norm=1.0,
            max_weight=0,
            metrics=(),
            max_group=self.max_group,
            bits=self.bits,
        )

    def _validate_async(self) -> None:
        if self.max_staleness == 0:
            raise InvalidConfig(
                "an async task needs max_staleness",
                hint="devices start from different checkpoints; say how many rounds they may be apart",
                expected=">= 1",
                got=0,
            )
        if self.concurrency < self.goal:
            raise InvalidConfig(
                "fewer devices at once than an update is made of",
                expected=f"concurrency >= {self.goal}",
                got=self.concurrency,
            )
        if self.groups.size < self.goal:
            raise InvalidConfig(
                "an async update is the sum of one group",
                expected=f"groups.size >= {self.goal}",
                got=self.groups.size,
            )

    def _validate_groups(self) -> None:
        groups = self.groups
        if groups.size < self.min_group:
            raise InvalidConfig(
                "groups.size is below min_group", expected=f">= {self.min_group}", got=groups.size
            )
        rest = self.goal % self.max_group
        certain = self.goal - (rest if rest < self.min_group else 0)
        if self.minimum > certain:
            raise InvalidConfig(
                f"groups of {self.max_group} may leave {rest} devices over, too few for a group",
                hint="make groups.size fit the goal, or minimum smaller",
                expected=f"minimum <= {certain}",
                got=self.minimum,
            )
        shape = choose_shape(
            self.max_group,
            groups.corrupt_fraction,
            groups.drop_out_fraction,
            Adversary.SEMI_MALICIOUS,
        )
        if shape.degree > MAX_NEIGHBOURS:
            raise InvalidConfig(
                "every device would have too many neighbours",
                hint="make groups.size, corrupt_fraction or drop_out_fraction smaller",
                expected=f"<= {MAX_NEIGHBOURS}",
                got=shape.degree,
            )

    @property
    def is_async(self) -> bool:
        return self.mode is Mode.ASYNC

    @property
    def assignment_s(self) -> float:
        """Longest that a device is waited for: through every round that its report may still go into."""
        return self.deadline_s * (1 if self.is_async else 1 + self.max_staleness)

    @property
    def cohort_size(self) -> int:
        """Devices that are drawn, at the most."""
        return cohort_size(self.goal, self.over_selection or self.max_over_selection)

    @property
    def max_group(self) -> int:
        """Most contributions in one sum: the whole cohort, or one group of secure aggregation."""
        if self.aggregation is Aggregation.PLAIN:
            return self.cohort_size
        return max(self.min_group, group_size(self.goal, self.groups.size))

    def pool_size(self, num_wanted: int | None = None) -> int:
        """Waiting devices that end the selection window early, at least as many as are drawn; 0: none do."""
        return max(self.pool_target, num_wanted or self.cohort_size) if self.pool_target else 0


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
