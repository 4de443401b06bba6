"""Prunes the log, continuously and in small steps, on one node at a time."""

import asyncio
import logging
from dataclasses import dataclass

import asyncpg

from app.database.connections import UNAVAILABLE, borrowed, reason
from app.feed import log
from app.feed.feed import Feed

logger = logging.getLogger("tablecast.feed")

STEP_ROWS = 2_000
PAUSE_S = 1.0
# After a full step there may be more to prune; the pause leaves the database to others.
SHORT_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class RetentionStats:
    """`pruned`: changes that this node has deleted so far."""

    pruned: int


class Retention:
    """Keeps the changes of the last `seconds`, and at most `changes` of them."""

    def __init__(self, feed: Feed, pool: asyncpg.Pool, seconds: float, changes: int) -> None:
        self._feed = feed
        self._pool = pool
        self._seconds = seconds
        self._changes = changes
        self._pruned = 0

    def stats(self) -> RetentionStats:
        """What has been counted."""
        return RetentionStats(self._pruned)

    async def run(self) -> None:
        """Prune forever, whenever this node leads."""
        while True:
            deleted = 0
            if self._feed.leading:
                try:
                    async with borrowed(self._pool, PAUSE_S) as connection:
                        deleted = await log.prune(
                            connection, self._seconds, self._changes, STEP_ROWS
                        )
                        self._pruned += deleted
                except UNAVAILABLE as error:
                    logger.info("the log was not pruned: %s", reason(error))
                except asyncpg.PostgresError as error:
                    logger.error("the log cannot be pruned: %s", error)
            await asyncio.sleep(SHORT_PAUSE_S if deleted == STEP_ROWS else PAUSE_S)
