"""Follows the log: wake, read, publish. Owns the position."""

import asyncio
import logging
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Protocol

import asyncpg

from app.database.connections import (
    READER,
    SHARED_SESSION,
    UNAVAILABLE,
    absence,
    connect,
    flush,
)
from app.feed import log
from app.feed.health import BEHIND_S, DEAF, FeedHealth, Outage
from app.feed.listener import Listener
from app.feed.log import HistoryLost, Page
from app.feed.offset import Epoch, Offset
from app.feed.pacing import Pacing

logger = logging.getLogger("tablecast.feed")

HELD_BACK_S = 10.0
READ_TIMEOUT_S = 15.0
SLOW_READ_S = 0.5
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
NOT_YET = "The server has not connected to the database yet."
SHARED = (
    "The database is behind a pooler in transaction mode:"
    " connect to it directly or through a pooler in session mode."
)


class Publisher(Protocol):
    """Where the feed's pages go. All methods return at once."""

    def started(self, epoch: Epoch, end: Offset) -> None:
        """A history begins at this offset: every earlier offset is void."""

    def publish(self, page: Page) -> None:
        """Publish the next page, which begins where the last one ended."""

    def state_changed(self, outage: Outage | None) -> None:
        """Changes do not arrive; or (None) they do, and everything up to now has been published."""


@dataclass(frozen=True, slots=True)
class FeedStats:
    """`leading`: this node rings for the others. `looks`: complete reads of the log so far.
    `unreadable`: changes that could not be read and became reloads of their topics.
    """

    leading: bool
    looks: int
    unreadable: int


class Feed:
    """Reads every committed change exactly once and in order, and hands it to a publisher.

    Starting, reconnecting and waking are one path: read from the position to now.

    `epoch` is the history being followed, None until the first connection. `reached` is the offset
    up to which it has been published; it may lie within a batch. `event_bytes`: the longest row
    that an event carries. `outage` is what the publisher was last told: None if changes arrive.
    """

    def __init__(self, url: str, event_bytes: int = log.ANY_SIZE) -> None:
        self._url = url
        self.event_bytes = event_bytes
        self.epoch: Epoch | None = None
        self.reached: Offset | None = None
        self._listener: Listener | None = None
        self.outage: Outage | None = None
        self._health = FeedHealth(time.monotonic(), round(time.time() * 1000))
        self._health_changed = asyncio.Event()
        self._noted: str | None = NOT_YET  # not worth a line in the log
        self._looked = asyncio.Condition()
        self._looks = 0
        self._settled = asyncio.Event()
        self._unreadable = 0

    def stats(self) -> FeedStats:
        """Return the state of the feed and its counters."""
        return FeedStats(self.leading, self._looks, self._unreadable)

    @property
    def leading(self) -> bool:
        """Whether this node rings for the others, prunes and inspects."""
        return self._listener is not None and self._listener.leading

    async def run(self, publisher: Publisher) -> None:
        """Follow the log forever, reconnecting by itself, and hand its pages to `publisher`."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(publisher), name="feed health")
            await self._reconnect_forever(publisher)

    async def _reconnect_forever(self, publisher: Publisher) -> None:
        failures = 0
        while True:
            looks = self._looks
            try:
                await self._follow_once(publisher)
            except ValueError:
                raise  # an argument of the wrong type, say: our bug, not the database's absence
            except SHARED_SESSION as error:
                self._failed(SHARED, str(error))
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                self._failed(absence(error), str(error) or type(error).__name__)
            finally:
                self._listener = None
            failures = 0 if self._looks > looks else failures + 1
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])

    async def _follow_once(self, publisher: Publisher) -> None:
        """Follow the log until a connection fails."""
        async with AsyncExitStack() as session:
            listener = await Listener.open(self._url)
            session.callback(listener.close)
            reader = await connect(self._url, command_timeout=READ_TIMEOUT_S, session=READER)
            session.callback(reader.terminate)
            await listener.settle_in(reader)
            await self.begin(reader, publisher)
            self._listener = listener
            await self._follow(listener, reader, publisher)

    # Health

    async def _watch(self, publisher: Publisher) -> None:
        """Tell the publisher about outages."""
        while True:
            now = time.monotonic()
            self._settle(self._health.judge(now), publisher)
            due = now + self._health.until_next(now)
            with suppress(TimeoutError):
                async with asyncio.timeout(due - now):
                    await self._health_changed.wait()
            self._health_changed.clear()
            self._health.paused(max(0.0, time.monotonic() - due))

    def _settle(self, outage: Outage | None, publisher: Publisher) -> None:
        if outage != self.outage:
            self._note(outage.reason if outage else None)
            self.outage = outage
            publisher.state_changed(outage)

    def _failed(self, reason: str, detail: str = "") -> None:
        self._note(reason, detail)
        self._health.failed(reason, time.monotonic())
        self._health_changed.set()

    def _note(self, trouble: str | None, detail: str = "") -> None:
        """Log what is wrong, once."""
        if trouble and trouble != self._noted:
            logger.warning("%s%s", trouble, f" ({detail})" if detail else "")
        elif self._noted and not trouble:
            logger.info("listening")
        self._noted = trouble

    def trouble(self) -> str | None:
        """Return a sentence on why the feed is not listening and caught up; None when it is."""
        if self.outage is not None:
            return self.outage.reason
        return None if self._looks else NOT_YET

    async def look(self) -> bool:
        """Wait until the log has been read up to now; return False if that takes too long."""
        try:
            async with asyncio.timeout(BEHIND_S):
                await self.look_patiently()
        except TimeoutError:
            return False
        return True

    async def look_patiently(self) -> None:
        """Wait until the log has been read up to now, however long the database is away."""
        wanted = self._looks + 2  # the read under way may have begun before the call
        async with self._looked:
            while self._looks < wanted:
                if self._listener is not None:
                    self._listener.nudge()
                await self._looked.wait()

    async def settled(self) -> None:
        """Wait until `reached` lies between batches, not within one."""
        await self._settled.wait()

    def _reach(self, offset: Offset) -> None:
        self.reached = offset
        if offset.until is None:
            self._settled.set()
        else:
            self._settled.clear()

    async def begin(self, reader: asyncpg.Connection, publisher: Publisher) -> None:
        """Continue the history where we left off, or start from now."""
        await log.adopt(reader)
        if self.reached is None or await log.current_epoch(reader) != self.epoch:
            await self._restart(reader, publisher)

    async def _restart(self, reader: asyncpg.Connection, publisher: Publisher) -> None:
        if self.reached is not None:
            logger.error("the log does not continue from where it was read: clients load again")
            await log.disown(reader, self.reached.position)
        epoch, reached = await log.current_epoch(reader), await log.current_position(reader)
        await flush(reader)  # the position may have seen commits that a crash would undo
        # Not earlier: a failure up to here is retried, and the publisher must still be called.
        self.epoch = epoch
        self._reach(Offset(reached))
        publisher.started(epoch, Offset(reached))

    async def _follow(
        self, listener: Listener, reader: asyncpg.Connection, publisher: Publisher
    ) -> None:
        pacing = Pacing(time.monotonic())
        while True:
            changes = await self._read_all(listener, reader, publisher)
            now = time.monotonic()
            pacing.read(changes, now)
            if pacing.should_ring(listener.asleep, now):
                await listener.ring()
            if pacing.should_look(now):
                await listener.take_part()
            if pacing.should_probe(now):
                await listener.probe(reader)
                if listener.leading:
                    await self._name_who_holds_back(reader)
            await self._rest(listener, pacing)

    async def _rest(self, listener: Listener, pacing: Pacing) -> None:
        """Wait until it is time to read again."""
        now = time.monotonic()
        awake = listener.leading and not listener.asleep
        if awake and pacing.is_tired(now) and await listener.fall_asleep():
            pacing.woke(rung_by_writer=False)
            return  # what was committed before the lock was taken must be read first
        rest = pacing.rest(listener.bell_works, now) if awake else pacing.until_look(now)
        rung = await listener.wait(rest)
        pacing.woke(rung_by_writer=rung and listener.asleep)
        if listener.asleep and listener.busy():
            await listener.wake_up()
            pacing.stay_awake(time.monotonic())

    async def _read_all(
        self, listener: Listener, reader: asyncpg.Connection, publisher: Publisher
    ) -> int:
        """Read and publish everything up to now; return the number of changes."""
        changes = 0
        try:
            while True:
                page = await self._read_page(listener, reader)
                changes += len(page.changes)
                self._unreadable += page.unreadable
                if page.until != self.reached:
                    self._reach(page.until)
                    publisher.publish(page)
                if page.is_latest:
                    break
        except HistoryLost:
            await self._restart(reader, publisher)
            return 0
        self._complete(page, listener, publisher)
        async with self._looked:
            self._looks += 1
            self._looked.notify_all()
        return changes

    async def _read_page(self, listener: Listener, reader: asyncpg.Connection) -> Page:
        """Read the next page. If that takes long, keep asking on the other connection whether the
        database answers at all.
        """
        assert self.reached is not None
        reading = asyncio.create_task(
            log.read(reader, self.reached, event_bytes=self.event_bytes), name="feed read"
        )
        reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while not (await asyncio.wait([reading], timeout=SLOW_READ_S))[0]:
                await listener.ask()
                self._health.answered(time.monotonic())
            self._health.answered(time.monotonic())
            return reading.result()
        finally:
            reading.cancel()

    def _complete(self, page: Page, listener: Listener, publisher: Publisher) -> None:
        """Note that the log was read to its end."""
        if listener.deaf:
            self._health.completed(time.monotonic(), page.read, DEAF)
            self._health_changed.set()
        else:
            self._health.completed(time.monotonic(), page.read)
            if self._noted:
                self._settle(None, publisher)
                self._note(None)

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
