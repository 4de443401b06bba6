"""Every query on the log: positions in, pages out."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from app.feed.offset import Epoch, Offset, Position

PAGE_ROWS = 5_000
# More than a feed that keeps up finds at once.
FEW_ROWS = 1_000
FEW_TRANSACTIONS = 32
# What is stored compressed counts tenfold; often it is threefold, rarely ninety.
PAGE_BYTES = 1024 * 1024

# The page of what is `unread`, at most $2 rows and about $3 bytes. The first row, with id 0, is the
# header: what was read up to, and whether the log continues from $1, both from the very snapshot
# the rows are from.
PAGE = """
page AS (
    SELECT *, sum(size) OVER (ORDER BY id) AS bytes
    FROM (
        SELECT *, coalesce(pg_column_size(row), 0)
                  * CASE WHEN pg_column_compression(row) IS NULL THEN 1 ELSE 10 END AS size
        FROM unread
    ) AS unread
    ORDER BY id
    LIMIT $2
)
SELECT 0 AS id, until::text AS topic, feed.continues(since)::text AS op, NULL AS body,
       extract(epoch FROM clock_timestamp())::float8 AS at, false AS full, '0'::xid8 AS xid
FROM bounds
UNION ALL
SELECT id, topic, op,
       CASE op WHEN 'destroy' THEN coalesce((row -> 'name')::text, row::text) ELSE row::text END,
       extract(epoch FROM at)::float8, bytes >= $3, xid
FROM page
WHERE bytes - size < $3
ORDER BY id
"""

# What a feed that keeps up asks: what is visible now and was not in $1.
#
# It is read gap by gap between the transactions still running: the rows of a bulk load under way
# cannot be seen, but would be stepped over one by one.
READ_LATEST = f"""
WITH bounds AS MATERIALIZED (
    SELECT since, until, (pg_snapshot_xmax(since)::text::bigint - 1)::text::xid8 AS seen,
           ARRAY(SELECT xid FROM pg_snapshot_xip(until) AS xid
                 WHERE xid >= pg_snapshot_xmax(since)) AS running
    FROM (SELECT $1::text::pg_snapshot AS since, pg_current_snapshot() AS until) AS p
),
unread AS (
    SELECT change.*
    FROM bounds,
         unnest(seen || running, running || pg_snapshot_xmax(until)) AS gap (above, below),
         LATERAL (
             SELECT * FROM feed.change WHERE xid > above AND xid < below
             ORDER BY xid, id LIMIT $2
         ) AS change
    UNION ALL
    SELECT change.*
    FROM bounds, pg_snapshot_xip(since) AS ended, LATERAL (
        SELECT * FROM feed.change WHERE xid = ended ORDER BY id LIMIT $2
    ) AS change
    WHERE pg_visible_in_snapshot(ended, until)
),
{PAGE}
"""

# What is between two positions, however much: not visible in $1 (two index searches, whatever the
# size of the log and however long some transaction stays open), visible in $4 (NULL: now), behind
# change $5.
#
# The primary key gives the changes of one transaction in order. So while the transactions are few
# (`written` stops at $6) each is entered where the page begins; a million rows of one COPY are not
# sorted anew for every page. Many transactions are read whole, and sorted. Of those that ran at $1
# only the ones that have `ended` are looked at: the rest would be walked in vain, row by row.
READ = f"""
WITH RECURSIVE bounds AS MATERIALIZED (
    SELECT pg_snapshot_xmax(since) AS low, pg_snapshot_xmax(until) AS high, since, until,
           ARRAY(SELECT xid FROM pg_snapshot_xip(since) AS xid
                 WHERE pg_visible_in_snapshot(xid, until)) AS ended
    FROM (SELECT $1::text::pg_snapshot AS since,
                 coalesce($4::text::pg_snapshot, feed.position()) AS until) AS p
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
behind AS (
    SELECT one.* FROM few, unnest(xids || (SELECT ended FROM bounds)) AS of (xid), LATERAL (
        SELECT * FROM feed.change
        WHERE change.xid = of.xid AND id > $5 ORDER BY id LIMIT $2
    ) AS one
    WHERE (SELECT cardinality(xids) < $6 FROM few) IS NOT FALSE
    UNION ALL
    SELECT * FROM feed.change
    WHERE xid >= (SELECT low FROM bounds) AND xid < (SELECT high FROM bounds) AND id > $5
      AND (SELECT cardinality(xids) >= $6 FROM few)
    UNION ALL
    SELECT * FROM feed.change
    WHERE xid = ANY ((SELECT ended FROM bounds)::xid8[]) AND id > $5
      AND (SELECT cardinality(xids) >= $6 FROM few)
),
unread AS (
    SELECT * FROM behind WHERE pg_visible_in_snapshot(xid, (SELECT until FROM bounds))
),
{PAGE}
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
    until = since.until or until
    if until is None:
        found = await connection.fetch(READ_LATEST, str(since.position), FEW_ROWS, PAGE_BYTES)
        if _whole(found, FEW_ROWS):
            newest = max(row["xid"] for row in found)
            snapshot = Position.parse(found[0]["topic"])
            return _page(found, since, Offset(since.position.advanced(snapshot, newest)))
    found = await connection.fetch(
        READ,
        str(since.position),
        PAGE_ROWS,
        PAGE_BYTES,
        str(until) if until else None,
        since.id,
        FEW_TRANSACTIONS,
    )
    reached = Position.parse(found[0]["topic"])
    if _whole(found, PAGE_ROWS):
        return _page(found, since, Offset(reached))
    return _page(found, since, Offset(since.position, reached, found[-1]["id"]))


def _whole(found: Sequence[asyncpg.Record], most_rows: int) -> bool:
    """Whether a header and rows are all there was."""
    return len(found) <= most_rows and not found[-1]["full"]


def _page(found: Sequence[asyncpg.Record], since: Offset, until: Offset) -> Page:
    header, *rows = found
    if header["op"] != "true":
        raise HistoryLost(f"the log does not continue from {since.position}")
    now = header["at"]
    written = rows[-1]["at"] if rows else now
    return Page(
        since, until, [Change(*row[:4]) for row in rows], round(written * 1000), round(now * 1000)
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
