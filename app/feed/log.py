"""Every query on the log: positions in, pages out."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from app.feed.offset import Epoch, Offset, Position

PAGE_ROWS = 5_000
FEW_TRANSACTIONS = 32
# What is stored compressed counts tenfold; often it is threefold, rarely ninety.
PAGE_BYTES = 1024 * 1024

# What is between two positions: not visible in $1 (two index searches, whatever the size of the
# log and however long some transaction stays open), visible in $2 (NULL: now), behind change $3.
# At most $4 rows and about $5 bytes. The first row, with id 0, is the header: the position read up
# to and whether the log continues from $1, both from the very snapshot the rows are from.
#
# The primary key gives the changes of one transaction in order. So while the transactions are few
# (`written` stops at $6) each is entered where the page begins; a million rows of one COPY are not
# sorted anew for every page. Many transactions are read whole, and sorted. Of those that ran at $1
# only the ones that have `ended` are looked at: the rest would be walked in vain, row by row.
READ = """
WITH RECURSIVE bounds AS MATERIALIZED (
    SELECT pg_snapshot_xmax(since) AS low, pg_snapshot_xmax(until) AS high, since, until,
           ARRAY(SELECT xid FROM pg_snapshot_xip(since) AS xid
                 WHERE pg_visible_in_snapshot(xid, until)) AS ended
    FROM (SELECT $1::text::pg_snapshot AS since,
                 coalesce($2::text::pg_snapshot, feed.position()) AS until) AS p
),
written AS (
    (SELECT xid FROM feed.change
     WHERE xid >= (SELECT low FROM bounds) AND xid < (SELECT high FROM bounds)
     ORDER BY xid LIMIT 1)
    UNION ALL
    SELECT (SELECT xid FROM feed.change
            WHERE xid > written.xid AND xid < (SELECT high FROM bounds) ORDER BY xid LIMIT 1)
    FROM written WHERE xid IS NOT NULL
),
few AS MATERIALIZED (SELECT array_agg(xid) AS xids FROM (SELECT xid FROM written LIMIT $6) AS w),
unread AS (
    SELECT one.* FROM few, unnest(xids || (SELECT ended FROM bounds)) AS of (xid), LATERAL (
        SELECT * FROM feed.change
        WHERE change.xid = of.xid AND id > $3 ORDER BY id LIMIT $4
    ) AS one
    WHERE (SELECT cardinality(xids) < $6 FROM few) IS NOT FALSE
    UNION ALL
    SELECT * FROM feed.change
    WHERE xid >= (SELECT low FROM bounds) AND xid < (SELECT high FROM bounds) AND id > $3
      AND (SELECT cardinality(xids) >= $6 FROM few)
    UNION ALL
    SELECT * FROM feed.change
    WHERE xid = ANY ((SELECT ended FROM bounds)::xid8[]) AND id > $3
      AND (SELECT cardinality(xids) >= $6 FROM few)
),
page AS (
    SELECT id, topic, op, row, at,
           sum(size) OVER (ORDER BY id) AS bytes, size
    FROM (
        SELECT *, coalesce(pg_column_size(row), 0)
                  * CASE WHEN pg_column_compression(row) IS NULL THEN 1 ELSE 10 END AS size
        FROM unread
    ) AS unread
    WHERE pg_visible_in_snapshot(xid, (SELECT until FROM bounds))
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

# Transactions that have written changes and not ended for $1 seconds; a prepared one has no pid.
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


async def adopt(connection: asyncpg.Connection) -> None:
    """Empty the log if it came with a dump from another cluster, further than this one is."""
    await connection.execute("SELECT feed.adopt()")


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
        READ,
        str(since.position),
        str(until) if until else None,
        since.id,
        PAGE_ROWS,
        PAGE_BYTES,
        FEW_TRANSACTIONS,
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


async def holding_back(connection: asyncpg.Connection, seconds: float) -> list[asyncpg.Record]:
    """The transactions whose changes wait for a commit longer than so many seconds."""
    holders: list[asyncpg.Record] = await connection.fetch(HOLDING_BACK, seconds)
    return holders


async def prune(connection: asyncpg.Connection, retention: float, keep: int, step: int) -> int:
    """Delete at most `step` changes older than `retention` seconds or more than `keep` changes
    back; returns how many went.
    """
    deleted: int = await connection.fetchval(
        "SELECT feed.prune(make_interval(secs => $1), $2, $3)", retention, keep, step
    )
    return deleted
