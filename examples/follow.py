"""Keeps the rows of subscriptions in memory, up to date, through any disconnect.

    pip install "python-socketio[asyncio-client]"
    python follow.py http://127.0.0.1:8000

python-socketio's client does not resume by itself, so each connect says where to continue, with
`since`. Its `auth` is the same for all namespaces, so options are given by topic. With the option
`key`, the server names the columns that identify a row.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import aiohttp  # noqa: F401  python-socketio's client needs it, and says so only in a log
import socketio

RETRY_S = 0.5
PATIENCE_S = 5.0  # how long to wait for a server that does not answer

Row = dict[str, Any]


class Subscription:
    """The rows of one topic, by key. `namespace` is /topic or /topic/label; `options` are those of
    CONNECT, as in where='status=eq.open'. `on_change` is called whenever `rows` has changed.
    """

    def __init__(self, namespace: str, on_change: Callable[[], None], **options: str) -> None:
        self.namespace = namespace
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.offset: str | None = None  # of the rows; None while they are incomplete
        self.refusal: Any = None
        self._key: list[str] = []
        self._on_change = on_change
        self._options = {"key": "true", **options}
        self._arriving: dict[tuple[Any, ...], Row] = {}

    @property
    def options(self) -> dict[str, str]:
        """Return what to ask for: the changes since the offset, or all rows."""
        return self._options if self.offset is None else {**self._options, "since": self.offset}

    def received(self, event: str, *arguments: Any) -> None:
        """Apply one event. A plain function, because coroutines may run out of order."""
        match event.partition(":")[2], arguments:
            case "hello", ({"recovered": False, "key": key}, _):
                self.offset, self._key, self._arriving = None, key, {}
            case "rows", (rows,):
                self._arriving |= {self._key_of(row): row for row in rows}
            case "loaded", (offset,):
                self.rows, self._arriving = self._arriving, {}
                self._reached(offset)
            case "create" | "update", (row, offset):
                self.rows[self._key_of(row)] = row
                self._reached(offset)
            case "destroy", (key, offset):
                del self.rows[self._key_of(key)]
                self._reached(offset)
            case "truncate", (offset,):
                self.rows.clear()
                self._reached(offset)
            case "offset", (offset,):
                self.offset = offset

    def refused(self, reason: Any) -> None:
        """Note why the subscription was refused; without `data`, only the connection failed."""
        if isinstance(reason, dict):
            self.refusal = reason.get("data")

    def _reached(self, offset: str) -> None:
        self.offset = offset
        self._on_change()

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[column] for column in self._key)


async def follow(url: str, *subscriptions: Subscription) -> None:
    """Keep subscriptions up to date, over one connection, until one of them is refused."""
    is_away = False
    while not any(each.refusal for each in subscriptions):
        client = socketio.AsyncClient(reconnection=False)  # this loop reconnects
        for each in subscriptions:
            client.on("*", each.received, namespace=each.namespace)
            client.on("connect_error", each.refused, namespace=each.namespace)
        topics = {each.namespace[1:]: each.options for each in subscriptions}
        namespaces = [each.namespace for each in subscriptions]
        try:
            async with asyncio.timeout(PATIENCE_S):
                # WebSocket only: this client does not survive every broken poll response.
                await client.connect(
                    url,
                    auth={"topics": topics},
                    namespaces=namespaces,
                    transports=["websocket"],
                    wait=False,
                )
            is_away = False
            # No 'disconnect' handlers: they are called only for namespaces that were joined.
            while client.connected and not any(each.refusal for each in subscriptions):
                await asyncio.sleep(0.1)
        except (TimeoutError, socketio.exceptions.ConnectionError) as error:
            if not is_away:
                print(f"{url}: {error or 'no answer'}; trying again", file=sys.stderr)
            is_away = True
        await client.disconnect()
        await asyncio.sleep(RETRY_S)


async def main(url: str) -> None:
    def show() -> None:
        print(json.dumps([list(each.rows.values()) for each in (large, products)]), flush=True)

    large = Subscription("/order/large", show, where="total=gte.15")
    products = Subscription("/product", show, where="stock=lt.10", columns="stock")
    print(f"connecting to {url}", file=sys.stderr)
    await follow(url, large, products)
    print(large.refusal or products.refusal)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith(("http://", "https://")):
        sys.exit("usage: python follow.py http://127.0.0.1:8000")
    asyncio.run(main(sys.argv[1]))
