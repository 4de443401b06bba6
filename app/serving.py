"""The HTTP server: uvicorn, behind our own doorway (app/doorway/).

A WebSocket never reaches uvicorn: the connection itself becomes the session. Everything else goes
through ASGI as usual, and the application also works on any other ASGI server.
"""

import asyncio
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from app.application import create_app, socket_paths
from app.database.connections import Refusal
from app.doorway.arrival import Doorway
from app.doorway.limits import extra_connections
from app.hosts import Hosts
from app.settings import Settings
from app.socketio import codec

logger = logging.getLogger("tablecast")

BACKLOG = 4096
# What the kernel accepts for a connection and has not sent yet. Without a limit it takes megabytes,
# and a slow client's pings, and whatever is urgent, would wait behind them.
UNSENT_BYTES = 128 * 1024
# How long a stopping server waits for pending requests, and uvicorn for the rest.
REQUESTS_S = 0.7
CUT_S = 0.05  # for handlers to notice that their clients have disconnected
GRACE_S = 1
# Files the process opens besides connections: database connections of the feed, the replays and the
# subscriptions, listening sockets, logs, static files, Python's own.
OTHER_FILES = 64
UNLIMITED_FILES = 1024 * 1024


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
        """Stop within about a second; calling it twice does not make that faster."""
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
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_requests(self) -> None:
        """Cut off requests that are pending after REQUESTS_S, before uvicorn does and complains."""
        await asyncio.sleep(REQUESTS_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(CUT_S)
        for task in list(self.server_state.tasks):
            task.cancel()


class Cancellable:
    """Wraps the application: a request cancelled by the shutdown ends without a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] == "lifespan":
                raise
            logger.info("a request was cancelled: the server stops")


async def settle() -> None:
    """Do the work that the first responses need not wait for."""
    await asyncio.to_thread(codec.libraries)
    # Objects alive now live forever; freeze them, or each full collection pauses every client for
    # 50 ms.
    gc.collect()
    gc.freeze()


def configure(app: Any, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for the application."""
    hosts = Hosts(settings.allowed_hosts, settings.host)
    most = settings.max_clients or most_clients(settings)
    door = Doorway(hosts, most, socket_paths(settings.root_path))
    return uvicorn.Config(
        Cancellable(app),
        http=cast(Any, door),  # uvicorn expects a class, and calls it
        ws="none",  # the doorway handles upgrades
        lifespan="on",
        proxy_headers=False,  # app/forwarded.py reads them
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


def most_clients(settings: Settings) -> int:
    """Return how many clients the limit on open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        files = UNLIMITED_FILES
    room = files - OTHER_FILES - settings.pool_size
    return max(1, room - extra_connections(room))


def with_limit(settings: Settings) -> Settings:
    """Return the settings with `max_clients` filled in. Raises Refusal if it is too large."""
    most = most_clients(settings)
    if settings.max_clients is not None and settings.max_clients > most:
        raise Refusal(
            f"MAX_CLIENTS is {settings.max_clients}, but the limit on open files leaves room for"
            f" {most}: choose a smaller number, or raise the limit (ulimit -n)."
        )
    return replace(settings, max_clients=settings.max_clients or most)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError if the address is unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return listening


async def serve(settings: Settings, started: Callable[[str], None]) -> None:
    """Serve until a signal says to stop. `started` is called with the address once the server
    accepts requests.

    Raises OSError if the address is unavailable, and Refusal if the server stopped because of an
    internal error.
    """
    allow_many_clients()
    settings = with_limit(settings)
    with listen(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        settings = replace(settings, host=host)
        app = create_app(settings, lambda: server.fail())
        server = HttpServer(configure(app, settings), lambda: started(address))
        await server.serve(sockets=[listening])
        if server.failed:
            raise Refusal("The server stopped because of an internal error; see its log.")
