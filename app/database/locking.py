"""Locks watched tables in a way that makes no writer fail or wait for long.

A migration takes all the locks that it needs at once: if it took them one by one, a transaction
that writes to two watched tables could deadlock with it, and Postgres might choose the writer as
the victim. And every later writer queues up after whoever waits for a lock: so we never wait for
long, but give up and try again.
"""

import asyncio
import time

import asyncpg

from app.database.connections import Connection, Refusal

PAUSE_S = 0.2  # lets writers through that have queued up after a lock that was not granted
GIVE_UP_S = 60.0

# The tables with triggers of ours are the watched ones and the log. The timeout is shorter than the
# second after which Postgres looks for a deadlock.
LOCK = """
    SAVEPOINT unlocked;
    SET LOCAL lock_timeout = '300ms';
    {};
    SET LOCAL lock_timeout = 0
"""
UNLOCK = "ROLLBACK TO SAVEPOINT unlocked"
WATCHED_TABLES = """
    DO $$ BEGIN
        EXECUTE (
            SELECT coalesce('LOCK TABLE ' || string_agg(format('%I.%I', nspname, relname), ', ')
                            || ' IN ACCESS EXCLUSIVE MODE', 'SELECT 1')
            FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE pg_has_role(relowner, 'USAGE') AND EXISTS (
                SELECT FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
                WHERE tgrelid = pg_class.oid AND pronamespace = to_regnamespace('feed')));
    END $$
"""
# The first is the lock of feed.watch and feed.unwatch.
ONE_TABLE = "SELECT pg_advisory_xact_lock(1413563213, 5); LOCK TABLE {} IN ACCESS EXCLUSIVE MODE"


async def lock_watched_tables(connection: Connection) -> None:
    """Lock the watched tables and the log until the transaction ends.

    Raises Refusal if others keep one of them in use for a minute.
    """
    await _lock(
        connection,
        WATCHED_TABLES,
        "The database cannot be migrated now: a long transaction or a dump has a watched table in"
        " use; try again when it has ended.",
    )


async def lock_table(connection: Connection, table: str) -> None:
    """Lock a table, named as in SQL, that is to be watched or unwatched, until the transaction
    ends.

    Raises Refusal if others keep it in use for a minute.
    """
    await _lock(
        connection,
        ONE_TABLE.format(table),
        f"{table} is in use by a long transaction or a dump, or tables are just being watched by"
        " somebody else: try again when that has ended.",
    )


async def _lock(connection: Connection, statement: str, refusal: str) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while True:
        try:
            await connection.execute(LOCK.format(statement))
        except asyncpg.LockNotAvailableError as error:
            await connection.execute(UNLOCK)
            if time.monotonic() > deadline:
                raise Refusal(refusal) from error
            await asyncio.sleep(PAUSE_S)
        else:
            return
