"""A client that reconnects by itself, a writer that keeps writing, and what the client must receive
from the writer.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import httpx
from websockets.exceptions import InvalidHandshake, WebSocketException

from app.database.connections import UNAVAILABLE, connect
from tests.support.feeds import eventually
from tests.support.sockets import RawClient, joined

PAUSE_S = 0.05
LOST = (OSError, EOFError, WebSocketException, InvalidHandshake, AssertionError)
LOG = "SELECT coalesce(new, old) ->> 'name' FROM feed.change ORDER BY id"


class Follower:
    """Follows one server, or several in turn, continuing from where it was."""

    def __init__(self, *urls: str) -> None:
        self.names: list[str] = []
        self.joined = 0
        self.not_recovered = 0
        self._urls = urls
        self._client: RawClient | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        attempt = 0
        while True:
            attempt += 1
            last = self._client
            auth = None if last is None else {"pid": last.pid, "offset": last.offset}
            try:
                async with joined(self._urls[attempt % len(self._urls)], auth) as client:
                    self.not_recovered += auth is not None and not client.recovered
                    self._client = client
                    self.joined += 1
                    while True:
                        event = await client.event(timeout=3600)
                        self.names.append(event[1]["name"])
            except LOST:
                await asyncio.sleep(PAUSE_S)


class Writer:
    """Writes things, one per transaction, whatever happens to the database."""

    def __init__(self, url: str) -> None:
        self.written = 0
        self._url = url

    async def run(self) -> None:
        """Write until cancelled. A write that may or may not have been committed is repeated."""
        while True:
            try:
                connection = await connect(self._url)
                try:
                    while True:
                        await connection.execute(
                            "INSERT INTO things (name) VALUES ($1) ON CONFLICT DO NOTHING",
                            f"{self.written}",
                        )
                        self.written += 1
                        await asyncio.sleep(0.01)
                finally:
                    connection.terminate()
            except (*UNAVAILABLE, asyncpg.PostgresError):
                await asyncio.sleep(PAUSE_S)

    async def write_on(self, count: int = 20) -> None:
        """Wait until this many more have been written."""
        wanted = self.written + count
        await eventually(lambda: self.written >= wanted)


@asynccontextmanager
async def followed(database_url: str, *followers: Follower) -> AsyncIterator[Writer]:
    """Run clients that follow a writer; at the end each must have had every change once, in order,
    and been recovered on every return.
    """
    writer = Writer(database_url)
    following = [asyncio.create_task(follower.run()) for follower in followers]
    writing = asyncio.create_task(writer.run())
    try:
        await eventually(lambda: all(follower.joined for follower in followers))
        for follower in followers:
            follower.names.clear()
        await writer.write_on()
        yield writer
        await writer.write_on()
        writing.cancel()
        await asyncio.wait([writing])
        connection = await connect(database_url)
        logged = [row[0] for row in await connection.fetch(LOG)]
        await connection.close()
        for follower in followers:
            await eventually(lambda f=follower: f.names[-1:] == logged[-1:], 30)  # type: ignore[misc]
            assert follower.names == logged[logged.index(follower.names[0]) :]
            assert follower.not_recovered == 0
    finally:
        for task in (writing, *following):
            task.cancel()
        await asyncio.wait([writing, *following])


async def readiness(url: str) -> tuple[int, str]:
    """Return the status and the reason that `/readyz` answers with."""
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        answer = await http.get("/readyz")
        return answer.status_code, answer.json().get("detail", "")


async def until_readiness(url: str, status: int, seconds: float = 20) -> str:
    """Wait until a server is ready (200) or not (503); return the reason."""
    async with asyncio.timeout(seconds):
        while (found := await readiness(url))[0] != status:
            await asyncio.sleep(0.02)
    return found[1]
