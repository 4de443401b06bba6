"""A long backlog: pages cost no more than they hold, and checkpoints split it without reordering a
row.
"""

import asyncio
import json
from typing import Any

import pytest

from app.database.connections import READER, Connection, connect
from app.feed import log
from app.feed.feed import Feed, Publisher
from app.feed.log import Page
from app.feed.offset import Offset, Position
from tests.support.feeds import eventually, following
from tests.support.sockets import App, RawClient, joined, opened
from tests.support.writing import current_offset, insert

SPACING = 4096  # of checkpoints, in changes


async def watch_backlog(connection: Connection) -> None:
    """Make the table that `write_backlog` fills."""
    await connection.execute("CREATE TABLE backlog (id bigint PRIMARY KEY, n int)")
    await connection.execute("SELECT feed.watch('backlog', 'backlog')")


async def write_backlog(connection: Connection, transactions: int, rows: int) -> None:
    """Write many transactions, each with some changes."""
    fill = (
        "INSERT INTO backlog SELECT $1::bigint * 1000 + i, i FROM generate_series(1, $2::int) AS i"
    )
    for number in range(transactions):
        await connection.execute(fill, number, rows)


async def pages_from(connection: Connection, since: Offset, until: Position) -> list[Page]:
    """Return all pages from an offset to a position."""
    pages: list[Page] = []
    while since != Offset(until):
        pages.append(await log.read(connection, since, until))
        assert pages[-1].since == since != pages[-1].until
        since = pages[-1].until
    return pages


async def test_a_long_backlog_is_read_checkpoint_by_checkpoint(
    connection: Connection, database_url: str
) -> None:
    """A backlog of many transactions, one of them left open, is split into batches of about as many
    changes as there are between two checkpoints; each change comes once.
    """
    other = await connect(database_url)
    await watch_backlog(connection)
    since = await current_offset(connection)
    left_open = other.transaction()
    await left_open.start()
    await insert(other, *(f"open {number}" for number in range(5000)))
    await write_backlog(connection, 600, 33)
    pages = await pages_from(connection, since, await log.current_position(connection))
    ids = [change.id for page in pages for change in page.changes]
    logged = await connection.fetch(
        "SELECT id FROM feed.change WHERE topic = 'backlog' AND op = 'create'"
    )
    assert sorted(ids) == sorted(row["id"] for row in logged) and len(ids) == 600 * 33
    assert max(len(page.changes) for page in pages) <= 2 * SPACING
    assert sum(page.until.until is None for page in pages) >= 600 * 33 // SPACING
    await left_open.commit()
    late = await log.read(connection, pages[-1].until)
    assert len(late.changes) == 5000 and late.changes[0].topic == "thing"
    other.terminate()


async def test_changes_of_one_row_stay_in_order_across_checkpoints(
    connection: Connection, database_url: str
) -> None:
    """Eight sessions increment the same rows, taking their transaction ids long before they write;
    a replay across many checkpoints has every row's numbers in order.
    """
    await connection.execute("CREATE TABLE counter (id int PRIMARY KEY, n int)")
    await connection.execute("SELECT feed.watch('counter', 'counter')")
    since = await current_offset(connection)
    await connection.execute("INSERT INTO counter SELECT i, 0 FROM generate_series(1, 200) AS i")

    async def count(session: int) -> None:
        mine = await connect(database_url)
        for round in range(16):
            async with mine.transaction():
                await insert(mine, f"{session} {round}")  # draws the transaction's id
                await asyncio.sleep(0.002 * (session % 3))
                await mine.execute(
                    "UPDATE counter SET n = n + 1 WHERE id IN"
                    " (SELECT id FROM counter ORDER BY id FOR UPDATE)"
                )
        mine.terminate()

    await asyncio.gather(*(count(session) for session in range(8)))
    pages = await pages_from(connection, since, await log.current_position(connection))
    reached = dict.fromkeys(range(1, 201), -1)
    for page in pages:
        for change in page.changes:
            if change.topic == "counter":
                row = json.loads(change.body or "")
                assert row["n"] == reached[row["id"]] + 1
                reached[row["id"]] = row["n"]
    assert set(reached.values()) == {8 * 16}
    assert sum(page.until.until is None for page in pages) > 3


async def blocks(
    connection: Connection, query: str, since: Offset, until: str, *limits: int
) -> int:
    """Return how many blocks one of the reads touches, with the plan that the feed uses."""
    for setting in READER.items():
        await connection.execute("SELECT set_config($1, $2, false)", *setting)
    values = [f"'{since.position}'", f"'{until}'", *map(str, limits)]
    types = ["text", "text", *("boolean" if limit is True else "bigint" for limit in limits)]
    await connection.execute(f"PREPARE reading ({', '.join(types)}) AS {query}")
    plan = json.loads(
        await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) EXECUTE reading ({', '.join(values)})"
        )
    )[0]["Plan"]
    await connection.execute("DEALLOCATE reading")
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


async def test_a_page_of_a_replay_touches_as_much_as_it_holds(connection: Connection) -> None:
    """Finding the next batch and reading it touches few blocks, however long the backlog is and
    however old the planner's statistics are.
    """
    await watch_backlog(connection)
    since = await current_offset(connection)
    await write_backlog(connection, 1000, 33)
    await connection.execute(
        "ANALYZE feed.change; INSERT INTO feed.checkpoint"
        " SELECT until, id + n, snapshot FROM feed.checkpoint, generate_series(1, 60) AS n"
    )
    until = await log.current_position(connection)
    page = (log.PAGE_ROWS, log.PAGE_BYTES, True, log.ANY_SIZE, log.SHORT_MEMBER_BYTES)
    checkpoint = await connection.fetchval(log.NEXT_CHECKPOINT, str(since.position), str(until))
    assert await blocks(connection, log.NEXT_CHECKPOINT, since, str(until)) < 100
    few, batch = (log.FEW_ROWS, *page), (log.BATCH_ROWS, *page)
    assert await blocks(connection, log.READ_BATCH, since, str(until), *few) < 200
    assert await blocks(connection, log.READ_BATCH, since, checkpoint, *batch) < 600


async def test_a_page_reads_no_row_beyond_its_end(connection: Connection) -> None:
    """Of a backlog of rows that are longer than an event may be, a page reads its own: judging the
    length of those after it would make each of many pages as expensive as all of them.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY, long text)")
    await connection.execute("SELECT feed.watch('t', 't')")
    since = await current_offset(connection)
    await connection.execute(
        "INSERT INTO t SELECT i, (SELECT string_agg(md5((i * j)::text), '')"
        " FROM generate_series(1, 250) AS j) FROM generate_series(1, 500) AS i"
    )
    until = str(await log.current_position(connection))
    limits = (log.FEW_ROWS, log.PAGE_ROWS, 64 * 1024, True, 4096, log.SHORT_MEMBER_BYTES)
    assert await blocks(connection, log.READ_BATCH, since, until, *limits) < 500


async def test_the_feed_catches_up_over_checkpoints(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feed that was cut off while a backlog grew publishes all of it once, then new changes."""
    await watch_backlog(connection)
    async with following(database_url) as (feed, recorder):
        connecting = asyncio.Event()
        real = Feed.begin

        async def late(self: Feed, reader: Any, publisher: Publisher) -> None:
            await connecting.wait()
            await real(self, reader, publisher)

        monkeypatch.setattr(Feed, "begin", late)
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        await write_backlog(connection, 400, 33)
        connecting.set()
        await recorder.until(400 * 33)
        await insert(connection, "new")
        await recorder.until(400 * 33 + 1)
        assert recorder.ids == sorted(set(recorder.ids)) and recorder.out_of_order == 0
        assert max(len(page.changes) for page in recorder.pages) <= 2 * SPACING
        await eventually(lambda: feed.trouble() is None)


async def test_reads_that_nobody_waits_for_are_cancelled(
    app: App, connection: Connection, database_url: str
) -> None:
    """Clients that disconnect while their replay waits for the log leave no read behind; a client
    that stays gets what it missed.
    """
    await watch_backlog(connection)
    await app.feed.look()
    async with joined(app.url) as gone:
        pass
    await write_backlog(connection, 300, 33)
    auth = {"pid": "p", "offset": gone.offset}
    async with joined(app.url):
        await eventually(lambda: app.feed.trouble() is None)
    app.replay.clear()
    blocker = await connect(database_url)
    leaving: list[RawClient] = []
    async with opened(app.url) as stays:
        await stays.join(auth)  # judged, and reading
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE feed.checkpoint IN ACCESS EXCLUSIVE MODE")
            app.replay.clear()
            for _ in range(20):
                async with opened(app.url) as client:
                    await client.join(auth)
                    leaving.append(client)
            await eventually(lambda: app.broadcast.stats().subscribers == 1)
            await eventually(lambda: app.replay.stats().reading <= 1)
        assert len(leaving) == 20
        taken = 0
        while taken < 300 * 33:
            assert "backlog:create" in await stays.frame()
            taken += 1
    blocker.terminate()
    await eventually(lambda: app.empty)


async def test_a_checkpoint_leaves_out_its_own_transaction(
    connection: Connection, database_url: str
) -> None:
    """A transaction that leaves a checkpoint and then writes a row that another transaction has
    written in the meantime comes after that transaction in a replay.
    """
    other = await connect(database_url)
    await connection.execute("CREATE TABLE rows (id int PRIMARY KEY, n int)")
    await connection.execute("SELECT feed.watch('rows', 'row'); INSERT INTO rows VALUES (1, 0)")
    since = await current_offset(connection)
    async with connection.transaction():
        await insert(connection, "draws the id")
        await insert(other, "moves the end of snapshots beyond it")
        await connection.execute(
            "INSERT INTO things (name) SELECT i FROM generate_series(1, 9000) AS i"
        )
        await other.execute("UPDATE rows SET n = 1")
        await connection.execute("UPDATE rows SET n = 2")
    await other.execute("INSERT INTO things (name) SELECT -i FROM generate_series(1, 9000) AS i")
    assert await connection.fetchval("SELECT count(*) FROM feed.checkpoint") >= 2
    pages = await pages_from(connection, since, await log.current_position(connection))
    bodies = [change.body for page in pages for change in page.changes if change.topic == "row"]
    assert [json.loads(body or "")["n"] for body in bodies] == [1, 2]
    other.terminate()
