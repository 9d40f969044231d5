"""Releases in stages: what was asked for, every step with its evidence, everything that was published."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    connection = op.get_bind()
    query = sa.text("SELECT * FROM releases ORDER BY sequence")
    old = [dict(row) for row in connection.execute(query).mappings()]
    with op.batch_alter_table("releases") as releases:
        releases.add_column(sa.Column("request", sa.Text(), nullable=False, server_default=""))
        releases.add_column(sa.Column("held_from", sa.String(length=16), nullable=True))
        releases.add_column(sa.Column("stage", sa.Integer(), nullable=False, server_default="0"))
        releases.add_column(sa.Column("since", sa.Float(), nullable=False, server_default="0"))
        releases.add_column(sa.Column("incumbent_id", sa.String(length=32), nullable=True))
        releases.create_foreign_key(
            op.f("fk_releases_incumbent_id"), "releases", ["incumbent_id"], ["release_id"]
        )
        releases.drop_constraint(op.f("uq_releases_population_slot_sequence"), type_="unique")
        releases.drop_constraint(op.f("fk_releases_evaluation_task_id"), type_="foreignkey")
        releases.drop_constraint(op.f("fk_releases_plan_hash"), type_="foreignkey")
        for name in (
            "sequence", "signed", "plan_hash", "checkpoint", "evaluation_task_id", "margin", "evidence",
        ):  # fmt: skip
            releases.drop_column(name)
    with op.batch_alter_table("releases") as releases:
        for name in ("request", "stage", "since"):
            releases.alter_column(name, server_default=None)
    for name, states in {
        "moving": "state NOT IN ('rejected', 'deployed', 'superseded', 'rolled_back')",
        "deployed": "state = 'deployed'",
    }.items():
        op.create_index(
            f"uq_releases_{name}",
            "releases",
            ["population", "slot"],
            unique=True,
            sqlite_where=sa.text(states),
            postgresql_where=sa.text(states),
        )
    op.create_table(
        "release_steps",
        sa.Column("step_id", sa.Integer(), nullable=False),
        sa.Column("release_id", sa.String(length=32), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("findings", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["release_id"], ["releases.release_id"], name=op.f("fk_release_steps_release_id")
        ),
        sa.PrimaryKeyConstraint("step_id", name=op.f("pk_release_steps")),
    )
    op.create_table(
        "manifests",
        sa.Column("population", sa.String(length=64), nullable=False),
        sa.Column("slot", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("release_id", sa.String(length=32), nullable=False),
        sa.Column("fraction", sa.Float(), nullable=False),
        sa.Column("signed", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["release_id"], ["releases.release_id"], name=op.f("fk_manifests_release_id")
        ),
        sa.PrimaryKeyConstraint("population", "slot", "sequence", name=op.f("pk_manifests")),
    )
    _carry_over(connection, old)


def _carry_over(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    """What was published stays so; what was asked for, without stages, as the records of today say it."""
    served: dict[tuple[str, str], str] = {}
    for row in rows:
        request = {
            **{name: row[name] for name in ("population", "slot", "version", "plan_hash")},
            **{name: row[name] for name in ("checkpoint", "evaluation_task_id")},
            "evaluation": {"margin": min(row["margin"], 0.99)},
            "stages": [],
        }
        place = (row["population"], row["slot"])
        values = {
            "release_id": row["release_id"],
            "request": json.dumps(request),
            "at": row["created_at"],
            "incumbent": served.get(place),
        }
        connection.execute(
            sa.text(
                "UPDATE releases SET request = :request, since = :at, incumbent_id = :incumbent"
                " WHERE release_id = :release_id"
            ),
            values,
        )
        connection.execute(
            sa.text(
                "INSERT INTO release_steps (release_id, at, state, stage, reason, findings)"
                " VALUES (:release_id, :at, :state, 0, :reason, '[]')"
            ),
            {**values, "state": row["state"], "reason": row["reason"]},
        )
        if row["signed"] is not None:
            served[place] = row["release_id"]
            connection.execute(
                sa.text(
                    "INSERT INTO manifests (population, slot, sequence, release_id, fraction, signed)"
                    " VALUES (:population, :slot, :sequence, :release_id, 1.0, :signed)"
                ),
                {
                    name: row[name]
                    for name in ("population", "slot", "sequence", "release_id", "signed")
                },
            )
