"""A raw client that holds subscriptions: what it receives, by namespace, folded into rows."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from tests.support.sockets import RawClient, opened

Row = dict[str, Any]


class Held:
    """What a client holds of one subscription, as the events say; a destroy carries the key."""

    def __init__(self, *key: str) -> None:
        self.key = key or ("id",)
        self.pid = ""
        self.recovered: bool | None = None
        self.offset = ""
        self.rows: dict[str, Row] = {}
        self.is_loaded = False
        self.is_whole = False  # it got all rows there are
        self.refused: dict[str, Any] | None = None
        self.events: list[list[Any]] = []  # but not those of `feed:rows`
        self.chunks = 0

    def place(self, row: Row) -> str:
        """Under what a row is held."""
        return json.dumps([row[column] for column in self.key])

    def take(self, event: list[Any]) -> None:
        """Fold one event."""
        name, *arguments = event
        if arguments and isinstance(arguments[-1], str):
            self.offset = arguments[-1]
        if name == "feed:rows":
            self.chunks += 1
            self.rows |= {self.place(row): row for row in arguments[0]}
            return
        self.events.append(event)
        if name == "feed:hello":
            self.recovered = self.is_loaded = arguments[0]["recovered"]
            if not self.recovered:
                self.rows.clear()
                self.is_whole = False
        elif name == "feed:loaded":
            self.is_loaded = self.is_whole = True
        elif name.endswith((":create", ":update")):
            is_new = self.place(arguments[0]) not in self.rows
            assert not self.is_whole or is_new == name.endswith(":create"), event
            self.rows[self.place(arguments[0])] = arguments[0]
        elif name.endswith(":destroy"):
            assert self.rows.pop(self.place(arguments[0]), None) or not self.is_whole, event
        elif name.endswith(":truncate"):
            self.rows.clear()

    @property
    def ids(self) -> list[Any]:
        """The ids of the rows held, in order."""
        return sorted(row["id"] for row in self.rows.values())

    @property
    def names(self) -> list[str]:
        """The names of the events so far."""
        return [event[0] for event in self.events]


class Subscriber:
    """A raw client with subscriptions in several namespaces."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.held: dict[str, Held] = {}

    async def subscribe(self, namespace: str, *key: str, **options: Any) -> Held:
        """Send CONNECT; return what will be held."""
        return await self.connect(namespace, Held(*key), options)

    async def resume(self, namespace: str, held: Held, **options: Any) -> Held:
        """Return to a subscription, as official clients do."""
        return await self.connect(
            namespace, held, {"pid": held.pid, "offset": held.offset, **options}
        )

    async def connect(self, namespace: str, held: Held, payload: Row) -> Held:
        """Send CONNECT with a payload; fold what comes into `held`."""
        self.held[namespace] = held
        prefix = "" if namespace == "/" else f"{namespace},"
        await self.client.send(f"40{prefix}{json.dumps(payload)}")
        return held

    async def step(self) -> None:
        """Take the next packet."""
        frame = await self.client.frame()
        kind, rest = frame[:2], frame[2:]
        namespace, content = "/", rest
        if rest.startswith("/"):
            namespace, _, content = rest.partition(",")
        held = self.held[namespace]
        if kind == "40":
            held.pid = json.loads(content)["pid"]
        elif kind == "44":
            held.refused = json.loads(content)
        else:
            assert kind == "42", frame
            held.take(json.loads(content))

    async def until(self, true: Callable[[], object]) -> None:
        """Take packets until something holds. Raises TimeoutError."""
        while not true():
            await self.step()

    async def drain(self) -> None:
        """Take the packets that come within a moment."""
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.05):
                    await self.step()

    async def loaded(self, held: Held) -> Held:
        """Take packets until a subscription is complete."""
        await self.until(lambda: held.is_loaded)
        return held

    async def refusal(self, held: Held) -> Row:
        """Take packets until a subscription is refused; return the refusal's data."""
        await self.until(lambda: held.refused is not None)
        assert held.refused is not None
        data: Row = held.refused["data"]
        is_unknown = data["code"] == "unknown_topic"
        assert held.refused["message"] == ("Invalid namespace" if is_unknown else data["detail"])
        assert data["detail"].endswith(".")
        return data


@asynccontextmanager
async def subscriber(url: str) -> AsyncIterator[Subscriber]:
    """A client that has not subscribed to anything."""
    async with opened(url) as client:
        yield Subscriber(client)
