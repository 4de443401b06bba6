"""Migrates a database, and checks whether it is up to date."""

import asyncio
import logging
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from app.database.connections import (
    OLDEST_SUPPORTED,
    UNAVAILABLE,
    Connection,
    Refusal,
    connect,
    reason,
)
from app.database.installation import installed_revision, sample_table
from app.database.rights import (
    Rights,
    refuse_migrating,
    refuse_reading_the_sample,
    refuse_serving,
)

if TYPE_CHECKING:
    from alembic.config import Config

logger = logging.getLogger("tablecast")

ALEMBIC = threading.Lock()  # alembic keeps its state in globals
ROOT = Path(__file__).parent.parent.parent
REVISION = re.compile(r'^(revision|down_revision) = "(\w+)"$', re.MULTILINE)
IS_FOLLOWED = """
    SELECT EXISTS (SELECT FROM feed.topic
                   WHERE topic = 'thing' AND relation = to_regclass('public.things'))
"""
FAILURES = (*UNAVAILABLE, asyncpg.PostgresError, ValueError)


def migrate(url: str, things: bool = True) -> str | None:
    """Run the missing migrations, each only once even if two nodes migrate at the same time.

    Returns the revision the database was at, None if it was new. With `things`, the sample table
    is made as well. Must not be called from a coroutine: alembic starts its own event loop. Raises
    Refusal.
    """
    # Importing alembic takes longer than everything else a server does to start.
    from alembic import command
    from alembic.util import CommandError
    from sqlalchemy.exc import DBAPIError

    before = asyncio.run(revision(url))
    if before is not None and before not in known_revisions():
        raise Refusal(unknown(before))
    try:
        with ALEMBIC:
            command.upgrade(configuration(url, things), "head")
    except (*FAILURES, DBAPIError, CommandError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        hint = " Or unwatch it first: SELECT feed.unwatch('...')." * ("be watched:" in str(cause))
        raise Refusal(f"The database cannot be migrated: {reason(cause)}.{hint}") from error
    return before


async def check(url: str, things: bool = True, rights: Rights = refuse_serving) -> None:
    """Raise Refusal unless the database is at the revision this version needs, and holds the
    sample table if `things` are to be served, and its role may use them (see `rights`).
    """
    async with reading(url) as connection:
        await rights(connection)
        found, needed = await installed_revision(connection), newest_revision()
        sample = await sample_table(connection) if things else None
        if sample is not None:
            sample.refuse_foreign()
            await refuse_reading_the_sample(connection)
        if found == needed and sample is not None and not await connection.fetchval(IS_FOLLOWED):
            logger.warning(
                "public.things is not watched as thing: no page follows it. Run `tablecast watch"
                " things --topic thing --destroy-with name`, or set THINGS=no"
            )
    if found is None:
        raise Refusal("The database is not migrated yet: run `tablecast migrate` first.")
    if found not in known_revisions():
        raise Refusal(unknown(found))
    if found != needed:
        raise Refusal(
            f"The database is at revision {found}, but this version of Tablecast needs {needed}:"
            " run `tablecast migrate` first."
        )
    if things and sample is None:
        raise Refusal(
            "There is no sample table public.things: run `tablecast migrate` to have it, or set"
            " THINGS=no to do without it."
        )


async def revision(url: str) -> str | None:
    """Return the revision the database is at; None if it was never migrated.

    Raises Refusal if the database cannot be reached or is too old.
    """
    async with reading(url) as connection:
        try:
            return await installed_revision(connection)
        except asyncpg.InsufficientPrivilegeError:
            await refuse_migrating(connection)
            raise


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[Connection]:
    """Connect to a database, to inspect it.

    Raises Refusal if it cannot be reached or read, or is too old.
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
        yield connection
    except FAILURES as error:
        raise Refusal(f"The database cannot be read: {reason(error)}.") from error
    finally:
        connection.terminate()


def unknown(revision: str) -> str:
    """Return the sentence about a revision that this version does not know."""
    return (
        f"The database is at revision {revision}, which this version of Tablecast does not know: a"
        " newer one has migrated it, so run that."
    )


def newest_revision() -> str:
    """Return the revision this version of Tablecast works with: the one that no other builds on."""
    revisions, built_on = _revisions()
    [newest] = revisions - built_on
    return newest


def known_revisions() -> set[str]:
    """Return all revisions this version of Tablecast can migrate from."""
    return _revisions()[0]


def _revisions() -> tuple[set[str], set[str]]:
    """Return the revisions, and those that another builds on. (Importing alembic takes long.)"""
    named: dict[str, set[str]] = {"revision": set(), "down_revision": set()}
    for file in (ROOT / "migrations" / "versions").glob("*.py"):
        for kind, name in REVISION.findall(file.read_text()):
            named[kind].add(name)
    return named["revision"], named["down_revision"]


def configuration(url: str, things: bool = True) -> "Config":
    """Return alembic's configuration for the database at `url`; `things`: with the sample table."""
    from alembic.config import Config

    config = Config(ROOT / "alembic.ini")
    config.attributes["url"] = url
    config.attributes["things"] = things
    return config
