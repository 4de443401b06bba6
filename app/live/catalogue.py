"""Binds requests to the tables of their topics, and keeps what it has found until they change."""

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from weakref import WeakValueDictionary

import asyncpg

from app.database.connections import Connection, borrowed
from app.live.condition import Condition, bind
from app.live.sharing import Sharing
from app.live.subscription import Request, Subscription, columns_of
from app.live.table import Table, describe

KEPT = 20_000


class Catalogue:
    """Knows the tables of topics, as far as somebody asks for them."""

    def __init__(self, pool: asyncpg.Pool, at_once: int) -> None:
        self._pool = pool
        self._at_once = asyncio.Semaphore(at_once)
        self._tables: dict[str, Table] = {}
        self._forgotten = 0  # how often anything was: what was read meanwhile may be outdated
        self._bound: OrderedDict[str, Subscription] = OrderedDict()  # by fingerprint
        self._shared: WeakValueDictionary[Hashable, Subscription] = WeakValueDictionary()
        self._binding: Sharing[str, Subscription] = Sharing()

    def known(self, request: Request) -> Subscription | None:
        """Return the subscription that a request stands for, if that is known without a look."""
        found = self._bound.get(request.fingerprint)
        if found is not None:
            self._bound.move_to_end(request.fingerprint)
        return found

    def is_current(self, subscription: Subscription) -> bool:
        """Whether a subscription is bound to its table as it is now, as far as is known."""
        return self._tables.get(subscription.table.topic) is subscription.table

    def forget(self, topic: str) -> None:
        """The table of a topic has changed, or the topic has another one."""
        self._forgotten += 1
        if self._tables.pop(topic, None) is not None:
            for fingerprint, subscription in list(self._bound.items()):
                if subscription.table.topic == topic:
                    del self._bound[fingerprint]

    def clear(self) -> None:
        """Forget everything."""
        self._forgotten += 1
        self._tables.clear()
        self._bound.clear()

    async def bind(self, request: Request) -> Subscription:
        """Return the subscription that a request stands for.

        Requests that are equal share one look, and the result. Raises SubscriptionRefused, or one
        of UNAVAILABLE.
        """
        found = self.known(request)
        if found is not None:
            return found
        return await self._binding.get(request.fingerprint, partial(self._bind, request))

    async def _bind(self, request: Request) -> Subscription:
        async with self._at_once, borrowed(self._pool) as connection:
            while True:
                table = await self._table(connection, request.topic)
                condition = await bind(connection, table, request.filter)
                if self._tables.get(request.topic) is table:  # else it has changed meanwhile
                    return self._keep(request, table, condition)

    def _keep(self, request: Request, table: Table, condition: Condition) -> Subscription:
        """Return what a request stands for, and remember it. The table must be current: what is
        remembered for another one would never be.
        """
        place = (
            id(table), condition, columns_of(table, request.columns), request.old, request.identity
        )  # fmt: skip
        found = self._shared.get(place)
        if found is None:
            found = Subscription(table, *place[1:])
            self._shared[place] = found
        self._bound[request.fingerprint] = found
        if len(self._bound) > KEPT:
            self._bound.popitem(last=False)
        return found

    async def _table(self, connection: Connection, topic: str) -> Table:
        """Return the table of a topic. All who look at the same time get the same one: a binding to
        another one would never be current.
        """
        while (table := self._tables.get(topic)) is None:
            forgotten = self._forgotten
            found = await describe(connection, topic)
            if forgotten == self._forgotten:
                table = self._tables.setdefault(topic, found)
                break
        return table
