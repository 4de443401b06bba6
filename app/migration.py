"""Bringing a database up to date, and telling whether it is."""

from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from app.database import UNAVAILABLE, Connection, Refusal

ROOT = Path(__file__).parent.parent


def configuration(url: str) -> Config:
    """Alembic's configuration for the database at `url`."""
    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = url
    return config


def migrate(url: str) -> None:
    """Run the migrations that the database lacks; at once from two places, they run once.

    Not to be called from a coroutine: alembic starts its own event loop. Raises Refusal.
    """
    try:
        command.upgrade(configuration(url), "head")
    except (*UNAVAILABLE, asyncpg.PostgresError, DBAPIError, CommandError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise Refusal(f"The database cannot be migrated: {reason.rstrip('.')}.") from error


async def revision(connection: Connection) -> str | None:
    """The revision a database is at; None if it was never migrated."""
    if await connection.fetchval("SELECT to_regclass('public.alembic_version')") is None:
        return None
    found: str | None = await connection.fetchval("SELECT version_num FROM public.alembic_version")
    return found


def newest_revision() -> str | None:
    """The revision this version of Tablecast works with."""
    return ScriptDirectory.from_config(configuration("")).get_current_head()
