"""Maintenance of the log: work that is repeated forever, on one node at a time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import asyncpg

from app.database.connections import UNAVAILABLE, Connection, borrowed, reason
from app.feed.feed import Feed

logger = logging.getLogger("tablecast.feed")

Work = Callable[[Connection], Awaitable[float]]


async def repeat(feed: Feed, pool: asyncpg.Pool, task: str, work: Work, pause: float) -> None:
    """Repeat `work` forever, whenever this node leads.

    It returns the seconds until the next time; if it fails, it is repeated after `pause`. A failure
    is logged, with `task` as the name of the work, once for as long as the reason stays the same.
    """
    noted = None
    while True:
        rest, failure = pause, None
        if feed.leading:
            try:
                async with borrowed(pool, pause) as connection:
                    rest = await work(connection)
            except UNAVAILABLE as error:
                failure = (logging.WARNING, reason(error))
            except asyncpg.PostgresError as error:
                failure = (logging.ERROR, str(error))
            if failure is not None and failure != noted:
                level, why = failure
                logger.log(level, "cannot %s: %s", task, why)
            noted = failure
        await asyncio.sleep(rest)
