"""Migrates a database, and checks whether it is up to date."""

import asyncio
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from app.database.connections import OLDEST_SUPPORTED, UNAVAILABLE, Refusal, connect

if TYPE_CHECKING:
    from alembic.config import Config

ALEMBIC = threading.Lock()  # alembic keeps its state in globals
ROOT = Path(__file__).parent.parent.parent
REVISION = re.compile(r'^(revision|down_revision) = "(\w+)"$', re.MULTILINE)
FAILURES = (*UNAVAILABLE, asyncpg.PostgresError, ValueError)


def migrate(url: str) -> str | None:
    """Run the missing migrations, each only once even if two nodes migrate at the same time.

    Returns the revision the database was at, None if it was new. Must not be called from a
    coroutine: alembic starts its own event loop. Raises Refusal.
    """
    # Importing alembic takes longer than everything else a server does to start.
    from alembic import command
    from alembic.util import CommandError
    from sqlalchemy.exc import DBAPIError

    before = asyncio.run(revision(url))
    try:
        with ALEMBIC:
            command.upgrade(configuration(url), "head")
    except (*FAILURES, DBAPIError, CommandError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise Refusal(f"The database cannot be migrated: {reason(cause)}.") from error
    return before


async def check(url: str) -> None:
    """Raise Refusal unless the database is at the revision this version needs."""
    found, needed = await revision(url), newest_revision()
    if found is None:
        raise Refusal("The database is not migrated yet: run `tablecast migrate` first.")
    if found != needed:
        raise Refusal(
            f"The database is at revision {found}, but this version of Tablecast needs {needed}:"
            " run `tablecast migrate` with the newer version."
        )


async def revision(url: str) -> str | None:
    """Return the revision the database is at; None if it was never migrated.

    Raises Refusal if the database cannot be reached or is too old.
    """
    try:
        connection = await connect(url)
    except FAILURES as error:
        raise Refusal(f"The database cannot be reached: {reason(error)}.") from error
    try:
        major = connection.get_server_version().major
        if major < OLDEST_SUPPORTED:
            raise Refusal(
                f"The database runs Postgres {major}; Tablecast needs {OLDEST_SUPPORTED} or later."
            )
        if await connection.fetchval("SELECT to_regclass('public.alembic_version')") is None:
            return None
        found: str | None = await connection.fetchval(
            "SELECT version_num FROM public.alembic_version"
        )
        return found
    except FAILURES as error:
        raise Refusal(f"The database cannot be read: {reason(error)}.") from error
    finally:
        connection.terminate()


def newest_revision() -> str:
    """The revision this version of Tablecast works with: the one that no other builds on."""
    revisions: set[str] = set()
    built_on: set[str] = set()
    for file in (ROOT / "migrations" / "versions").glob("*.py"):
        for kind, name in REVISION.findall(file.read_text()):
            (revisions if kind == "revision" else built_on).add(name)
    [newest] = revisions - built_on
    return newest


def configuration(url: str) -> "Config":
    """Alembic's configuration for the database at `url`."""
    from alembic.config import Config

    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = url
    return config


def reason(error: BaseException | None) -> str:
    """Return an error's message as the end of a sentence."""
    if isinstance(error, TimeoutError):
        return "it does not answer"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
