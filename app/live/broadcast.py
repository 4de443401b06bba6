"""Sends each page to the live subscribers, and brings the others up to date.

A subscriber is either *live*, and gets every page as it is published, or *catching up*: it gets
the pages after its offset at its own pace, until that offset is the one the live ones have.
Comparing the two and going live is one step, so no change falls between. A live subscriber that
cannot keep up goes back to catching up; one that reads nothing at all is disconnected, and
continues when it returns.

While the database is away, subscribers stay connected and are told so, in order with the pages:
each learns at once that changes do not arrive, and when it is live again, that they do.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from app.database.connections import UNAVAILABLE
from app.feed.feed import Feed
from app.feed.health import Outage
from app.feed.log import HistoryLost, Page
from app.feed.offset import Epoch, Offset
from app.live.audience import Audience
from app.live.buffer import EncodedPage, EncodedState
from app.live.replay import Replay
from app.live.subscriber import (
    UNLIMITED,
    CloseReason,
    Encoder,
    Greeting,
    Subscriber,
    Transport,
)

logger = logging.getLogger("tablecast.live")

JOIN_TIMEOUT_S = 10.0
# How often a subscriber's reads may fail in a row although the feed's own succeed.
ATTEMPTS = 3

T = TypeVar("T")
Work: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


class Stalled(Exception):
    """A subscriber reads nothing."""


@dataclass(frozen=True, slots=True)
class BroadcastStats:
    """`subscribers`: all of them. `live`: those that get every page as it is published."""

    subscribers: int
    live: int


class Broadcast:
    """The feed's publisher: sends its pages to the subscribers.

    `buffer_bytes`: how much may be unsent to a live subscriber. `stall_s`: how long one may read
    nothing, in seconds.
    """

    def __init__(self, feed: Feed, replay: Replay, buffer_bytes: int, stall_s: float) -> None:
        self.feed = feed
        self.replay = replay
        self._buffer_bytes = buffer_bytes
        self._stall_s = stall_s
        self._subscribers: set[Subscriber] = set()
        self._audience = Audience()
        # Their offsets are being judged: nothing has been written to them.
        self._joining: dict[Subscriber, Greeting] = {}
        self._state = EncodedState(None)
        self._has_started = False
        self._formatted: tuple[Offset | None, str] = (None, "")

    def stats(self) -> BroadcastStats:
        """Count the subscribers."""
        return BroadcastStats(len(self._subscribers), len(self._audience))

    # The feed's side

    def started(self, _: Epoch, __: Offset) -> None:
        """A history begins. Subscribers of another one are disconnected; when they return, they
        learn that they must load again.
        """
        if self._has_started:  # else they wait for this one
            self.close_all(CloseReason.NEW_HISTORY)
        self._has_started = True
        self.replay.clear()

    def publish(self, page: Page) -> None:
        """Send a page to every live subscriber."""
        assert self.feed.epoch is not None
        encoded = EncodedPage(page, self.feed.epoch)
        self.replay.keep(encoded)
        if page.changes:
            for subscriber in self._audience.send(encoded, self._buffer_bytes):
                self._start(subscriber, self.catch_up, page.since)

    def state_changed(self, outage: Outage | None) -> None:
        """Tell every subscriber that changes do not arrive; or the live ones that they do. Those
        that are catching up are told when they are live.
        """
        self._state = EncodedState(outage)
        for subscriber in list(self._audience if outage is None else self._subscribers):
            self._tell(subscriber)

    def _tell(self, subscriber: Subscriber) -> None:
        """Say whether changes arrive, unless the subscriber knows."""
        greeting = self._joining.pop(subscriber, None)
        if greeting is not None:
            greeting.hold(subscriber.transport)
        if subscriber.told is not self._state.outage:
            subscriber.told = self._state.outage
            subscriber.transport.try_write(self._state.message(subscriber.encode), UNLIMITED)

    def close_all(self, reason: CloseReason) -> None:
        """Disconnect every subscriber; by their offsets they continue elsewhere or later."""
        for subscriber in list(self._subscribers):
            subscriber.transport.close(reason)

    # The subscribers' side

    def subscribe(
        self, transport: Transport, encode: Encoder, since: Any, greeting: Greeting
    ) -> Subscriber:
        """Add a subscriber: welcome it, send what it missed, then every new page.

        `since` is the offset it says it has. If judging that takes a read of the log, all of this
        happens later, in a task; while the database is away, the subscriber is held.
        """
        subscriber = Subscriber(transport, encode)
        self._subscribers.add(subscriber)
        try:
            judged, offset = self.replay.judge_at_once(since)
            if not judged:
                self._joining[subscriber] = greeting
                if self._state.outage is not None:
                    self._tell(subscriber)
                self._start(subscriber, self._join, since, greeting)
            elif not self._admit(subscriber, offset, greeting):
                assert offset is not None
                self._start(subscriber, self.catch_up, offset)
        except BaseException:
            self.leave(subscriber)
            raise
        return subscriber

    def move(self, subscriber: Subscriber, transport: Transport) -> None:
        """Write to a subscriber by another transport from now on."""
        is_live = subscriber.task is None
        self._audience.discard(subscriber)
        subscriber.transport = transport
        if is_live:
            self._audience.add(subscriber)

    def leave(self, subscriber: Subscriber) -> None:
        """Forget a subscriber; no error if it has left already."""
        self._subscribers.discard(subscriber)
        self._audience.discard(subscriber)
        self._joining.pop(subscriber, None)
        if subscriber.task is not None:
            subscriber.task.cancel()

    def _admit(self, subscriber: Subscriber, offset: Offset | None, greeting: Greeting) -> bool:
        """Welcome a subscriber with its offset; return whether it is live with that."""
        epoch, reached = self.feed.epoch, self.feed.reached
        assert epoch is not None and reached is not None
        self._joining.pop(subscriber, None)
        if offset is not None:
            greeting.welcome(subscriber.transport, True, epoch.format(offset))
        else:
            greeting.welcome(subscriber.transport, False, self._format(epoch, reached))
        if self._state.outage is not None:
            subscriber.told = None  # clients may take a welcome for good news
            self._tell(subscriber)
        if offset is not None and offset != reached:
            return False
        self.go_live(subscriber)
        return True

    def _format(self, epoch: Epoch, reached: Offset) -> str:
        """Format the offset of the live subscribers, once for all who join meanwhile."""
        if self._formatted[0] is not reached:
            self._formatted = (reached, epoch.format(reached))
        return self._formatted[1]

    def go_live(self, subscriber: Subscriber) -> None:
        """From now on a subscriber gets every page."""
        subscriber.task = None
        if subscriber in self._subscribers:
            self._audience.add(subscriber)
            self._tell(subscriber)

    def _start(self, subscriber: Subscriber, work: Work, *arguments: Any) -> None:
        subscriber.task = asyncio.create_task(
            self._supervise(subscriber, work, *arguments), name=f"catch-up {subscriber.transport}"
        )

    async def _supervise(self, subscriber: Subscriber, work: Work, *arguments: Any) -> None:
        """Do one subscriber's work; whatever ends it early closes the transport with a reason."""
        try:
            await work(subscriber, *arguments)
        except Stalled:
            subscriber.transport.close(CloseReason.STALLED)
        except HistoryLost as error:
            logger.info("%s: %s", subscriber.transport, error)
            subscriber.transport.close(CloseReason.HISTORY_LOST)
        except UNAVAILABLE as error:
            logger.info("%s: %s", subscriber.transport, str(error) or type(error).__name__)
            subscriber.transport.close(CloseReason.DATABASE_AWAY)
        except Exception:
            logger.exception("%s: the replay has failed", subscriber.transport)
            subscriber.transport.close(CloseReason.INTERNAL_ERROR)

    async def _join(self, subscriber: Subscriber, since: Any, greeting: Greeting) -> None:
        offset = await self._patiently(self._judge, since)
        if not self._admit(subscriber, offset, greeting):
            assert offset is not None
            await self.catch_up(subscriber, offset)

    async def _judge(self, since: Any) -> Offset | None:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            return await self.replay.judge(since)

    async def catch_up(self, subscriber: Subscriber, offset: Offset) -> None:
        """Write the pages after an offset, and go live where the live ones are."""
        while True:
            await self._drained(subscriber)
            if offset == self.feed.reached:
                self.go_live(subscriber)
                return
            for page in await self._patiently(self.replay.pages_after, offset):
                subscriber.transport.try_write(page.message(subscriber.encode), UNLIMITED)
                offset = page.until

    async def _patiently(self, read: Callable[[Any], Awaitable[T]], argument: Any) -> T:
        """Read what a subscriber needs; while the database is away, wait.

        Raises one of UNAVAILABLE if that fails although the feed can read.
        """
        for _ in range(ATTEMPTS - 1):
            try:
                return await read(argument)
            except UNAVAILABLE as error:
                logger.debug("a read for a subscriber has failed: %r", error)
                await self.feed.look_patiently()
        return await read(argument)

    async def _drained(self, subscriber: Subscriber) -> None:
        """Wait until a subscriber has read what it was sent. Raises Stalled if it reads nothing."""
        while True:
            transport = subscriber.transport
            unsent = transport.unsent_bytes()
            try:
                async with asyncio.timeout(self._stall_s):
                    await transport.drained()
            except TimeoutError:
                if transport.unsent_bytes() >= unsent:
                    raise Stalled from None
                continue
            if transport is subscriber.transport:
                return
