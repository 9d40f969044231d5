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
