"""What the operator's side of the server shows: cohorts only, never one device.

The server writes these records, the command line and the dashboard read them.
"""

from __future__ import annotations

from enum import StrEnum

from homespun.protocol.group import GroupState
from homespun.protocol.messages import Message, Name, Sha256, TaskKind
from homespun.protocol.release import (
    Finding,
    ReleaseState,
)
from homespun.protocol.release_request import (
    ReleaseRequest,
)
from homespun.protocol.round import RoundState
from homespun.protocol.tasks import TaskSpec


class TaskState(StrEnum):
    ACTIVE = "active"
    FINISHED = "finished"
    HALTED = "halted"
    STOPPED = "stopped"


class MetricView(Message, frozen=True, kw_only=True):
    """`sum` over `count` elements of all contributions of a round."""

    sum: float
    count: float


class GroupSummary(Message, frozen=True, kw_only=True):
    """One group of a securely aggregated round.

    `num_devices`: that joined; `num_shared`: of them, that shared their keys; `num_masked`: whose reports are in the
    sum; `num_agreed`: that signed who is in it; `num_unmasked`: that helped to open it (no more than needed).
    """

    number: int
    state: GroupState
    num_devices: int
    num_shared: int
    num_masked: int
    num_agreed: int
    num_unmasked: int
    reason: str = ""


class RoundSummary(Message, frozen=True, kw_only=True):
    """One round attempt. `metrics` by name; `clipped_share`: updates that met the clip bound.

    `num_assigned`: devices that were given a place in it; `num_carried`: stragglers of earlier rounds that may join.
    """

    task_id: str
    task_name: str
    kind: TaskKind
    round_number: int
    attempt: int
    state: RoundState
    opened_at: float | None = None
    selected_at: float | None = None
    closed_at: float | None = None
    committed_at: float | None = None
    deadline_at: float | None = None
    num_waiting: int = 0
    num_assigned: int = 0
    num_carried: int = 0
    num_reported: int = 0
    num_late: int = 0
    goal: int = 0
    base_checkpoint: Sha256 | None = None
    checkpoint: Sha256 | None = None
    reason: str = ""
    weight: float | None = None
    clipped_share: float | None = None
    metrics: dict[str, MetricView] = {}
    groups: tuple[GroupSummary, ...] = ()


class TaskView(Message, frozen=True, kw_only=True):
    """A task and how far it is. `head`: its newest checkpoint; `reason`: why it was halted."""

    task_id: str
    spec: TaskSpec
    state: TaskState
    created_at: float
    rounds_committed: int
    head: Sha256
    reason: str = ""


class CheckpointView(Message, frozen=True, kw_only=True):
    """A checkpoint in its chain; `chain` is the hash over (parent's chain, hash, round)."""

    hash: Sha256
    plan_hash: Sha256
    parent: Sha256 | None = None
    chain: str = ""
    task_name: str | None = None
    round_number: int | None = None
    created_at: float
    size_bytes: int


class Evidence(Message, frozen=True, kw_only=True):
    """Paired comparison on other devices, primary metric.

    `wins`: devices where the candidate was better; `candidate`, `incumbent`: their metric over all examples of all
    devices; `difference`: what the gate makes of the differences of the devices.
    """

    task_id: str
    metric: str
    num_devices: int
    wins: int
    candidate: float
    incumbent: float
    difference: Finding


class ReleaseStep(Message, frozen=True, kw_only=True):
    """One step of a release: where it led, when, why, and what was known then. `stage`: from 0."""

    at: float
    state: ReleaseState
    stage: int
    reason: str
    findings: tuple[Finding, ...] = ()


class ReleaseView(Message, frozen=True, kw_only=True):
    """A release and why it is where it is.

    `sequence`: of its newest manifest; `fraction`: share of the devices that it was last published for; `held_from`:
    where a person stopped it; `incumbent_id`: the release that it replaces; `since`: when it came here; `steps`:
    how; `findings`: about its stage, so far; `evidence`: of its evaluation, so far. The last three are of a single
    release only, lists leave them out.
    """

    release_id: str
    population: Name
    slot: Name
    version: str
    state: ReleaseState
    plan_hash: Sha256
    checkpoint: Sha256
    created_at: float
    since: float
    request: ReleaseRequest
    sequence: int | None = None
    fraction: float | None = None
    stage: int = 0
    held_from: ReleaseState | None = None
    incumbent_id: str | None = None
    reason: str = ""
    evidence: Evidence | None = None
    findings: tuple[Finding, ...] = ()
    steps: tuple[ReleaseStep, ...] = ()


class PopulationView(Message, frozen=True, kw_only=True):
    name: Name
    created_at: float
    num_devices: int


class TokenView(Message, frozen=True, kw_only=True):
    """A join token; `token` itself is shown once, when it is created."""

    token_id: str
    population: Name
    token: str | None = None
    max_uses: int | None = None
    uses: int = 0
    expires_at: float | None = None


class Stored(Message, frozen=True, kw_only=True):
    """A blob that was taken in."""

    hash: Sha256
    size_bytes: int
    name: str = ""


class Event(Message, frozen=True, kw_only=True):
    """Something that happened, in order of `sequence`. `kind`: e.g. round.committed, task.halted."""

    sequence: int
    at: float
    kind: str
    task_id: str | None = None
    round_number: int | None = None
    attempt: int | None = None
    text: str = ""
