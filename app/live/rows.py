"""Reads the rows of a subscription as of one offset, for snapshots and for REST."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from app.database.connections import (
    SNAPSHOT_TIMEOUT_S,
    UNAVAILABLE,
    Connection,
    flush,
    one_moment,
    reason,
)
from app.feed.log import SHORT_MEMBER_BYTES
from app.live.condition import Unjudgeable
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.subscription import Subscription
from app.live.table import Column, Table

logger = logging.getLogger("tablecast.live")

# How many rows are fetched at once: few at first, then about as many as FETCHED_BYTES hold.
FIRST_ROWS = 20
MOST_ROWS = 1_000
FETCHED_BYTES = 1024 * 1024
CHUNK_CHARS = 64 * 1024
# How many of the longest rows fit into the query's memory, and the most that Postgres can be given.
ROWS_IN_MEMORY = 4
MOST_MEMORY_KB = 2_000_000

# Rows are rendered as for the log, so that they look the same (feed.json_expression and
# feed.rows_of in migrations/sql/0003_capture.sql). `matching` are those asked for, at most
# {limit}, in the order of the key. Of a row that is too large there is only the outline; of one
# that cannot be rendered at all, what identifies it. `place`: the key as texts, if there is a
# limit. All names are qualified, because columns may have any name.
#
# `shown` is NULL once the rows are longer than $4 bytes in total: what is fetched beyond that takes
# no memory here. Outlines count only if they are long, because clients see less of them. Each row
# is made once, hence the OFFSET 0, and passes through the window on its own: the sum follows the
# order in which the rows arrive, and nothing waits for the last one.
ROWS = """
WITH matching AS (
    SELECT x.* FROM ONLY {table} AS x WHERE {condition} {order} {limit}
)
SELECT CASE WHEN sum(octet_length(listed.shown))
                 FILTER (WHERE NOT listed.is_too_large OR octet_length(listed.shown) > 32768)
                 OVER (ROWS UNBOUNDED PRECEDING) > $4
            THEN NULL ELSE listed.shown END AS shown,
       listed.is_too_large, listed.place
FROM (
    SELECT CASE WHEN octet_length(rendered.text) <= $3 THEN {shown}
                ELSE coalesce(feed.outline(rendered.whole, $1, $2), {identifying})::text
           END AS shown,
           coalesce(octet_length(rendered.text) > $3, true) AS is_too_large,
           {place} AS place
    FROM (
        SELECT made.whole, made.whole::text AS text, made.row
        FROM (
            SELECT CASE WHEN pg_column_size(found.row) <= 32768 THEN row_to_json(found.row)
                        ELSE feed.large_json(found.row) END AS whole,
                   found.row
            FROM (SELECT x.*::record AS row FROM {rows} AS x OFFSET 0) AS found
            OFFSET 0
        ) AS made
        OFFSET 0
    ) AS rendered
    OFFSET 0
) AS listed
"""
# The row itself, in the expressions for `shown`, `identifying` and `place`.
RENDERED = "(rendered.row)"

# Taken before the transaction has a snapshot: TRUNCATE, and an ALTER that rewrites the table, hide
# rows even from older snapshots ("MVCC Caveats" in Postgres's documentation).
LOCK = "LOCK TABLE ONLY {table} IN ACCESS SHARE MODE"
# Read first in the rows' transaction, so in the same snapshot. `is_same`: the name is still that of
# the topic's table. `unflushed`: the rows may contain commits that a crash would undo. `work_mem`:
# a window without the memory for a row or two ($3, in kB) would write all rows to disk.
HEADER = """
SELECT feed.offset() AS "offset",
       (SELECT relation = to_regclass($2) FROM feed.topic WHERE topic = $1) AS is_same,
       pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() AS unflushed,
       set_config('work_mem', greatest(pg_size_bytes(current_setting('work_mem')) / 1024, $3)::text,
                  true) AS work_mem
"""


# What Postgres raises for a text that is not a value of a type; the last one: for regclass, say.
UNREADABLE_VALUE = (
    asyncpg.DataError, asyncpg.ProgramLimitExceededError, asyncpg.SyntaxOrAccessError
)  # fmt: skip


# What a statement raises if something about the table has changed: its name, its schema, a column,
# a type.
OUTDATED = (
    asyncpg.SyntaxOrAccessError, asyncpg.InvalidSchemaNameError, asyncpg.DataError, Unjudgeable
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a subscription as of an offset: JSON texts in UTF-8, `chunks` of several rows
    each, joined by commas. `more_after`: the key of the last row, as texts, if a limit has left
    others out.
    """

    offset: str
    chunks: Sequence[bytes]
    count: int
    bytes: int
    more_after: tuple[str, ...] | None


class TooManyBytes(Exception):
    """The rows are longer than allowed."""


class Outdated(Exception):
    """The table may no longer be what the subscription is bound to."""


async def read_rows(
    connection: Connection,
    subscription: Subscription,
    limit_bytes: int,
    event_bytes: int,
    *,
    after: Sequence[str] | None = None,
    limit: int | None = None,
) -> Rows:
    """Read the rows that match, by key: `limit` at most, those after a key (as texts) if one is
    given.

    Raises TooManyBytes, Outdated, SubscriptionRefused, or one of UNAVAILABLE. Outdated is raised
    for an invalid value, too: it may be in the filter, such as a label that an enum no longer has.
    """
    table = subscription.table
    parameters: list[Any] = [
        list(table.identifying), SHORT_MEMBER_BYTES, event_bytes, limit_bytes
    ]  # fmt: skip
    memory_kb = min(ROWS_IN_MEMORY * event_bytes // 1024, MOST_MEMORY_KB)
    query = statement(subscription, parameters, after, limit)
    reading = Reading(subscription, limit_bytes, limit)
    try:
        async with one_moment(connection):
            await connection.execute(LOCK.format(table=table.name))
            header = await connection.fetchrow(HEADER, table.topic, table.name, memory_kb)
            if not header["is_same"]:
                raise Outdated(f"{table.name} is not the table of {table.topic} any more")
            if after is not None:
                await require_key(connection, table, after)
            cursor = await connection.cursor(query, *parameters)
            while found := await cursor.fetch(reading.batch):
                reading.add(found)
    except asyncpg.InsufficientPrivilegeError as error:
        report_privilege(connection.get_settings().session_authorization, table, error)
        raise no_right(table, error) from error
    except OUTDATED as error:
        raise Outdated(str(error)) from error
    except asyncpg.QueryCanceledError as error:
        raise SubscriptionRefused(
            RefusalCode.TOO_LARGE,
            f"Reading these rows takes more than {SNAPSHOT_TIMEOUT_S:.0f} seconds: ask for fewer,"
            " or filter by a column that has an index.",
            "where",
        ) from error
    except UNAVAILABLE:
        raise
    except (asyncpg.PostgresError, UnicodeDecodeError) as error:
        raise unreadable(table.topic, error) from error
    if header["unflushed"]:
        await flush(connection)
    return reading.rows(header["offset"])


class Reading:
    """Collects rows into chunks."""

    def __init__(
        self, subscription: Subscription, limit_bytes: int, limit: int | None = None
    ) -> None:
        self._subscription = subscription
        self._limit_bytes = limit_bytes
        self._limit = limit
        self._chunks: list[bytes] = []
        self._closed_bytes = 0
        self._open: list[str] = []
        self._open_chars = 0
        self._count = 0
        self._last: Sequence[str] | None = None
        self._has_more = False

    def add(self, found: Sequence[asyncpg.Record]) -> None:
        """Add rows, but none beyond the limit. Raises TooManyBytes."""
        kept = found if self._limit is None else found[: self._limit - self._count]
        self._has_more = len(kept) < len(found)
        for row, is_too_large, _ in kept:
            if row is None:
                raise TooManyBytes
            shown = self._subscription.shown(row, True) if is_too_large else row
            self._open.append(shown)
            self._open_chars += len(shown)
            if self._open_chars >= CHUNK_CHARS:
                self._close()
        self._count += len(kept)
        if kept:
            self._last = kept[-1]["place"]
        if self._bytes > self._limit_bytes:
            raise TooManyBytes

    @property
    def batch(self) -> int:
        """How many rows to fetch next."""
        if not self._count:
            return FIRST_ROWS
        return max(1, min(MOST_ROWS, FETCHED_BYTES * self._count // self._bytes))

    @property
    def _bytes(self) -> int:
        return self._closed_bytes + self._open_chars

    def _close(self) -> None:
        chunk = ",".join(self._open).encode()
        self._chunks.append(chunk)
        self._closed_bytes += len(chunk)
        self._open, self._open_chars = [], 0

    def rows(self, offset: str) -> Rows:
        """Return everything that was added. Raises TooManyBytes."""
        if self._open:
            self._close()
        if self._bytes > self._limit_bytes:
            raise TooManyBytes
        more_after = tuple(self._last) if self._has_more and self._last else None
        return Rows(offset, self._chunks, self._count, self._bytes, more_after)


def statement(
    subscription: Subscription,
    parameters: list[Any],
    after: Sequence[str] | None,
    limit: int | None,
) -> str:
    """Return the SQL that reads the rows; what it needs besides ROWS's own parameters is added to
    `parameters`.

    Names come from the catalog, quoted; values are parameters: nothing from a client becomes SQL.
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
        order=f"ORDER BY {', '.join(map(sortable, key))}" if key else "",
        limit="" if limit is None else f"LIMIT {limit + 1:d}",  # one more shows if any follow
        shown="rendered.text" if columns is None else f"{part(columns)}::text",
        identifying=part(table.identifying),
        place="NULL::text[]" if limit is None else place(key),
        rows=table.rows,
    )


def later(key: Sequence[Column], after: Sequence[str], parameters: list[Any]) -> str:
    """Return the condition that a key comes after another one, given as texts, in the order of
    `sortable`, so that paging neither skips a row nor repeats one.
    """
    first = len(parameters) + 1
    parameters.extend(after)
    values = ", ".join(f"${first + n}::text::{sort_type(column)}" for n, column in enumerate(key))
    return f"ROW({', '.join(map(sortable, key))}) > ROW({values})"


def sortable(column: Column) -> str:
    """Return the expression that rows are sorted by.

    For a type that is not Postgres's own, ORDER BY would use the type's operators, and `>` those of
    the type that it happens to be cast to (citext: text).
    """
    if column.compared_as_text:
        return f'{written(column)} COLLATE "C"'
    return f"x.{quoted(column.name)}"


def sort_type(column: Column) -> str:
    """Return the type of the expression that `sortable` returns."""
    return "text" if column.compared_as_text else column.type


def written(column: Column, row: str = "x") -> str:
    """Return the expression for a value as Postgres writes it. (A cast could run a user's code.)"""
    return f"format('%s', {row}.{quoted(column.name)})"


def place(key: Sequence[Column]) -> str:
    """Return the expression for the key of a row, as texts."""
    return f"ARRAY[{', '.join(written(column, RENDERED) for column in key)}]::text[]"


async def require_key(connection: Connection, table: Table, after: Sequence[str]) -> None:
    """Refuse texts that are not values of the key columns."""
    types = [sort_type(table.column(name)) for name in table.key]
    values = ", ".join(f"${number}::text::{type}" for number, type in enumerate(types, 1))
    try:
        await connection.fetchrow(f"SELECT num_nulls({values})", *after)
    except UNREADABLE_VALUE as error:
        raise SubscriptionRefused(
            RefusalCode.BAD_VALUE,
            f"after is not a key of {table.topic}: {reason(error)}.",
            "after",
        ) from error


def part(columns: Sequence[str]) -> str:
    """Return the expression for a row of some columns, as JSON."""
    names = ", ".join(f"{RENDERED}.{quoted(name)}" for name in columns)
    return f"(SELECT row_to_json(part.*) FROM (SELECT {names}) AS part)"


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def unreadable(topic: str, error: Exception) -> SubscriptionRefused:
    """Log why the rows of a topic cannot be read; return the refusal, which names no value."""
    logger.error(
        "the rows of the topic %s cannot be read: %s (%s)",
        topic, reason(error), type(error.__cause__ or error).__name__,
    )  # fmt: skip
    return SubscriptionRefused(
        RefusalCode.UNREADABLE,
        f"Postgres cannot read the rows of {topic}: the table is being altered, or one of its"
        " values is in error. Try again later; the server's log has the details.",
        "topic",
    )


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
