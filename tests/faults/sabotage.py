"""Ways to switch off one safety of the product, in a server process that is to be tested, or in its
database.
"""

import asyncio
import sys
from collections.abc import Callable

import asyncpg

from app.feed import log
from app.feed.feed import Feed
from app.feed.offset import Epoch, Offset, Position
from app.live.audience import Client, Live
from app.live.broadcast import Broadcast
from app.live.recent import Part


def fence() -> None:
    """A position forgets which transactions were running, and is but a number."""
    whole = Position.parse

    def only_the_number(text: str) -> Position:
        return Position(whole(text).xmax, frozenset())

    Position.parse = only_the_number  # type: ignore[method-assign]


def joining_early() -> None:
    """A client gets what is live while its replay is still under way."""
    replay = Broadcast._catch_up

    async def join_and_replay(self: Broadcast, client: Client, offset: Offset) -> None:
        self._live.add(client)
        end = self._end
        while self._end == end:  # so that something live comes for certain
            await asyncio.sleep(0.01)
        await replay(self, client, offset)

    Broadcast._catch_up = join_and_replay  # type: ignore[method-assign]


def joining_blindly() -> None:
    """A client joins after its replay, without a look whether the live ones are further."""

    async def catch_up(self: Broadcast, client: Client, offset: Offset) -> None:
        part = self._recent.get(offset) or await self._read(offset)
        client.connection.write(part.frames)
        self._live.add(client)
        client.catching_up = None

    Broadcast._catch_up = catch_up  # type: ignore[method-assign]


def bound() -> None:
    """A client that takes nothing is written to all the same."""

    send = Live.send

    def send_all(self: Live, part: Part, limit_bytes: int) -> list[Client]:
        return send(self, part, sys.maxsize)

    Live.send = send_all  # type: ignore[method-assign]


def catch_up() -> None:
    """After a reconnect the feed goes on from now."""
    begin = Feed._begin

    async def begin_now(self: Feed, reader: "asyncpg.Connection[asyncpg.Record]") -> None:
        await begin(self, reader)
        self.reached = Offset(await log.current_position(reader))

    Feed._begin = begin_now  # type: ignore[method-assign]


def epoch() -> None:
    """An offset is taken from whatever history it comes."""

    def parse(self: Epoch, text: str) -> Offset:
        match text.split(".")[1:-1]:
            case [position, until, id]:
                return Offset(Position.parse(position), Position.parse(until), int(id))
            case [position]:
                return Offset(Position.parse(position))
        raise AssertionError(text)

    Epoch.parse = parse  # type: ignore[method-assign]


KINDS: dict[str, Callable[[], None]] = {
    kind.__name__: kind for kind in (fence, joining_early, joining_blindly, bound, catch_up, epoch)
}


def unsettled() -> None:
    """What statements inside others have changed stays in the order it was logged (below)."""


KINDS |= {unsettled.__name__: unsettled}

IN_DATABASE = {
    "unsettled": """
        CREATE OR REPLACE FUNCTION feed.settle(
            relation regclass, changed text, nesting text, logged bigint)
        RETURNS text LANGUAGE sql AS $$ SELECT '' $$
    """
}
