"""Snapshots: the rows of a subscription, read once for everybody who asks for them meanwhile."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg

from app.database.connections import borrowed
from app.feed.feed import Feed
from app.feed.log import HistoryLost
from app.feed.offset import InvalidOffset, Offset
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.rows import Outdated, Rows, TooManyBytes, read_rows, unreadable
from app.live.sharing import Sharing
from app.live.subscriber import Message, SubscriptionEncoder
from app.live.subscription import Subscription

# How long a snapshot is given to others who ask for it, unless rows of its topic change first.
FRESH_S = 5.0
# Snapshots up to this size do not wait for room.
SMALL_BYTES = 256 * 1024
# How often a read checks whether the feed still has the database.
AWAY_CHECK_S = 1.0
# How long a refusal holds for others who ask for the same.
REFUSED_S = 30.0


class Snapshot:
    """The rows of a subscription as of an offset. `users`: how many are being sent it, plus one
    while it is given to others who ask, until `freshness` expires.
    """

    __slots__ = ("_rows", "bytes", "freshness", "offset", "users")

    def __init__(self, rows: Rows, offset: Offset) -> None:
        self._rows = rows
        self.offset = offset
        self.bytes = rows.bytes
        self.users = 0
        self.freshness: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return how many messages it takes."""
        return len(self._rows.chunks)

    def message(self, encode: SubscriptionEncoder, number: int) -> Message:
        """Return one of its messages, as this encoder writes it; it is not kept."""
        return encode.rows(self._rows.chunks[number])


def is_later(offset: Offset, since: Offset) -> bool:
    """Return whether a snapshot as of `offset` includes everything up to `since`."""
    return offset.position.covers(since.until or since.position)


@dataclass(frozen=True, slots=True)
class SnapshotStats:
    """`reading`: reads under way. `reads`: how many there were so far. `held_bytes`: what the
    snapshots in memory hold.
    """

    reading: int
    reads: int
    held_bytes: int


class Snapshots:
    """Reads snapshots, using connections from `pool`.

    `limit_bytes`: how long one may be. Not much more than four times as much is held at any time: a
    subscriber that needs another one waits until others have been sent theirs.
    """

    def __init__(self, feed: Feed, pool: asyncpg.Pool, at_once: int, limit_bytes: int) -> None:
        self._feed = feed
        self._pool = pool
        self._limit_bytes = limit_bytes
        # One fewer per topic: one table that is locked must not hold up all others.
        self._at_once = asyncio.Semaphore(at_once)
        self._of_topic: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(at_once - 1)
        )
        self._reading: Sharing[Subscription, Snapshot] = Sharing()
        self._fresh: dict[str, dict[Subscription, Snapshot]] = {}  # by topic
        self._refused: dict[Subscription, SubscriptionRefused] = {}
        self._held_bytes = 0
        self._released = asyncio.Event()
        self._reads = 0
        # How often anything was forgotten, and the rows of each topic have changed: a read that was
        # begun before is not shared.
        self._forgotten = 0
        self._changes: Counter[str] = Counter()

    def stats(self) -> SnapshotStats:
        """Return what is held, and the counters."""
        return SnapshotStats(len(self._reading), self._reads, self._held_bytes)

    def refusal(self, subscription: Subscription) -> SubscriptionRefused | None:
        """Return why a snapshot of a subscription was refused a moment ago, if it was."""
        return self._refused.get(subscription)

    def give_up(self, subscription: Subscription, error: Outdated) -> SubscriptionRefused:
        """Return the refusal for a subscription that was outdated again and again: the same one for
        all who ask for it.
        """
        if subscription not in self._refused:
            self._refuse(subscription, unreadable(subscription.table.topic, error))
        return self._refused[subscription]

    def changed(self, topics: Set[str]) -> None:
        """Stop sharing the snapshots of these topics: rows have changed since they were read."""
        self._changes.update(topics)
        for topic in topics:
            for subscription, snapshot in list(self._fresh.get(topic, {}).items()):
                self._drop(subscription, snapshot)

    def forget(self, topic: str) -> None:
        """Stop sharing the snapshots of a topic, including those being read, and its refusals."""
        self.changed({topic})
        self._forgotten += 1
        for subscription in [*self._refused, *self._reading.keys()]:
            if subscription.table.topic == topic:
                self._refused.pop(subscription, None)
                self._reading.forget(subscription)

    def clear(self) -> None:
        """Stop sharing all snapshots and refusals."""
        known = {each.table.topic for each in [*self._refused, *self._reading.keys()]}
        for topic in known | self._fresh.keys():
            self.forget(topic)

    @asynccontextmanager
    async def of(
        self, subscription: Subscription, since: Offset | None = None
    ) -> AsyncIterator[Snapshot]:
        """Provide a snapshot that includes everything up to `since`: a new one, or one that was
        read for others a moment ago.

        Raises SubscriptionRefused, Outdated, HistoryLost, or one of UNAVAILABLE.
        """
        snapshot = await self._get(subscription)
        while since is not None and not is_later(snapshot.offset, since):
            self._drop(subscription, snapshot)
            snapshot = await self._get(subscription)
        self._hold(snapshot)
        try:
            yield snapshot
        finally:
            self._release(snapshot)

    async def _get(self, subscription: Subscription) -> Snapshot:
        if subscription in self._refused:
            raise self._refused[subscription].with_traceback(None)
        # A client that asks after a write must see it: has nothing been written since?
        if self._get_fresh(subscription) is not None and await self._feed.look():
            snapshot = self._get_fresh(subscription)
            if snapshot is not None:
                return snapshot
        return await self._reading.get(subscription, partial(self._read, subscription))

    async def _read(self, subscription: Subscription) -> Snapshot:
        """Read a snapshot, and keep the result, or the refusal, for others."""
        topic = subscription.table.topic
        forgotten, changes = self._forgotten, self._changes[topic]
        try:
            snapshot = await self._read_within_limits(subscription)
        except SubscriptionRefused as refused:
            if forgotten == self._forgotten:
                self._refuse(subscription, refused)
            raise
        if forgotten == self._forgotten and changes == self._changes[topic]:
            self._drop(subscription, self._get_fresh(subscription))
            self._fresh.setdefault(topic, {})[subscription] = snapshot
            self._hold(snapshot)
            snapshot.freshness = self._later(FRESH_S, self._drop, subscription, snapshot)
        return snapshot

    def _refuse(self, subscription: Subscription, refused: SubscriptionRefused) -> None:
        """Refuse a subscription to others, too, for a while. The traceback and the causes are not
        kept: they hold the rows that were read.
        """
        refused.__cause__ = refused.__context__ = refused.__traceback__ = None
        self._refused[subscription] = refused
        self._later(REFUSED_S, self._refused.pop, subscription, None)

    async def _read_within_limits(self, subscription: Subscription) -> Snapshot:
        """Read a snapshot; while others take up all the room, only a small one."""
        may_be_small = True
        while True:
            async with self._of_topic[subscription.table.topic], self._at_once:
                has_room = self._has_room()
                if has_room or may_be_small:
                    limit_bytes = self._limit_bytes
                    if not has_room:
                        limit_bytes = min(SMALL_BYTES, limit_bytes)
                    rows = await self._rows_within(subscription, limit_bytes)
                    if rows is not None:
                        return Snapshot(rows, self._offset(rows.offset))
                    if limit_bytes >= self._limit_bytes:
                        raise self._too_large(subscription)
                    may_be_small = False
            await self._room()

    async def _rows_within(self, subscription: Subscription, limit_bytes: int) -> Rows | None:
        """Read rows; return None if they are too long."""
        try:
            return await self._unless_away(self._rows(subscription, limit_bytes))
        except TooManyBytes:
            return None

    async def _room(self) -> None:
        """Wait until there is room for a snapshot of any length."""
        while not self._has_room():
            self._released.clear()
            await self._released.wait()

    def _has_room(self) -> bool:
        """Return whether no more is held than one snapshot may take; to make room, drop those that
        nobody is being sent.
        """
        if self._held_bytes > self._limit_bytes:
            kept = [item for fresh in self._fresh.values() for item in fresh.items()]
            for subscription, snapshot in kept:
                if snapshot.users == 1:
                    self._drop(subscription, snapshot)
        return self._held_bytes <= self._limit_bytes

    async def _unless_away(self, reading: Coroutine[Any, Any, Rows]) -> Rows:
        """Read, but give up when the feed loses the database: we would wait on a dead connection
        for as long as a statement may take. Raises ConnectionError.
        """
        before = self._feed.outage
        task = asyncio.create_task(reading, name="read rows")
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while not (await asyncio.wait([task], timeout=AWAY_CHECK_S))[0]:
                outage = self._feed.outage
                if outage is not None and outage.is_absence and outage != before:
                    raise ConnectionError("the database went away while rows were read")
            return task.result()
        finally:
            task.cancel()

    async def _rows(self, subscription: Subscription, limit_bytes: int) -> Rows:
        async with borrowed(self._pool) as connection:
            self._reads += 1
            return await read_rows(connection, subscription, limit_bytes, self._feed.event_bytes)

    def _too_large(self, subscription: Subscription) -> SubscriptionRefused:
        return SubscriptionRefused(
            RefusalCode.TOO_LARGE,
            f"These rows take more than {self._limit_bytes} bytes (SNAPSHOT_BYTES): ask for fewer"
            " with a filter, for fewer columns, or page through"
            f" GET /topics/{subscription.table.topic} and continue from its Feed-Offset.",
            "where",
        )

    def _offset(self, text: str) -> Offset:
        epoch = self._feed.epoch
        assert epoch is not None
        try:
            return epoch.parse(text)
        except InvalidOffset as error:
            raise HistoryLost("the database began another history") from error

    def _later(
        self, seconds: float, work: Callable[..., object], *arguments: object
    ) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, work, *arguments)

    def _get_fresh(self, subscription: Subscription) -> Snapshot | None:
        return self._fresh.get(subscription.table.topic, {}).get(subscription)

    def _drop(self, subscription: Subscription, snapshot: Snapshot | None) -> None:
        """Stop sharing a snapshot; no error if it has been dropped already."""
        if snapshot is not None and self._get_fresh(subscription) is snapshot:
            fresh = self._fresh[subscription.table.topic]
            del fresh[subscription]
            if not fresh:
                del self._fresh[subscription.table.topic]
            if snapshot.freshness is not None:
                snapshot.freshness.cancel()  # the timer would go on holding the rows
            self._release(snapshot)

    def _hold(self, snapshot: Snapshot) -> None:
        if not snapshot.users:
            self._held_bytes += snapshot.bytes
        snapshot.users += 1

    def _release(self, snapshot: Snapshot) -> None:
        snapshot.users -= 1
        if not snapshot.users:
            self._held_bytes -= snapshot.bytes
            self._released.set()
