"""Puts everything together: the routes, and the lifespan that opens and closes every resource."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from app.cors import CrossOrigin, Preflights
from app.database.connections import (
    Pool,
    create_pool,
    create_reading_pool,
    create_subscription_pool,
)
from app.feed.feed import Feed
from app.feed.inspection import Inspection
from app.feed.retention import Retention
from app.forwarded import Origins, TrustedProxies
from app.hosts import Hosts
from app.live.broadcast import Broadcast, BroadcastLimits
from app.live.catalogue import Catalogue
from app.live.lists import Lists
from app.live.replay import JUDGED_AT_ONCE, READS_AT_ONCE, Replay
from app.live.snapshot import Snapshots
from app.rest import about, health, openapi, problems, things, topics
from app.rest.compression import Compression
from app.rest.host_check import HostCheck
from app.settings import Settings
from app.socketio.server import SocketIO

logger = logging.getLogger("tablecast")

ROOT = Path(__file__).parent.parent
CLIENT_FILES = ROOT / "node_modules" / "socket.io-client" / "dist"
CANCEL_AGAIN_S = 0.5
# How many snapshots are read, subscriptions are bound to their tables, and lists are read for REST,
# at once.
SNAPSHOTS_AT_ONCE = 3
BOUND_AT_ONCE = 2
LISTS_AT_ONCE = 2
# A subscription that receives nothing is sent its offset after QUIET_S at the latest, and well
# before the log has been replaced: after 1/QUIET_SHARE of the time and of the changes it keeps.
QUIET_S = 30.0
QUIET_SHARE = 4
SOCKET_PATHS = ("/socket.io-client/", "/socket.io/")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def socket_paths(prefix: str) -> tuple[str, ...]:
    """Return Socket.IO's paths: as they are, and under the prefix in case no proxy strips it."""
    return (*SOCKET_PATHS, *(prefix + path for path in SOCKET_PATHS if prefix))


class State(TypedDict):
    """What the lifespan opens: available to every request, and to the server."""

    pool: Pool
    feed: Feed
    retention: Retention
    inspection: Inspection
    replay: Replay
    catalogue: Catalogue
    snapshots: Snapshots
    lists: Lists
    broadcast: Broadcast
    socketio: SocketIO


class PageFiles(StaticFiles):
    """Static files with headers that say what a browser may do with them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


class SocketPath:
    """A Socket.IO path: the server itself, and under it the official client's files."""

    def __init__(self) -> None:
        self._files = StaticFiles(directory=CLIENT_FILES, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == scope["root_path"] + "/":
            state: State = scope["state"]
            await state["socketio"].handle_request(scope, receive, send)
        elif scope["type"] == "http":
            await self._files(scope, receive, send)
        else:
            await send({"type": "websocket.close"})


class UnderPrefix:
    """Serves an application under a path prefix, whether or not the proxy strips it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == self._prefix:
            await self._redirect(scope, receive, send)  # the page's URLs are relative
        else:
            path: str = scope["path"]
            if not path.startswith(self._prefix + "/"):
                path = self._prefix + path
            await self._app({**scope, "root_path": self._prefix, "path": path}, receive, send)

    async def _redirect(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        response = Response(None, 308, {"Location": f"{self._prefix}/{query}"})
        await response(scope, receive, send)


def limits(settings: Settings) -> BroadcastLimits:
    """Return what a client may leave unread, and when one that receives nothing is sent its offset:
    long before the changes after its last offset are pruned.
    """
    return BroadcastLimits(
        settings.client_buffer,
        settings.client_stall,
        min(QUIET_S, settings.feed_retention / QUIET_SHARE),
        max(1, settings.feed_max_changes // QUIET_SHARE),
    )


@asynccontextmanager
async def lifespan(
    settings: Settings, origins: Origins, failed: Callable[[], None], _: Starlette
) -> AsyncIterator[State]:
    """Open everything the application needs, and close it in reverse."""
    assert settings.database_url is not None
    pool = await create_pool(settings)
    reading_pool = await create_reading_pool(settings, READS_AT_ONCE + JUDGED_AT_ONCE)
    subscription_pool = await create_subscription_pool(
        settings, SNAPSHOTS_AT_ONCE + BOUND_AT_ONCE + LISTS_AT_ONCE
    )
    try:
        feed = Feed(settings.database_url, settings.max_event_bytes)
        replay = Replay(feed, reading_pool)
        catalogue = Catalogue(subscription_pool, BOUND_AT_ONCE)
        snapshots = Snapshots(feed, subscription_pool, SNAPSHOTS_AT_ONCE, settings.snapshot_bytes)
        lists = Lists(feed, catalogue, subscription_pool, LISTS_AT_ONCE, settings.snapshot_bytes)
        broadcast = Broadcast(feed, replay, catalogue, snapshots, limits(settings))
        retention = Retention(feed, pool, settings.feed_retention, settings.feed_max_changes)
        inspection = Inspection(feed, pool)
        socketio = SocketIO(
            broadcast,
            ping_interval=settings.ping_interval,
            ping_timeout=settings.ping_timeout,
            origins=origins,
            max_clients=settings.max_clients,
        )
        tasks = [
            asyncio.create_task(feed.run(broadcast), name="feed"),
            asyncio.create_task(retention.run(), name="retention"),
            asyncio.create_task(inspection.run(), name="inspection"),
        ]
        for task in tasks:
            task.add_done_callback(partial(report_end, failed))
        try:
            yield State(
                pool=pool,
                feed=feed,
                retention=retention,
                inspection=inspection,
                replay=replay,
                catalogue=catalogue,
                snapshots=snapshots,
                lists=lists,
                broadcast=broadcast,
                socketio=socketio,
            )
        finally:
            socketio.close()
            await end(tasks)
    finally:
        for each in (pool, reading_pool, subscription_pool):
            each.terminate()  # nobody is waiting for pending queries


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended. Once is not enough: in Python 3.11, `asyncio.wait_for`
    swallows a cancellation that arrives together with its result.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


def report_end(failed: Callable[[], None], task: asyncio.Task[None]) -> None:
    """Log why a background task ended, and stop the process."""
    if not task.cancelled():
        logger.critical("the task %s has failed", task.get_name(), exc_info=task.exception())
        failed()


def stop_process() -> None:
    """End the process as its supervisor would."""
    os.kill(os.getpid(), signal.SIGTERM)


def create_app(settings: Settings, failed: Callable[[], None] = stop_process) -> ASGIApp:
    """Return the ASGI application. `settings.database_url` must name a migrated database.

    `failed` is called when a task that must never end has failed. It must end the process, so that
    a supervisor restarts it; clients continue where they were.
    """
    if not CLIENT_FILES.is_dir():
        logger.warning("%s is not there: pages cannot load the Socket.IO client", CLIENT_FILES)
    routes: list[BaseRoute] = [
        *(things.routes if settings.things else things.routes_without_things),
        *topics.routes,
        openapi.route(settings.things),
        *health.routes,
        *about.routes(settings),
        *(Mount(path.rstrip("/"), app=SocketPath()) for path in SOCKET_PATHS),
        Mount("/", app=PageFiles(directory=ROOT / "static", html=True)),
    ]
    hosts = Hosts(settings.allowed_hosts, settings.host)
    origins = Origins(settings.allowed_origins, TrustedProxies(settings.trusted_proxies))
    app: ASGIApp = Starlette(
        routes=routes,
        middleware=[Middleware(Compression)],
        exception_handlers=problems.exception_handlers,
        lifespan=partial(lifespan, settings, origins, failed),
    )
    app = Preflights(app, origins)
    if settings.root_path:
        app = UnderPrefix(app, settings.root_path)
    return CrossOrigin(HostCheck(app, hosts), origins)
