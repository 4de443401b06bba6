"""Connections to Postgres, all with the same session settings, and the errors that mean it is
unavailable.
"""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import asyncpg
from asyncpg.exceptions import TargetServerAttributeNotMatched

from app.settings import Settings, database_hosts

OLDEST_SUPPORTED = 15
CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 5.0
SNAPSHOT_TIMEOUT_S = 60.0
RELEASE_TIMEOUT_S = 1.0

# The only setting that is sent while connecting: poolers refuse parameters they do not know.
STARTUP = {"application_name": "tablecast"}

# URL parameters that concern only Postgres's own clients. The driver would pass them on to the
# server, which refuses those it does not know.
LIBPQ_ONLY = frozenset(
    {
        "channel_binding", "connect_timeout", "fallback_application_name", "gssencmode",
        "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval",
        "sslcompression", "sslsni", "tcp_user_timeout",
    }
)  # fmt: skip

# What the driver looks for in the home directory.
HOME_FILES = (
    ".pgpass", ".postgresql/root.crt", ".postgresql/root.crl", ".postgresql/postgresql.crt",
    ".postgresql/postgresql.key",
)  # fmt: skip
NO_HOME = "/nonexistent"

# A row must look the same in a REST response as in the trigger's log, whatever the client.
SESSION = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "quote_all_identifiers": "off",
    "array_nulls": "on",
    # Reading under a database's default of serializable could make writers fail.
    "default_transaction_isolation": "read committed",
}

# Roles that may create objects in a schema must not be able to make us call their functions and
# operators.
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

# Reading the rows of a subscription. A row that a policy hides would turn up with its next change,
# so Postgres must raise an error if there is a policy; a locked table must not keep others waiting
# for long.
ALL_ROWS = {"row_security": "off", "lock_timeout": "2s"}

# Commits an empty message and waits until it, and so all WAL before it, is on disk.
FLUSH = """
    SELECT set_config('synchronous_commit', 'local', true),
           pg_logical_emit_message(true, 'tablecast', '')
"""

# Raised when the database is down, shutting down, starting, full or too slow: not a bug of ours.
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

Sentences: TypeAlias = tuple[tuple[tuple[type[BaseException], ...], str], ...]

# What is wrong, as the end of a sentence that any client may read: no names, no addresses.
UNREACHABLE: Sentences = (
    ((TimeoutError,), "it does not answer"),
    ((ConnectionRefusedError, FileNotFoundError), "nothing listens at its address"),
    ((ConnectionError, asyncpg.PostgresConnectionError), "the connection was lost"),
    ((socket.gaierror,), "the name of its host is unknown"),
    ((OSError,), "the network does not reach it"),
    ((asyncpg.InterfaceError, asyncpg.InternalClientError), "it does not answer"),
    ((asyncpg.CannotConnectNowError,), "it is starting up or shutting down"),
    ((asyncpg.QueryCanceledError,), "it takes too long to answer"),
    ((asyncpg.OperatorInterventionError,), "it is shutting down or ended the connection"),
    ((asyncpg.TooManyConnectionsError,), "it accepts no more connections"),
    ((asyncpg.InsufficientResourcesError,), "it has run out of resources"),
    ((asyncpg.InvalidAuthorizationSpecificationError,), "it rejects the server's credentials"),
    ((asyncpg.InvalidCatalogNameError,), "it does not exist at the moment"),
)
UNUSABLE: Sentences = (
    ((asyncpg.ReadOnlySQLTransactionError,), "it accepts no writes (it may be a standby)"),
    ((asyncpg.LockNotAvailableError,), "a table is locked"),
    ((asyncpg.ObjectNotInPrerequisiteStateError,),
     "it is a standby, or does not allow connections at the moment"),
    ((asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError),
     "Tablecast's tables are missing from it (`tablecast migrate` makes them)"),
    ((asyncpg.InsufficientPrivilegeError,), "the server's role lacks a privilege"),
)  # fmt: skip

Connection: TypeAlias = asyncpg.Connection
Pool: TypeAlias = asyncpg.Pool


class Refusal(Exception):
    """Tablecast cannot start, or had to stop; the message is a sentence that says why."""


class SharedSession(ConnectionError):
    """A pooler gives the session to others between transactions, so nothing set in it lasts."""


# What using or preparing a statement in such a session raises.
SHARED_SESSION: tuple[type[BaseException], ...] = (
    SharedSession,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.DuplicatePreparedStatementError,
)


def absence(error: BaseException) -> str:
    """Return a sentence, for anybody to read, on why the database cannot be reached or used."""
    for sentences, trouble in ((UNREACHABLE, "reached"), (UNUSABLE, "used")):
        for types, reason in sentences:
            if isinstance(error, types):
                return f"The database cannot be {trouble}: {reason}."
    return "The database reports an error; the server's log has the details."


def reason(error: BaseException | None) -> str:
    """Return what went wrong, as the end of a sentence, for whoever runs Tablecast."""
    if isinstance(error, OSError) and (error.errno or not str(error)):  # say more than a number
        for types, sentence in UNREACHABLE:
            if isinstance(error, types) and OSError not in types:
                return sentence
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0].rstrip(".")


def ignore_unreadable_home() -> None:
    """Make the driver do without the home directory if it may not read what it looks for there.

    HOME may be another user's (`sudo` can leave it like that), or hidden by a service manager; the
    driver would then fail to connect.
    """
    try:
        files = [Path.home() / name for name in HOME_FILES]
        in_reach = all(os.access(file, os.R_OK) for file in files if file.exists())
    except (PermissionError, RuntimeError):  # out of reach, or a user without a home
        in_reach = False
    if not in_reach:
        os.environ["HOME"] = NO_HOME


async def connect(
    url: str, *, session: Mapping[str, str] | None = None, **options: Any
) -> Connection:
    """Open a connection to the database at `url`. Raises one of UNAVAILABLE.

    Of several hosts, the first usable one is chosen. `session` is added to the usual session
    settings. `options` are passed to `asyncpg.connect`.
    """
    options = {"timeout": CONNECT_TIMEOUT_S, "server_settings": STARTUP} | options
    try:
        connection = await _connect_to_any(url, options)
    except TargetServerAttributeNotMatched as error:
        raise ConnectionError("no host is as target_session_attrs requires") from error
    try:
        await connection.execute(_setting(SESSION | dict(session or {})))
    except BaseException:
        connection.terminate()
        raise
    return connection


def for_the_driver(url: str) -> str:
    """Return the URL of a database without what only Postgres's own clients understand."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in query if name not in LIBPQ_ONLY]
    if kept == query:
        return url
    return urlunsplit(parts._replace(query=urlencode(kept, quote_via=quote)))


async def _connect_to_any(url: str, options: dict[str, Any]) -> Connection:
    hosts, url = database_hosts(url), for_the_driver(url)
    if len(hosts) < 2:
        return await asyncpg.connect(url, **options)
    # asyncpg would let a host that does not answer use up the time of all others.
    options = options | {"timeout": options["timeout"] / len(hosts)}
    for host, port in hosts[:-1]:
        try:
            return await asyncpg.connect(url, host=host, port=port, **options)
        except UNAVAILABLE:
            continue
    host, port = hosts[-1]
    return await asyncpg.connect(url, host=host, port=port, **options)


def _setting(session: Mapping[str, str]) -> str:
    """Return SQL for session settings: one round trip, and no prepared statement."""
    return ";".join(f"SET {name} TO '{value}'" for name, value in session.items())


async def flush(connection: Connection) -> None:
    """Wait until everything committed so far is on disk.

    A commit under `synchronous_commit = off` is visible before it is flushed, and a crash undoes
    it.
    """
    await connection.execute(FLUSH)


async def keep_session(_: Connection) -> None:
    """Return a connection to the pool as it is: nothing we do changes the session.

    asyncpg would reset it, which costs an extra round trip for every statement, and undoes what
    `connect` has set.
    """


@asynccontextmanager
async def borrowed(pool: Pool, timeout: float | None = None) -> AsyncIterator[Connection]:
    """Borrow a connection from a pool; wait at most `timeout` seconds for a free one.

    If the block is cancelled, so is its statement. If the server does not confirm that soon, the
    connection is discarded: a cancellation must not wait for a silent server.
    """
    connection = await pool.acquire(timeout=timeout)
    try:
        yield connection
    finally:
        # In a task of its own, which handles errors even if this wait is cancelled, too.
        await asyncio.shield(asyncio.create_task(_give_back(pool, connection)))


async def _give_back(pool: Pool, connection: Connection) -> None:
    with suppress(*UNAVAILABLE):
        await pool.release(connection, timeout=RELEASE_TIMEOUT_S)


@asynccontextmanager
async def one_moment(connection: Connection) -> AsyncIterator[None]:
    """Read as of one moment, in a read-only transaction.

    Cancelling the block waits at most RELEASE_TIMEOUT_S for its ROLLBACK, and then closes the
    connection: asyncpg's own transaction would wait as long as for any statement.
    """
    transaction = connection.transaction(isolation="repeatable_read", readonly=True)
    await transaction.__aenter__()
    try:
        yield
    except BaseException:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await transaction.__aexit__(*sys.exc_info())
        except UNAVAILABLE:
            connection.terminate()
        raise
    await transaction.__aexit__(None, None, None)


async def create_pool(settings: Settings) -> Pool:
    """Create the pool for REST. It connects on first use, so the database may be down."""
    return await _pool(settings, settings.pool_size, {})


async def create_reading_pool(settings: Settings, size: int) -> Pool:
    """Create a pool for reading the log, with at most `size` connections."""
    return await _pool(settings, size, READER)


async def create_subscription_pool(settings: Settings, size: int) -> Pool:
    """Create a pool for reading the catalog and the rows of subscriptions, which may take longer
    than other statements.
    """
    # Statements are rarely repeated, and altering a table would invalidate a cached one.
    return await _pool(settings, size, ALL_ROWS, SNAPSHOT_TIMEOUT_S, statement_cache_size=0)


async def _pool(
    settings: Settings,
    size: int,
    session: dict[str, str],
    timeout_s: float = STATEMENT_TIMEOUT_S,
    **options: Any,
) -> Pool:
    timeout = {"statement_timeout": f"{timeout_s * 1000:.0f}"}
    return await asyncpg.create_pool(
        settings.database_url,
        connect=connect,
        session=OWN_NAMES | timeout | session,
        min_size=0,
        max_size=size,
        timeout=CONNECT_TIMEOUT_S,
        reset=keep_session,
        command_timeout=timeout_s + 1,  # in case the server does not answer at all
        **options,
    )
