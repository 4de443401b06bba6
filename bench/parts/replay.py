"""The cost of a replay's pages in a short and in a long backlog, and how replays delay each other.

CHANGES in the environment sets the length of the backlog; another transaction leaves half as many
rows uncommitted.
"""

import asyncio
import json
import os
import statistics
import time
from contextlib import AsyncExitStack

import asyncpg
from websockets.asyncio.client import connect as open_websocket

from app.database.connections import READER
from app.database.embedded import ADDRESS
from app.feed import log
from app.feed.feed import Feed
from app.feed.health import Outage
from app.feed.log import Page
from app.feed.offset import Epoch, Offset, Position
from bench.lab import Figure, Lab
from bench.servers import running

CHANGES = int(os.environ.get("CHANGES", "10_000_000"))
SHORT = 20_000
ROWS = 33  # of a transaction
WRITERS = 4
PAGES = 30
PAGE_ROWS = 5_000  # the unit of the figures
OLD_CLIENTS = 6
MISSED = 50
MOST_TIMES = 2.0
MOST_DELAY_S = 1.0

BEGUN_BYTES = 100_000
PATH = "/socket.io-client/?EIO=4&transport=websocket"
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)

TABLE = f"""
    CREATE TABLE replayed (id bigint PRIMARY KEY, n bigint NOT NULL DEFAULT 0, note text NOT NULL);
    INSERT INTO replayed SELECT i, 0, 'some words about it'
    FROM generate_series(1, {WRITERS * ROWS * 8}) AS i;
    SELECT feed.watch('replayed', 'replayed');
"""
UPDATE = f"UPDATE replayed SET n = n + 1 WHERE id > $1::bigint AND id <= $1::bigint + {ROWS}"
BULK = "INSERT INTO things (name) SELECT i FROM generate_series(1, $1::int) AS i"


async def run(lab: Lab) -> list[Figure]:
    """Times of pages in a short backlog and in a long one, and the delay that old clients cause."""
    [ours] = [peer for peer in lab.peers if peer.name == "ours"]
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(lab.postgres.clone("ours", "stage_replay"))
        url = lab.postgres.url(database)
        async with lab.postgres.connect(database) as connection:
            await connection.execute(TABLE)
        reader = await asyncpg.connect(url, server_settings=READER)
        stack.push_async_callback(reader.close)
        epoch, since = await log.current_epoch(reader), Offset(await log.current_position(reader))
        await fill(url, SHORT)
        short_page = await page_ms(reader, since)
        short_feed = await feed_ms(url, epoch, since)
        await fill(url, CHANGES - SHORT)
        bulk = await asyncpg.connect(url)
        stack.callback(bulk.terminate)
        await bulk.execute("BEGIN")
        await bulk.execute(BULK, CHANGES // 2, timeout=900)
        long_page = await page_ms(reader, since)
        long_feed = await feed_ms(url, epoch, since)
        # Uncommitted changes have numbers, too.
        keep = str(2 * CHANGES)
        server = await stack.enter_async_context(
            running(ours, lab.postgres, database, FEED_MAX_CHANGES=keep)
        )
        recent = Offset(await log.current_position(reader))
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as writer:
            for _ in range(MISSED // ROWS + 1):
                await writer.execute(UPDATE, 0)
        alone = await resumed_after(server.port, epoch, recent)
        delay = await resumed_next_to_old_clients(server.port, epoch, since, recent) - alone
    name = f"a backlog of {CHANGES:,} in {CHANGES // ROWS:,} transactions"
    figures = [
        Figure(
            "replay", f"{PAGE_ROWS:,} changes of {name}, {who}", "ms", {"ours": long},
            f"≤ {MOST_TIMES:g} × at {SHORT:,}", long <= MOST_TIMES * short, short, f"at {SHORT:,}",
        )
        for who, long, short in (
            ("replayed", long_page, short_page), ("by a feed that was away", long_feed, short_feed),
        )
    ]  # fmt: skip
    figures.append(
        Figure(
            "replay", f"delay of a client that missed {MISSED}, by {OLD_CLIENTS} that missed all",
            "s", {"ours": delay}, f"≤ {MOST_DELAY_S:g} s", delay <= MOST_DELAY_S,
        )
    )  # fmt: skip
    return figures


async def fill(url: str, changes: int) -> None:
    """Log `changes` changes in small transactions of several concurrent writers."""

    async def write(number: int) -> None:
        connection = await asyncpg.connect(url)
        try:
            for count in range(changes // ROWS // WRITERS):
                await connection.execute(UPDATE, ROWS * (number * 8 + count % 8))
        finally:
            await connection.close()

    await asyncio.gather(*(write(number) for number in range(WRITERS)))


async def page_ms(reader: asyncpg.Connection, since: Offset) -> float:
    """Return the time to read 5,000 changes, from an offset on, as the median of some pages."""
    until: Position = await log.current_position(reader)
    times = []
    for _ in range(PAGES):
        began = time.perf_counter()
        page = await log.read(reader, since, until)
        took = time.perf_counter() - began
        if page.changes:
            times.append(took / len(page.changes) * PAGE_ROWS * 1000)
        since = page.until
        if since == Offset(until):
            break
    return statistics.median(times)


class Stopwatch:
    """An audience that notes how long pages take."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last = time.perf_counter()

    def started(self, epoch: Epoch, end: Offset) -> None:
        raise RuntimeError(f"the feed starts over at {end} instead of catching up: {epoch}")

    def publish(self, page: Page) -> None:
        now = time.perf_counter()
        if page.changes:
            self.times.append((now - self._last) / len(page.changes) * PAGE_ROWS * 1000)
        self._last = now

    def state_changed(self, outage: Outage | None) -> None:
        """Outages show in the times."""


async def feed_ms(url: str, epoch: Epoch, since: Offset) -> float:
    """The same for the feed itself, when it reconnects after it had reached an offset."""
    watch = Stopwatch()
    feed = Feed(url)
    feed.epoch, feed.reached = epoch, since
    task = asyncio.create_task(feed.run(watch))
    try:
        async with asyncio.timeout(60):
            while len(watch.times) < PAGES and feed.trouble():  # noqa: ASYNC110 - it gives no signal
                await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.wait([task])
    return statistics.median(watch.times[1:] or watch.times)


def credentials(epoch: Epoch, since: Offset) -> str:
    """Return CONNECT as the official client sends it when it reconnects."""
    return "40" + json.dumps({"pid": "p", "offset": epoch.format(since)})


async def resumed_after(port: int, epoch: Epoch, since: Offset) -> float:
    """Return the seconds until a client that missed a little has it."""
    began = time.perf_counter()
    async with asyncio.timeout(60), open_websocket(f"ws://{ADDRESS}:{port}{PATH}") as websocket:
        await websocket.recv()
        await websocket.send(credentials(epoch, since))
        missed = 0
        while missed < MISSED:
            missed += '42["replayed:' in str(await websocket.recv())
    return time.perf_counter() - began


async def resumed_next_to_old_clients(
    port: int, epoch: Epoch, oldest: Offset, recent: Offset
) -> float:
    """The same while clients with the oldest offset are being sent everything they missed."""
    began = asyncio.Semaphore(0)

    async def take_all() -> None:
        # A bare socket: parsing what it reads would delay the client that is measured.
        reader, writer = await asyncio.open_connection(ADDRESS, port)
        try:
            writer.write(HANDSHAKE.format(path=PATH).encode())
            await reader.readuntil(b"\r\n\r\n")
            connect = credentials(epoch, oldest).encode()
            # A mask of zeros (RFC 6455, section 5.3) leaves the text as it is.
            writer.write(b"\x81\xfe" + len(connect).to_bytes(2) + bytes(4) + connect)
            received = 0
            while some := await reader.read(2**20):
                if received < BEGUN_BYTES <= received + len(some):
                    began.release()
                received += len(some)
        finally:
            writer.close()

    old = [asyncio.create_task(take_all()) for _ in range(OLD_CLIENTS)]
    try:
        async with asyncio.timeout(60):
            for _ in old:
                await began.acquire()
        return max([await resumed_after(port, epoch, recent) for _ in range(3)])
    finally:
        for task in old:
            task.cancel()
        await asyncio.wait(old)
