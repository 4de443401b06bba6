"""A TCP proxy between two parties that can simulate a bad network."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit

PIECE_BYTES = 64 * 1024


class Proxy:
    """Carries bytes to and from `host:port` until stopped.

    `forth` is the direction from the client to the target, `back` the opposite one. `source`: the
    address of this machine that the target sees.
    """

    def __init__(self, host: str, port: int, source: str | None = None) -> None:
        self.target = host, port
        self._source = (source, 0) if source else None
        self._forth, self._back = asyncio.Event(), asyncio.Event()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self.port = 0
        self.accepted = 0  # connections so far
        self._last = b""  # what to hold everything after
        self.pass_on()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._connections)
        self.cut()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    def __len__(self) -> int:
        """The number of open connections."""
        return len(self._connections)

    def pass_on(self) -> None:
        """Carry everything, including what was held."""
        self._forth.set()
        self._back.set()

    def hold(self, *, forth: bool = True, back: bool = True) -> None:
        """Become a black hole, in one direction or in both: nothing gets through, not even a close.
        New connections are accepted but get no answer.
        """
        for way, held in ((self._forth, forth), (self._back, back)):
            if held:
                way.clear()
            else:
                way.set()

    def hold_after(self, text: bytes) -> None:
        """Hold everything that follows the first piece with this text that comes back."""
        self._last = text

    def cut(self) -> None:
        """Reset every open connection; new ones are carried as before."""
        for task, writers in list(self._connections.items()):
            for writer in writers:
                writer.transport.abort()
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        writers = self._connections[task] = [writer]
        try:
            await self._forth.wait()
            target_reader, target_writer = await asyncio.open_connection(
                *self.target, local_addr=self._source
            )
            writers.append(target_writer)
            ways = [
                asyncio.create_task(self._carry(reader, target_writer, self._forth)),
                asyncio.create_task(self._carry(target_reader, writer, self._back)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # cut, or the target does not listen
        finally:
            for each in writers:
                each.close()  # sends what was already read
            del self._connections[task]

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event
    ) -> None:
        try:
            while piece := await reader.read(PIECE_BYTES):
                await way.wait()
                writer.write(piece)
                if way is self._back and self._last and self._last in piece:
                    self._last = b""
                    self.hold()
                await writer.drain()
        except OSError:
            pass  # when one side ends, so does the other
        await way.wait()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Yield a proxy in front of the server at `url`, and the URL that leads through it."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    async with Proxy(parts.hostname, parts.port) as proxy:
        credentials, at, _ = parts.netloc.rpartition("@")
        netloc = f"{credentials}{at}127.0.0.1:{proxy.port}"
        yield proxy, urlunsplit(parts._replace(netloc=netloc))
