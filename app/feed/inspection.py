"""Notices what no trigger can capture: tables that were altered, triggers that are missing."""

import logging
from dataclasses import dataclass

import asyncpg

from app.database.connections import Connection
from app.feed import log, maintenance
from app.feed.feed import Feed

logger = logging.getLogger("tablecast.feed")

PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class InspectionStats:
    """`reloads`: how often this node has had the clients of a topic load it again."""

    reloads: int


class Inspection:
    """Checks whether the watched tables were altered, on one node at a time."""

    def __init__(self, feed: Feed, pool: asyncpg.Pool) -> None:
        self._feed = feed
        self._pool = pool
        self._reloads = 0

    def stats(self) -> InspectionStats:
        """Return the counters."""
        return InspectionStats(self._reloads)

    async def run(self) -> None:
        """Check forever, whenever this node leads."""
        await maintenance.repeat(
            self._feed, self._pool, "inspect the tables", self._inspect, PAUSE_S
        )

    async def _inspect(self, connection: Connection) -> float:
        changed = await log.check_topics(connection)
        self._reloads += len(changed)
        report(changed)
        return PAUSE_S


def report(changed: list[tuple[str, str | None]]) -> None:
    """Log which topics must be loaded again, and what is wrong with them."""
    for topic, problem in changed:
        if problem is None:
            logger.warning("the table of the topic %s was altered: clients load it again", topic)
        else:
            logger.error("the topic %s: %s; clients load it again", topic, problem)
