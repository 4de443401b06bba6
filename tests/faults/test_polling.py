"""A polling client whose response was lost must not continue as if nothing had happened."""

import asyncio
import json
from urllib.parse import urlsplit

import httpx
import pytest

from app.database.connections import Connection
from app.feed.log import Page
from app.live.broadcast import Broadcast
from app.live.subscriber import CloseReason
from tests.support.server import RunningServer
from tests.support.sockets import App, PollingClient, waiting_poll
from tests.support.writing import insert

TIMEOUT_S = 10


async def open_session(http: httpx.AsyncClient) -> str:
    """Open a polling session, join, and read the first response; return the session's path."""
    answer = await http.get("/socket.io/?EIO=4&transport=polling&t=0")
    path = f"/socket.io/?EIO=4&transport=polling&sid={json.loads(answer.text[1:])['sid']}"
    await http.post(path, content="40")
    assert "feed:hello" in (await http.get(f"{path}&t=1")).text
    return path


async def test_a_poll_that_comes_twice_ends_the_session(server: RunningServer) -> None:
    """An HTTP client repeats a GET by itself, because its connection broke during the response."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        path = await open_session(http)
        await http.post("/api/things", json={"name": "one"})
        assert "thing:create" in (await http.get(f"{path}&t=2")).text
        assert (await http.get(f"{path}&t=2")).status_code == 400
        assert (await http.get(f"{path}&t=3")).status_code == 400


async def test_a_second_concurrent_poll_ends_the_session(server: RunningServer) -> None:
    """A client polls again while the server still holds a poll that the client has given up on."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        path = await open_session(http)
        polls = [http.get(f"{path}&t={number}") for number in (2, 3)]
        first, second = sorted(await asyncio.gather(*polls), key=lambda answer: answer.status_code)
        assert first.text == "1"  # Engine.IO: close
        assert second.status_code == 400


async def test_a_poll_whose_connection_ends_ends_the_session(server: RunningServer) -> None:
    """A client disconnects while it waits for the response to its poll."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        path = await open_session(http)
        address = urlsplit(server.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"GET {path}&t=2 HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        await writer.drain()
        writer.close()
        async with asyncio.timeout(TIMEOUT_S):
            while (await http.post(path, content="3")).status_code == 200:
                await asyncio.sleep(0.05)


async def test_the_end_of_a_session_comes_without_events(
    app: App, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session is closed just as it is written to, while its client waits in a poll.

    socket.io-client notes the offset of an event a moment after it has it. Events in one answer
    with the end would be noted after the next connect, and come twice.
    """
    publish = Broadcast.publish

    def publish_and_close(self: Broadcast, page: Page) -> None:
        publish(self, page)
        self.close_all(CloseReason.SERVER_STOPS)

    async with httpx.AsyncClient(base_url=app.url, timeout=TIMEOUT_S) as http:
        client = PollingClient(http)
        await client.open()
        await client.post("40")
        await client.poll()
        poll = await waiting_poll(client)
        monkeypatch.setattr(Broadcast, "publish", publish_and_close)
        await insert(connection, "one")
        answer = await poll
        assert answer.status_code == 400 and "thing" not in answer.text
        assert (await http.get(client.address)).status_code == 400
