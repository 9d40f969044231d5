"""Groups of secure aggregation, and which of them an assignment is in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "groups",
        sa.Column("group_id", sa.Integer(), nullable=False),
        sa.Column("round_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("deadline_at", sa.Float(), nullable=False),
        sa.Column("num_devices", sa.Integer(), nullable=False),
        sa.Column("num_shared", sa.Integer(), nullable=False),
        sa.Column("num_masked", sa.Integer(), nullable=False),
        sa.Column("num_agreed", sa.Integer(), nullable=False),
        sa.Column("num_unmasked", sa.Integer(), nullable=False),
        sa.Column("snapshot", sa.String(length=64), nullable=True),
        sa.Column("total", sa.String(length=64), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name=op.f("fk_groups_round_id")),
        sa.PrimaryKeyConstraint("group_id", name=op.f("pk_groups")),
        sa.UniqueConstraint("round_id", "number", name=op.f("uq_groups_round_id_number")),
    )
    with op.batch_alter_table("assignments") as assignments:
        assignments.add_column(sa.Column("group_id", sa.Integer(), nullable=True))
        assignments.create_foreign_key(
            op.f("fk_assignments_group_id"), "groups", ["group_id"], ["group_id"]
        )
