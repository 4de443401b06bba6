"""Compresses responses where it pays: text of some length, for clients that accept gzip.

What is streamed, and Socket.IO's own answers, is of no type that is compressed here.
"""

import asyncio
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
# More is compressed in a thread, two at a time, so that the event loop goes on.
AT_ONCE_BYTES = 32 * 1024
THREADS = 2
# Files do not change: they are compressed well, once. A list is different each time.
LIST_LEVEL, FILE_LEVEL = 1, 9
FILES = 64
GZIP_WINDOW_BITS = 31


class Compression:
    """Middleware around an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._files: dict[tuple[str, str], bytes] = {}
        self._threads = asyncio.Semaphore(THREADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            send = CompressedSend(self, scope, send)
        await self._app(scope, receive, send)

    async def compress(self, body: bytes, path: str, etag: str | None) -> bytes:
        """Return a body, compressed; that of a file is kept."""
        if etag is None:
            return await self._compress(body, LIST_LEVEL)
        found = self._files.get((path, etag))
        if found is None:
            found = await self._compress(body, FILE_LEVEL)
            if len(self._files) == FILES:
                del self._files[next(iter(self._files))]
            self._files[path, etag] = found
        return found

    async def _compress(self, body: bytes, level: int) -> bytes:
        if len(body) <= AT_ONCE_BYTES:
            return gzip(body, level)
        async with self._threads:
            return await asyncio.to_thread(gzip, body, level)


class CompressedSend:
    """Sends one response: it is held back until it is complete, if it is to be compressed."""

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
        """Say in a response that it depends on what is accepted; return whether to compress it."""
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
        etag = headers.get("etag")
        headers["content-encoding"] = "gzip"
        if etag is not None:
            # The same file, but not the same bytes. A request for a range of the whole file must
            # not be continued with these, which is what a weak tag says.
            headers["etag"] = f"W/{etag.removeprefix('W/')}"
        if self._scope["method"] == "HEAD" and not self._body:
            del headers["content-length"]
            body = b""
        else:
            body = await self._compression.compress(bytes(self._body), self._scope["path"], etag)
            headers["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def length(start: Message) -> int:
    """Return the length that a response states; 0 if it does not."""
    return next((int(value) for name, value in start["headers"] if name == b"content-length"), 0)


def accepts_gzip(asked: Headers) -> bool:
    """Return whether a request accepts gzip (RFC 9110, section 12.5.3)."""
    weights: dict[str, str] = {}
    for part in ",".join(asked.getlist("accept-encoding")).lower().split(","):
        coding, _, weight = re.sub(r"\s", "", part).partition(";q=")
        weights[coding] = weight or "1"
    return re.fullmatch("0[.0]*", weights.get("gzip", weights.get("*", "0"))) is None


def gzip(body: bytes, level: int) -> bytes:
    """Compress. Releases the GIL."""
    compressor = zlib.compressobj(level, wbits=GZIP_WINDOW_BITS)
    return compressor.compress(body) + compressor.flush()
