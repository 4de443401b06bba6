"""Sends each page to the live subscribers, and brings the others up to date.

A subscriber is either *live*, and gets every page as it is published, or *catching up*: it gets
the pages after its offset at its own pace, until that offset is the one the live ones have.
Comparing the two and going live is one step, so no change falls between. A live subscriber that
cannot keep up goes back to catching up; one that reads nothing at all is disconnected, and
continues when it returns.

While the database is away, subscribers stay connected and are told so, in order with the pages:
each learns at once that changes do not arrive, and once it is live again, that they do.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import asyncpg

from app.database.connections import UNAVAILABLE
from app.feed.feed import Feed
from app.feed.health import Outage
from app.feed.log import HistoryLost, Page
from app.feed.offset import Epoch, Offset
from app.live.audience import Audience
from app.live.buffer import EncodedPage, EncodedState
from app.live.catalogue import Catalogue
from app.live.quiet import QuietOffsets
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.replay import Replay
from app.live.room import Room
from app.live.rows import Outdated
from app.live.snapshot import Snapshots
from app.live.subscriber import (
    UNLIMITED,
    CloseReason,
    Encoder,
    Greeting,
    Subscriber,
    SubscriptionEncoder,
    Transport,
)
from app.live.subscription import LOADING, Request, Subscription

logger = logging.getLogger("tablecast.live")

JOIN_TIMEOUT_S = 10.0
# Python's client gives up a second after its CONNECT.
HOLD_AFTER_S = 0.4
MOST_SUBSCRIPTIONS = 200_000
# How often a subscriber's reads may fail in a row although the feed's own succeed.
ATTEMPTS = 3
# A read waits for a lock for a while (ALL_ROWS in app/database/connections.py), then this long
# before it tries again: other tables' reads get their turn.
LOCKED_PAUSE_S = 0.2
# The pauses before rows are read again if the table has changed. The feed looks for altered tables
# every two seconds.
PAUSES_S = (0.0, 0.2, 1.0, 2.0)

T = TypeVar("T")
Work: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


class Stalled(Exception):
    """A subscriber reads nothing."""


@dataclass(frozen=True, slots=True)
class BroadcastStats:
    """`subscribers`: all of them. `live`: those that get every page as it is published."""

    subscribers: int
    live: int


@dataclass(frozen=True, slots=True)
class BroadcastLimits:
    """`buffer_bytes`: how much may be unsent to a live subscriber. `stall_s`: how long one may read
    nothing, in seconds. `quiet_s`, `quiet_changes`: after how long, and after how many changes to
    anything, a subscription that was sent nothing is sent its offset.
    """

    buffer_bytes: int
    stall_s: float
    quiet_s: float
    quiet_changes: int


class Broadcast:
    """The feed's publisher: sends its pages to the subscribers."""

    def __init__(
        self,
        feed: Feed,
        replay: Replay,
        catalogue: Catalogue,
        snapshots: Snapshots,
        limits: BroadcastLimits,
    ) -> None:
        self.feed = feed
        self.replay = replay
        self.catalogue = catalogue
        self.snapshots = snapshots
        self._limits = limits
        self._subscribers: set[Subscriber] = set()
        self._audience = Audience()
        # Their offsets are being judged: nothing has been written to them.
        self._joining: set[Subscriber] = set()
        self._quiet = QuietOffsets(feed, limits.quiet_s, limits.quiet_changes)
        self._room = Room()
        self._state = EncodedState(None)
        self._has_started = False
        self._formatted: tuple[Offset | None, str] = (None, "")

    def stats(self) -> BroadcastStats:
        """Count the subscribers."""
        return BroadcastStats(len(self._subscribers), len(self._audience))

    # The feed's side

    def started(self, _: Epoch, __: Offset) -> None:
        """A history begins. Subscribers of the previous one are disconnected; when they return,
        they learn that they must load again.
        """
        if self._has_started:  # else they wait for this one
            self.close_all(CloseReason.NEW_HISTORY)
        self._has_started = True
        self.replay.clear()
        self.catalogue.clear()
        self.snapshots.clear()

    def publish(self, page: Page) -> None:
        """Send a page to every live subscriber."""
        assert self.feed.epoch is not None
        encoded = EncodedPage(page, self.feed.epoch)
        self.replay.keep(encoded)
        if not page.changes:
            return
        for change in page.changes:
            if change.op == "reload":
                self.catalogue.forget(change.topic)
                self.snapshots.forget(change.topic)
        self.snapshots.changed({change.topic for change in page.changes})
        sent = self._audience.send(encoded, self._limits.buffer_bytes)
        for group in sent.groups:
            self._quiet.begin(group)
        for subscriber in sent.slow:
            self._start(subscriber, self.catch_up, page.since)
        for subscriber in sent.reloading:
            self._start(subscriber, self.load_again, page.until)
        self._quiet.count(len(page.changes))

    # Outages

    def state_changed(self, outage: Outage | None) -> None:
        """Tell every subscriber that changes do not arrive; or the live ones that they do. Those
        that are catching up are told when they are live.
        """
        self._state = EncodedState(outage)
        for subscriber in list(self._audience if outage is None else self._subscribers):
            self._tell(subscriber)

    def _tell(self, subscriber: Subscriber) -> None:
        """Tell a subscriber whether changes arrive, unless it knows."""
        self._hold(subscriber)
        if subscriber.told is not self._state.outage:
            subscriber.told = self._state.outage
            subscriber.transport.try_write(self._state.message(subscriber.encode), UNLIMITED)

    def _hold(self, subscriber: Subscriber) -> None:
        """Hold a subscriber if its offset is still being judged."""
        if subscriber in self._joining:
            self._joining.remove(subscriber)
            subscriber.greeting.hold(subscriber.transport)

    def close_all(self, reason: CloseReason) -> None:
        """Disconnect every subscriber; their offsets let them continue elsewhere or later."""
        for subscriber in list(self._subscribers):
            subscriber.transport.close(reason)

    # The subscribers' side

    def subscribe(
        self,
        transport: Transport,
        encode: Encoder | SubscriptionEncoder,
        since: Any,
        greeting: Greeting,
        request: Request | None = None,
    ) -> Subscriber:
        """Add a subscriber: welcome it, send what it missed, then every new page.

        `since` is the offset it says it has, and `request` what it asks for: None for all changes
        of all topics, and then `encode` is an Encoder. If judging these requires a look at the
        database, all of this happens later, in a task; while the database is away, the subscriber
        is held. Raises SubscriptionRefused.
        """
        if request is not None and len(self._subscribers) >= MOST_SUBSCRIPTIONS:
            raise SubscriptionRefused(
                RefusalCode.TOO_MANY, "This node has too many subscriptions; try again later."
            )
        subscriber = Subscriber(transport, encode, greeting, request)
        self._subscribers.add(subscriber)
        try:
            judged, offset = self.replay.judge_at_once(since)
            if judged and self._is_bound(subscriber, offset):
                if not self._admit(subscriber, offset):
                    self._start(subscriber, self.catch_up, offset)
            else:
                self._joining.add(subscriber)
                if self._state.outage is not None:
                    self._tell(subscriber)
                self._start(subscriber, self._join, since)
                if request is not None:
                    asyncio.get_running_loop().call_later(HOLD_AFTER_S, self._hold, subscriber)
        except BaseException:
            self.leave(subscriber)
            raise
        return subscriber

    def _is_bound(self, subscriber: Subscriber, offset: Offset | None) -> bool:
        """Bind a subscriber to the table it asks for, if that requires no look at the database;
        return whether it is bound and may have what it asks for.
        """
        if subscriber.request is None:
            return True
        found = self.catalogue.known(subscriber.request)
        if found is None or (offset is None and self.snapshots.refusal(found) is not None):
            return False
        self._bind_to(subscriber, found)
        return True

    def _bind_to(self, subscriber: Subscriber, subscription: Subscription | None) -> None:
        """Set what a subscriber that is not live asks for. Raises SubscriptionRefused."""
        before = subscriber.subscription
        if subscription is not None:
            self._room.take(subscription)
        if before is not None:
            self._room.leave(before)
        subscriber.subscription = subscription

    def move(self, subscriber: Subscriber, transport: Transport) -> None:
        """Write to a subscriber through another transport from now on."""
        is_live = subscriber.task is None
        if is_live:
            self._remove(subscriber)
        subscriber.transport = transport
        if is_live:
            self._add(subscriber)

    def leave(self, subscriber: Subscriber) -> None:
        """Forget a subscriber; no error if it has left already."""
        self._subscribers.discard(subscriber)
        self._remove(subscriber)
        self._bind_to(subscriber, None)
        self._joining.discard(subscriber)
        if subscriber.task is not None:
            subscriber.task.cancel()

    def _add(self, subscriber: Subscriber) -> None:
        """Make a subscriber live."""
        begun = self._audience.add(subscriber)
        if begun is not None:
            self._quiet.begin(begun)

    def _remove(self, subscriber: Subscriber) -> None:
        """Make a subscriber not live; no error if it is not."""
        ended = self._audience.discard(subscriber)
        if ended is not None:
            self._quiet.end(ended)

    def _admit(self, subscriber: Subscriber, offset: Offset | None) -> bool:
        """Welcome a subscriber, given its offset; return whether it is live now."""
        epoch, reached = self.feed.epoch, self.feed.reached
        assert epoch is not None and reached is not None
        self._joining.discard(subscriber)
        loads = offset is None and subscriber.request is not None and subscriber.request.snapshot
        if offset is not None:
            self._welcome(subscriber, True, epoch.format(offset))
        elif loads:
            self._welcome(subscriber, False, LOADING)
        else:
            self._welcome(subscriber, False, self._format(epoch, reached))
        if loads or (offset is not None and offset != reached):
            return False
        self.go_live(subscriber)
        return True

    def _welcome(self, subscriber: Subscriber, recovered: bool, offset: str) -> None:
        subscription = subscriber.subscription
        key = None if subscription is None else subscription.table.key
        subscriber.greeting.welcome(subscriber.transport, recovered, offset, key)
        if self._state.outage is not None:
            subscriber.told = None  # clients may take a welcome as news that changes arrive
            self._tell(subscriber)

    def _format(self, epoch: Epoch, reached: Offset) -> str:
        """Format the offset of the live subscribers, once for all that join at it."""
        if self._formatted[0] is not reached:
            self._formatted = (reached, epoch.format(reached))
        return self._formatted[1]

    def go_live(self, subscriber: Subscriber) -> None:
        """Send a subscriber every page from now on."""
        subscriber.task = None
        if subscriber in self._subscribers:
            self._add(subscriber)
            self._tell(subscriber)

    def _is_current(self, subscriber: Subscriber) -> bool:
        """Return whether a subscriber's table is as it was when it subscribed."""
        subscription = subscriber.subscription
        return subscription is None or self.catalogue.is_current(subscription)

    def _start(self, subscriber: Subscriber, work: Work, *arguments: Any) -> None:
        self._remove(subscriber)
        subscriber.task = asyncio.create_task(
            self._supervise(subscriber, work, *arguments), name=f"catch-up {subscriber.transport}"
        )

    async def _supervise(self, subscriber: Subscriber, work: Work, *arguments: Any) -> None:
        """Do one subscriber's work; an error refuses it, or closes the transport with a reason."""
        try:
            await work(subscriber, *arguments)
        except Stalled:
            subscriber.transport.close(CloseReason.STALLED)
        except SubscriptionRefused as refused:
            self._joining.discard(subscriber)
            subscriber.greeting.refuse(subscriber.transport, refused)
            refused.with_traceback(None)  # others may share it
        except HistoryLost as error:
            logger.info("%s: %s", subscriber.transport, error)
            subscriber.transport.close(CloseReason.HISTORY_LOST)
        except UNAVAILABLE as error:
            logger.info("%s: %s", subscriber.transport, str(error) or type(error).__name__)
            subscriber.transport.close(CloseReason.DATABASE_AWAY)
        except Exception:
            logger.exception("%s: the replay has failed", subscriber.transport)
            subscriber.transport.close(CloseReason.INTERNAL_ERROR)

    async def _join(self, subscriber: Subscriber, since: Any) -> None:
        offset = await self._patiently(self._judge, since)
        if subscriber.request is not None:
            subscription = await self._bind(subscriber)
            refused = self.snapshots.refusal(subscription) if offset is None else None
            if refused is not None and subscriber.request.snapshot:
                raise refused.with_traceback(None)
        if not self._admit(subscriber, offset):
            await self.catch_up(subscriber, offset)

    async def _judge(self, since: Any) -> Offset | None:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            return await self.replay.judge(since)

    async def _bind(self, subscriber: Subscriber) -> Subscription:
        """Bind a subscriber to the table it asks for, as it is now."""
        assert subscriber.request is not None
        while True:
            subscription = await self._patiently(self._bind_request, subscriber.request)
            if self.catalogue.is_current(subscription):
                self._bind_to(subscriber, subscription)
                return subscription

    async def _bind_request(self, request: Request) -> Subscription:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            return await self.catalogue.bind(request)

    async def catch_up(self, subscriber: Subscriber, offset: Offset | None) -> None:
        """Write the pages after an offset, and go live once it is that of the live subscribers.
        Without an offset, write the rows first.
        """
        if offset is None:
            offset = await self._load(subscriber)
        while True:
            await self._drained(subscriber)
            if not self._is_current(subscriber):
                offset = await self._begin_again(subscriber, offset)
            elif offset == self.feed.reached:
                self.go_live(subscriber)
                return
            else:
                offset = await self._replay(subscriber, offset)

    async def load_again(self, subscriber: Subscriber, since: Offset) -> None:
        """Start over: a subscriber's rows cannot be derived from the changes before `since`."""
        await self.catch_up(subscriber, await self._begin_again(subscriber, since))

    async def _replay(self, subscriber: Subscriber, offset: Offset) -> Offset:
        """Write the next pages after an offset; return the offset where they end."""
        subscription, encode = subscriber.subscription, subscriber.encode
        is_told = True
        for page in await self._patiently(self.replay.pages_after, offset):
            if subscription is None:
                subscriber.transport.try_write(page.message(encode), UNLIMITED)
            else:
                interpreted = self.replay.events(page)
                events = interpreted.of(subscription)
                if events is None:
                    return await self._begin_again(subscriber, page.until)
                if events:
                    message = encode.events(events, interpreted)
                    subscriber.transport.try_write(message, UNLIMITED)
                is_told = interpreted.until(events) is not None
            offset = page.until
        if not is_told:
            assert self.feed.epoch is not None
            quiet = encode.quiet(self.feed.epoch.format(offset))
            subscriber.transport.try_write(quiet, UNLIMITED)
        return offset

    async def _begin_again(self, subscriber: Subscriber, since: Offset) -> Offset:
        """Have a subscriber drop its rows, and load what it asked for, as of `since` or later, if
        that is still possible.
        """
        await self._bind(subscriber)
        epoch, reached = self.feed.epoch, self.feed.reached
        assert epoch is not None and reached is not None and subscriber.request is not None
        if not subscriber.request.snapshot:
            self._welcome(subscriber, False, self._format(epoch, reached))
            return reached
        self._welcome(subscriber, False, LOADING)
        return await self._load(subscriber, since)

    async def _load(self, subscriber: Subscriber, since: Offset | None = None) -> Offset:
        """Write the rows of a subscription; return their offset."""
        write = partial(self._write_snapshot, since)
        for pause_s in PAUSES_S:
            try:
                return await self._patiently(write, subscriber)
            except Outdated as error:  # the feed has not noticed yet
                logger.info("%s: %s", subscriber.transport, error)
            await asyncio.sleep(pause_s)
            await self._bind_again(subscriber)
        try:
            return await self._patiently(write, subscriber)
        except Outdated as error:
            assert subscriber.subscription is not None
            refused = self.snapshots.give_up(subscriber.subscription, error)
        # Not within the handler: the error would be its context, and keep the rows that were read.
        raise refused.with_traceback(None)

    async def _bind_again(self, subscriber: Subscriber) -> None:
        """Bind a subscriber again whose table has changed."""
        if self._is_current(subscriber):  # else another subscriber was faster
            assert subscriber.request is not None
            self.catalogue.forget(subscriber.request.topic)
        await self._bind(subscriber)
        self._welcome(subscriber, False, LOADING)  # the key may have changed

    async def _write_snapshot(self, since: Offset | None, subscriber: Subscriber) -> Offset:
        assert subscriber.subscription is not None and self.feed.epoch is not None
        encode = subscriber.encode
        async with self.snapshots.of(subscriber.subscription, since) as snapshot:
            for number in range(len(snapshot)):
                await self._drained(subscriber)
                subscriber.transport.try_write(snapshot.message(encode, number), UNLIMITED)
            loaded = encode.loaded(self.feed.epoch.format(snapshot.offset))
            subscriber.transport.try_write(loaded, UNLIMITED)
            return snapshot.offset

    async def _patiently(self, read: Callable[[Any], Awaitable[T]], argument: Any) -> T:
        """Read what a subscriber needs; while the database is away or the table locked, wait.

        Raises one of UNAVAILABLE if reading fails although the feed's own reads succeed.
        """
        failures = 0
        while True:
            try:
                return await read(argument)
            except asyncpg.LockNotAvailableError:
                await asyncio.sleep(LOCKED_PAUSE_S)
            except UNAVAILABLE as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise
                logger.debug("a read for a subscriber has failed: %r", error)
            await self.feed.look_patiently()

    async def _drained(self, subscriber: Subscriber) -> None:
        """Wait until a subscriber has read what it was sent. Raises Stalled if it reads nothing."""
        while True:
            transport = subscriber.transport
            try:
                async with asyncio.timeout(None) as patience:
                    with stalling(transport, self._limits.stall_s, patience):
                        await transport.drained()
            except TimeoutError:
                raise Stalled from None
            if transport is subscriber.transport:
                return


@contextmanager
def stalling(transport: Transport, stall_s: float, patience: asyncio.Timeout) -> Iterator[None]:
    """Let `patience` expire as soon as a client has read nothing for `stall_s`. Until then the wait
    is not interrupted: one that is restarted loses its turn.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look(before: int) -> None:
        nonlocal timer
        progress = transport.progress()
        if progress > before:
            timer = loop.call_later(stall_s, look, progress)
        else:
            patience.reschedule(loop.time())

    timer = loop.call_later(stall_s, look, transport.progress())
    try:
        yield
    finally:
        timer.cancel()
