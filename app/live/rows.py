"""Reads the rows of a subscription as of one offset, for snapshots and for REST."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from app.database.connections import SNAPSHOT_TIMEOUT_S, Connection, flush
from app.feed.log import SHORT_MEMBER_BYTES
from app.live.condition import Unjudgeable
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.subscription import Subscription
from app.live.table import Column, Table

logger = logging.getLogger("tablecast.live")

FETCHED_ROWS = 1_000
CHUNK_CHARS = 64 * 1024

# Rows are rendered as for the log, so that they look the same (feed.json_expression and
# feed.rows_of in migrations/sql/0003_capture.sql). `matching` are those asked for, at most
# {limit}, in the order of the key. Of a row that is too large there is only the outline; of one
# that cannot be rendered at all, what identifies it.
ROWS = """
WITH matching AS (
    SELECT x.* FROM ONLY {table} AS x WHERE {condition} ORDER BY {order} {limit}
)
SELECT coalesce(CASE WHEN is_too_large THEN feed.outline(whole, $1, $2) ELSE {shown} END,
                row_to_json({identifying}))::text AS shown,
       coalesce(is_too_large, true) AS is_too_large
FROM {rows} AS x
CROSS JOIN LATERAL (
    SELECT CASE WHEN pg_column_size(x.*) <= 32768 THEN row_to_json(x.*)
                ELSE feed.large_json(x.*) END AS whole
    OFFSET 0
) AS rendered
CROSS JOIN LATERAL (SELECT octet_length(whole::text) > $3 AS is_too_large OFFSET 0) AS measured
"""
# Read first in the rows' transaction, so of the same snapshot. `is_same`: the name is still that of
# the topic's table. `unflushed`: the rows may contain commits that a crash would undo.
HEADER = """
SELECT feed.offset() AS "offset",
       (SELECT relation = to_regclass($2) FROM feed.topic WHERE topic = $1) AS is_same,
       pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() AS unflushed
"""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a subscription as of an offset: JSON texts, `chunks` of several rows each, joined
    by commas. `last`: the last row.
    """

    offset: str
    chunks: Sequence[str]
    count: int
    bytes: int
    last: str | None


class TooManyBytes(Exception):
    """The rows are longer than may be read."""


class Outdated(Exception):
    """The table is not as the subscription says any more."""


async def read_rows(
    connection: Connection,
    subscription: Subscription,
    limit_bytes: int,
    event_bytes: int,
    *,
    after: Sequence[str] | None = None,
    limit: int | None = None,
) -> Rows:
    """Read the rows that match, by key: `limit` at most, those after a key if one is given.

    Raises TooManyBytes, Outdated, SubscriptionRefused, or one of UNAVAILABLE.
    """
    table = subscription.table
    parameters: list[Any] = [list(table.identifying), SHORT_MEMBER_BYTES, event_bytes]
    query = statement(subscription, parameters, after, limit)
    reading = Reading(subscription, limit_bytes)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            header = await connection.fetchrow(HEADER, table.topic, table.name)
            if not header["is_same"]:
                raise Outdated(f"{table.name} is not the table of {table.topic} any more")
            cursor = await connection.cursor(query, *parameters)
            while found := await cursor.fetch(FETCHED_ROWS):
                reading.add(found)
    except asyncpg.InsufficientPrivilegeError as error:
        report_privilege(connection.get_settings().session_authorization, table, error)
        raise no_right(table, error) from error
    except (asyncpg.SyntaxOrAccessError, Unjudgeable) as error:
        raise Outdated(str(error)) from error
    except asyncpg.QueryCanceledError as error:
        raise SubscriptionRefused(
            RefusalCode.TOO_LARGE,
            f"Reading these rows takes more than {SNAPSHOT_TIMEOUT_S:.0f} seconds: ask for fewer,"
            " or filter by a column that has an index.",
            "where",
        ) from error
    if header["unflushed"]:
        await flush(connection)
    return reading.rows(header["offset"])


class Reading:
    """Collects rows into chunks."""

    def __init__(self, subscription: Subscription, limit_bytes: int) -> None:
        self._subscription = subscription
        self._limit_bytes = limit_bytes
        self._chunks: list[str] = []
        self._open: list[str] = []
        self._open_chars = self._bytes = self._count = 0
        self._last: str | None = None

    def add(self, found: Sequence[asyncpg.Record]) -> None:
        """Add rows. Raises TooManyBytes."""
        for row, is_too_large in found:
            shown = self._subscription.shown(row, True) if is_too_large else row
            self._open.append(shown)
            self._open_chars += len(shown)
            if self._open_chars >= CHUNK_CHARS:
                self._close()
            self._last = shown
        self._count += len(found)
        if self._bytes + self._open_chars > self._limit_bytes:
            raise TooManyBytes

    def _close(self) -> None:
        self._chunks.append(",".join(self._open))
        self._bytes += self._open_chars
        self._open, self._open_chars = [], 0

    def rows(self, offset: str) -> Rows:
        """Return everything that was added."""
        if self._open:
            self._close()
        return Rows(offset, self._chunks, self._count, self._bytes, self._last)


def statement(
    subscription: Subscription,
    parameters: list[Any],
    after: Sequence[str] | None,
    limit: int | None,
) -> str:
    """Return the SQL that reads the rows; what it needs besides ROWS's own parameters is added to
    `parameters`.

    Names come from the catalog, quoted; values are parameters: nothing of a client is SQL.
    """
    table = subscription.table
    key = [table.column(name) for name in table.key]
    condition = subscription.condition.sql(parameters)
    if after is not None:
        condition = f"({condition}) AND {later(key, after, parameters)}"
    columns = subscription.columns
    return ROWS.format(
        table=table.name,
        condition=condition,
        order=", ".join(f"x.{quoted(column.name)}" for column in key),
        limit="" if limit is None else f"LIMIT {limit:d}",
        shown="whole" if columns is None else f"row_to_json({part(columns)})",
        identifying=part(table.identifying),
        rows=table.rows,
    )


def later(key: Sequence[Column], after: Sequence[str], parameters: list[Any]) -> str:
    """Return the condition that a key is later than another one, given as texts."""
    names = ", ".join(f"x.{quoted(column.name)}" for column in key)
    parameters.extend(after)
    first = len(parameters) - len(key) + 1
    values = ", ".join(f"${first + n}::text::{column.type}" for n, column in enumerate(key))
    return f"ROW({names}) > ROW({values})"


def part(columns: Sequence[str]) -> str:
    """Return the expression for a row of some columns."""
    names = ", ".join(f"x.{quoted(name)}" for name in columns)
    return f"(SELECT part FROM (SELECT {names}) AS part)"


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def report_privilege(role: str, table: Table, error: Exception) -> None:
    """Log what to grant."""
    logger.error(
        "the role %s is refused: %s; let the table's owner run: GRANT SELECT ON %s TO %s",
        role, error, table.name, role,
    )  # fmt: skip


def no_right(table: Table, error: Exception) -> SubscriptionRefused:
    """Return the refusal for rows that the server's role may not read."""
    if "row-level security" in str(error):
        detail = f"The table of {table.topic} has row-level security, which is not supported yet."
    else:
        detail = (
            f"The server's database role may not read the table of {table.topic};"
            " its log says what to grant."
        )
    return SubscriptionRefused(RefusalCode.NO_RIGHT, detail, "topic")
