"""The tables. Comments say what a thing is for and who may read it; `store/migrations` creates them.

Readers: **server** only; **operators** through the operator API; **devices** through the device API. Everything
that names one device in one round lives in `claims` and `assignments`, which are emptied when a round ends; what
remains (`receipts`) is keyed by a hash that only the device can link to anything.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

HASH = String(64)
NAME = String(64)
ID = String(32)


def _population() -> Column[str]:
    return Column(
        "population",
        NAME,
        ForeignKey("populations.name"),
        nullable=False,
        comment="Its population.",
    )


populations = Table(
    "populations",
    metadata,
    Column("name", NAME, primary_key=True, comment="What devices and operators call it."),
    Column("created_at", Float, nullable=False, comment="Unix seconds."),
    comment="Groups of devices that check in under one name. Operators.",
)

tokens = Table(
    "tokens",
    metadata,
    Column("token_id", ID, primary_key=True, comment="What operators call it."),
    Column("token_hash", HASH, nullable=False, unique=True, comment="SHA-256 of the join token."),
    _population(),
    Column("max_uses", Integer, comment="Devices that may enrol with it; null: any number."),
    Column("uses", Integer, nullable=False, comment="Devices that did; not which."),
    Column("expires_at", Float, comment="Unix seconds; null: never."),
    Column("revoked", Boolean, nullable=False, comment="Whether an operator withdrew it."),
    comment="Join tokens. Operators, without the hash.",
)

devices = Table(
    "devices",
    metadata,
    Column("device_id", ID, primary_key=True, comment="From the hash of its public key."),
    Column(
        "population",
        NAME,
        ForeignKey("populations.name"),
        primary_key=True,
        comment="A population that it joined.",
    ),
    Column("public_key", LargeBinary(32), nullable=False, comment="Raw Ed25519 key."),
    comment="Who may sign requests; nothing about what it did or when. Server; operators see counts.",
)

plans = Table(
    "plans",
    metadata,
    Column("hash", HASH, primary_key=True, comment="Address of the plan's zip."),
    Column("name", String(100), nullable=False, comment="From its manifest."),
    Column("size_bytes", Integer, nullable=False, comment="Of the zip."),
    Column("manifest", LargeBinary, nullable=False, comment="Its manifest, canonical JSON."),
    Column("created_at", Float, nullable=False, comment="Unix seconds."),
    comment="Published plans. Operators; devices of populations with a grant.",
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("hash", HASH, primary_key=True, comment="Address of the safetensors file."),
    Column(
        "plan_hash", HASH, ForeignKey("plans.hash"), primary_key=True, comment="Whose parameters."
    ),
    Column("size_bytes", Integer, nullable=False, comment="Of the file."),
    Column("created_at", Float, nullable=False, comment="Unix seconds, of its first appearance."),
    comment="Parameters, pushed or trained. Operators; devices of populations with a grant.",
)

grants = Table(
    "grants",
    metadata,
    Column(
        "population",
        NAME,
        ForeignKey("populations.name"),
        primary_key=True,
        comment="Whose devices.",
    ),
    Column("hash", HASH, primary_key=True, comment="May download this blob."),
    comment="Which blobs a population may see. Server.",
)

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", ID, primary_key=True, comment="Random."),
    Column("name", NAME, nullable=False, comment="From the description."),
    _population(),
    Column("plan_hash", HASH, ForeignKey("plans.hash"), nullable=False, comment="Its plan."),
    Column("spec", Text, nullable=False, comment="The description, JSON of TaskSpec."),
    Column("state", String(16), nullable=False, comment="active, finished, halted, stopped."),
    Column("reason", Text, nullable=False, comment="Why halted, for people."),
    Column("created_at", Float, nullable=False, comment="Unix seconds."),
    Column("head", HASH, nullable=False, comment="Newest checkpoint."),
    Column("chain", HASH, nullable=False, comment="Hash chain up to the head."),
    Column("optimizer_state", HASH, comment="Server optimizer's state at the head; private blob."),
    Column("rounds_committed", Integer, nullable=False, comment="How far it is."),
    Column("failures", Integer, nullable=False, comment="Abandoned attempts in a row."),
    comment="Computations for a population. Operators; devices see the offers made from it.",
)

rounds = Table(
    "rounds",
    metadata,
    Column("round_id", Integer, primary_key=True, comment="Internal."),
    Column("task_id", ID, ForeignKey("tasks.task_id"), nullable=False, comment="Its task."),
    Column("number", Integer, nullable=False, comment="From 1."),
    Column("attempt", Integer, nullable=False, comment="From 1, for this number."),
    Column("state", String(16), nullable=False, comment="See protocol.round."),
    Column("base", HASH, nullable=False, comment="Checkpoint that it starts from."),
    Column("opened_at", Float, comment="Unix seconds."),
    Column("select_at", Float, comment="Deadline of the selection window."),
    Column("selected_at", Float, comment="When the cohort was drawn."),
    Column("deadline_at", Float, comment="When waiting for reports ends."),
    Column("closed_at", Float, comment="When the fence fell: later reports are late."),
    Column("committed_at", Float, comment="When the checkpoint became the head."),
    Column("num_wanted", Integer, comment="Devices to draw, from the measured drop-out."),
    Column("num_assigned", Integer, nullable=False, comment="Size of the cohort."),
    Column("num_reported", Integer, nullable=False, comment="Contributions in the sum."),
    Column(
        "num_carried",
        Integer,
        nullable=False,
        server_default="0",
        comment="Of earlier rounds, that may join.",
    ),
    Column("num_late", Integer, nullable=False, comment="Assigned but not in when the fence fell."),
    Column("sum_snapshot", HASH, comment="Running sum of the reports; private blob. Server only."),
    Column("checkpoint", HASH, comment="What it made; null for evaluation."),
    Column("chain", HASH, comment="Hash chain up to that checkpoint."),
    Column("optimizer_state", HASH, comment="After its step; private blob. Server only."),
    Column("result", Text, comment="Totals over the cohort, JSON of RoundResult."),
    Column("reason", Text, nullable=False, comment="Why abandoned or cancelled, for people."),
    Column(
        "is_tallied",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="Whether its cohort is counted in rates.",
    ),
    UniqueConstraint("task_id", "number", "attempt"),
    comment="Attempts at rounds. Operators: cohort figures only.",
)
Index("ix_rounds_state", rounds.c.state)
# At most one committed attempt per round, whatever the code above this line believes.
_COMMITTED = text("state IN ('committed', 'scrubbed')")
Index(
    "uq_rounds_committed",
    rounds.c.task_id,
    rounds.c.number,
    unique=True,
    sqlite_where=_COMMITTED,
    postgresql_where=_COMMITTED,
)

groups = Table(
    "groups",
    metadata,
    Column("group_id", Integer, primary_key=True, comment="Internal."),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, comment="Which round."),
    Column("number", Integer, nullable=False, comment="From 1, in its round."),
    Column("state", String(16), nullable=False, comment="See protocol.group."),
    Column("deadline_at", Float, nullable=False, comment="When waiting for this step ends."),
    Column("num_devices", Integer, nullable=False, comment="Devices that joined."),
    Column("num_shared", Integer, nullable=False, comment="That shared their keys."),
    Column("num_masked", Integer, nullable=False, comment="Whose masked reports are in the sum."),
    Column("num_agreed", Integer, nullable=False, comment="That signed the survivors."),
    Column("num_unmasked", Integer, nullable=False, comment="That helped to open the sum."),
    Column("snapshot", HASH, comment="All of it, while it lasts; private blob. Server only."),
    Column("total", HASH, comment="Its opened sum; private blob. Server only."),
    Column("reason", Text, nullable=False, comment="Why it came to nothing, for people."),
    UniqueConstraint("round_id", "number"),
    comment="Devices of a round that are summed together, masked. Operators: figures only.",
)

claims = Table(
    "claims",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id"), primary_key=True, comment="An open round."),
    Column("device_id", ID, primary_key=True, comment="Who waits for the draw."),
    Column("expires_at", Float, nullable=False, comment="Unix seconds; waiting until then."),
    comment="The pool of a draw; emptied when the round ends. Server.",
)

assignments = Table(
    "assignments",
    metadata,
    Column("assignment_id", ID, primary_key=True, comment="Random; the device's ticket."),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, comment="Where it counts."),
    Column("origin_id", ForeignKey("rounds.round_id"), nullable=False, comment="Where given."),
    Column("device_id", ID, nullable=False, comment="Whose ticket."),
    Column("expires_at", Float, nullable=False, comment="Unix seconds; waited for until then."),
    Column("group_id", ForeignKey("groups.group_id"), comment="Where it is summed, if it joined."),
    UniqueConstraint("round_id", "device_id"),
    comment="The cohort; emptied when the round ends, but for who is carried on. Server, and each its own.",
)

receipts = Table(
    "receipts",
    metadata,
    Column("receipt_id", HASH, primary_key=True, comment="SHA-256 of the assignment id."),
    Column("round_id", ForeignKey("rounds.round_id"), nullable=False, comment="Which round."),
    Column("state", String(16), nullable=False, comment="See protocol.messages.ReportState."),
    Column("digest", HASH, comment="SHA-256 of the report's body."),
    Column("reason", Text, nullable=False, comment="Why void or late."),
    Column(
        "has_heard",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="Whether its device was told that it is late.",
    ),
    Column(
        "is_carried",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="Whether it was expected in an earlier round first.",
    ),
    comment="What became of every report, kept against replay. Who knows the assignment id.",
)
Index("ix_receipts_round_id_state", receipts.c.round_id, receipts.c.state)

releases = Table(
    "releases",
    metadata,
    Column("release_id", ID, primary_key=True, comment="Random."),
    _population(),
    Column("slot", NAME, nullable=False, comment="What the model is for."),
    Column("version", String(100), nullable=False, comment="A name for people."),
    Column("request", Text, nullable=False, comment="What was asked for, JSON of ReleaseRequest."),
    Column("state", String(16), nullable=False, comment="See protocol.release."),
    Column("held_from", String(16), comment="Where it was when a person held it."),
    Column("stage", Integer, nullable=False, comment="Which stage it is in, from 0."),
    Column("since", Float, nullable=False, comment="When it came to this state and stage."),
    Column(
        "incumbent_id",
        ID,
        ForeignKey("releases.release_id"),
        comment="What the slot served when it began, and what a rollback goes back to.",
    ),
    Column("reason", Text, nullable=False, comment="Why it is where it is, for people."),
    Column("created_at", Float, nullable=False, comment="Unix seconds."),
    UniqueConstraint("population", "slot", "version"),
    comment="Model versions on their way to devices. Operators.",
)
# At most one release on its way, and one that is deployed, whatever the code above this line believes.
for _name, _states in {
    "moving": "state NOT IN ('rejected', 'deployed', 'superseded', 'rolled_back')",
    "deployed": "state = 'deployed'",
}.items():
    Index(
        f"uq_releases_{_name}",
        releases.c.population,
        releases.c.slot,
        unique=True,
        sqlite_where=text(_states),
        postgresql_where=text(_states),
    )

release_steps = Table(
    "release_steps",
    metadata,
    Column("step_id", Integer, primary_key=True, comment="Order of happening."),
    Column("release_id", ForeignKey("releases.release_id"), nullable=False, comment="Whose."),
    Column("at", Float, nullable=False, comment="Unix seconds."),
    Column("state", String(16), nullable=False, comment="Where it led."),
    Column("stage", Integer, nullable=False, comment="Which stage, from 0."),
    Column("reason", Text, nullable=False, comment="For people."),
    Column("findings", Text, nullable=False, comment="The evidence for it, JSON of Finding."),
    comment="Every step of every release with its evidence: totals over cohorts. Operators.",
)

manifests = Table(
    "manifests",
    metadata,
    Column("population", NAME, primary_key=True, comment="Its population."),
    Column("slot", NAME, primary_key=True, comment="What the model is for."),
    Column("sequence", Integer, primary_key=True, comment="Only grows."),
    Column("release_id", ForeignKey("releases.release_id"), nullable=False, comment="What."),
    Column("fraction", Float, nullable=False, comment="Share of the devices that take it."),
    Column("signed", LargeBinary, nullable=False, comment="JSON of SignedRelease."),
    comment="What was published. Devices get the newest of a slot, and the newest for all of them.",
)

pacing = Table(
    "pacing",
    metadata,
    Column(
        "population",
        NAME,
        ForeignKey("populations.name"),
        primary_key=True,
        comment="Whose check-ins.",
    ),
    Column("state", Text, nullable=False, comment="Check-ins per minute, JSON of PaceRecord."),
    comment="How many devices are to come back when; never which. Server.",
)

rates = Table(
    "rates",
    metadata,
    Column("task_id", ID, ForeignKey("tasks.task_id"), primary_key=True, comment="Which task."),
    Column("hour", Integer, primary_key=True, comment="Of the day, UTC, at which they were drawn."),
    Column("num_reported", Float, nullable=False, comment="Devices that reported; faded."),
    Column("num_lost", Float, nullable=False, comment="Devices that did not; faded."),
    Column("at", Float, nullable=False, comment="Unix seconds, as of which."),
    comment="What became of cohorts, over many rounds. Server.",
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, comment="Order of happening."),
    Column("at", Float, nullable=False, comment="Unix seconds."),
    Column("kind", String(40), nullable=False, comment="Such as round.committed."),
    Column("task_id", ID, comment="Which task."),
    Column("round_number", Integer, comment="Which round."),
    Column("attempt", Integer, comment="Which attempt."),
    Column("text", Text, nullable=False, comment="For people; cohorts, never one device."),
    comment="What happened, in order. Operators.",
    sqlite_autoincrement=True,
)
