"""Alembic's entry point; `store.database` runs it with an open transaction."""

from __future__ import annotations

from alembic import context

from homespun.server.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
