"""Connects alembic to the database: through asyncpg, one node at a time.

Everything happens in one transaction, between `prepare` and `finish`: app/database/installation.py.
"""

import asyncio
import os

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.database.connections import connect
from app.database.installation import SCHEMA, finish, prepare
from app.database.migration import newest_revision
from app.database.schema import metadata
from migrations.sample import complete_sample, wants_sample
from migrations.sql_files import on_connection

# Two nodes that start at the same time migrate one after the other (the lock's first number is
# Tablecast's, as in sql/0003_capture.sql).
MIGRATION_LOCK = "SELECT pg_advisory_xact_lock(1413563213, 4)"


def run(connection: Connection) -> None:
    newest = newest_revision()
    context.configure(
        connection, target_metadata=metadata, include_schemas=True, version_table_schema=SCHEMA
    )
    with context.begin_transaction():
        connection.execute(text(MIGRATION_LOCK))
        on_connection(lambda asyncpg: prepare(asyncpg, newest, wants_sample()))
        context.run_migrations()
        if wants_sample() and context.get_context().get_current_heads() == (newest,):
            complete_sample()
        on_connection(finish)


async def connect_and_run(url: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: connect(url), poolclass=pool.NullPool
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


asyncio.run(connect_and_run(context.config.attributes.get("url") or os.environ["DATABASE_URL"]))
