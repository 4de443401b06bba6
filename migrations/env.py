"""Connects alembic to the database: through asyncpg, one node at a time."""

import asyncio
import os

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.database.connections import connect
from app.database.schema import metadata

# Two nodes that start at the same time migrate one after the other (the lock's first number is
# Tablecast's, as in sql/0003_capture.sql).
MIGRATION_LOCK = "SELECT pg_advisory_xact_lock(1413563213, 4)"


def run(connection: Connection) -> None:
    context.configure(connection, target_metadata=metadata, include_schemas=True)
    with context.begin_transaction():
        connection.execute(text(MIGRATION_LOCK))
        context.run_migrations()


async def connect_and_run(url: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: connect(url), poolclass=pool.NullPool
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    asyncio.run(connect_and_run(context.config.attributes.get("url") or os.environ["DATABASE_URL"]))
