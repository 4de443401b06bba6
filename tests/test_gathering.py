"""Head and body of a response are sent at once."""

import asyncio
from typing import Any

from app.doorway.gathering import Gathering
from tests.support.sockets import PATH, QUERY, App


class Recording(asyncio.Transport):
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def write(self, data: Any) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("close")

    def is_closing(self) -> bool:
        return "close" in self.done

    def get_write_buffer_size(self) -> int:
        return 7


async def test_what_is_written_in_one_turn_is_sent_at_once() -> None:
    """A server writes a head and a body, then another response, and closes."""
    below = Recording()
    gathering = Gathering(below)
    gathering.write(b"head ")
    gathering.write(b"body")
    assert below.done == []
    await asyncio.sleep(0)
    assert below.done == [b"head body"]
    gathering.write(b"last")
    gathering.close()
    await asyncio.sleep(0)
    assert below.done == [b"head body", b"last", "close"]
    assert gathering.get_write_buffer_size() == 7


async def test_a_client_gets_a_response_whole(app: App) -> None:
    """A client reads the answer to a poll: its first bytes are all of it."""
    host, _, port = app.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in range(20):
        writer.write(f"GET {PATH}{QUERY}polling HTTP/1.1\r\nHost: ours\r\n\r\n".encode())
        head, _, body = (await reader.read(65536)).partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower() and body
    writer.close()
