"""The HTTP server: uvicorn. The one module that relies on what uvicorn does not document.

A plain upgrade on a Socket.IO path never reaches uvicorn: the connection itself becomes the
session. Everything else takes the ordinary way, so the application works on any ASGI server.
"""

import asyncio
import gc
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.application import SOCKET_PATHS, create_app
from app.database.connections import Refusal
from app.settings import Settings
from app.socketio import codec
from app.socketio.handshake import EngineRequest, RequestRefused, parse_upgrade
from app.socketio.session import INBOUND_BYTES

BACKLOG = 4096
GRACE_S = 1
# What an upgrade begins with. One whose headers do not fit into this is left to uvicorn.
OPENINGS = tuple(f"GET {path}".encode() for path in SOCKET_PATHS)
HEAD_BYTES = 16 * 1024
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Doorway(asyncio.Protocol):
    """Reads the head of a connection's first request and hands the connection to the Socket.IO
    server or to uvicorn, with every byte read so far.
    """

    __slots__ = ("_arguments", "_head", "_transport")

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments  # what uvicorn makes its own protocol with
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._arguments["server_state"].connections.add(self)

    def data_received(self, data: bytes) -> None:
        head = self._head = self._head + data
        if (
            not (head.startswith(OPENINGS) or could_be_an_opening(head))
            or len(head) > HEAD_BYTES
            or b"\n\n" in head  # not HTTP, but uvicorn has an answer to it
        ):
            self._pass_on(head)
        elif b"\r\n\r\n" in head:
            request = parse_upgrade(head, SOCKET_PATHS)
            if request is None:
                self._pass_on(head)
            else:
                self._accept(request)

    def _accept(self, request: EngineRequest) -> None:
        self._leave()
        try:
            self._arguments["app_state"]["socketio"].accept(self._transport, request)
        except RequestRefused as refused:
            self._transport.write(refused.as_http())
            self._transport.close()

    def _pass_on(self, head: bytes) -> None:
        self._leave()
        protocol = HttpToolsProtocol(**self._arguments)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(head)

    def connection_lost(self, _: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """uvicorn is shutting down; no request is pending."""
        self._transport.close()

    def _leave(self) -> None:
        self._arguments["server_state"].connections.discard(self)


def could_be_an_opening(head: bytes) -> bool:
    """Whether the few bytes of a request so far may become one on a Socket.IO path."""
    return any(opening.startswith(head) for opening in OPENINGS)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Answers 400 to what is not a WebSocket handshake (a request with a body, say); uvicorn would
    not answer.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.write(BAD_REQUEST)
            self.transport.close()


class HttpServer(uvicorn.Server):
    """Announces when it is ready. Disconnects clients before it shuts down on SIGINT or SIGTERM."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = started
        self._settling: asyncio.Task[None] | None = None
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()
            self._settling = asyncio.create_task(settle())

    def stop(self) -> None:
        """Stop, within about a second; asking twice does not make it faster."""
        self.should_exit = True

    def fail(self) -> None:
        """Stop because of an error that has been logged."""
        self.failed = self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifespan.state["socketio"].close()
        if self._settling is not None:
            await self._settling
        await super().shutdown(sockets)


async def settle() -> None:
    """Do the work the first responses need not wait for."""
    await asyncio.to_thread(codec.libraries)
    # Objects alive now live forever; freeze them, or each full collection pauses every client for
    # 50 ms.
    gc.collect()
    gc.freeze()


def configure(app: Any) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=Doorway,
        ws=WebSocketProtocol,
        ws_max_size=INBOUND_BYTES,
        ws_ping_interval=None,  # Engine.IO has its own
        ws_per_message_deflate=False,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_S,
    )


def allow_many_clients() -> None:
    """Raise the limit on open files to the maximum: each client needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS may report a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError if the address is unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


async def serve(settings: Settings, started: Callable[[str], None]) -> None:
    """Serve until a signal says stop. `started` is called with the address once requests are
    answered.

    Raises OSError if the address is unavailable, and Refusal if the server stopped because of an
    internal error.
    """
    allow_many_clients()
    with listen(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        app = create_app(settings, lambda: server.fail())
        server = HttpServer(configure(app), lambda: started(address))
        await server.serve(sockets=[listening])
        if server.failed:
            raise Refusal("The server stopped because of an internal error; see its log.")
