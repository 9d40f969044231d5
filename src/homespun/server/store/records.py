"""What the transactions return: plain records, never rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from typing import Any

import msgspec
from sqlalchemy import Row

from homespun.protocol.group import GroupState, GroupView
from homespun.protocol.messages import Receipt
from homespun.protocol.release import (
    ReleaseState,
)
from homespun.protocol.release_request import (
    ReleaseRequest,
)
from homespun.protocol.round import RoundState, RoundView
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import MetricView, ReleaseView, TaskState, TaskView
from homespun.server.store.schema import tasks
from homespun.types import Hash


@dataclass(frozen=True)
class DeviceRecord:
    """Who may sign requests. `public_key`: raw Ed25519."""

    device_id: str
    public_key: bytes
    populations: frozenset[str]


@dataclass(frozen=True)
class TaskRecord:
    """A task with what only the server needs: the chain's hash and the optimizer's state."""

    task_id: str
    spec: TaskSpec
    state: TaskState
    reason: str
    created_at: float
    rounds_committed: int
    head: Hash
    chain: Hash
    optimizer_state: Hash | None

    @property
    def view(self) -> TaskView:
        return TaskView(
            task_id=self.task_id,
            spec=self.spec,
            state=self.state,
            created_at=self.created_at,
            rounds_committed=self.rounds_committed,
            head=self.head,
            reason=self.reason,
        )


@dataclass(frozen=True)
class NewTask:
    """A task to create. `chain`: the hash chain at its initial checkpoint."""

    task_id: str
    spec: TaskSpec
    chain: Hash


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """Totals over a cohort."""

    weight: float | None = None
    clipped_share: float | None = None
    metrics: dict[str, MetricView] = {}


@dataclass(frozen=True)
class RoundRecord:
    """A live round: what `protocol.round.due` looks at, and what its events need.

    `num_wanted`: devices to draw; `sums`: snapshots of what was added up, of the whole round or of each opened group.
    """

    round_id: int
    task: TaskRecord
    number: int
    attempt: int
    base: Hash
    num_wanted: int
    sums: tuple[Hash, ...]
    checkpoint: Hash | None
    view: RoundView


@dataclass(frozen=True)
class GroupRecord:
    """A group that is not over: what `protocol.group.due` looks at, and what its events need."""

    group_id: int
    round_id: int
    task: TaskRecord
    round_number: int
    attempt: int
    base: Hash
    snapshot: Hash | None
    view: GroupView


@dataclass(frozen=True)
class GroupCounts:
    """How many devices took each step so far; the names are columns of `schema.groups`."""

    num_devices: int
    num_shared: int
    num_masked: int
    num_agreed: int
    num_unmasked: int


@dataclass(frozen=True)
class GroupChange:
    """What a group commit makes durable.

    `state`: after it, with `deadline_at` if it is another one; `joined`: assignments that joined; `digests`:
    receipt id -> digest of the masked reports that are in the sum now.
    """

    state: GroupState
    counts: GroupCounts
    deadline_at: float | None = None
    joined: tuple[str, ...] = ()
    digests: Mapping[Hash, Hash] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A device is in the cohort: its ticket, what it starts from until when; `is_new`: it was let in just now."""

    assignment_id: str
    base: Hash
    expires_at: float
    is_new: bool = False


@dataclass(frozen=True)
class Gathered:
    """A claim that waits; `due`: the draw may be made now; `is_new`: the device did not wait before."""

    due: bool
    is_new: bool = False


@dataclass(frozen=True)
class TurnedAway:
    """A claim that came to nothing; `reason` as in `messages.Rejected`."""

    reason: str


ClaimAnswer = Drawn | Gathered | TurnedAway


@dataclass(frozen=True)
class Expectation:
    """An assignment as the server knows it before a body is read.

    `origin`: the round that it was given in; `number`: the one that it is in now; `base`: of that one; `deadline_at`:
    of that one; `expires_at`: of the assignment itself; `has_heard`: that it is late.
    """

    round_id: int
    task: TaskRecord
    number: int
    attempt: int
    base: Hash
    state: RoundState
    deadline_at: float
    expires_at: float
    origin: int
    is_carried: bool
    group_id: int | None
    receipt: Receipt
    has_heard: bool = False


@dataclass(frozen=True)
class Recorded:
    """A group of reports is durable; `due`: the round may close now."""

    due: bool


@dataclass(frozen=True)
class Refused:
    """Nothing was written: these reports are not expected any more; none named: the stored sum is another."""

    receipt_ids: frozenset[Hash]


@dataclass(frozen=True)
class Trained:
    """What aggregation made, ready to be committed. `checkpoint` is None for an evaluation."""

    checkpoint: Hash | None
    chain: Hash | None
    optimizer_state: Hash | None
    result: RoundResult


@dataclass(frozen=True)
class ReleaseRecord:
    """A release. `sequence`, `fraction`: of its newest manifest; `incumbent`: the release that it replaces."""

    release_id: str
    request: ReleaseRequest
    state: ReleaseState
    held_from: ReleaseState | None
    stage: int
    since: float
    incumbent_id: str | None
    incumbent_checkpoint: Hash | None
    reason: str
    sequence: int | None
    fraction: float | None
    created_at: float

    @property
    def evaluation_name(self) -> str:
        """Of the server's own evaluation task. Devices remember names: none takes part twice in one release."""
        return f"evaluate-{self.release_id}"

    @property
    def watch_name(self) -> str:
        return f"watch-{self.release_id}"

    def task(self, state: ReleaseState) -> TaskSpec | None:
        """The task that runs while the release is in `state`."""
        request = self.request
        if state in (ReleaseState.CANARY, ReleaseState.RAMP):
            return request.watch_task(self.watch_name, self.release_id)
        if state is not ReleaseState.EVALUATING or request.evaluation_task_id is not None:
            return None
        if self.incumbent_checkpoint is None:
            return None
        return request.evaluation_task(self.evaluation_name, self.incumbent_checkpoint)

    @property
    def view(self) -> ReleaseView:
        request = self.request
        return ReleaseView(
            release_id=self.release_id,
            population=request.population,
            slot=request.slot,
            version=request.version,
            state=self.state,
            plan_hash=request.plan_hash,
            checkpoint=request.checkpoint,
            created_at=self.created_at,
            since=self.since,
            request=request,
            sequence=self.sequence,
            fraction=self.fraction,
            stage=self.stage,
            held_from=self.held_from,
            incumbent_id=self.incumbent_id,
            reason=self.reason,
        )


def or_never(at: float | None) -> float:
    """A stored deadline; there is none where devices come and go at any time."""
    return inf if at is None else at


@lru_cache(maxsize=1024)
def decode_spec(text: str) -> TaskSpec:
    """A stored description; descriptions never change."""
    return msgspec.json.decode(text, type=TaskSpec)


def task_record(row: Row[Any], prefix: str = "") -> TaskRecord:
    """A task from a row that holds all columns of `schema.tasks`, named with `prefix`."""
    value = {column.name: getattr(row, prefix + column.name) for column in tasks.columns}
    return TaskRecord(
        task_id=value["task_id"],
        spec=decode_spec(value["spec"]),
        state=TaskState(value["state"]),
        reason=value["reason"],
        created_at=value["created_at"],
        rounds_committed=value["rounds_committed"],
        head=value["head"],
        chain=value["chain"],
        optimizer_state=value["optimizer_state"],
    )
