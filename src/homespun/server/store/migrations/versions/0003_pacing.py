"""Aggregates for choosing devices: promised check-ins, and how many reports came of the devices drawn."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "pacing",
        sa.Column("population", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["population"], ["populations.name"], name=op.f("fk_pacing_population")
        ),
        sa.PrimaryKeyConstraint("population", name=op.f("pk_pacing")),
    )
    op.create_table(
        "rates",
        sa.Column("task_id", sa.String(length=32), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("num_reported", sa.Float(), nullable=False),
        sa.Column("num_lost", sa.Float(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_rates_task_id")),
        sa.PrimaryKeyConstraint("task_id", "hour", name=op.f("pk_rates")),
    )
    # In place, not in a batch: SQLite does not let go of a table that others refer to.
    op.add_column("rounds", sa.Column("num_wanted", sa.Integer(), nullable=True))
    op.add_column(
        "rounds",
        sa.Column("is_tallied", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    # Nobody noted who heard of the end of these.
    op.execute("UPDATE rounds SET is_tallied = true WHERE state IN ('committed', 'scrubbed')")
    op.add_column(
        "receipts",
        sa.Column("has_heard", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
