"""Connections that are borrowed from a pool, when nobody waits for them any more."""

import asyncio
import gc
from contextlib import suppress

import pytest

from app.database.connections import Connection, borrowed, create_pool
from app.settings import Settings
from tests.support.feeds import eventually
from tests.support.proxy import proxied

pytestmark = pytest.mark.database

SLEEPS = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(20)'"


async def test_a_loan_that_is_cancelled_twice_ends_quietly(
    connection: Connection, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for a statement gives up, and then gives up waiting until a silent server confirms
    that: the connection is closed, and no error is left for the log.
    """
    async with proxied(database_url) as (proxy, url):
        pool = await create_pool(Settings(database_url=url))

        async def work() -> None:
            async with borrowed(pool) as loan:
                await loan.execute("SELECT pg_sleep(20)")

        task = asyncio.create_task(work())
        while not await connection.fetchval(SLEEPS):
            await asyncio.sleep(0.01)
        proxy.hold()
        for _ in range(2):
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        with suppress(asyncio.CancelledError):
            await task
        await eventually(lambda: pool.get_size() == 0)
        del task
        gc.collect()
        assert not caplog.records
        pool.terminate()
