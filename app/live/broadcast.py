"""A page to all who joined, and everybody else to where those are.

A client is either *live*, and gets every page as it is published, or *catching up*: it reads the
log at its own pace from the offset it has, until that offset is where the live ones are. Testing
that and joining them is one step, so no change falls between. A client that cannot follow goes
back to catching up; one that takes nothing at all is cut off, and continues when it returns.
"""

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import asyncpg

from app.database.connections import UNAVAILABLE
from app.feed import log
from app.feed.feed import Feed
from app.feed.log import HistoryLost, Page
from app.feed.offset import Epoch, InvalidOffset, Offset
from app.live.audience import Client, Live
from app.live.recent import Part, Recent
from app.socketio import frames
from app.socketio.session import Connection

logger = logging.getLogger("tablecast.sockets")

READS_AT_ONCE = 2
JUDGED_AT_ONCE = 2
# What ends a replay; the client comes back, and is told.
GONE: tuple[type[BaseException], ...] = (HistoryLost, *UNAVAILABLE)
# Parts that lie ready are sent together, up to so many bytes.
JOINED_BYTES = 256 * 1024


@dataclass(slots=True)
class Reading:
    """A read of the log under way, and how many clients wait for it."""

    task: asyncio.Task[Part]
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class BroadcastStats:
    """`reading`: reads of the log under way. `unreadable`: changes that replays could not read."""

    clients: int
    reading: int
    unreadable: int


class Broadcast:
    """The audience of the feed: everything that has an offset and wants what comes behind it."""

    def __init__(self, pool: asyncpg.Pool, client_buffer: int, client_stall: float) -> None:
        self.feed: Feed | None = None
        self._pool = pool
        self._client_buffer = client_buffer
        self._client_stall = client_stall
        self._live = Live()
        self._clients: dict[Connection, Client] = {}
        self._recent = Recent()
        self._reading: dict[Offset, Reading] = {}
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._judged = asyncio.Semaphore(JUDGED_AT_ONCE)
        self._unreadable = 0
        self._epoch: Epoch | None = None
        self._end: Offset | None = None  # where the live clients are
        self._settled = asyncio.Event()  # the end is not within a batch

    def __len__(self) -> int:
        return len(self._clients)

    def stats(self) -> BroadcastStats:
        """How it stands."""
        return BroadcastStats(len(self._clients), len(self._reading), self._unreadable)

    # The feed's side

    def started(self, epoch: Epoch, end: Offset) -> None:
        """A history begins: who lives in another one is sent off, and told when it returns."""
        if self._epoch is not None:  # else nobody has joined; who waits to may stay
            self.cut_all("another history")
        self._epoch, self._end = epoch, end
        self._recent.clear()
        self._settled.set()

    def publish(self, page: Page) -> None:
        """Send a page to every live client."""
        assert self._epoch is not None
        part = Part(page, self._epoch)
        self._recent.add(part)
        self._end = page.until
        if page.until.until is None:
            self._settled.set()
        else:
            self._settled.clear()
        if not page.changes:
            return
        for client in self._live.send(part, self._client_buffer):
            self._start_catching_up(client, page.since)

    def cut_all(self, reason: str) -> None:
        """End every connection; by their offsets the clients continue elsewhere or later."""
        for connection in list(self._clients):
            connection.cut(reason)

    # The clients' side

    async def join(self, connection: Connection, auth: Any) -> None:
        """Accept a client: CONNECT, hello, what it missed, and then what comes.

        Raises one of UNAVAILABLE if an offset cannot be judged now.
        """
        auth = auth if isinstance(auth, dict) else {}
        pid, came_with = auth.get("pid"), auth.get("offset")
        resumes = isinstance(pid, str) and isinstance(came_with, str)
        if not resumes:
            came_with = auth.get("since")
        client = Client(connection, timing=auth.get("timing") is True)
        self._clients[connection] = client
        offset = await self._judge(came_with)
        if self._clients.get(connection) is not client:
            return  # it left meanwhile
        assert self._end is not None and self._epoch is not None
        recovered = offset is not None
        if not (resumes and recovered):
            pid = secrets.token_urlsafe(12)
        connection.write(
            frames.welcome(connection.sid, pid, recovered, self._epoch.format(offset or self._end))
        )
        if offset is None or offset == self._end:
            self._live.add(client)
        else:
            self._start_catching_up(client, offset)

    def knows(self, connection: Connection) -> bool:
        """Whether a client has joined, or is about to."""
        return connection in self._clients

    def leave(self, connection: Connection) -> None:
        """Forget a client; not an error if it never joined."""
        client = self._clients.pop(connection, None)
        if client is not None:
            self._live.discard(client)
            if client.catching_up is not None:
                client.catching_up.cancel()

    async def _judge(self, text: Any) -> Offset | None:
        """The offset a client may continue from; None where it must load anew."""
        if self._epoch is None:
            await self._look()
        assert self._epoch is not None
        if not isinstance(text, str):
            return None
        try:
            offset = self._epoch.parse(text)
            if offset != self._end and self._recent.get(offset) is None:
                await self._wait_until_reached(offset)
                async with self._judged, self._pool.acquire() as connection:
                    if not await log.continues(connection, offset.position):
                        raise HistoryLost(f"the log does not continue from {offset.position}")
            return offset
        except (InvalidOffset, HistoryLost) as reason:
            logger.info("a client cannot continue: %s", reason)
            return None

    def _start_catching_up(self, client: Client, offset: Offset) -> None:
        client.catching_up = asyncio.create_task(
            self._catch_up(client, offset), name=f"catch-up {client.connection.sid}"
        )

    async def _catch_up(self, client: Client, offset: Offset) -> None:
        try:
            while True:
                await self._drained(client.connection)
                if offset == self._end:
                    self._live.add(client)
                    client.catching_up = None
                    return
                parts = self._recent.run(offset, JOINED_BYTES) or [await self._read(offset)]
                for part in parts:
                    client.connection.write(part.timed_frames if client.timing else part.frames)
                offset = parts[-1].until
        except TimeoutError:
            client.connection.cut("it takes nothing")
        except GONE as reason:
            client.connection.cut(str(reason) or type(reason).__name__)
        except Exception:
            logger.exception("the replay to %s has failed", client.connection.sid)
            client.connection.cut("its replay has failed")

    async def _drained(self, connection: Connection) -> None:
        """Wait until a client has taken what it was sent. Raises TimeoutError when it stalls."""
        while True:
            unsent = connection.unsent_bytes()
            try:
                async with asyncio.timeout(self._client_stall):
                    await connection.drained()
                return
            except TimeoutError:
                if connection.unsent_bytes() >= unsent:
                    raise

    async def _read(self, offset: Offset) -> Part:
        """The part after an offset, out of the log. Clients that ask for the same share one read;
        it is cancelled when nobody waits for it any more.

        Raises HistoryLost if the log does not continue from there.
        """
        reading = self._reading.get(offset)
        if reading is None:
            reading = Reading(asyncio.create_task(self._read_log(offset), name="replay"))
            self._reading[offset] = reading
        reading.waiting += 1
        try:
            return await asyncio.shield(reading.task)
        finally:
            reading.waiting -= 1
            if not reading.waiting or reading.task.done():
                if self._reading.get(offset) is reading:
                    del self._reading[offset]
                reading.task.cancel()

    async def _read_log(self, offset: Offset) -> Part:
        # Not beyond where the live clients are to be: after a batch, never within.
        await self._settled.wait()
        await self._wait_until_reached(offset)
        assert self._end is not None and self._epoch is not None
        epoch, target = self._epoch, self._end.position
        async with self._reads, self._pool.acquire() as connection:
            page = await log.read(connection, offset, target)
        self._unreadable += page.unreadable
        part = Part(page, epoch)
        if epoch is self._epoch:
            self._recent.add(part)
        return part

    async def _wait_until_reached(self, offset: Offset) -> None:
        """Return when the live clients are as far as an offset. Raises HistoryLost if they are not,
        even after a look: it is from the future.
        """
        reached = offset.until or offset.position
        if self._end is not None and self._end.position.covers(reached):
            return
        await self._settled.wait()
        await self._look()  # another node was faster
        if self._end is None or not self._end.position.covers(reached):
            raise HistoryLost("from the future")

    async def _look(self) -> None:
        if self.feed is None or not await self.feed.look():
            raise ConnectionError("the feed is not connected to the database")
