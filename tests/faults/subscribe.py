"""Holds subscriptions with python-socketio and with a bare client, and writes down everything they
receive, like subscribe.mjs.

Argument: a JSON array of {kind, url, transports, file, switching, namespaces}. Stops when standard
input ends.
"""

import asyncio
import contextlib
import json
import random
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import aiohttp
import socketio
from websockets.exceptions import InvalidHandshake, WebSocketException

from tests.support.sockets import RawClient, opened

RETRY_S = 0.4
TIMEOUT_S = 10
LOST = (
    OSError, EOFError, aiohttp.ClientError, socketio.exceptions.SocketIOError,
    WebSocketException, InvalidHandshake,
)  # fmt: skip


class Namespace:
    """What a client asks for in one namespace, and how far it is."""

    def __init__(self, name: str, alternatives: list[dict[str, str]], file: Any) -> None:
        self.name = name
        self.offset: str | None = None
        self.pid: str | None = None
        self._alternatives = alternatives
        self._asked = -1
        self._file = file

    def ask(self, switching: float) -> dict[str, str]:
        """Return the options for a CONNECT: now and then others than before."""
        before = self._asked
        if before < 0:
            self._asked = 0
        elif random.random() < switching:
            self._asked = (before + 1) % len(self._alternatives)
        if self._asked != before:
            self.changed()
        self._write("ask", self._asked)
        return self._alternatives[self._asked]

    def changed(self) -> None:
        """What was held is not what is asked for now."""

    def take(self, event: str, *arguments: Any) -> None:
        """Write down an event."""
        if event == "feed:state":
            return
        if event == "feed:rows":
            self._write("rows", arguments[0])
            return
        *what, self.offset = arguments
        if event == "feed:hello":
            self._write("hello", what[0]["recovered"], self.offset, None)
        elif event in ("feed:loaded", "feed:offset"):
            self._write(event.removeprefix("feed:"), self.offset)
        else:
            body, old = (*what, None, None)[:2]
            self._write("event", event, body, old, self.offset)

    def refused(self, data: Any) -> None:
        """Write down a refusal."""
        self._write("refused", data)

    def _write(self, *entry: Any) -> None:
        text = json.dumps([self.name, *entry], ensure_ascii=False, separators=(",", ":"))
        self._file.write(f"{text}\n")
        self._file.flush()


class WithoutPid(Namespace):
    """A client that does not resume by itself: it must know whose offset it has."""

    def changed(self) -> None:
        self.offset = None


class Client(ABC):
    """A client that connects again and again."""

    kind: type[Namespace] = Namespace

    def __init__(self, options: dict[str, Any]) -> None:
        file = Path(options["file"]).open("a", encoding="utf-8")  # noqa: SIM115  # until the end
        self._url = options["url"]
        self._transports = options["transports"]
        self._switching = options["switching"]
        self._namespaces = [
            self.kind(name, alternatives, file)
            for name, alternatives in options["namespaces"].items()
        ]

    async def follow(self) -> None:
        """Hold the subscriptions until cancelled."""
        while True:
            with contextlib.suppress(*LOST):  # the server is down
                await self.listen()
            await asyncio.sleep(RETRY_S)

    @abstractmethod
    async def listen(self) -> None:
        """Follow one connection until it ends."""


class PythonClient(Client):
    """python-socketio: one payload for all namespaces, and `since` for each."""

    kind = WithoutPid

    async def listen(self) -> None:
        client = socketio.AsyncClient(reconnection=False)
        topics = {}
        for namespace in self._namespaces:
            options = namespace.ask(self._switching)
            since = {} if namespace.offset is None else {"since": namespace.offset}
            topics[namespace.name[1:]] = options | since
            self._listen_in(client, namespace)
        try:
            await client.connect(
                self._url, auth={"topics": topics}, transports=self._transports,
                namespaces=[namespace.name for namespace in self._namespaces],
                wait_timeout=TIMEOUT_S,
            )  # fmt: skip
            await client.wait()
        finally:
            await client.disconnect()

    def _listen_in(self, client: socketio.AsyncClient, namespace: Namespace) -> None:
        async def on_event(event: str, *arguments: Any) -> None:
            namespace.take(event, *arguments)

        async def on_error(data: Any) -> None:
            if isinstance(data, dict) and "data" in data:
                namespace.refused(data["data"])

        client.on("*", on_event, namespace=namespace.name)
        client.on("connect_error", on_error, namespace=namespace.name)


class BareClient(Client):
    """Packets on a WebSocket, and what official clients say to resume."""

    async def listen(self) -> None:
        async with opened(self._url) as client:
            for namespace in self._namespaces:
                payload = dict(namespace.ask(self._switching))
                if namespace.pid is not None and namespace.offset is not None:
                    payload |= {"pid": namespace.pid, "offset": namespace.offset}
                await client.send(f"40{namespace.name},{json.dumps(payload)}")
            await self._read(client)

    async def _read(self, client: RawClient) -> None:
        named = {namespace.name: namespace for namespace in self._namespaces}
        while True:
            frame = await client.frame()
            kind, (name, _, content) = frame[:2], frame[2:].partition(",")
            if kind == "40":
                named[name].pid = json.loads(content)["pid"]
            elif kind == "42":
                named[name].take(*json.loads(content))
            elif kind == "44":
                named[name].refused(json.loads(content)["data"])
            else:
                raise EOFError(frame)


KINDS: dict[str, type[Client]] = {"python": PythonClient, "bare": BareClient}


async def main() -> None:
    clients = [KINDS[options["kind"]](options) for options in json.loads(sys.argv[1])]
    following = [asyncio.create_task(client.follow()) for client in clients]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([ended, *following], return_when=asyncio.FIRST_COMPLETED)
    for task in following:
        task.cancel()
    for failure in await asyncio.gather(*following, return_exceptions=True):
        if isinstance(failure, Exception):
            raise failure


if __name__ == "__main__":
    asyncio.run(main())
