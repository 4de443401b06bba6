"""Wake, read, publish. Owns the position."""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import asyncpg

from app.database.connections import READER, UNAVAILABLE, connect, flush
from app.feed import log
from app.feed.listener import Listener
from app.feed.log import HistoryLost, Page
from app.feed.offset import Epoch, Offset

logger = logging.getLogger("tablecast.feed")

# Awake, the feed reads on and on, and rests when it finds nothing, the longer the longer nothing
# came. Up to some thousand changes a second, what counts is how soon they arrive; from there on
# every change that was read earns the writers a rest from being read.
SHORTEST_REST_S = 0.001
LONGEST_REST_S = 0.020
REST_PER_CHANGE_S = 0.00015
# While an open transaction keeps the feed awake, and where there is no bell to sleep by.
KEPT_AWAKE_REST_S = 0.030
NO_BELL_REST_S = 0.010
# Awake and nothing read for so long: try to sleep.
TIRED_AFTER_S = 0.030
# While busy, the other nodes are rung for no more often.
RING_S = 0.010
# Every node looks without any bell.
LOOK_S = 1.0
PROBE_S = 5.0
HELD_BACK_S = 10.0
READ_TIMEOUT_S = 15.0
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
DEAF = "notifications do not reach the listening connection (a transaction-mode pooler between?)"
# Not ready when the last complete read is older.
BEHIND_S = 5.0


class Audience(Protocol):
    """Who the feed publishes to. All methods return at once."""

    def started(self, epoch: Epoch, end: Offset) -> None:
        """A history begins at this offset: every one from before is void."""

    def publish(self, page: Page) -> None:
        """The next page; it begins where the last one ended."""


@dataclass(frozen=True, slots=True)
class FeedStats:
    """`unreadable`: changes that could not be read, and became reloads of their topics."""

    unreadable: int


class Feed:
    """Reads every committed change exactly once and in order, and publishes it.

    Start, reconnect and wake are one path: read from the position to now.
    """

    def __init__(self, url: str, audience: Audience) -> None:
        self._url = url
        self._audience = audience
        self.epoch: Epoch | None = None
        self.reached: Offset | None = None  # published up to here, perhaps within a batch
        self.leading = False
        self._listener: Listener | None = None
        self._trouble: str | None = "not connected to the database yet"
        self._read_at = float("-inf")
        self._looked = asyncio.Condition()
        self._looks = 0
        self._unreadable = 0

    def stats(self) -> FeedStats:
        """What has happened so far."""
        return FeedStats(self._unreadable)

    async def run(self) -> None:
        """Follow the log for ever, reconnecting by itself."""
        failures = 0
        while True:
            try:
                async with AsyncExitStack() as session:
                    listener = await Listener.open(self._url)
                    session.callback(listener.close)
                    reader = await connect(
                        self._url,
                        command_timeout=READ_TIMEOUT_S,
                        server_settings=READER,
                    )
                    session.callback(reader.terminate)
                    await self._begin(reader)
                    self._set_trouble(DEAF if listener.deaf else None)
                    self._listener = listener
                    failures = 0
                    await self._follow(listener, reader)
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                reason = f"the database cannot be reached: {error or type(error).__name__}"
                self._set_trouble(reason)
            finally:
                self._listener = None
                self.leading = False
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1

    def _set_trouble(self, trouble: str | None) -> None:
        if trouble and trouble != self._trouble:
            logger.warning("%s; trying again", trouble)
        elif self._trouble and not trouble:
            logger.info("listening")
        self._trouble = trouble

    def trouble(self) -> str | None:
        """Why the feed is not listening and caught up, in one sentence; None when it is."""
        if self._trouble:
            return self._trouble
        behind = time.monotonic() - self._read_at
        if behind > BEHIND_S:
            return f"the log was last read completely {behind:.0f} seconds ago"
        return None

    async def look(self) -> bool:
        """Have the log read up to now; False if it cannot be within a few seconds."""
        wanted = self._looks + 2  # the read under way may have begun before the call
        try:
            async with asyncio.timeout(BEHIND_S), self._looked:
                while self._looks < wanted:
                    if self._listener is not None:
                        self._listener.nudge()
                    await self._looked.wait()
        except TimeoutError:
            return False
        return True

    async def _begin(self, reader: asyncpg.Connection) -> None:
        """Take up the history where it was left, or begin at now."""
        await log.adopt(reader)
        if self.reached is None or await log.current_epoch(reader) != self.epoch:
            await self._restart(reader)

    async def _restart(self, reader: asyncpg.Connection) -> None:
        if self.reached is not None:
            logger.error("the log does not continue from where it was read: clients load anew")
            await log.disown(reader, self.reached.position)
        epoch, reached = await log.current_epoch(reader), await log.current_position(reader)
        await flush(reader)  # the position may have seen commits that a crash would take back
        # Not before: what fails until here begins again, or the audience would never hear of it.
        self.epoch, self.reached = epoch, Offset(reached)
        self._audience.started(self.epoch, self.reached)

    async def _follow(self, listener: Listener, reader: asyncpg.Connection) -> None:
        next_look = next_probe = next_ring = 0.0
        rang = owes_ring = False
        last_found = time.monotonic()
        while True:
            changes = await self._read_all(reader)
            now = time.monotonic()
            if changes:
                last_found = now
                owes_ring = owes_ring or not (rang and listener.asleep)
            if owes_ring and (listener.asleep or now >= next_ring):
                await listener.ring()
                owes_ring, next_ring = False, now + RING_S
            if now >= next_look:
                next_look = now + LOOK_S
                await listener.take_part()
                self.leading = listener.leading
            if now >= next_probe:
                next_probe = now + PROBE_S
                await listener.probe()
                self._set_trouble(DEAF if listener.deaf else None)
                if listener.leading:
                    await self._name_who_holds_back(reader)

            until_look = max(0.0, next_look - time.monotonic())
            if not listener.leading:
                rang = await listener.wait(until_look)
            elif listener.asleep:
                rang = await listener.wait(until_look)
                if listener.busy():
                    await listener.wake_up()
                    last_found = now
            elif now - last_found >= TIRED_AFTER_S and await listener.fall_asleep():
                rang = False  # read once more
            else:
                rest = awake_rest(changes, now - last_found, listener.bell_works)
                rang = await listener.wait(min(rest, until_look))

    async def _read_all(self, reader: asyncpg.Connection) -> int:
        """Read and publish everything up to now; how many changes that was."""
        assert self.reached is not None
        changes = 0
        try:
            while True:
                page = await log.read(reader, self.reached)
                changes += len(page.changes)
                self._unreadable += page.unreadable
                if page.until != self.reached:
                    self._audience.publish(page)
                    self.reached = page.until
                if page.is_latest:
                    break
        except HistoryLost:
            await self._restart(reader)
            return 0
        self._read_at = time.monotonic()
        async with self._looked:
            self._looks += 1
            self._looked.notify_all()
        return changes

    async def _name_who_holds_back(self, reader: asyncpg.Connection) -> None:
        for holder in await log.holding_back(reader, HELD_BACK_S):
            pid, user, application, state, seconds = holder
            if pid is None:
                logger.warning("a prepared transaction holds back the changes it has written")
            else:
                logger.warning(
                    "a transaction open for %d s holds back the changes it has written:"
                    " pid %d, user %s, application %r, %s",
                    seconds, pid, user, application, state,
                )  # fmt: skip


def awake_rest(changes: int, idle: float, bell_works: bool) -> float:
    """How long to rest after a read, in seconds: by how much it found, else by how long nothing has
    come.
    """
    if changes:
        return min(changes * REST_PER_CHANGE_S, LONGEST_REST_S)
    longest = KEPT_AWAKE_REST_S if bell_works else NO_BELL_REST_S
    return min(max(idle / 4, SHORTEST_REST_S), longest)
