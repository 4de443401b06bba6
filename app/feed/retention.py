"""Prunes the log, continuously and in small steps, on one node at a time."""

import time
from collections import deque
from dataclasses import dataclass

import asyncpg

from app.database.connections import Connection
from app.feed import log, maintenance
from app.feed.feed import Feed
from app.feed.offset import Position

STEP_ROWS = 2_000
PAUSE_S = 1.0
# After a full step there may be more to prune; the pause gives others their turn.
SHORT_PAUSE_S = 0.05
# All nodes look at the log once a second, so within this time the others have read what the leading
# one has.
OTHERS_READ_S = 3.0


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
        self._reached: deque[tuple[float, Position]] = deque()
        self._step = STEP_ROWS
        self._pruned = 0

    def stats(self) -> RetentionStats:
        """Return the counters."""
        return RetentionStats(self._pruned)

    async def run(self) -> None:
        """Prune forever, whenever this node leads."""
        await maintenance.repeat(self._feed, self._pool, "prune the log", self._prune, PAUSE_S)

    async def _prune(self, connection: Connection) -> float:
        reader = self._read_by_all(time.monotonic())
        if reader is None:
            return PAUSE_S
        step = self._step
        try:
            deleted = await log.prune(connection, self._seconds, self._changes, step, reader)
        except asyncpg.QueryCanceledError:
            if step == 1:
                raise
            self._step = max(1, step // 4)  # its rows are large, or the disk is slow
            return SHORT_PAUSE_S
        self._pruned += deleted
        self._step = min(STEP_ROWS, step + step // 10 + 1)
        return SHORT_PAUSE_S if deleted == step else PAUSE_S

    def _read_by_all(self, now: float) -> Position | None:
        """Return the position that this node reached long enough ago for the others to have reached
        it, too; None if it has not been running for that long.
        """
        reached = self._reached
        if self._feed.reached is not None:
            reached.append((now, self._feed.reached.position))
        while len(reached) > 1 and reached[1][0] <= now - OTHERS_READ_S:
            reached.popleft()
        return reached[0][1] if reached and reached[0][0] <= now - OTHERS_READ_S else None
