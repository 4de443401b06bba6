"""Every query on the log: positions in, pages out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import msgspec

from app.database.connections import UNAVAILABLE, flush
from app.feed.offset import Epoch, Offset, Position
from app.feed.row import excerpt, members

logger = logging.getLogger("tablecast.feed")

PAGE_ROWS = 5_000
# Compressed values count tenfold; usually the factor is about three, rarely ninety.
PAGE_BYTES = 1024 * 1024
# Of a row that is too large, members up to this length are still read: filters may ask for them.
SHORT_MEMBER_BYTES = 4_000
# The end of what an event carries of a row that is too large.
TOO_LARGE = ', "too_large": true}'
# No limit on the size of an event.
ANY_SIZE = 2**40
# More than a feed that keeps up finds in one read.
FEW_ROWS = 1_000
# More than lies between two checkpoints (there is one about every 4096 changes).
BATCH_ROWS = 10_000
# Errors caused by the rows themselves; a failed connection is one of UNAVAILABLE.
UNREADABLE = (asyncpg.PostgresError, UnicodeDecodeError)

# The beginning (BOUNDS) and the end (PAGE) of both reads.
#
# `unread` holds the changes, up to one more than the limit, which shows that there are more. The
# first row, without an id, is the header: when and up to which snapshot the log was read, whether
# the log continues from $1, how many changes are in `unread`, the newest transaction among them,
# and whether any was committed without waiting for the disk. Then comes the page, at most $4
# changes and about $5 bytes; unless $6, without their rows. Of a row longer than $7 bytes it has
# only the members that identify it and those of at most $8 bytes, so that the rest never leaves the
# database. (Compression saves at most a factor of 255, so nearly all rows are known to be shorter
# without being read.)
#
# A feed that keeps up runs this some fifty times a second, on the writers' server: sums and times
# are float8, because numeric takes several times as long.
BOUNDS = """
bounds AS MATERIALIZED (
    SELECT since, until, feed.xid_before(pg_snapshot_xmax(since)) AS seen,
           ARRAY(SELECT xid FROM pg_snapshot_xip(until) AS xid
                 WHERE xid >= pg_snapshot_xmax(since)) AS running
    FROM (SELECT $1::text::pg_snapshot AS since,
                 coalesce($2::text::pg_snapshot, pg_current_snapshot()) AS until) AS given
),
gap AS (
    SELECT gap.* FROM bounds,
           unnest(seen || running, running || pg_snapshot_xmax(until)) AS gap (above, below)
),
ended AS (
    SELECT xid FROM bounds, pg_snapshot_xip(since) AS xid WHERE pg_visible_in_snapshot(xid, until)
)
"""
PAGE = """
page AS (
    SELECT *, CASE WHEN new_stored > $7::bigint OR new_is_compressed AND new_stored > $7 / 255
                   THEN octet_length(new::text) > $7 ELSE false END AS new_is_too_large,
              CASE WHEN old_stored > $7::bigint OR old_is_compressed AND old_stored > $7 / 255
                   THEN octet_length(old::text) > $7 ELSE false END AS old_is_too_large
    FROM (
        SELECT *, sum(size) OVER (ORDER BY id) AS bytes
        FROM (
            SELECT *, new_stored * CASE WHEN new_is_compressed THEN 10 ELSE 1::float8 END
                    + old_stored * CASE WHEN old_is_compressed THEN 10 ELSE 1::float8 END AS size
            FROM (
                SELECT *, coalesce(pg_column_size(new), 0) AS new_stored,
                       pg_column_compression(new) IS NOT NULL AS new_is_compressed,
                       coalesce(pg_column_size(old), 0) AS old_stored,
                       pg_column_compression(old) IS NOT NULL AS old_is_compressed
                FROM (
                    SELECT id, topic, op, at,
                           CASE WHEN op IN ('create', 'update') THEN new END AS new,
                           CASE op WHEN 'update' THEN old
                                   WHEN 'destroy' THEN coalesce(old, new) END AS old
                    FROM unread
                ) AS sent
                ORDER BY id LIMIT $4
            ) AS measured
        ) AS sized
    ) AS summed
    WHERE bytes - size < $5
    -- Lengths are found once each, and only of the page's own rows: finding one may mean reading
    -- the whole row.
    OFFSET 0
)
SELECT NULL::bigint AS id, NULL AS topic, NULL AS op, NULL AS new, NULL AS old,
       NULL::text[] AS key, NULL AS destroy_with, false AS ambiguous, false AS new_is_too_large,
       false AS old_is_too_large, NULL::float8 AS written_at,
       date_part('epoch', clock_timestamp()) AS read_at,
       until::text AS until, feed.continues(since) AS continues, found, newest, async
FROM bounds,
     (SELECT count(*) AS found, max(xid) AS newest, bool_or(async) AS async FROM unread) AS total
UNION ALL
SELECT id, page.topic, op,
       CASE WHEN NOT $6 THEN NULL
            WHEN new_is_too_large THEN feed.outline(new, watched.identifying, $8::integer)
            ELSE new END,
       CASE WHEN NOT $6 THEN NULL
            WHEN old_is_too_large THEN feed.outline(old, watched.identifying, $8::integer)
            ELSE old END,
       watched.key, watched.destroy_with, watched.ambiguous, new_is_too_large,
       old_is_too_large, date_part('epoch', at), NULL, NULL, NULL, NULL, NULL, NULL
FROM page
LEFT JOIN (SELECT *, key || destroy_with AS identifying FROM feed.topic) AS watched
          ON watched.topic = page.topic
ORDER BY id NULLS FIRST
"""

# The changes visible in $2 (NULL: now) that were not visible in $1, unless there are more than $3.
#
# They are read by the primary key, gap by gap between the transactions still running: otherwise
# the scan would step one by one over the invisible rows of a bulk load that is still open.
READ_BATCH = f"""
WITH {BOUNDS},
unread AS MATERIALIZED (
    SELECT change.* FROM gap, LATERAL (
        SELECT * FROM feed.change WHERE xid > gap.above AND xid < gap.below
        ORDER BY xid, id LIMIT $3 + 1
    ) AS change
    UNION ALL
    SELECT change.* FROM ended, LATERAL (
        SELECT * FROM feed.change WHERE xid = ended.xid ORDER BY id LIMIT $3 + 1
    ) AS change
),
{PAGE}
"""

# The same for any number of changes, starting after change $3. The primary key returns the changes
# of one transaction in order, so each transaction is read from where the page begins; a million
# rows of one COPY are not sorted again for every page.
READ_LARGE = f"""
WITH RECURSIVE {BOUNDS},
written AS (
    SELECT gap.below, (SELECT xid FROM feed.change WHERE xid > gap.above AND xid < gap.below
                       ORDER BY xid LIMIT 1) AS xid
    FROM gap
    UNION ALL
    SELECT below, (SELECT xid FROM feed.change WHERE xid > written.xid AND xid < written.below
                   ORDER BY xid LIMIT 1)
    FROM written WHERE xid IS NOT NULL
),
unread AS MATERIALIZED (
    SELECT change.*
    FROM (SELECT xid FROM written WHERE xid IS NOT NULL UNION ALL SELECT xid FROM ended) AS part,
         LATERAL (
             SELECT * FROM feed.change
             WHERE xid = part.xid AND id > $3 ORDER BY id LIMIT $4 + 1
         ) AS change
    ORDER BY id LIMIT $4 + 1
),
{PAGE}
"""

# The first checkpoint after position $1, with changes in between, and not after $2 (NULL: now). A
# snapshot is later than another if it sees everything that the other one sees. Served by the
# primary key.
NEXT_CHECKPOINT = """
SELECT position::text
FROM (SELECT $1::text::pg_snapshot AS since,
             coalesce($2::text::pg_snapshot, pg_current_snapshot()) AS until) AS given,
     feed.checkpoint,
     LATERAL (SELECT feed.position_of(snapshot) AS position OFFSET 0) AS cut
WHERE checkpoint.until > pg_snapshot_xmax(since)
      AND checkpoint.until <= pg_snapshot_xmax(given.until)
      AND NOT EXISTS (SELECT FROM pg_snapshot_xip(snapshot) AS xid
                      WHERE pg_visible_in_snapshot(xid, since))
      AND NOT EXISTS (SELECT FROM pg_snapshot_xip(given.until) AS xid
                      WHERE pg_visible_in_snapshot(xid, snapshot))
      AND position::text <> since::text
ORDER BY checkpoint.until, id LIMIT 1
"""

# Transactions that have written changes and have been open for $1 seconds; prepared ones, which
# have no pid, at any age.
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
    """The log does not continue from this position: it was pruned, rewound or restarted."""


class Change(msgspec.Struct, frozen=True):
    """One row of the log.

    `body`: what the event carries, as JSON text: the row, or what identifies a row that is too
    large; for a destroy, the key, or the value of the column that the topic's destroys carry. A
    truncate and a reload have none; a reload means that clients must load the topic again.

    `new` and `old`: the row after and before, as JSON text, None where there is none. One that is
    too large has only the members that identify it, and short ones.
    """

    id: int
    topic: str
    op: str
    body: str | None
    new: str | None = None
    old: str | None = None
    new_is_too_large: bool = False
    old_is_too_large: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive changes of one batch, between two offsets.

    `written` and `read`: when the last change was written and when the page was read, in
    milliseconds since 1970 by the database's clock. `is_latest`: nothing was left to read then.
    `unreadable`: how many of the changes became reloads because they could not be read.
    """

    since: Offset
    until: Offset
    changes: Sequence[Change]
    written: int
    read: int
    is_latest: bool = False
    unreadable: int = 0


async def current_epoch(connection: asyncpg.Connection) -> Epoch:
    """Return the epoch of the database. Raises one of UNAVAILABLE, also while a dump is being
    restored and has not filled the table yet.
    """
    row = await connection.fetchrow("SELECT feed.epoch(), secret::text FROM feed.state")
    if row is None:
        raise asyncpg.UndefinedTableError("feed.state is empty")
    return Epoch(*row)


async def adopt(connection: asyncpg.Connection) -> None:
    """Empty the log if it came in a dump from a cluster with higher transaction ids."""
    await connection.execute("SELECT feed.adopt()")


async def disown(connection: asyncpg.Connection, position: Position) -> None:
    """Begin another epoch if the newest change of a position is missing but was not pruned:
    Postgres lost commits it had shown (a crash under `synchronous_commit = off`).
    """
    await connection.execute("SELECT feed.disown($1::text::pg_snapshot)", str(position))


async def current_position(connection: asyncpg.Connection) -> Position:
    """Return the position of a reader that has read everything up to now."""
    return Position.parse(await connection.fetchval("SELECT feed.position()::text"))


async def continues(connection: asyncpg.Connection, position: Position) -> bool:
    """Return whether the log holds everything after a position. Reads no changes."""
    return bool(
        await connection.fetchval("SELECT feed.continues($1::text::pg_snapshot)", str(position))
    )


async def read(
    connection: asyncpg.Connection,
    since: Offset,
    until: Position | None = None,
    event_bytes: int = ANY_SIZE,
) -> Page:
    """Read the next page after an offset, up to a position (None: up to now).

    From an offset within a batch, reading continues to the end of that batch. A long backlog is
    split into batches at checkpoints. A change that cannot be read becomes a reload of its topic.
    Of a row whose JSON is longer than `event_bytes`, only what identifies it is read.
    Changes read up to now are flushed to disk before they are returned, so a crash cannot undo
    them.

    Raises HistoryLost, or one of UNAVAILABLE.
    """
    rows = PAGE_ROWS
    while True:
        try:
            limits = (rows, PAGE_BYTES, True, event_bytes, SHORT_MEMBER_BYTES)
            return await _read(connection, since, until, limits)
        except UNAVAILABLE:
            raise
        except UNREADABLE as error:
            if rows > 1:
                rows = max(1, rows // 8)
                continue
            return await _read_around(connection, since, until, error)


async def _read_around(
    connection: asyncpg.Connection, since: Offset, until: Position | None, error: Exception
) -> Page:
    """Return a page with the one change that cannot be read, as a reload."""
    page = await _read(connection, since, until, (1, PAGE_BYTES, False, ANY_SIZE, 0))
    [change] = page.changes
    logger.error(
        "change %d of the topic %s cannot be read (%s): clients of the topic load again",
        change.id, change.topic, str(error).partition("\n")[0],
    )  # fmt: skip
    return Page(
        page.since, page.until, [Change(change.id, change.topic, "reload", None)],
        page.written, page.read, page.is_latest, unreadable=1,
    )  # fmt: skip


async def _read(
    connection: asyncpg.Connection,
    since: Offset,
    until: Position | None,
    page_limits: tuple[int, int, bool, int, int],
) -> Page:
    """Read a page; `page_limits` are what PAGE calls $4 to $8."""
    if since.until is not None:
        found = await _fetch(connection, READ_LARGE, since, since.until, since.id, *page_limits)
        return await _page(connection, found, since, since.until, until is None)

    found = await _fetch(connection, READ_BATCH, since, until, FEW_ROWS, *page_limits)
    if found[0]["found"] <= FEW_ROWS:
        return await _page(connection, found, since, until, until is None)

    target = await _next_checkpoint(connection, since, until)
    if target is None:
        target = until or await current_position(connection)
    found = await _fetch(connection, READ_BATCH, since, target, BATCH_ROWS, *page_limits)
    if found[0]["found"] > BATCH_ROWS:
        found = await _fetch(connection, READ_LARGE, since, target, 0, *page_limits)
    return await _page(connection, found, since, target, until is None)


async def _fetch(
    connection: asyncpg.Connection,
    query: str,
    since: Offset,
    until: Position | None,
    *arguments: object,
) -> list[asyncpg.Record]:
    """Run one of the reads. Raises HistoryLost."""
    found: list[asyncpg.Record] = await connection.fetch(
        query, str(since.position), None if until is None else str(until), *arguments
    )
    if not found[0]["continues"]:
        raise HistoryLost(f"the log does not continue from {since.position}")
    return found


async def _next_checkpoint(
    connection: asyncpg.Connection, since: Offset, until: Position | None
) -> Position | None:
    text = await connection.fetchval(
        NEXT_CHECKPOINT, str(since.position), None if until is None else str(until)
    )
    return None if text is None else Position.parse(text)


async def _page(
    connection: asyncpg.Connection,
    found: Sequence[asyncpg.Record],
    since: Offset,
    target: Position | None,
    is_live: bool,
) -> Page:
    """Return the page found between an offset and a position (None: the header's snapshot)."""
    header, *rows = found
    is_latest = target is None and since.until is None and len(rows) == header["found"]
    if is_live and header["async"]:
        await flush(connection)
    if target is None:
        target = since.position.advanced(Position.parse(header["until"]), header["newest"])
    if len(rows) == header["found"]:
        until = Offset(target)
    else:
        until = Offset(since.position, target, rows[-1]["id"])
    now = header["read_at"]
    written = rows[-1]["written_at"] if rows else now
    changes = [_change(*row[:10]) for row in rows]
    return Page(since, until, changes, round(written * 1000), round(now * 1000), is_latest)


def _change(
    id: int,
    topic: str,
    op: str,
    new: str | None,
    old: str | None,
    key: list[str] | None,
    destroy_with: str | None,
    ambiguous: bool | None,
    new_is_too_large: bool,
    old_is_too_large: bool,
) -> Change:
    if op == "destroy":
        # Nothing says which row was destroyed if its value need not be unique any more.
        body = None if old is None or ambiguous else _destroyed(old, key, destroy_with)
    elif new_is_too_large and new is not None:
        body = too_large(new, key or (), destroy_with)
    else:
        body = new
    if body is None:
        # The row was too long for the log, or nothing in it identifies it. A changed key that was
        # not split into a destroy and a create (rekey) could not be put into order.
        return Change(id, topic, "truncate" if op == "truncate" else "reload", None)
    return Change(id, topic, op, body, new, old, new_is_too_large, old_is_too_large)


def too_large(outline: str, key: Sequence[str], destroy_with: str | None) -> str | None:
    """Return what an event carries of a row that is too large, given its outline. None if a column
    that identifies it is called `too_large`: the row could not be told from a complete one.
    """
    extra = () if destroy_with is None or destroy_with in key else (destroy_with,)
    if "too_large" in (*key, *extra):
        return None
    identifying = excerpt(outline, (*key, *extra))
    return None if identifying is None else identifying[:-1] + TOO_LARGE


def _destroyed(row: str, key: list[str] | None, destroy_with: str | None) -> str | None:
    """Return what a destroy carries of a row; None if the row lacks it (the column was renamed or
    dropped), or the topic is no longer watched.
    """
    if destroy_with is not None:
        found = members(row, (destroy_with,))
        return None if found is None else found[0]
    return None if key is None else excerpt(row, tuple(key))


async def holding_back(connection: asyncpg.Connection, seconds: float) -> list[asyncpg.Record]:
    """Return the transactions that have held back their changes for more than `seconds`."""
    holders: list[asyncpg.Record] = await connection.fetch(HOLDING_BACK, seconds)
    return holders


async def check_topics(connection: asyncpg.Connection) -> list[tuple[str, str | None]]:
    """Make clients load again the topics whose tables were altered or whose triggers were missing.

    Returns each such topic, and what is still wrong with it (None: nothing).
    """
    found = await connection.fetch("SELECT topic, problem FROM feed.check_topics()")
    return [(row["topic"], row["problem"]) for row in found]


async def prune(
    connection: asyncpg.Connection,
    retention: float,
    keep: int,
    step: int,
    reader: Position | None = None,
) -> int:
    """Delete at most `step` changes that are older than `retention` seconds or more than `keep`
    changes back, but none that `reader` needs to continue. Returns how many were deleted.
    """
    deleted: int = await connection.fetchval(
        "SELECT feed.prune(make_interval(secs => $1), $2, $3, $4::text::pg_snapshot)",
        retention, keep, step, None if reader is None else str(reader),
    )  # fmt: skip
    return deleted
