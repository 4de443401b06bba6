"""Hold the open orders, whatever happens to the connection: python examples/subscribe.py URL

Needs `pip install "python-socketio[asyncio-client]"` and a table that is watched:

    CREATE TABLE orders (id int PRIMARY KEY, status text NOT NULL, total numeric NOT NULL);
    -- then: tablecast watch orders --topic order
"""

import asyncio
import sys
from typing import Any

import socketio

Row = dict[str, Any]
Key = tuple[Any, ...]


class Subscription(socketio.AsyncClientNamespace):  # type: ignore[misc]
    """The rows of one topic: `rows` by their keys. `columns`: those of the key, in order."""

    def __init__(self, topic: str, columns: tuple[str, ...] = ("id",), **options: str) -> None:
        super().__init__(f"/{topic}")
        self.topic = topic
        self.rows: dict[Key, Row] = {}
        self._columns = columns
        self._options = options
        self._offset: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """What to ask for now: this client does not resume by itself, so it says how far it is."""
        return self._options | ({"since": self._offset} if self._offset else {})

    # A plain function: the library runs coroutines side by side, so that they may overtake each
    # other.
    def trigger_event(self, event: str, *arguments: Any) -> Any:
        """Fold one event. An offset, if there is one, is the last argument."""
        if event.startswith(("feed:", f"{self.topic}:")):
            self._fold(event.partition(":")[2], *arguments)
            if isinstance(arguments[-1], str):
                self._offset = arguments[-1]
            show(self)
        elif event == "connect_error":
            print(self.topic, "refused:", arguments, flush=True)
        return nothing()

    def _fold(self, event: str, *arguments: Any) -> None:
        if event == "hello" and not arguments[0]["recovered"]:
            self.rows.clear()
        elif event == "rows":
            self.rows.update({self._key(row): row for row in arguments[0]})
        elif event in ("create", "update"):
            self.rows[self._key(arguments[0])] = arguments[0]
        elif event == "destroy":
            self.rows.pop(self._key(arguments[0]), None)
        elif event == "truncate":
            self.rows.clear()

    def _key(self, row: Row) -> Key:
        return tuple(row[column] for column in self._columns)


async def nothing() -> None:
    """What the library awaits of an event."""


def show(subscription: Subscription) -> None:
    """Print the rows."""
    print(subscription.topic, list(subscription.rows.values()), flush=True)


async def follow(url: str, *subscriptions: Subscription) -> None:
    """Hold subscriptions on one connection, for ever."""
    client = socketio.AsyncClient()
    for each in subscriptions:
        client.register_namespace(each)
    await client.connect(
        url,
        # One payload for all namespaces, made again for every connection.
        auth=lambda: {"topics": {each.topic: each.options for each in subscriptions}},
        namespaces=[each.namespace for each in subscriptions],
        retry=True,
    )
    await client.wait()


if __name__ == "__main__":
    asyncio.run(
        follow(sys.argv[1], Subscription("order", where="status=eq.open"), Subscription("thing"))
    )
