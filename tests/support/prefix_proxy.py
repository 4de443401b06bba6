"""A reverse proxy that shows a server under a path prefix, as `location /app/` in nginx does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

HEAD_BYTES = 64 * 1024


@asynccontextmanager
async def under_prefix(
    url: str, prefix: str, host: str | None = None
) -> AsyncIterator[tuple[str, list[str]]]:
    """Yield the address under which the server at `url` is seen, and the request lines so far.

    `host`: what the server is told as Host, as by a proxy that does not pass the browser's on.
    """
    parts = urlsplit(url)
    requests: list[str] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(HEAD_BYTES):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # when one side ends, so does the other
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return
        requests.append(head.partition("\r\n")[0])
        method, _, target = head.partition(" ")
        if not target.startswith(prefix):
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            writer.close()
            return
        head = rewritten(f"{method} /{target.removeprefix(prefix)}", host)
        server_reader, server_writer = await asyncio.open_connection(parts.hostname, parts.port)
        server_writer.write(head.encode("latin-1"))
        await asyncio.gather(carry(reader, server_writer), carry(server_reader, writer))

    listening = await asyncio.start_server(accept, "127.0.0.1", 0, limit=HEAD_BYTES)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}{prefix}", requests
    finally:
        listening.close()


def rewritten(head: str, host: str | None) -> str:
    """A request's head with one request a connection, unless it upgrades, and another Host."""
    lines = head.removesuffix("\r\n\r\n").split("\r\n")
    names = [line.partition(":")[0].lower() for line in lines]
    if "upgrade" not in names:
        lines = [line for line, name in zip(lines, names, strict=True) if name != "connection"]
        lines.append("Connection: close")
    if host is not None:
        lines = [f"Host: {host}" if line.lower().startswith("host:") else line for line in lines]
    return "\r\n".join([*lines, "", ""])
