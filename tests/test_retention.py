"""Retention: what is pruned and when, and that no node notices."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.feed.retention import Retention
from tests.support.feeds import eventually, following
from tests.support.writing import insert


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    async with asyncpg.create_pool(database_url, min_size=0, max_size=2) as opened:
        yield opened


async def test_old_changes_are_pruned_and_the_table_does_not_grow(
    private_postgres: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under steady writes the log keeps the young changes and its file stops growing. (On a private
    Postgres: other tests' transactions would delay it.)
    """
    monkeypatch.setattr("app.feed.retention.PAUSE_S", 0.05)
    monkeypatch.setattr("app.feed.retention.OTHERS_READ_S", 0.1)
    url = private_postgres(fsync="off").url
    connection = await connect(url)
    async with asyncpg.create_pool(url) as pool, following(url, keep=False) as (feed, recorder):
        retention = asyncio.create_task(Retention(feed, pool, 0.5, 10**9).run())
        sizes = []
        for number in range(60):
            await connection.execute(
                "INSERT INTO things (name) SELECT $1 || i::text FROM generate_series(1, 200) AS i",
                f"{number} ",
            )
            if number % 10 == 9:
                await connection.execute("VACUUM feed.change")  # like autovacuum, but sooner
                sizes.append(await connection.fetchval("SELECT pg_table_size('feed.change')"))
            await asyncio.sleep(0.05)
        await recorder.until(12_000)
        assert sizes[-1] <= max(sizes[:3]) * 1.5
        async with asyncio.timeout(10):
            while await connection.fetchval("SELECT count(*) FROM feed.change"):
                await asyncio.sleep(0.05)
        await insert(connection, "after")
        await recorder.until(12_001)
        assert len(recorder.histories) == 1 and recorder.out_of_order == 0
        retention.cancel()
        await asyncio.wait([retention])
    await connection.close()


async def test_nodes_that_keep_up_do_not_notice_that_the_log_is_pruned(
    connection: Connection,
    database_url: str,
    pool: "asyncpg.Pool[asyncpg.Record]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Changes grow older than the retention while an older transaction runs; when it ends, no
    node's position is lost, not even before that node has looked again.
    """
    monkeypatch.setattr("app.feed.retention.PAUSE_S", 0.02)
    holder = await connect(database_url)
    async with (
        following(database_url) as (leader, one),
        following(database_url) as (other, two),
    ):
        assert leader.leading and not other.leading
        retention = Retention(leader, pool, 0, 10**9)
        pruning = asyncio.create_task(retention.run())
        for number in (1, 2):
            transaction = holder.transaction()
            await transaction.start()
            await holder.fetchval("SELECT pg_current_xact_id()")
            await insert(connection, str(number))
            await asyncio.gather(one.until(number), two.until(number))
            await transaction.commit()
            async with asyncio.timeout(20):
                while retention.stats().pruned < number:
                    await asyncio.sleep(0.01)
            assert await leader.look() and await other.look()
        pruning.cancel()
        await asyncio.wait([pruning])
    assert len(one.histories) == len(two.histories) == 1
    await holder.close()


async def test_a_log_that_cannot_be_pruned_is_reported_once(
    connection: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The database is read-only for a while: the log says so, but not every second."""
    monkeypatch.setattr("app.feed.retention.PAUSE_S", 0.02)
    monkeypatch.setattr("app.feed.retention.OTHERS_READ_S", 0.1)
    read_only = {"default_transaction_read_only": "on"}
    await insert(connection, "a")
    borrowed: list[object] = []

    async def note(connection: object) -> None:
        borrowed.append(connection)

    async with (
        asyncpg.create_pool(database_url, server_settings=read_only, setup=note) as pool,
        following(database_url) as (feed, _),
    ):
        pruning = asyncio.create_task(Retention(feed, pool, 0, 10**9).run())
        await eventually(lambda: "cannot prune the log" in caplog.text)
        attempts = len(borrowed)
        await eventually(lambda: len(borrowed) > attempts + 5)
        pruning.cancel()
        await asyncio.wait([pruning])
    assert caplog.text.count("cannot prune the log") == 1


async def test_a_step_that_takes_too_long_becomes_shorter(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are so large that the statement timeout ends a step of the usual size."""
    monkeypatch.setattr("app.feed.retention.PAUSE_S", 0.05)
    monkeypatch.setattr("app.feed.retention.OTHERS_READ_S", 0.1)
    await connection.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN PERFORM pg_sleep(0.002); RETURN OLD; END $$;"
        "CREATE TRIGGER slow BEFORE DELETE ON feed.change FOR EACH ROW EXECUTE FUNCTION slow();"
        "INSERT INTO things (name) SELECT i FROM generate_series(1, 1000) AS i"
    )
    impatient = {"statement_timeout": "700ms"}
    async with (
        asyncpg.create_pool(database_url, server_settings=impatient) as pool,
        following(database_url, keep=False) as (feed, _),
    ):
        pruning = asyncio.create_task(Retention(feed, pool, 0, 10**9).run())
        async with asyncio.timeout(30):
            while await connection.fetchval("SELECT count(*) FROM feed.change"):
                await asyncio.sleep(0.05)
        pruning.cancel()
        await asyncio.wait([pruning])


async def test_no_more_changes_are_kept_than_allowed(
    connection: Connection,
    database_url: str,
    pool: "asyncpg.Pool[asyncpg.Record]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Changes beyond FEED_MAX_CHANGES are pruned, however young, without blocking writers."""
    monkeypatch.setattr("app.feed.retention.STEP_ROWS", 100)
    # Other tests' transactions make steps smaller; full pauses in between would take too long.
    monkeypatch.setattr("app.feed.retention.PAUSE_S", 0.05)
    monkeypatch.setattr("app.feed.retention.OTHERS_READ_S", 0.1)
    async with following(database_url, keep=False) as (feed, _):
        await connection.execute(
            "INSERT INTO things (name) SELECT i FROM generate_series(1, 1500) i"
        )
        retention = Retention(feed, pool, 3600, 1000)
        pruning = asyncio.create_task(retention.run())
        longest = 0.0
        async with asyncio.timeout(20):
            while await connection.fetchval("SELECT count(*) FROM feed.change") > 1000:
                began = time.monotonic()
                await insert(connection, f"{began}")
                longest = max(longest, time.monotonic() - began)
                await asyncio.sleep(0.01)
        assert longest < 1
        assert retention.stats().pruned >= 500
        pruning.cancel()
        await asyncio.wait([pruning])
