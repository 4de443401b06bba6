"""Every query on the log: positions in, pages out."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import asyncpg

from app.feed.offset import Epoch, Offset, Position

PAGE_ROWS = 5_000
PAGE_BYTES = 1024 * 1024  # as stored: long rows are compressed, several-fold at most

# A batch too long for one page is streamed from here on by a cursor: sorted once, not page by page.
# How many rows at once follows their length.
FIRST_FETCH_ROWS = 100
CURSOR_ROWS = 2_000

# What is between two positions: not visible in $1 (two index searches, whatever the size of the
# log and however long some transaction stays open), visible in $2 (NULL: now), behind change $3.
# At most $4 rows and about $5 bytes. The first row, with id 0, is the header: the position read up
# to and whether the log continues from $1, both from the very snapshot the rows are from.
READ = """
WITH bounds AS MATERIALIZED (
    SELECT $1::text::pg_snapshot AS since,
           coalesce($2::text::pg_snapshot, feed.position()) AS until
),
page AS (
    SELECT id, topic, op, row, at,
           sum(pg_column_size(row)) OVER (ORDER BY id) AS bytes,
           coalesce(pg_column_size(row), 0) AS size
    FROM (
        SELECT * FROM feed.change
        WHERE xid >= (SELECT pg_snapshot_xmax(since) FROM bounds)
          AND xid < (SELECT pg_snapshot_xmax(until) FROM bounds)
        UNION ALL
        SELECT * FROM feed.change
        WHERE xid = ANY (ARRAY(SELECT pg_snapshot_xip(since) FROM bounds))
    ) AS unread
    WHERE pg_visible_in_snapshot(xid, (SELECT until FROM bounds)) AND id > $3
    ORDER BY id
    LIMIT $4
)
SELECT 0 AS id, until::text AS topic, feed.continues(since)::text AS op, NULL AS body,
       (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS at, false AS full
FROM bounds
UNION ALL
SELECT id, topic, op,
       CASE op WHEN 'destroy' THEN coalesce((row -> 'name')::text, row::text) ELSE row::text END,
       (extract(epoch FROM at) * 1000)::bigint, coalesce(bytes, 0) >= $5
FROM page
WHERE coalesce(bytes, 0) - size < $5
ORDER BY id
"""

# The same for the rest of a batch, all of it, for a cursor.
READ_REST = """
SELECT id, topic, op,
       CASE op WHEN 'destroy' THEN coalesce((row -> 'name')::text, row::text) ELSE row::text END
           AS body,
       (extract(epoch FROM at) * 1000)::bigint AS at
FROM (
    SELECT * FROM feed.change
    WHERE xid >= pg_snapshot_xmax($1::text::pg_snapshot)
      AND xid < pg_snapshot_xmax($2::text::pg_snapshot)
    UNION ALL
    SELECT * FROM feed.change
    WHERE xid = ANY (ARRAY(SELECT pg_snapshot_xip($1::text::pg_snapshot)))
) AS unread
WHERE pg_visible_in_snapshot(xid, $2::text::pg_snapshot) AND id > $3
ORDER BY id
"""

# Transactions that have written changes and not ended for $1 seconds; pid is NULL for prepared ones.
HOLDING_BACK = """
SELECT lock.pid, usename, application_name, state,
       extract(epoch FROM clock_timestamp() - xact_start)::int AS seconds
FROM pg_locks AS lock
LEFT JOIN pg_stat_activity AS activity ON activity.pid = lock.pid
WHERE lock.relation = 'feed.change'::regclass AND lock.mode = 'RowExclusiveLock' AND lock.granted
  AND (lock.pid IS NULL OR xact_start < clock_timestamp() - make_interval(secs => $1))
  AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class HistoryLost(Exception):
    """The log does not continue from the position asked for: pruned, rewound or another history."""


@dataclass(frozen=True, slots=True)
class Change:
    """One row of the log. `body` is what the event carries, as JSON text (truncate: None)."""

    id: int
    topic: str
    op: str
    body: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive changes of one batch, between two offsets.

    `written` and `read`: when the last change was written and when the page was read, in
    milliseconds since 1970 by the database's clock.
    """

    since: Offset
    until: Offset
    changes: Sequence[Change]
    written: int
    read: int


async def current_epoch(connection: asyncpg.Connection) -> Epoch:
    """The epoch of the database."""
    row = await connection.fetchrow("SELECT feed.epoch(), secret::text FROM feed.state")
    return Epoch(*row)


async def disown(connection: asyncpg.Connection, position: Position) -> None:
    """Begin another epoch if the newest change of a position is gone without having been pruned:
    Postgres lost commits it had shown (a crash under `synchronous_commit = off`).
    """
    await connection.execute("SELECT feed.disown($1::text::pg_snapshot)", str(position))


async def current_position(connection: asyncpg.Connection) -> Position:
    """The position of a reader that has read everything there is now."""
    return Position.parse(await connection.fetchval("SELECT feed.position()::text"))


async def read(
    connection: asyncpg.Connection, since: Offset, until: Position | None = None
) -> Page:
    """Read the next page behind an offset, up to a position (None: up to now).

    An offset within a batch is continued to the end of that batch. Raises HistoryLost.
    """
    if since.until is not None:
        until = since.until
    header, *rows = await connection.fetch(
        READ, str(since.position), until and str(until), since.id, PAGE_ROWS, PAGE_BYTES
    )
    _, position, continues, _, now, _ = header
    if continues != "true":
        raise HistoryLost(f"the log does not continue from {since.position}")
    reached = Position.parse(position)
    complete = not rows or not (rows[-1]["full"] or len(rows) == PAGE_ROWS)
    return Page(
        since,
        Offset(reached) if complete else Offset(since.position, reached, rows[-1]["id"]),
        [Change(*row[:4]) for row in rows],
        rows[-1]["at"] if rows else now,
        now,
    )


async def read_rest(connection: asyncpg.Connection, since: Offset) -> AsyncIterator[Page]:
    """Stream what is left of a batch behind an offset within it, page by page."""
    assert since.until is not None
    async with connection.transaction(readonly=True):
        cursor = await connection.cursor(
            READ_REST, str(since.position), str(since.until), since.id
        )
        size = FIRST_FETCH_ROWS
        rows = await cursor.fetch(size)
        while True:
            chars = sum(len(row["body"] or "") for row in rows)
            more = len(rows) == size
            size = max(1, min(CURSOR_ROWS, size * PAGE_BYTES // max(chars, 1)))
            following = await cursor.fetch(size) if more else []
            until = (
                Offset(since.position, since.until, rows[-1]["id"])
                if following
                else Offset(since.until)
            )
            at = rows[-1]["at"] if rows else 0
            yield Page(since, until, [Change(*row[:4]) for row in rows], at, at)
            if not following:
                return
            since, rows = until, following


async def holding_back(connection: asyncpg.Connection, seconds: float) -> list[asyncpg.Record]:
    """The transactions whose changes wait for a commit longer than so many seconds."""
    return await connection.fetch(HOLDING_BACK, seconds)


async def prune(
    connection: asyncpg.Connection, retention: float, keep: int, step: int
) -> int:
    """Delete at most `step` changes older than `retention` seconds or more than `keep` changes
    back; returns how many went.
    """
    return await connection.fetchval(
        "SELECT feed.prune(make_interval(secs => $1), $2, $3)", retention, keep, step
    )
