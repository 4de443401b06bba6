"""Judges offsets and reads what subscribers missed: from the replay buffer, else from the log."""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg

from app.database.connections import borrowed
from app.feed import log
from app.feed.feed import Feed
from app.feed.log import HistoryLost
from app.feed.offset import InvalidOffset, Offset
from app.live.buffer import EncodedPage, ReplayBuffer
from app.live.events import PageEvents
from app.live.sharing import Sharing
from app.live.subscription import LOADING

logger = logging.getLogger("tablecast.live")

READS_AT_ONCE = 2
JUDGED_AT_ONCE = 2
# Buffered pages are handed out together up to this size.
TOGETHER_BYTES = 768 * 1024
# What pages mean to subscriptions is kept, up to pages of this size.
INTERPRETED_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ReplayStats:
    """`reading`: reads of the log under way. `reads`: all of them so far. `unreadable`: changes
    that could not be read and became reloads of their topics.
    """

    reading: int
    reads: int
    unreadable: int


class Replay:
    """Judges offsets and replays the log, using connections from `pool`."""

    def __init__(self, feed: Feed, pool: asyncpg.Pool) -> None:
        self._feed = feed
        self._pool = pool
        self._buffer = ReplayBuffer()
        self._reading: Sharing[Offset, EncodedPage] = Sharing()
        self._events: dict[EncodedPage, PageEvents] = {}  # least recently used first
        self._interpreted_bytes = 0  # of these
        self._reads_at_once = asyncio.Semaphore(READS_AT_ONCE)
        self._judged_at_once = asyncio.Semaphore(JUDGED_AT_ONCE)
        self._reads = 0
        self._unreadable = 0

    def stats(self) -> ReplayStats:
        """Return what is going on, and the counters."""
        return ReplayStats(len(self._reading), self._reads, self._unreadable)

    def keep(self, page: EncodedPage) -> None:
        """Buffer a page that was just published."""
        self._buffer.add(page)

    def clear(self) -> None:
        """Empty the buffer."""
        self._buffer.clear()
        self._events.clear()
        self._interpreted_bytes = 0

    # Judging

    def judge_at_once(self, text: Any) -> tuple[bool, Offset | None]:
        """Judge an offset without reading the log. Return whether that is possible, and the offset
        to continue from, None if the client must load again.
        """
        if self._feed.epoch is None:
            return False, None
        offset = self._parse(text)
        if offset is None or offset == self._feed.reached or offset in self._buffer:
            return True, offset
        return False, offset

    async def judge(self, text: Any) -> Offset | None:
        """Return the offset to continue from; None if the client must load again.

        Raises one of UNAVAILABLE if that cannot be decided now.
        """
        if self._feed.epoch is None:
            await self._look()
        judged, offset = self.judge_at_once(text)
        if judged or offset is None:
            return offset
        try:
            await self._wait_until_reached(offset)
            async with self._judged_at_once, borrowed(self._pool) as connection:
                if await log.continues(connection, offset.position):
                    return offset
            logger.info("a client cannot continue: the log does not hold what it missed")
        except HistoryLost as reason:
            logger.info("a client cannot continue: %s", reason)
        return None

    def _parse(self, text: Any) -> Offset | None:
        assert self._feed.epoch is not None
        if not isinstance(text, str) or text == LOADING:
            return None
        try:
            return self._feed.epoch.parse(text)
        except InvalidOffset as reason:
            logger.info("a client cannot continue: %s", reason)
            return None

    # Reading

    async def pages_after(self, offset: Offset) -> list[EncodedPage]:
        """Return the next pages after an offset, at least one.

        Raises HistoryLost if the log does not continue from there, or one of UNAVAILABLE.
        """
        found = self._buffer.run(offset, TOGETHER_BYTES)
        return found or [await self._reading.get(offset, partial(self._read_log, offset))]

    def events(self, page: EncodedPage) -> PageEvents:
        """Return what a page means to subscriptions; cached, as many soon ask for the same page."""
        events = self._events.pop(page, None)
        if events is None:
            events = page.events()
            self._interpreted_bytes += page.bytes
        self._events[page] = events
        while self._interpreted_bytes > INTERPRETED_BYTES and len(self._events) > 1:
            unused = next(iter(self._events))
            del self._events[unused]
            self._interpreted_bytes -= unused.bytes
        return events

    async def _read_log(self, offset: Offset) -> EncodedPage:
        # At most as far as the live subscribers are, and never into the middle of a batch.
        await self._feed.settled()
        await self._wait_until_reached(offset)
        epoch, reached = self._feed.epoch, self._feed.reached
        assert epoch is not None and reached is not None
        async with self._reads_at_once, borrowed(self._pool) as connection:
            self._reads += 1
            page = await log.read(connection, offset, reached.position, self._feed.event_bytes)
        self._unreadable += page.unreadable
        encoded = EncodedPage(page, epoch)
        if epoch is self._feed.epoch:
            self._buffer.add(encoded)
        return encoded

    async def _wait_until_reached(self, offset: Offset) -> None:
        """Return once the feed has reached an offset. Raises HistoryLost if it has not, even after
        another look: the offset is from the future.
        """
        if self._has_reached(offset):
            return
        await self._feed.settled()
        await self._look()  # another node may have been faster
        if not self._has_reached(offset):
            raise HistoryLost("the offset is from the future")

    def _has_reached(self, offset: Offset) -> bool:
        reached = self._feed.reached
        return reached is not None and reached.position.covers(offset.until or offset.position)

    async def _look(self) -> None:
        if not await self._feed.look():
            raise ConnectionError("the feed is not connected to the database")
