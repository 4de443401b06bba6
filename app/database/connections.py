"""Connections to Postgres, with the same session settings, and the errors of an unavailable one."""

from typing import Any, TypeAlias

import asyncpg

from app.settings import Settings

OLDEST_SUPPORTED = 15
CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 5.0

# A row must look the same in a REST response as in the trigger's log, whatever the client.
SESSION = {
    "application_name": "tablecast",
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    # Reading under a database's default of serializable could make writers fail.
    "default_transaction_isolation": "read committed",
}

# Roles that may create objects in a schema must not get us to use their functions and operators.
OWN_NAMES = {"search_path": "pg_catalog"}

# Reading the log means the same few index searches each time: planning them again would take
# longer than running them, and the statistics of a growing log are always out of date. (A bitmap
# has no order: to return the first few rows, it would sort all matching ones.)
READER = OWN_NAMES | {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}

# Commits an empty message and waits until it, and so all WAL before it, is on disk.
FLUSH = """
    SELECT set_config('synchronous_commit', 'local', true),
           pg_logical_emit_message(true, 'tablecast', '')
"""

# Raised when the database is down, shutting down, starting, full or too slow: no bug of ours.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,  # refused, reset, unreachable, TimeoutError
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,  # the connection was closed while in use
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,  # shut down, starting, cancelled by the statement timeout
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.ReadOnlySQLTransactionError,  # a standby: the primary is now elsewhere
    asyncpg.InvalidCatalogNameError,  # the database is being dropped and restored
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.TransactionRollbackError,  # a deadlock: trying again helps
    asyncpg.ObjectNotInPrerequisiteStateError,  # a standby, or a lock that was not available
    asyncpg.UndefinedTableError,  # a dump is being restored
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
)

Connection: TypeAlias = asyncpg.Connection
Pool: TypeAlias = asyncpg.Pool


class Refusal(Exception):
    """Tablecast cannot start, or had to stop; the message is a sentence that says why."""


async def connect(url: str, **options: Any) -> Connection:
    """Open a connection to the database at `url`. Raises one of UNAVAILABLE.

    `options` are passed to `asyncpg.connect`; `server_settings` are added to the usual ones.
    """
    options["server_settings"] = SESSION | options.get("server_settings", {})
    return await asyncpg.connect(url, **{"timeout": CONNECT_TIMEOUT_S} | options)


async def flush(connection: Connection) -> None:
    """Wait until everything committed so far is on disk.

    A commit under `synchronous_commit = off` is visible before it is flushed, and a crash undoes
    it.
    """
    await connection.execute(FLUSH)


async def keep_session(_: Connection) -> None:
    """Return a connection to the pool as it is: nothing here changes the session.

    asyncpg would reset it, which costs an extra round trip for every statement.
    """


async def create_pool(settings: Settings) -> Pool:
    """Create the pool for REST. It connects on first use, so the database may be down."""
    return await _pool(settings, settings.pool_size, {})


async def create_reading_pool(settings: Settings, size: int) -> Pool:
    """Create a pool for reading the log, with at most `size` connections."""
    return await _pool(settings, size, READER)


async def _pool(settings: Settings, size: int, session: dict[str, str]) -> Pool:
    timeout = {"statement_timeout": f"{STATEMENT_TIMEOUT_S * 1000:.0f}"}
    return await asyncpg.create_pool(
        settings.database_url,
        min_size=0,
        max_size=size,
        timeout=CONNECT_TIMEOUT_S,
        reset=keep_session,
        command_timeout=STATEMENT_TIMEOUT_S + 1,  # in case the server does not answer at all
        server_settings=SESSION | OWN_NAMES | timeout | session,
    )
