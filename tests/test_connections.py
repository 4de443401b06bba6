"""Connections that are borrowed from a pool, when nobody waits for them any more."""

import asyncio
import gc
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

import pytest

from app.database.connections import (
    RELEASE_TIMEOUT_S,
    Connection,
    borrowed,
    create_subscription_pool,
    one_moment,
)
from app.settings import Settings
from tests.support.feeds import eventually
from tests.support.proxy import proxied

pytestmark = pytest.mark.database

SLEEPS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND query = 'SELECT pg_sleep(20)'
"""


@pytest.mark.parametrize(
    ("within", "times"), [(nullcontext, 2), (one_moment, 1)], ids=["alone", "one moment"]
)
async def test_a_loan_that_is_cancelled_ends_soon_and_quietly(
    connection: Connection,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    within: Callable[[Any], AbstractAsyncContextManager[None]],
    times: int,
) -> None:
    """Who waits for a statement gives up, and perhaps gives up waiting until a silent server
    confirms that: the connection is closed, and no error is left for the log.
    """
    async with proxied(database_url) as (proxy, url):
        pool = await create_subscription_pool(Settings(database_url=url), 1)

        async def work() -> None:
            async with borrowed(pool) as loan, within(loan):
                await loan.execute("SELECT pg_sleep(20)")

        task = asyncio.create_task(work())
        async with asyncio.timeout(10):
            while not await connection.fetchval(SLEEPS):
                await asyncio.sleep(0.01)
        proxy.hold()
        for _ in range(times):
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        with suppress(asyncio.CancelledError):
            async with asyncio.timeout(2 * RELEASE_TIMEOUT_S + 1):
                await task
        await eventually(lambda: pool.get_size() == 0)
        del task
        gc.collect()
        assert not caplog.records
        pool.terminate()
