"""A polling client whose answer was lost on the way must not go on as if nothing had happened."""

import asyncio
import json
from urllib.parse import urlsplit

import httpx
from engineio.packet import CLOSE

from app.database.connections import create_pool
from app.live.broadcast import Broadcast
from app.settings import Settings
from app.socketio.frames import Frames
from app.socketio.server import Server
from app.socketio.session import Connection
from tests.support.server import RunningServer

TIMEOUT_S = 10


async def open_session(http: httpx.AsyncClient) -> str:
    """Open a polling session, join, and take what comes at once; returns its path."""
    answer = await http.get("/socket.io/?EIO=4&transport=polling&t=0")
    path = f"/socket.io/?EIO=4&transport=polling&sid={json.loads(answer.text[1:])['sid']}"
    await http.post(path, content="40")
    assert "feed:hello" in (await http.get(f"{path}&t=1")).text
    return path


async def test_a_poll_that_comes_twice_ends_the_session(server: RunningServer) -> None:
    """An HTTP client repeats a GET by itself, because its connection broke under the answer."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        path = await open_session(http)
        await http.post("/api/things", json={"name": "one"})
        assert "thing:create" in (await http.get(f"{path}&t=2")).text
        assert (await http.get(f"{path}&t=2")).status_code == 400
        assert (await http.get(f"{path}&t=3")).status_code == 400


async def test_a_poll_beside_another_ends_the_session(server: RunningServer) -> None:
    """A client polls anew while the server still holds a poll of which the client gave up hope."""
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
        path = await open_session(http)
        polls = [http.get(f"{path}&t={number}") for number in (2, 3)]
        first, second = sorted(await asyncio.gather(*polls), key=lambda answer: answer.status_code)
        assert first.text == "1"  # Engine.IO: close
        assert second.status_code == 400


async def test_a_poll_whose_connection_ends_ends_the_session(server: RunningServer) -> None:
    """A client hangs up while it waits for the answer to its poll."""
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


async def test_the_end_of_a_session_comes_without_events() -> None:
    """A session is cut in the very moment it was written to, while its client waits in a poll.

    socket.io-client keeps events that come together with the end until it is back, and would
    have them twice.
    """
    settings = Settings(database_url="postgresql://nowhere")
    broadcast = Broadcast(await create_pool(settings), 1, 1)
    server = Server(broadcast, ping_interval=1, ping_timeout=1, allowed_origins=())
    connection = Connection(server, "sid")
    polled = asyncio.create_task(connection.poll())
    connection.write(Frames(["2one", "2two"]))
    connection.cut("a test")
    assert [packet.data for packet in await polled] == ["2one", "2two"]
    assert [packet.packet_type for packet in await connection.poll()] == [CLOSE]
