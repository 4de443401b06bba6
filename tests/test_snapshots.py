"""Snapshots of subscriptions: read once for many, bounded, and never in a slow client's way."""

import asyncio
import gc
import json
import re
import socket
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any, TypeVar

import httpx
import pytest
from websockets.asyncio.client import connect as open_websocket

from app.database import connections
from app.database.connections import Connection, connect
from app.feed.health import BEHIND, Outage
from app.live import broadcast
from app.live import snapshot as snapshot_module
from app.live.rows import Reading
from app.live.snapshot import Snapshot
from app.live.subscriber import CloseReason
from app.socketio import queued
from tests.support.feeds import eventually
from tests.support.floods import FINAL, PING, TEXT, UPGRADE, Watch, client_frame
from tests.support.proxy import proxied
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import App, opened, polling_client, serving_here, until_ready
from tests.support.subscribers import Held, Subscriber, subscriber

pytestmark = pytest.mark.database

T = TypeVar("T")
ITEMS = """
    CREATE TABLE items (id int PRIMARY KEY, owner int NOT NULL, note text NOT NULL);
    SELECT feed.watch('items', 'item');
    INSERT INTO items SELECT i, i % 10, repeat(md5(i::text), 2) FROM generate_series(1, 10000) i;
"""


@pytest.fixture
async def items(connection: Connection) -> Connection:
    """A connection to a database with 10,000 items, of ten owners."""
    await connection.execute(ITEMS)
    return connection


@pytest.fixture
async def app(items: Connection, database_url: str) -> AsyncIterator[App]:
    """The application on a database with items."""
    async with serving_here(database_url) as served:
        yield served


async def test_many_share_one_read(app: App, items: Connection) -> None:
    """Many clients come back at once: the rows are read once, and each client has all of them, and
    then every change.
    """
    count = scaled(60, 500)
    before = app.snapshots.stats().reads
    async with AsyncExitStack() as stack:

        async def load(namespace: str) -> tuple[Subscriber, Held]:
            client = await stack.enter_async_context(subscriber(app.url))
            return client, await client.loaded(await client.subscribe(namespace))

        loaded = await asyncio.gather(
            *(load("/item" if number % 2 else f"/item/{number % 8}") for number in range(count))
        )
        assert app.snapshots.stats().reads == before + 1
        await items.execute("DELETE FROM items WHERE id % 20 = 0")
        await items.execute("UPDATE items SET owner = 77 WHERE id = 1")
        await items.execute("INSERT INTO items VALUES (0, 0, 'done')")
        everything = {
            json.dumps([row["id"]]): dict(row) for row in await items.fetch("TABLE items")
        }
        for client, held in loaded:
            while "[0]" not in held.rows:
                await client.step()
            assert held.rows == everything


async def test_a_snapshot_has_what_was_written_before(app: App, items: Connection) -> None:
    """A client that asks after a write gets it with the rows, although others have just been given
    a snapshot without it.
    """
    async with subscriber(app.url) as client:
        for number in range(20):
            await items.execute("INSERT INTO items VALUES ($1, 50, '')", -number)
            held = await client.subscribe(f"/item/{number}", where="owner=eq.50")
            await client.loaded(held)
            assert held.names == ["feed:hello", "feed:loaded"] and len(held.rows) == number + 1


async def test_nothing_is_kept(
    app: App, items: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A while after a snapshot was sent, nothing of it is held, nor of the client."""
    monkeypatch.setattr(snapshot_module, "FRESH_S", 0.1)
    async with subscriber(app.url) as client:
        await client.loaded(await client.subscribe("/item"))
        await eventually(lambda: app.snapshots.stats().held_bytes == 0)
    await eventually(lambda: app.empty)


async def test_a_slow_client_holds_up_nobody(app: App, items: Connection) -> None:
    """A client reads only the beginning of a large snapshot: others get theirs and what is written,
    no transaction stays open, and the table can be altered.
    """
    await items.execute("UPDATE items SET note = repeat(note, 40)")  # 25 MB
    async with subscriber(app.url) as slow, subscriber(app.url) as quick:
        stuck = await slow.subscribe("/item")
        await slow.until(lambda: stuck.chunks)
        held = await quick.loaded(await quick.subscribe("/item/quick", where="owner=eq.3"))
        assert len(held.rows) == 1000
        await items.execute("ALTER TABLE items ALTER note SET DEFAULT ''")
        await items.execute("INSERT INTO items VALUES (0, 3, 'new')")
        await quick.until(lambda: 0 in held.ids)
        assert not stuck.is_loaded
        await slow.loaded(stuck)
        await slow.until(lambda: len(stuck.rows) == 10_001)  # loaded again: the table was altered


@asynccontextmanager
async def slow_line(url: str, buffer_bytes: int, *packets: bytes) -> AsyncIterator[socket.socket]:
    """Yield a WebSocket's socket with a small receive buffer, on which `packets` were sent."""
    loop = asyncio.get_running_loop()
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        connection.setblocking(False)
        await loop.sock_connect(connection, (host, int(port)))
        await loop.sock_sendall(connection, UPGRADE)
        for packet in packets:
            await loop.sock_sendall(connection, client_frame(FINAL | TEXT, packet))
        yield connection


@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_that_reads_slowly_but_steadily(
    items: Connection, database_url: str, reads: bool
) -> None:
    """A client takes 16 kB at a time, for much longer than a client may read nothing or take to
    answer a ping. It gets all rows of two subscriptions, and neither those of a short one nor pings
    wait for them; its own pings are answered. One that reads nothing is disconnected.
    """
    await items.execute("UPDATE items SET note = repeat(note, 12)")
    ping = b"\x81\x012"
    few = f"40/item/few,{json.dumps({'where': 'id=lt.500'})}"
    limits: dict[str, Any] = {"ping_interval": 0.5, "ping_timeout": 0.5} if reads else {}
    async with serving_here(database_url, client_stall=0.5, **limits) as app:
        loop = asyncio.get_running_loop()
        async with slow_line(app.url, 32_768, b"40/item,", b"40/item/2,") as connection:
            loaded: list[bytes] = []
            pinged: list[float] = []
            end, has_asked, answered = b"", False, 0
            async with asyncio.timeout(60):
                while reads and len(loaded) < 3:
                    part = await loop.sock_recv(connection, 16_384)
                    assert part, "disconnected"
                    end += part
                    if ping in end:
                        end = end.replace(ping, b"")
                        pinged.append(loop.time())
                        await loop.sock_sendall(connection, client_frame(FINAL | TEXT, b"3"))
                        await loop.sock_sendall(connection, client_frame(FINAL | PING, b"ours"))
                    answered += part.count(b"\x8a\x04ours")
                    if b'["feed:rows"' in end and not has_asked:
                        has_asked = True
                        asking = client_frame(FINAL | TEXT, few.encode())
                        await loop.sock_sendall(connection, asking)
                    loaded += re.findall(rb'42(/[^,]*),\["feed:loaded"', end)
                    end = end.rpartition(b'["feed:loaded"')[2][-100:]
                    await asyncio.sleep(0.004)  # its pace
            if reads:
                assert loaded[0] == b"/item/few"
                gaps = [after - before for before, after in pairwise(pinged)]
                assert statistics.median(gaps) < 1.0, "official clients would disconnect"
                assert answered > len(gaps) // 2, "libraries that send pings would disconnect"
            else:
                await eventually(lambda: app.socketio.stats().closed[CloseReason.STALLED])


async def test_a_burst_for_a_client_on_a_slow_line(items: Connection, database_url: str) -> None:
    """A live client reads slowly, and 120 kB come at once, all of which the kernel takes: pings
    arrive late, behind them, and the client stays connected. Once it reads and answers nothing, it
    is disconnected.
    """
    async with serving_here(database_url, ping_interval=0.3, ping_timeout=0.6) as app:
        loop = asyncio.get_running_loop()
        async with slow_line(app.url, 16_384, b'40/item,{"where":"owner=eq.3"}') as connection:
            received = b""
            async with asyncio.timeout(30):
                while b'["feed:loaded"' not in received:
                    received += await loop.sock_recv(connection, 65_536)
                await items.execute("UPDATE items SET note = repeat('x', 1200) WHERE id < 1000")
                while received.count(b'"item:update"') < 100:
                    part = await loop.sock_recv(connection, 2_000)
                    assert part, "disconnected"
                    received += part
                    for _ in range(part.count(b"\x81\x012")):
                        await loop.sock_sendall(connection, client_frame(FINAL | TEXT, b"3"))
                    await asyncio.sleep(0.025)  # its pace
            assert not app.socketio.stats().closed[CloseReason.HEARTBEAT_MISSED]
            await eventually(lambda: app.socketio.stats().closed[CloseReason.HEARTBEAT_MISSED])


async def test_another_asgi_server_is_rid_of_a_stalled_client(
    items: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another ASGI server waits in `send` for a client that reads nothing: the session does not
    wait with it for ever.
    """
    monkeypatch.setattr(queued, "CLOSE_TIMEOUT_S", 0.1)
    await items.execute("UPDATE items SET note = repeat(note, 12)")
    async with (
        serving_here(database_url, plain=True, client_stall=0.3) as app,
        opened(app.url, max_queue=1) as client,
    ):
        for number in range(4):
            await client.send(f"40/item/{number},")
        await eventually(lambda: app.socketio.stats().closed[CloseReason.STALLED])
        await eventually(lambda: not serving_tasks())


def serving_tasks() -> list[str]:
    """The tasks that serve sessions for another ASGI server."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith(("send ", "receive "))]


async def test_a_client_that_polls_slowly_but_steadily(
    items: Connection, database_url: str
) -> None:
    """By polls, a client takes the rows of two subscriptions for longer than it may read nothing or
    take to answer a ping: the two take turns, no answer takes longer than that, and no ping waits
    for more than one.
    """
    await items.execute("UPDATE items SET note = repeat(note, 5)")
    async with (
        serving_here(database_url, client_stall=0.5, ping_interval=0.5, ping_timeout=0.5) as app,
        polling_client(app.url) as client,
    ):
        await client.post("40/item,\x1e40/item/2,")
        seen: list[str] = []
        async with asyncio.timeout(60):
            while sum('["feed:loaded"' in packet for packet in seen) < 2:
                packets = await client.poll()
                seen += packets
                await asyncio.sleep(sum(map(len, packets)) / 1_500_000)  # its pace
        of_rows = ["/item/2," in packet[:10] for packet in seen if '["feed:rows"' in packet]
        assert 0.3 < of_rows[: len(of_rows) // 2].count(True) / (len(of_rows) // 2) < 0.7


async def test_a_poller_subscribes_while_large_rows_load(
    items: Connection, database_url: str
) -> None:
    """A client polls for rows of 900 kB each, and subscribes to something else meanwhile: little is
    held for it, so it does not count as one that reads nothing.
    """
    await items.execute("UPDATE items SET note = repeat('x', 900000) WHERE id <= 30")
    async with serving_here(database_url) as app, polling_client(app.url) as client:
        await client.post(f"40/item,{json.dumps({'where': 'id=lte.30'})}")
        while not any('["feed:rows"' in packet for packet in await client.poll()):
            pass
        assert (await client.post("40/thing,")).status_code == 200
        missing = {"/item", "/thing"}
        async with asyncio.timeout(30):
            while missing:
                packets = await client.poll()
                loaded = [packet for packet in packets if '["feed:loaded"' in packet]
                missing -= {packet[2:].partition(",")[0] for packet in loaded}


async def test_many_subscriptions_of_a_slow_client(items: Connection, database_url: str) -> None:
    """A client reads so slowly that each of its subscriptions waits for its turn longer than a
    client may read nothing: none of them is served much more than the others.
    """
    await items.execute("UPDATE items SET note = repeat(note, 5)")
    async with (
        serving_here(database_url, client_stall=0.3) as app,
        polling_client(app.url) as client,
    ):
        await client.post("\x1e".join(f"40/item/{number}," for number in range(20)))
        served: Counter[str] = Counter()
        async with asyncio.timeout(60):
            while served.total() < 120:
                packets = await client.poll()
                rows = [packet for packet in packets if '["feed:rows"' in packet]
                served.update(packet.partition(",")[0] for packet in rows)
                await asyncio.sleep(sum(map(len, packets)) / 2_500_000)  # its pace
        assert min(served.values()) > 3 and len(served) == 20


async def test_a_snapshot_that_is_too_large(items: Connection, database_url: str) -> None:
    """Rows take more than SNAPSHOT_BYTES: the client is told what to do instead, also when it asks
    again, and nothing was read again; a filter makes it possible.
    """
    async with (
        serving_here(database_url, snapshot_bytes=200_000) as app,
        subscriber(app.url) as client,
    ):
        for namespace in ("/item", "/item/again", "/item"):
            refused = await client.refusal(await client.subscribe(namespace))
            assert refused["code"] == "too_large" and "SNAPSHOT_BYTES" in refused["detail"]
            assert "GET /topics/item" in refused["detail"]
        assert app.snapshots.stats().reads == 1
        await client.loaded(await client.subscribe("/item", where="owner=eq.3"))
        offset = await items.fetchval("SELECT feed.offset()")
        held = await client.subscribe("/item/since", since=offset)
        await client.until(lambda: held.recovered)
        await items.execute("UPDATE items SET owner = 3 WHERE id = 5")
        await client.until(lambda: held.ids == [5])


async def test_a_refusal_before_an_upgrade(items: Connection, database_url: str) -> None:
    """A client is joined to a namespace and then refused. What it sends there all the same, after
    its upgrade to a WebSocket, harms nothing else of the connection.
    """
    async with (
        serving_here(database_url, snapshot_bytes=200_000) as app,
        polling_client(app.url) as client,
    ):
        await client.post("40/item,")
        packets: list[str] = []
        while not any(packet.startswith("44/item,") for packet in packets):
            packets += await client.poll()
        assert packets[0].startswith("40/item,")
        address = app.url.replace("http", "ws") + client.address.replace("polling", "websocket")
        async with open_websocket(address, proxy=None) as websocket, asyncio.timeout(10):
            await websocket.send("2probe")
            assert await websocket.recv() == "3probe"
            for packet in ("5", "41/item,", '42/item,["hi"]', "40/item/again,"):
                await websocket.send(packet)
            while not str(await websocket.recv()).startswith("44/item/again,"):
                pass


async def test_large_rows_after_small_ones(
    start_server: Callable[..., RunningServer], items: Connection
) -> None:
    """The first rows are small and the next ones add up to much more than a snapshot may be: it is
    refused, as a list is, before the server holds them in memory.
    """
    await items.execute(
        "CREATE TABLE texts (id int PRIMARY KEY, text text NOT NULL);"
        " INSERT INTO texts SELECT i, repeat('x', CASE WHEN i > 20 THEN 900000 ELSE 1 END)"
        f" FROM generate_series(1, {scaled(250, 900)}) AS i; SELECT feed.watch('texts', 'text')"
    )
    server = start_server(SNAPSHOT_BYTES="8MiB")
    await until_ready(server.url)
    async with subscriber(server.url) as client, httpx.AsyncClient(base_url=server.url) as http:
        await client.loaded(await client.subscribe("/text/few", where="id=lt.20"))
        assert (await http.get("/topics/text?limit=1")).status_code == 200
        with Watch(server).looking() as watch:
            refused = await client.refusal(await client.subscribe("/text"))
            assert refused["code"] == "too_large"
            assert (await http.get("/topics/text")).json()["code"] == "too_large"
    assert watch.grown_mib < 60


async def test_one_snapshot_in_many_namespaces(
    start_server: Callable[..., RunningServer], items: Connection
) -> None:
    """A snapshot that is not ASCII is sent in several namespaces, by WebSocket and by polling: the
    server holds it once.
    """
    await items.execute("UPDATE items SET note = repeat('x', 1500) || '😀'")
    server = start_server()
    await until_ready(server.url)
    async with subscriber(server.url) as client, polling_client(server.url) as poller:
        await client.loaded(await client.subscribe("/item/few", where="id=lt.20"))
        with Watch(server).looking() as watch:
            for number in range(4):
                held = await client.loaded(await client.subscribe(f"/item/{number}"))
                assert len(held.rows) == 10_000 and held.rows["[1]"]["note"].endswith("x😀")
                held.rows.clear()
            await poller.post("40/item/polling,")
            packets: list[str] = []
            while not packets or '"feed:loaded"' not in packets[-1]:
                packets += await poller.poll()
            assert sum(packet.count("x😀") for packet in packets) == 10_000
    assert watch.grown_mib < 90


async def test_many_large_snapshots_wait_for_each_other(
    items: Connection, database_url: str
) -> None:
    """Clients that read slowly ask for different snapshots: those held at a time are bounded, and
    all of them arrive in the end.
    """
    limit = 600_000
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(serving_here(database_url, snapshot_bytes=limit))
        clients: list[tuple[Subscriber, Held]] = []
        for number in range(8):
            client = await stack.enter_async_context(subscriber(app.url))
            clients.append(
                (client, await client.subscribe("/item", where=f"id=gt.{5000 + number}"))
            )
        most = 0
        for client, held in clients:
            while not held.is_loaded:
                await client.step()
                most = max(most, app.snapshots.stats().held_bytes)
                await eventually(lambda: held_in_memory() == app.snapshots.stats().held_bytes)
            assert len(held.rows) == 5000 - clients.index((client, held))
        assert most <= 3 * limit
        assert app.snapshots.stats().reads <= 2 * len(clients)  # a second time when there is room


def held_in_memory() -> int:
    """Return how long the snapshots are that there are."""
    return sum(snapshot.bytes for snapshot in in_memory(Snapshot))


def in_memory(kind: type[T]) -> list[T]:
    """Return the objects of a class that there are."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, kind)]


async def test_what_is_refused_is_not_kept(items: Connection, database_url: str) -> None:
    """Different subscriptions are refused because their rows are too long: that is remembered, but
    not the rows that had been read.
    """
    async with (
        serving_here(database_url, snapshot_bytes=400_000) as app,
        subscriber(app.url) as client,
    ):
        for number in range(3):
            asked = await client.subscribe(f"/item/{number}", where=f"id=gt.{number}")
            assert (await client.refusal(asked))["code"] == "too_large"
        assert in_memory(Reading) == []


async def test_small_snapshots_do_not_wait(items: Connection, database_url: str) -> None:
    """Clients that read nothing hold all the room there is for snapshots: another client's few rows
    come at once, and its many rows when there is room.
    """
    await items.execute("UPDATE items SET note = repeat(note, 80)")  # 50 MB
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(serving_here(database_url, snapshot_bytes=20_000_000))
        slow = []
        for number in range(2):
            client = await stack.enter_async_context(subscriber(app.url))
            held = await client.subscribe("/item", where=f"owner=gte.{7 - number}&id=lt.9000")
            while not held.chunks:
                await client.step()
            slow.append((client, held))
        quick = await stack.enter_async_context(subscriber(app.url))
        few = await quick.loaded(await quick.subscribe("/item/few", where="id=eq.7"))
        assert few.ids == [7]
        many = await quick.subscribe("/item/many", where="owner=lt.2")
        for client, held in slow:
            await client.loaded(held)
        assert len((await quick.loaded(many)).rows) == 2000


def changes(held: Held) -> list[str]:
    """The names of the events that say that something has changed."""
    return [name for name in held.names if name.startswith("item:")]


async def test_large_rows(items: Connection, database_url: str) -> None:
    """A row that is too large for an event is in a snapshot as it is in an event: its key; but with
    all columns that a client asks for, as long as these are short.
    """
    await items.execute("INSERT INTO items VALUES (0, 50, repeat('x', 5000))")
    async with (
        serving_here(database_url, max_event_bytes=2000) as app,
        subscriber(app.url) as client,
    ):
        whole = await client.loaded(await client.subscribe("/item", where="owner=gte.50"))
        part = await client.loaded(
            await client.subscribe("/item/part", where="owner=gte.50", columns="owner")
        )
        for owner in (51, 52):
            await items.execute("UPDATE items SET owner = $1 WHERE id = 0", owner)
        await client.until(lambda: part.rows["[0]"]["owner"] == 52)
        assert list(whole.rows.values()) == [{"id": 0, "too_large": True}]
        assert list(part.rows.values()) == [{"id": 0, "owner": 52}]
        await items.execute("UPDATE items SET note = note || 'y' WHERE id = 0")
        await items.execute("UPDATE items SET owner = 1 WHERE id = 0")
        await client.until(lambda: not part.rows and not whole.rows)
        assert changes(part) == ["item:update", "item:update", "item:destroy"]
        assert changes(whole) == ["item:update"] * 3 + ["item:destroy"]


async def test_filters_on_large_columns(items: Connection, database_url: str) -> None:
    """The column that is too large is in the filter: what can be said of it is, without loading
    anything again.
    """
    async with (
        serving_here(database_url, max_event_bytes=2000) as app,
        subscriber(app.url) as client,
    ):
        held = [
            await client.loaded(
                await client.subscribe(f"/item/{number}", where=where, columns="owner")
            )
            for number, where in enumerate(
                ("note=eq.short", "note=neq.short&owner=eq.50", "note=not.in.(short)&id=lt.1")
            )
        ]
        await items.execute("INSERT INTO items VALUES (0, 50, repeat('x', 5000))")
        await client.until(lambda: [len(each.rows) for each in held] == [0, 1, 1])
        await items.execute("UPDATE items SET note = 'short' WHERE id = 0")
        await client.until(lambda: [len(each.rows) for each in held] == [1, 0, 0])
        await items.execute("UPDATE items SET note = repeat('y', 5000) WHERE id = 0")
        await client.until(lambda: [len(each.rows) for each in held] == [0, 1, 1])
        assert [each.names.count("feed:loaded") for each in held] == [1, 1, 1]


async def test_filters_on_large_numbers(items: Connection, database_url: str) -> None:
    """A row that is too large has a number of 5,000 digits, which may be 1: filters by it have the
    rows that match all the same.
    """
    long = "1" + "0" * 5000
    async with (
        serving_here(database_url, max_event_bytes=2000) as app,
        subscriber(app.url) as client,
    ):
        await items.execute("ALTER TABLE items ADD n numeric; SELECT feed.check_topics()")
        assert await app.feed.look()
        filters = {
            "n=eq.1": "n = 1", "n=neq.1": "n <> 1", "n=in.(1,2)": "n IN (1, 2)",
            "n=is.null&id=lt.3": "n IS NULL AND id < 3",
            "n=gt.1": "n > 1", "n=in.(1,1e5000)": f"n IN (1, {long})",
        }  # fmt: skip
        held = {
            where: await client.loaded(
                await client.subscribe(f"/item/{number}", where=where, columns="owner")
            )
            for number, where in enumerate(filters)
        }
        for statement in (
            f"UPDATE items SET n = {long} WHERE id = 1",
            "UPDATE items SET n = id WHERE id = 2",
            f"UPDATE items SET n = {long} + 1 WHERE id = 1",
            "UPDATE items SET n = 1 WHERE id = 1",
            "UPDATE items SET n = round(1::numeric, 5000) WHERE id = 1",
            "INSERT INTO items VALUES (20000, 5, 'last', 2)",
        ):
            await items.execute(statement)
            for where, condition in filters.items():
                rows = await items.fetch(f"SELECT id FROM items WHERE {condition} ORDER BY id")
                wanted = [row["id"] for row in rows]
                await client.until(lambda: held[where].ids == wanted)  # noqa: B023


async def test_what_may_not_be_read(items: Connection, database_url: str) -> None:
    """The table has row-level security that applies to the server: it says so."""
    await items.execute(
        "ALTER TABLE items ENABLE ROW LEVEL SECURITY; ALTER TABLE items FORCE ROW LEVEL SECURITY"
    )
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        held = await client.subscribe("/item")
        is_superuser = await items.fetchval(
            "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
        )
        if is_superuser:  # whom no policy concerns
            await client.loaded(held)
        else:
            refused = await client.refusal(held)
            assert refused["code"] == "no_right" and "row-level security" in refused["detail"]


# An enum that is rendered by a function, which fails later.
MOODS = """
    CREATE TYPE mood AS ENUM ('fine');
    CREATE FUNCTION rendered(mood) RETURNS json LANGUAGE sql AS $$ SELECT '"fine"'::json $$;
    CREATE CAST (mood AS json) WITH FUNCTION rendered(mood);
    CREATE TABLE moods (id int PRIMARY KEY, mood mood);
    INSERT INTO moods VALUES (1, 'fine');
    SELECT feed.watch('moods', 'mood');
"""
FAILING = """
    CREATE OR REPLACE FUNCTION rendered(mood) RETURNS json LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'a secret' USING ERRCODE = '{error}'; END $$
"""


@pytest.mark.parametrize("error", ["P0001", "XX000", "54001", "22012"])
async def test_rows_that_cannot_be_read(
    app: App, items: Connection, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    """Postgres fails to render a row: subscriptions to it, and lists, are refused with a sentence
    that tells nothing of the row, the log has the details once, and the connection lives on.
    """
    await items.execute(MOODS)
    async with subscriber(app.url) as client, httpx.AsyncClient(base_url=app.url) as http:
        held = await client.loaded(await client.subscribe("/item", where="owner=eq.3"))
        assert (await http.get("/topics/mood")).json() == [{"id": 1, "mood": "fine"}]
        await items.execute(FAILING.format(error=error))
        refused = await client.refusal(await client.subscribe("/mood"))
        assert (refused["code"], refused["field"]) == ("unreadable", "topic")
        assert "of mood" in refused["detail"] and "secret" not in refused["detail"]
        assert await client.refusal(await client.subscribe("/mood/again")) == refused
        details = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
        assert len(details) == 1 and "the topic mood cannot be read: a secret" in details[0]
        response = await http.get("/topics/mood")
        assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
        assert {name: response.json()[name] for name in ("code", "detail")} == {
            name: refused[name] for name in ("code", "detail")
        }
        await items.execute("INSERT INTO items VALUES (0, 3, 'new')")
        await client.until(lambda: 0 in held.ids)
    assert "Traceback" not in caplog.text


async def test_a_virtual_column_that_cannot_be_computed(app: App, items: Connection) -> None:
    """A column that is computed when it is read fails for a row: the same."""
    if items.get_server_version().major < 18:
        pytest.skip("virtual generated columns came with Postgres 18")
    await items.execute(
        "CREATE TABLE shares (id int PRIMARY KEY, part int GENERATED ALWAYS AS (100 / id) VIRTUAL);"
        " INSERT INTO shares VALUES (0), (1); SELECT feed.watch('shares', 'share')"
    )
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/item", where="owner=eq.3"))
        refused = await client.refusal(await client.subscribe("/share"))
        assert refused["code"] == "unreadable"
        await client.loaded(await client.subscribe("/share/other", where="id=eq.1"))
        await items.execute("INSERT INTO items VALUES (0, 3, 'new')")
        await client.until(lambda: 0 in held.ids)


async def test_what_is_renamed(items: Connection, database_url: str) -> None:
    """The schemas of a table and of a column's type get other names, which no client has to hear
    of: whoever asks for rows later has them, by a subscription and by REST.
    """
    await items.execute(
        "CREATE SCHEMA kinds; CREATE SCHEMA shop; CREATE TYPE kinds.mood AS ENUM ('sad', 'glad');"
        "CREATE TABLE shop.pets (id int PRIMARY KEY, mood kinds.mood);"
        "INSERT INTO shop.pets VALUES (1, 'sad'), (2, 'glad');"
        "SELECT feed.watch('shop.pets', 'pet')"
    )
    async with (
        serving_here(database_url) as app,
        subscriber(app.url) as client,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        for number, rename in enumerate(("", "SCHEMA shop", "SCHEMA kinds", "TABLE new_shop.pets")):
            if rename:
                name = rename.split()[-1].split(".")[-1]
                await items.execute(f"ALTER {rename} RENAME TO new_{name}")
            held = await client.subscribe(f"/pet/{number}", where="mood=eq.glad")
            await client.loaded(held)
            assert held.ids == [2]
            answer = await http.get("/topics/pet?mood=eq.glad&limit=1")
            assert answer.status_code == 200 and len(answer.json()) == 1


async def test_a_locked_table(
    items: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is locked while a client asks for its rows: the client gets them afterwards, by the
    same read, although the feed falls behind meanwhile.
    """
    monkeypatch.setattr(snapshot_module, "AWAY_CHECK_S", 0.02)
    other = await connect(database_url)
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        async with other.transaction():
            await other.execute("LOCK TABLE items")
            held = await client.subscribe("/item", where="owner=eq.3")
            await client.until(lambda: held.names == ["feed:hello"])
            for _ in range(5):
                app.feed.outage = Outage(0, BEHIND)  # whatever else it notes
                await asyncio.sleep(snapshot_module.AWAY_CHECK_S)
        await client.loaded(held)
        assert app.snapshots.stats().reads == 1
    await other.close()


async def test_a_table_that_is_locked_for_long(
    items: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is locked for longer than Postgres waits for a lock, again and again: its clients
    wait on the connections they have, and get the rows afterwards.
    """
    monkeypatch.setitem(connections.ALL_ROWS, "lock_timeout", "20ms")
    monkeypatch.setattr(broadcast, "LOCKED_PAUSE_S", 0.01)
    other = await connect(database_url)
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        async with other.transaction():
            await other.execute("LOCK TABLE items")
            held = await client.subscribe("/item", where="owner=eq.3")
            await eventually(lambda: app.snapshots.stats().reads > 2 * broadcast.ATTEMPTS)
        await client.loaded(held)
        assert held.names == ["feed:hello", "feed:loaded"]
    await other.close()


async def test_a_locked_table_holds_up_no_other(items: Connection, database_url: str) -> None:
    """Many different rows of a locked table are asked for: those of another table come at once."""
    other = await connect(database_url)
    async with (
        serving_here(database_url) as app,
        subscriber(app.url) as client,
        other.transaction(),
    ):
        await other.execute("LOCK TABLE items")
        locked = [
            await client.subscribe(f"/item/{number}", where=f"id=gt.{number}")
            for number in range(20)
        ]
        await client.until(lambda: all(held.names == ["feed:hello"] for held in locked))
        await client.loaded(await client.subscribe("/thing"))
        assert not any(held.is_loaded for held in locked)
    await other.close()


async def test_a_table_that_is_emptied_while_it_is_read(
    app: App, items: Connection, database_url: str
) -> None:
    """Rows are asked for while a transaction has emptied the table and not committed: the snapshot
    is from after it, because TRUNCATE takes rows away from earlier ones (it is not MVCC-safe).
    """
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    other = await connect(database_url)
    async with subscriber(app.url) as client:
        await client.loaded(await client.subscribe("/item/before", where="id=lt.2"))
        async with other.transaction():
            await other.execute("UPDATE items SET note = 'changed' WHERE id = 1")
            await other.execute("TRUNCATE items")
            held = await client.subscribe("/item", where="id=lt.3")
            async with asyncio.timeout(10):
                while not await items.fetchval(waiting):
                    await asyncio.sleep(0.01)
        await client.loaded(held)
        await items.execute("INSERT INTO items VALUES (2, 2, 'new')")
        await client.until(lambda: held.ids == [2])
        assert changes(held) == ["item:create"]
    await other.close()


async def test_a_read_that_hangs(
    items: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network swallows everything while rows are being read: the read is given up, long before
    it would have ended by itself, and the client gets the rows when the network is back.
    """
    monkeypatch.setattr(snapshot_module, "AWAY_CHECK_S", 0.1)
    async with (
        proxied(database_url) as (network, url),
        serving_here(url) as app,
        subscriber(app.url) as client,
    ):
        where = "owner=eq.3"
        await client.loaded(await client.subscribe("/item", where=where))
        app.snapshots.clear()
        network.hold()
        held = await client.subscribe("/item/again", where=where)
        await client.until(lambda: held.names[-1:] == ["feed:state"])
        await eventually(lambda: not app.snapshots.stats().reading)
        network.pass_on()
        async with asyncio.timeout(20):
            await client.loaded(held)
        assert len(held.rows) == 1000
