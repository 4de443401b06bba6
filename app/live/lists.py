"""Lists for REST: the topics there are, and the rows of a topic as of an offset."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.database.connections import Connection, Pool, borrowed
from app.feed.feed import Feed
from app.live.catalogue import Catalogue
from app.live.filter import parse_key
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.rows import Outdated, Rows, TooManyBytes, read_rows, unreadable
from app.live.subscription import Request, Subscription
from app.live.table import Table, describe_all

# How long a list waits for its turn, for a connection, and for its table to be looked up.
PATIENCE_S = 2.0
# A client that waits for a response gives up sooner than one that waits for a snapshot, and may
# have left unnoticed: meanwhile, others wait for their turn.
LONGEST_READ_S = 20.0
ATTEMPTS = 3


class TooSlow(Exception):
    """Reading takes longer than anybody should wait."""


class Lists:
    """Reads lists, a few at once, using connections from `pool`. The others wait, but not for long.

    `limit_bytes`: how long a list may be. All methods may raise one of UNAVAILABLE, also if they
    have to wait for others for too long.
    """

    def __init__(
        self, feed: Feed, catalogue: Catalogue, pool: Pool, at_once: int, limit_bytes: int
    ) -> None:
        self._feed = feed
        self._catalogue = catalogue
        self._pool = pool
        self._at_once = asyncio.Semaphore(at_once)
        self._limit_bytes = limit_bytes

    async def topics(self) -> list[Table]:
        """Return the tables of all topics."""
        async with self._turn(), asyncio.timeout(PATIENCE_S), borrowed(self._pool) as connection:
            return await describe_all(connection)

    async def rows(self, request: Request, limit: int | None, after: str | None) -> Rows:
        """Return the rows that are asked for, by key: `limit` at most, those after a key if one is
        given.

        Raises SubscriptionRefused or TooSlow.
        """
        async with self._turn():
            for _ in range(ATTEMPTS - 1):
                try:
                    return await self._rows(request, limit, after)
                except Outdated:  # the feed has not noticed yet
                    self._catalogue.forget(request.topic)
            try:
                return await self._rows(request, limit, after)
            except Outdated as error:
                raise unreadable(request.topic, error) from error

    async def _rows(self, request: Request, limit: int | None, after: str | None) -> Rows:
        async with asyncio.timeout(PATIENCE_S):
            subscription = await self._catalogue.bind(request)
        table = subscription.table
        if not table.key and (limit, after) != (None, None):
            raise SubscriptionRefused(
                RefusalCode.UNSUPPORTED,
                f"The table of {table.topic} has no primary key, so nobody can page through it:"
                " leave out limit and after.",
                "limit" if after is None else "after",
            )
        place = None if after is None else parse_key(after, table.key)
        async with borrowed(self._pool, PATIENCE_S) as connection:
            try:
                async with asyncio.timeout(LONGEST_READ_S):
                    return await self._read(connection, subscription, limit, place)
            except TimeoutError as error:
                raise TooSlow(
                    f"Reading these rows takes more than {LONGEST_READ_S:.0f} seconds: add a limit,"
                    " filter by a column that has an index, or try again."
                ) from error

    async def _read(
        self,
        connection: Connection,
        subscription: Subscription,
        limit: int | None,
        after: tuple[str, ...] | None,
    ) -> Rows:
        try:
            return await read_rows(
                connection,
                subscription,
                self._limit_bytes,
                self._feed.event_bytes,
                after=after,
                limit=limit,
            )
        except TooManyBytes:
            raise SubscriptionRefused(
                RefusalCode.TOO_LARGE,
                f"These rows take more than {self._limit_bytes} bytes (SNAPSHOT_BYTES): add a limit"
                " and follow Link (or lower the limit), filter, or ask for fewer columns.",
                "limit",
            ) from None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait until no more than a few others are reading."""
        async with asyncio.timeout(PATIENCE_S):
            await self._at_once.acquire()
        try:
            yield
        finally:
            self._at_once.release()
