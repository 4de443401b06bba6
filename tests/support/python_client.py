"""A Python client that keeps an up-to-date copy of a table in memory.

python-socketio's client does not resume by itself. So this one keeps the offset and sends it on
each connection.
"""

import asyncio
from typing import Any

import aiohttp
import socketio

RETRY_S = 0.5
TIMEOUT_S = 10
Thing = dict[str, Any]


class Things:
    """The things by id, as of `offset`."""

    def __init__(self, url: str, transports: list[str] | None = None) -> None:
        self.url = url
        self.transports = transports
        self.items: dict[int, Thing] = {}
        self.offset: str | None = None
        self.is_live = True
        self._ids: dict[str, int] = {}

    async def follow(self) -> None:
        """Load the list and follow its changes until cancelled."""
        while True:
            try:
                if self.offset is None:
                    await self._load()
                await self._listen()
            except (OSError, aiohttp.ClientError, socketio.exceptions.ConnectionError):
                pass  # the server is down
            await asyncio.sleep(RETRY_S)

    async def _load(self) -> None:
        timeout = aiohttp.ClientTimeout(TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as http:
            answer = await http.get(f"{self.url}/api/things")
            self.on_list(await answer.json(), answer.headers["Feed-Offset"])

    async def _listen(self) -> None:
        """Follow one connection until it ends."""
        # A new client for every connection, so that nothing of the last one remains.
        client = socketio.AsyncClient(reconnection=False)

        # It may await only at the end: otherwise handlers run out of order.
        async def on_event(event: str, *arguments: Any) -> None:
            if self.offset is None:
                return
            self.on_event(event, *arguments)
            if self.offset is None:
                await client.disconnect()

        client.on("*", on_event)
        auth = {"since": self.offset}
        try:
            await client.connect(
                self.url, auth=auth, transports=self.transports, wait_timeout=TIMEOUT_S
            )
            await client.wait()
        finally:
            await client.disconnect()

    def on_list(self, things: list[Thing], offset: str) -> None:
        """Start from a whole list."""
        self.items = {thing["id"]: thing for thing in things}
        self._ids = {thing["name"]: thing["id"] for thing in things}
        self.offset = offset

    def on_event(self, event: str, *arguments: Any) -> None:
        """Apply one event. The last argument is the offset; the others are the event's.

        Only `feed:state` has no offset: whether the rows are as of now.
        """
        if event == "feed:state":
            self.is_live = arguments[0]["live"]
            return
        *what, offset = arguments
        match event, what:
            case "feed:hello", [{"recovered": False}]:
                offset = None  # the server cannot continue: load the list again
            case "thing:create", [thing]:
                self._put(thing)
            case "thing:update", [thing]:
                before = self.items[thing["id"]]
                if (
                    self._ids[before["name"]] == thing["id"]
                ):  # else another thing has taken the name
                    del self._ids[before["name"]]
                self._put(thing)
            case "thing:destroy", [name]:
                del self.items[self._ids.pop(name)]
            case "thing:truncate", []:
                self.items.clear()
                self._ids.clear()
        self.offset = offset

    def _put(self, thing: Thing) -> None:
        self.items[thing["id"]] = thing
        self._ids[thing["name"]] = thing["id"]
