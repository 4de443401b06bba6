"""Notices what no trigger can capture: tables that were altered, triggers that are missing."""

import asyncio
import logging

import asyncpg

from app.database.connections import UNAVAILABLE
from app.feed import log
from app.feed.feed import Feed

logger = logging.getLogger("tablecast.feed")

PAUSE_S = 2.0


class Inspection:
    """Checks whether the watched tables were altered, on one node at a time."""

    def __init__(self, feed: Feed, pool: asyncpg.Pool) -> None:
        self._feed = feed
        self._pool = pool

    async def run(self) -> None:
        """Check forever, whenever this node leads."""
        while True:
            if self._feed.leading:
                try:
                    async with self._pool.acquire(timeout=PAUSE_S) as connection:
                        report(await log.check_topics(connection))
                except UNAVAILABLE as error:
                    logger.info("the tables were not inspected: %s", error or type(error).__name__)
                except asyncpg.PostgresError as error:
                    logger.error("the tables cannot be inspected: %s", error)
            await asyncio.sleep(PAUSE_S)


def report(changed: list[tuple[str, str | None]]) -> None:
    """Log which topics must be loaded again, and what is wrong with them."""
    for topic, problem in changed:
        if problem is None:
            logger.warning("the table of the topic %s was altered: clients load it again", topic)
        else:
            logger.error("the topic %s: %s; clients load it again", topic, problem)
