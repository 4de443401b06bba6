"""Ways to disable one safeguard of the product, in the server process under test or in its
database.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import asyncpg

from app.feed import log
from app.feed.feed import Feed, Publisher
from app.feed.offset import Epoch, Offset, Position
from app.live.audience import Audience, Sent
from app.live.broadcast import Broadcast
from app.live.buffer import EncodedPage
from app.live.events import Pair, TopicChanges
from app.live.subscriber import UNLIMITED, Subscriber
from app.live.subscription import LOADING
from app.live.table import Table
from app.socketio.connecting import ConnectPayload
from app.socketio.frames import Frames, NamespaceEncoder
from app.socketio.server import ConnectAnswer


def fence() -> None:
    """A position forgets which transactions were running, and becomes a mere number."""
    whole = Position.parse

    def only_the_number(text: str) -> Position:
        return Position(whole(text).xmax, frozenset())

    Position.parse = only_the_number  # type: ignore[method-assign]


def joining_early() -> None:
    """A client gets live changes while its replay is still under way."""
    replay = Broadcast.catch_up

    async def join_and_replay(
        self: Broadcast, subscriber: Subscriber, offset: Offset | None
    ) -> None:
        self.go_live(subscriber)
        reached = self.feed.reached
        while self.feed.reached == reached:  # so that at least one live page arrives
            await asyncio.sleep(0.01)
        await replay(self, subscriber, offset)

    Broadcast.catch_up = join_and_replay  # type: ignore[method-assign]


def joining_blindly() -> None:
    """A client goes live after its replay, even if the live clients are further ahead."""

    async def catch_up(self: Broadcast, subscriber: Subscriber, offset: Offset | None) -> None:
        assert offset is not None  # a client without one is live at once
        page = (await self.replay.pages_after(offset))[0]
        subscriber.transport.try_write(page.message(subscriber.encode), UNLIMITED)
        self.go_live(subscriber)

    Broadcast.catch_up = catch_up  # type: ignore[method-assign]


def bound() -> None:
    """A client that reads nothing is written to all the same."""

    send = Audience.send

    def send_all(self: Audience, page: EncodedPage, limit_bytes: int) -> Sent:
        return send(self, page, UNLIMITED)

    Audience.send = send_all  # type: ignore[method-assign]


def catch_up() -> None:
    """After a reconnect the feed continues from now."""
    begin = Feed.begin

    async def begin_now(
        self: Feed, reader: "asyncpg.Connection[asyncpg.Record]", publisher: Publisher
    ) -> None:
        await begin(self, reader, publisher)
        self.reached = Offset(await log.current_position(reader))

    Feed.begin = begin_now  # type: ignore[method-assign]


def epoch() -> None:
    """An offset of any history is accepted."""

    def parse(self: Epoch, text: str) -> Offset:
        match text.split(".")[1:-1]:
            case [position, until, id]:
                return Offset(Position.parse(position), Position.parse(until), int(id))
            case [position]:
                return Offset(Position.parse(position))
        raise AssertionError(text)

    Epoch.parse = parse  # type: ignore[method-assign]


def old_rows() -> None:
    """Filters look at the new row only."""
    rows = TopicChanges.rows

    def only_new(self: TopicChanges, number: int, table: Table) -> Pair:
        old, new = rows(self, number, table)
        return (old if new is None else new if self.changes[number].op == "update" else None), new

    TopicChanges.rows = only_new  # type: ignore[method-assign]


def fingerprint() -> None:
    """A client that asks for something else than before continues where it was."""
    read = ConnectPayload.read

    def read_without(namespace: str, payload: Any) -> ConnectPayload:
        found = read(namespace, payload)
        if found.outdated is None:
            return found
        return replace(found, pid=payload["pid"], since=payload["offset"], outdated=None)

    ConnectPayload.read = staticmethod(read_without)  # type: ignore[method-assign]


def loading() -> None:
    """The hello before a snapshot has the offset of the live clients."""
    subscribe, welcome = Broadcast.subscribe, ConnectAnswer.welcome
    found: list[Broadcast] = []

    def subscribe_and_tell(self: Broadcast, *arguments: Any) -> Subscriber:
        found[:] = [self]
        return subscribe(self, *arguments)

    def welcome_as_live(
        self: ConnectAnswer, session: Any, recovered: bool, offset: str, key: Any = None
    ) -> None:
        feed = found[0].feed
        assert feed.epoch is not None and feed.reached is not None
        current = feed.epoch.format(feed.reached) if offset == LOADING else offset
        welcome(self, session, recovered, current, key)

    Broadcast.subscribe = subscribe_and_tell  # type: ignore[method-assign,assignment]
    ConnectAnswer.welcome = welcome_as_live  # type: ignore[method-assign]


def quiet() -> None:
    """A client to which nothing is sent keeps the offset that it has."""

    def nothing(self: NamespaceEncoder, offset: str) -> Frames:
        return Frames(())

    NamespaceEncoder.quiet = nothing  # type: ignore[method-assign]


KINDS: dict[str, Callable[[], None]] = {
    kind.__name__: kind
    for kind in (
        fence,
        joining_early,
        joining_blindly,
        bound,
        catch_up,
        epoch,
        old_rows,
        fingerprint,
        loading,
        quiet,
    )
}


def unsettled() -> None:
    """Changes of nested statements stay in the order they were logged (below)."""


KINDS |= {unsettled.__name__: unsettled}

IN_DATABASE = {
    "unsettled": """
        CREATE OR REPLACE FUNCTION feed.settle(
            relation regclass, changed text, nesting text, logged bigint)
        RETURNS text LANGUAGE sql AS $$ SELECT '' $$
    """
}
