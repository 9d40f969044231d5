"""Where an assignment was given, until when it is waited for, and how many were carried into a round."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column(
        "rounds", sa.Column("num_carried", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column(
        "receipts",
        sa.Column("is_carried", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    with op.batch_alter_table("assignments") as assignments:
        assignments.add_column(sa.Column("origin_id", sa.Integer(), nullable=True))
        assignments.add_column(sa.Column("expires_at", sa.Float(), nullable=True))
    op.execute(
        "UPDATE assignments SET origin_id = round_id, expires_at = coalesce((SELECT deadline_at"
        " FROM rounds WHERE rounds.round_id = assignments.round_id), 0)"
    )
    with op.batch_alter_table("assignments") as assignments:
        assignments.alter_column("origin_id", existing_type=sa.Integer(), nullable=False)
        assignments.alter_column("expires_at", existing_type=sa.Float(), nullable=False)
        assignments.create_foreign_key(
            op.f("fk_assignments_origin_id"), "rounds", ["origin_id"], ["round_id"]
        )
