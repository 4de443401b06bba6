"""Connections to Postgres, all alike, and what it means when there is none."""

from typing import Any, TypeAlias

import asyncpg

from app.settings import Settings

OLDEST_SUPPORTED = 15
CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 5.0

# A row must look the same in a REST answer as in the trigger's log, whoever the client is.
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

# Whoever may create objects in a schema must not have its functions and operators used by us.
OWN_NAMES = {"search_path": "pg_catalog"}

# Reading the log is the same few index searches each time: planning them again would take longer
# than doing them, and what the planner knows of a log that grows is always old. (A bitmap has no
# order: all that it finds would be sorted for the first few.)
READER = OWN_NAMES | {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}

# Commits a message of no meaning, and waits until it is on disk, and with it all that lies before.
FLUSH = """
    SELECT set_config('synchronous_commit', 'local', true),
           pg_logical_emit_message(true, 'tablecast', '')
"""

# Raised when the database is away, going away, starting, full or too slow: nobody's fault here.
UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,  # refused, reset, unreachable, and TimeoutError
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,  # the connection was closed under us
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,  # shut down, starting, cancelled by the statement timeout
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.ReadOnlySQLTransactionError,  # a standby: its primary went elsewhere
    asyncpg.InvalidCatalogNameError,  # the database is being restored under its name
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.TransactionRollbackError,  # a deadlock, which another try gets past
    asyncpg.ObjectNotInPrerequisiteStateError,  # a standby, or a lock that was not to be had
    asyncpg.UndefinedTableError,  # a dump is being restored
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
)

Connection: TypeAlias = asyncpg.Connection
Pool: TypeAlias = asyncpg.Pool


class Refusal(Exception):
    """Tablecast cannot start; the message is a sentence that says why."""


async def connect(url: str, **options: Any) -> Connection:
    """Open a connection to the database at `url`. Raises one of UNAVAILABLE.

    `options` go to `asyncpg.connect`; `server_settings` among them are added to the usual ones.
    """
    options["server_settings"] = SESSION | options.get("server_settings", {})
    return await asyncpg.connect(url, **{"timeout": CONNECT_TIMEOUT_S} | options)


async def flush(connection: Connection) -> None:
    """Have everything that is committed so far on disk.

    A commit under `synchronous_commit = off` is visible before it is flushed, and a crash takes it
    back.
    """
    await connection.execute(FLUSH)


async def keep_session(_: Connection) -> None:
    """A used connection goes back to the pool as it is: nobody changes the session of one.

    asyncpg would reset it, which is another round trip to the server for every statement.
    """


async def create_pool(settings: Settings) -> Pool:
    """Make the pool for REST. It connects when used, so the database may be away."""
    return await _pool(settings, settings.pool_size, {})


async def create_reading_pool(settings: Settings, size: int) -> Pool:
    """Make a pool for reading the log, `size` connections at most."""
    return await _pool(settings, size, READER)


async def _pool(settings: Settings, size: int, session: dict[str, str]) -> Pool:
    timeout = {"statement_timeout": f"{STATEMENT_TIMEOUT_S * 1000:.0f}"}
    return await asyncpg.create_pool(
        settings.database_url,
        min_size=0,
        max_size=size,
        timeout=CONNECT_TIMEOUT_S,
        reset=keep_session,
        command_timeout=STATEMENT_TIMEOUT_S + 1,  # for a server that does not answer at all
        server_settings=SESSION | OWN_NAMES | timeout | session,
    )
