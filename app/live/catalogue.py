"""Binds requests to the tables of their topics, and caches the results until a table changes."""

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from weakref import WeakValueDictionary

import asyncpg

from app.database.connections import Connection, borrowed
from app.live.condition import Condition, bind, bind_at_once
from app.live.refusal import SubscriptionRefused
from app.live.sharing import Sharing
from app.live.subscription import Request, Subscription, columns_of
from app.live.table import Table, describe

# Results are cached up to this size; a number may have 131,072 digits.
KEPT_CHARS = 32 * 1024 * 1024
OVERHEAD_CHARS = 1_000


def weight(subscription: Subscription) -> int:
    """Return roughly how much memory a subscription takes."""
    return OVERHEAD_CHARS + 3 * len(subscription.condition.text)


class Catalogue:
    """The tables of those topics that somebody asks for."""

    def __init__(self, pool: asyncpg.Pool, at_once: int) -> None:
        self._pool = pool
        self._at_once = asyncio.Semaphore(at_once)
        self._tables: dict[str, Table] = {}
        self._forgotten = 0  # how often: what was looked up before that may be outdated
        self._bound: OrderedDict[str, Subscription] = OrderedDict()  # by fingerprint
        self._weight = 0  # of these
        self._shared: WeakValueDictionary[Hashable, Subscription] = WeakValueDictionary()
        self._binding: Sharing[str, Subscription] = Sharing()

    def known(self, request: Request) -> Subscription | None:
        """Return the subscription that a request stands for, or None if that requires a look at the
        database. (So does a refusal: the table may have been altered without the feed noticing.)
        """
        found = self._bound.get(request.fingerprint)
        if found is not None:
            self._bound.move_to_end(request.fingerprint)
            return found
        table = self._tables.get(request.topic)
        if table is None:
            return None
        try:
            condition = bind_at_once(table, request.filter)
            return None if condition is None else self._keep(request, table, condition)
        except SubscriptionRefused:
            return None

    def is_current(self, subscription: Subscription) -> bool:
        """Return whether a subscription is bound to its table as it is now, as far as we know."""
        return self._tables.get(subscription.table.topic) is subscription.table

    def forget(self, topic: str) -> None:
        """Forget the table of a topic: it has changed, or the topic has another one."""
        self._forgotten += 1
        if self._tables.pop(topic, None) is not None:
            for fingerprint, subscription in list(self._bound.items()):
                if subscription.table.topic == topic:
                    self._forget_bound(fingerprint)

    def clear(self) -> None:
        """Forget everything."""
        self._forgotten += 1
        self._tables.clear()
        self._bound.clear()
        self._weight = 0

    async def bind(self, request: Request) -> Subscription:
        """Return the subscription that a request stands for.

        Equal requests share one look at the database, and the result. Raises SubscriptionRefused,
        or one of UNAVAILABLE.
        """
        found = self.known(request)
        if found is not None:
            return found
        return await self._binding.get(request.fingerprint, partial(self._bind, request))

    async def _bind(self, request: Request) -> Subscription:
        async with self._at_once:
            found = self.known(request)  # others may have looked up the table meanwhile
            if found is not None:
                return found
            async with borrowed(self._pool) as connection:
                while True:
                    table = await self._table(connection, request.topic)
                    try:
                        condition = await bind(connection, table, request.filter)
                        if self._tables.get(request.topic) is table:  # else it has just changed
                            return self._keep(request, table, condition)
                    except SubscriptionRefused:
                        if await describe(connection, request.topic) == table:
                            raise
                        if self._tables.get(request.topic) is table:
                            self.forget(request.topic)

    def _keep(self, request: Request, table: Table, condition: Condition) -> Subscription:
        """Keep what a request stands for; equal requests for one table share a subscription."""
        place = (
            id(table), condition, columns_of(table, request.columns), request.old, request.identity
        )  # fmt: skip
        found = self._shared.get(place)
        if found is None:
            found = Subscription(table, *place[1:])
            self._shared[place] = found
        self._forget_bound(request.fingerprint)
        self._bound[request.fingerprint] = found
        self._weight += weight(found)
        while self._weight > KEPT_CHARS and len(self._bound) > 1:
            self._forget_bound(next(iter(self._bound)))
        return found

    def _forget_bound(self, fingerprint: str) -> None:
        found = self._bound.pop(fingerprint, None)
        if found is not None:
            self._weight -= weight(found)

    async def _table(self, connection: Connection, topic: str) -> Table:
        """Return the table of a topic: the same object for all who look it up at the same time,
        because a subscription to another one would never be current. Raises SubscriptionRefused.
        """
        while topic not in self._tables:
            forgotten = self._forgotten
            table = await describe(connection, topic)
            if forgotten == self._forgotten:
                self._tables.setdefault(topic, table)
        return self._tables[topic]
