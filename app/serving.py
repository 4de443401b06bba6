"""The HTTP server: uvicorn, lending the application its WebSocket transports."""

import asyncio
import gc
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.application import create_app
from app.database.connections import Refusal
from app.settings import Settings
from app.socketio.server import INBOUND_BYTES
from app.socketio.session import LENT_TRANSPORT

BACKLOG = 4096
GRACE_S = 1
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Lends itself to the application, which so can write frames that are encoded once for all
    clients, see how much of them a client has not taken, and wait until it has.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # What is no handshake at all (a request with a body, say) uvicorn would leave unanswered.
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.write(BAD_REQUEST)
            self.transport.close()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"][LENT_TRANSPORT] = self  # type: ignore[assignment]

    def write_frames(self, frames: bytes) -> None:
        """Write whole frames; nothing once the connection is closing."""
        if self.handshake_complete and not (self.close_sent or self.transport.is_closing()):
            self.transport.write(frames)

    def unsent_bytes(self) -> int:
        """What the client has not taken."""
        return self.transport.get_write_buffer_size()

    async def drained(self) -> None:
        """Wait until little is left unsent; at once where the connection is lost."""
        await self.writable.wait()

    def forget_handshake(self) -> None:
        """Let go of the request and the response: nobody asks for them again."""
        del self.request, self.response

    def abort(self) -> None:
        """Close without sending what is left."""
        self.transport.abort()


class Server(uvicorn.Server):
    """Says when it is there; stops at SIGINT and SIGTERM, and then lets the clients go first."""

    def __init__(self, config: uvicorn.Config, app: Starlette, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._started = started
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # What is there now stays; a collection that walked it would stop everybody for 50 ms.
            gc.collect()
            gc.freeze()
            self._started()

    def fail(self) -> None:
        """Stop, for a reason that the log tells."""
        self.failed = self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.sockets.close()
        await super().shutdown(sockets)


def allow_many_clients() -> None:
    """Every client takes a file descriptor: take as many as the system gives."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS may show more than it gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


async def serve(settings: Settings, started: Callable[[str], None]) -> None:
    """Serve until a signal says stop. `started` is told the address once requests are answered.

    Raises OSError if the address is taken or cannot be had, and Refusal if the server stopped
    because something in it has failed.
    """
    allow_many_clients()
    app = create_app(settings, lambda: server.fail())
    config = uvicorn.Config(
        app,
        http="httptools",
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
    with listen(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server = Server(config, app, lambda: started(address))
        await server.serve(sockets=[listening])
        if server.failed:
            raise Refusal(
                "The server has stopped because of an internal error; the log says which."
            )
