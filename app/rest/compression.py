"""Compresses responses where it pays: text of some length, for clients that accept gzip.

Streams and Socket.IO's own answers have none of the types that are compressed here.
"""

import asyncio
import posixpath
import re
import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TYPES = frozenset(
    {
        "application/json",
        "application/javascript",
        "text/javascript",
        "text/css",
        "text/html",
        "image/svg+xml",
    }
)
SHORTEST_BYTES = 1024
# Longer bodies are compressed in a thread, two at a time, so that the event loop goes on. While
# MOST_WAITING are under way, further lists are sent as they are: waiting, they would only take up
# memory.
AT_ONCE_BYTES = 32 * 1024
THREADS = 2
MOST_WAITING = 4
# Files do not change: they are compressed well, once. A list is different each time.
LIST_LEVEL, FILE_LEVEL = 1, 9
FILES = 64
GZIP_WINDOW_BITS = 31


class Compression:
    """Middleware around an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._files: dict[tuple[str, str], asyncio.Task[bytes]] = {}
        self._threads = asyncio.Semaphore(THREADS)
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            send = CompressedSend(self, scope, send)
        await self._app(scope, receive, send)

    async def list(self, body: bytes) -> bytes | None:
        """Return a list, compressed; None if too much else is being compressed."""
        if self._waiting >= MOST_WAITING:
            return None
        return await self._compress(body, LIST_LEVEL)

    async def file(self, path: str, etag: str, body: bytes) -> bytes:
        """Return a file, compressed: once for all who ask for it."""
        key = posixpath.normpath(path), etag
        found = self._files.get(key)
        if found is None or (found.done() and (found.cancelled() or found.exception())):
            if len(self._files) == FILES:
                del self._files[next(iter(self._files))]
            found = self._files[key] = asyncio.create_task(self._compress(body, FILE_LEVEL))
        return await asyncio.shield(found)

    async def _compress(self, body: bytes, level: int) -> bytes:
        if len(body) <= AT_ONCE_BYTES:
            return gzip(body, level)
        self._waiting += 1
        try:
            async with self._threads:
                return await asyncio.to_thread(gzip, body, level)
        finally:
            self._waiting -= 1


class CompressedSend:
    """Sends one response. One that will be compressed is held back until it is complete."""

    def __init__(self, compression: Compression, scope: Scope, send: Send) -> None:
        self._compression = compression
        self._scope = scope
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._begin(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._end(self._start)

    def _begin(self, start: Message) -> bool:
        """Add `Vary` if a response depends on Accept-Encoding; return whether to compress it."""
        status = start["status"]
        if status != 304 and length(start) < SHORTEST_BYTES:
            return False
        headers = MutableHeaders(raw=start["headers"])
        media_type = headers.get("content-type", "").partition(";")[0]
        if status != 304 and (media_type not in TYPES or "content-encoding" in headers):
            return False
        headers.add_vary_header("Accept-Encoding")
        asked = Headers(scope=self._scope)
        return status == 200 and "range" not in asked and accepts_gzip(asked)

    async def _end(self, start: Message) -> None:
        """Send the response, compressed."""
        headers = MutableHeaders(raw=start["headers"])
        etag, body = headers.get("etag"), bytes(self._body)
        self._body.clear()
        packed: bytes | None = b""
        if body and etag is not None:
            packed = await self._compression.file(self._scope["path"], etag, body)
        elif body:
            packed = await self._compression.list(body)
        if packed is not None:
            body = packed
            headers["content-encoding"] = "gzip"
            headers["content-length"] = str(len(body))
            if etag is not None:
                # The same file, but not the same bytes. Ranges of the two must not be combined,
                # which is what a weak tag says.
                headers["etag"] = f"W/{etag.removeprefix('W/')}"
            if not body:  # a HEAD request for a file
                del headers["content-length"]
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def length(start: Message) -> int:
    """Return the Content-Length of a response; 0 if it has none."""
    return next((int(value) for name, value in start["headers"] if name == b"content-length"), 0)


def accepts_gzip(asked: Headers) -> bool:
    """Return whether a request accepts gzip (RFC 9110, section 12.5.3)."""
    weights: dict[str, str] = {}
    for part in ",".join(asked.getlist("accept-encoding")).lower().split(","):
        coding, _, weight = re.sub(r"\s", "", part).partition(";q=")
        weights[coding] = weight or "1"
    return re.fullmatch("0[.0]*", weights.get("gzip", weights.get("*", "0"))) is None


def gzip(body: bytes, level: int) -> bytes:
    """Compress a body. Releases the GIL."""
    compressor = zlib.compressobj(level, wbits=GZIP_WINDOW_BITS)
    return compressor.compress(body) + compressor.flush()
