"""Control messages between device and server: JSON, strict, versioned by the path (`/v1/...`).

Turn-away is a value here (`Waiting`, `Rejected`); failures travel as problem+json made from `errors`.
Times are durations in seconds, so that no device's clock matters. `docs/protocol.md` is the normative text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from homespun.errors import BadFrame
from homespun.secagg.messages import (
    AgreeRequest,
    MaskInputRequest,
    ShareKeysRequest,
    Terms,
    UnmaskRequest,
)

PROTOCOL_VERSION = 1

# \Z and not $, which also matches before a newline at the end.
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Base64 = Annotated[str, Meta(max_length=1024)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
# Every language reads whole numbers up to 2^53 - 1 from JSON without loss.
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**53 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Bits = Annotated[int, Meta(ge=8, le=32)]
FieldName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}\Z")]
Whole = Annotated[int, Meta(ge=-(2**53) + 1, le=2**53 - 1)]
Value = bool | Whole | float | Annotated[str, Meta(max_length=200)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A record with exactly these fields."""


class TaskKind(StrEnum):
    TRAIN = "train"
    EVALUATE = "evaluate"
    ANALYZE = "analyze"


class Aggregation(StrEnum):
    """How contributions are added up: `secure` (masked, only sums are ever seen) or `plain`."""

    SECURE = "secure"
    PLAIN = "plain"


class Mode(StrEnum):
    """When devices are let in: `rounds` (a cohort is drawn for each) or `async` (at any time, a few at once)."""

    ROUNDS = "rounds"
    ASYNC = "async"


class RetryWindow(Message, frozen=True, kw_only=True):
    """Come back at a time drawn once, uniformly, between the two.

    `earliest_s`: from now; `latest_s`: from now.
    """

    earliest_s: Seconds
    latest_s: Seconds


class Bucket(Message, frozen=True, kw_only=True):
    """The devices whose salted hash falls into [low, high): disjoint buckets never share a device.

    `salt`: goes before the device id in the hash; `low`: included; `high`: not included.
    """

    salt: str
    low: Share = 0.0
    high: Share = 1.0


class Comparison(Message, frozen=True, kw_only=True):
    """One test of an example. An example without the field does not pass it, whatever the operator.

    `field`: one that the device's app declared; `op`: how its value is compared, numbers by size and texts by code
    point; `value`: what with, of the field's type; for `in` a list of them, one of which it must be.
    """

    field: FieldName
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in"]
    value: Value | Annotated[tuple[Value, ...], Meta(min_length=1, max_length=100)]


class ExampleQuery(Message, frozen=True, kw_only=True):
    """Examples that a device must hold, and how many.

    `collection`: where the app put them; `where`: they pass every one of these; `max_age_s`: they are newer than
    this; `min_examples`: fewest that must be there.
    """

    collection: Name = "default"
    where: Annotated[tuple[Comparison, ...], Meta(max_length=16)] = ()
    max_age_s: Seconds | None = None
    min_examples: Count = 1


class Criteria(Message, frozen=True, kw_only=True):
    """What a device must hold and be; decided on the device, the answer is never sent.

    `requires`: conditions that must hold (see `protocol.eligibility`); `min_examples`: relevant examples in
    the store, of the side that the task works on; `collection`: only examples of this one are relevant; `where`:
    only those that pass every one of these; `max_age_s`: only examples newer than this; `also`: other examples that
    must be there, on either side, and are not worked on; `min_separation_rounds`: rounds of this task that must lie
    between two in which the device takes part; `min_separation_s`: time since the last of them; `bucket`: only these
    devices (null: all).
    """

    requires: tuple[str, ...] = ("idle", "charging", "unmetered")
    min_examples: Count = 1
    collection: Name = "default"
    where: Annotated[tuple[Comparison, ...], Meta(max_length=16)] = ()
    max_age_s: Seconds | None = None
    also: Annotated[tuple[ExampleQuery, ...], Meta(max_length=8)] = ()
    min_separation_rounds: Count = 0
    min_separation_s: Seconds = 0.0
    bucket: Bucket | None = None

    @property
    def relevant(self) -> ExampleQuery:
        """The examples that the task works on."""
        return ExampleQuery(
            collection=self.collection,
            where=self.where,
            max_age_s=self.max_age_s,
            min_examples=self.min_examples,
        )


class Encoding(Message, frozen=True, kw_only=True):
    """How a contribution becomes integers.

    `bits`: of a main word; `clip_norm`: L2 bound of an update, of an evaluation the bound of a device's difference
    between two models; `max_weight`: examples beyond which a device weighs no more (0: every device weighs 1);
    `max_group`: most contributions in one sum; `rotation_seed`: of the random rotation before rounding (null: none).
    """

    bits: Bits = 16
    clip_norm: Annotated[float, Meta(gt=0)]
    max_weight: Count
    max_group: Positive
    rotation_seed: Count | None = None


class Watch(Message, frozen=True, kw_only=True):
    """What devices of its stage and of its control band report while a release is on its way:
    how the model does that they serve.

    `slot`: whose model; `release_id`: the release that is watched; `max_latency_s`: a prediction that takes longer
    counts as this; `min_predictions`: a device that speaks once says nothing before what it serves has been used so
    often, or has failed.
    """

    slot: Name
    release_id: str
    max_latency_s: Annotated[float, Meta(gt=0, le=60)] = 0.1
    min_predictions: Count = 20


# --- enrolment ----------------------------------------------------------------------------------------


class Enroll(Message, frozen=True, kw_only=True):
    """A device asks to join a population. The request itself is signed with the key that it brings.

    `token`: the join token that the operator handed out; `public_key`: Ed25519, raw, base64.
    """

    population: Name
    token: Annotated[str, Meta(max_length=200)]
    public_key: Base64


class Enrolled(Message, frozen=True, kw_only=True):
    """The device belongs to the population now. The answer to a repeated request is the same.

    `device_id`: the first 16 bytes of the SHA-256 of the public key, hexadecimal; `publisher_keys`: Ed25519
    keys (raw, base64) whose plans and releases the device may run.
    """

    device_id: str
    population: Name
    publisher_keys: tuple[Base64, ...]


# --- check-in, claim ----------------------------------------------------------------------------------


class CheckIn(Message, frozen=True, kw_only=True):
    """The device is ready to take part. `plan_formats`: formats of plans that it can run."""

    population: Name
    plan_formats: tuple[int, ...] = (1,)
    wait_s: Seconds = 0.0


class Offer(Message, frozen=True, kw_only=True):
    """One open round, and all a device needs to decide whether to claim it.

    `min_group`: fewest contributions that are ever decoded together; `download_bytes`: plan and checkpoints;
    `upload_bytes`: one report; `mode`: whether a cohort is drawn, or whoever comes is let in; `max_staleness`:
    most rounds that may be committed between the one a device was assigned in and the one its report goes into;
    `watch`: of an evaluation that asks about what devices serve (null: it brings its own checkpoints).
    """

    task_id: str
    task_name: str
    kind: TaskKind
    round_number: Positive
    attempt: Positive
    plan_hash: Sha256
    criteria: Criteria
    aggregation: Aggregation
    min_group: Positive
    download_bytes: Count
    upload_bytes: Count
    watch: Watch | None = None
    mode: Mode = Mode.ROUNDS
    max_staleness: Count = 0


class ReleaseNotice(Message, frozen=True, kw_only=True):
    """The newest release of a slot; the signed manifest itself is fetched apart."""

    slot: Name
    sequence: Positive


class CheckInReply(Message, frozen=True, kw_only=True):
    """What there is to do.

    `offers`: open rounds, fairly ordered; `releases`: one for each slot that has any; `retry`: when to check
    in again if no offer fits.
    """

    offers: tuple[Offer, ...]
    releases: tuple[ReleaseNotice, ...]
    retry: RetryWindow


class Claim(Message, frozen=True, kw_only=True):
    """The device decided to take part. Repeating a claim returns the same answer."""

    task_id: str
    round_number: Positive
    attempt: Positive
    wait_s: Seconds = 0.0


class Assigned(Message, frozen=True, kw_only=True, tag="assigned"):
    """The device is in the cohort.

    `checkpoints`: what to train from (one), or to evaluate (candidate first, incumbent second); `encoding`:
    how the contribution is encoded; `seed`: public randomness of this round attempt, mixed with the device's
    own seed; `deadline_s`: time left to report; `max_staleness`: as offered; above 0, the device keeps its
    update until the session ends, for a later round may need it in another encoding.
    """

    assignment_id: str
    kind: TaskKind
    round_number: Positive
    attempt: Positive
    plan_hash: Sha256
    checkpoints: tuple[Sha256, ...]
    encoding: Encoding
    aggregation: Aggregation
    seed: int
    deadline_s: Seconds
    max_staleness: Count = 0


class Waiting(Message, frozen=True, kw_only=True, tag="waiting"):
    """Others are awaited: the draw is still to come, or the next step of the group.

    `retry`: ask again within this window.
    """

    retry: RetryWindow


class Rejected(Message, frozen=True, kw_only=True, tag="rejected"):
    """Not this time. `reason`: not_drawn, full, round_closed, unknown_round or not_in_bucket."""

    reason: str
    retry: RetryWindow


ClaimReply = Assigned | Waiting | Rejected


def checkpoints_hash(checkpoints: Sequence[str]) -> str:
    """One hash for what a device works from: that of the only checkpoint, or SHA-256 over those of several."""
    if len(checkpoints) == 1:
        return checkpoints[0]
    return hashlib.sha256("\n".join(checkpoints).encode()).hexdigest()


# --- report -------------------------------------------------------------------------------------------


class ReportState(StrEnum):
    """What became of a report. INCLUDED, VOID and LATE are final; there is no silence.

    With secure aggregation the masked input is the report: ACKNOWLEDGED says that it is in its group's sum, which may
    yet come to nothing.
    """

    EXPECTED = "expected"
    ACKNOWLEDGED = "acknowledged"
    INCLUDED = "included"
    VOID = "void"
    LATE = "late"


class Receipt(Message, frozen=True, kw_only=True):
    """What became of an assignment's report.

    `state`: see the table of states; `digest`: SHA-256 of the report's body; `checkpoint`: the one it went
    into; `reason`: why it is void or late.
    """

    assignment_id: str
    state: ReportState
    digest: Sha256 | None = None
    checkpoint: Sha256 | None = None
    reason: str = ""


class Settled(Message, frozen=True, kw_only=True, tag="settled"):
    """Nothing more is asked of the device. `receipt`: what became of its report so far."""

    receipt: Receipt


class Carried(Message, frozen=True, kw_only=True, tag="carried"):
    """The assignment was carried into a later round: encode the same update again, weighted by its staleness, and join.

    `terms`: of that round's groups; the answer is that to Terms; `encoding`: how the contribution is encoded there;
    `ancestry`: the checkpoint that the device trained from and those that followed, up to the one in the terms; its
    staleness is their number less one.
    """

    terms: Terms
    encoding: Encoding
    ancestry: Annotated[tuple[Sha256, ...], Meta(min_length=1)]


GroupReply = (
    Terms
    | Carried
    | ShareKeysRequest
    | MaskInputRequest
    | AgreeRequest
    | UnmaskRequest
    | Waiting
    | Settled
)
"""What a group asks of one of its devices next. `Terms`: join one, with fresh keys."""


class Abort(Message, frozen=True, kw_only=True):
    """The device gives up an assignment before reporting; nothing more is said about why."""

    assignment_id: str


# --- releases -----------------------------------------------------------------------------------------


class ReleaseManifest(Message, frozen=True, kw_only=True):
    """What a slot serves. Signed by the publisher; `sequence` only grows, a rollback is a higher number.

    With u = unit_interval(stage_salt, its own salt), a device belongs to the stage when u < fraction, and to the
    control band when u >= 1 - control; all but the stage keep what they serve. The salt is the release's, so each
    stage contains the one before.

    `release_id`: the same over all stages; `version`: for people; `checkpoint`: what the slot serves; `fraction`: share
    of the devices that take it; `control`: share of the devices that it is compared with; `stage_salt`: chooses which;
    `issued_at`: Unix seconds, for people.
    """

    population: Name
    slot: Name
    sequence: Positive
    release_id: str = ""
    version: str
    plan_hash: Sha256
    checkpoint: Sha256
    fraction: Share = 1.0
    control: Share = 0.0
    stage_salt: str = ""
    issued_at: float


class SignedRelease(Message, frozen=True, kw_only=True):
    """A release as it travels.

    `manifest`: the exact bytes of a ReleaseManifest, base64; `signature`: Ed25519 over
    `homespun-release-v1`, a line feed and those bytes, base64.
    """

    manifest: Annotated[str, Meta(max_length=16384)]
    signature: Base64


M = TypeVar("M")


def encode(message: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces."""
    return msgspec.json.encode(message, order="sorted")


def decode(data: bytes, kind: type[M] | Any) -> M:
    """Strict JSON. Raises `BadFrame` naming the field that is wrong."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise BadFrame(f"the message does not fit: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFrame(f"not JSON: {error}") from error
