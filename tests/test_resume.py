"""A client that returns continues after what it has seen, or is told that it cannot."""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from app.database.connections import Connection, connect
from app.feed import log
from app.feed.offset import Epoch, Offset, Position
from app.live.broadcast import BroadcastStats
from tests.support.feeds import eventually
from tests.support.machine import require
from tests.support.proxy import proxied
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import App, RawClient, joined, opened, serving_here, until_ready
from tests.support.writing import insert

WATCH = Path(__file__).parent / "faults" / "watch.mjs"


async def insert_many(connection: Connection, first: int, last: int, chars: int = 0) -> None:
    """Create the things `first` to `last` in one statement, each with an info of `chars`
    characters.
    """
    await connection.execute(
        "INSERT INTO things (name, info) SELECT i, left(repeat(md5(i::text), $3 / 32 + 1), $3)"
        " FROM generate_series($1::int, $2::int) AS i",
        first, last, chars,
    )  # fmt: skip


def names(events: list[list[Any]]) -> list[str]:
    """Return the names of the things in create events."""
    return [event[1]["name"] for event in events]


def credentials(client: RawClient) -> dict[str, str]:
    """Return what the official client sends when it reconnects."""
    return {"pid": client.pid, "offset": client.offset}


# The official client


class Official:
    """An unmodified socket.io-client in Node.js; its file holds what it received, one JSON line
    each.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def lines(self, kind: str) -> list[list[Any]]:
        """Return what it has received of one kind so far."""
        if not self._file.exists():
            return []
        text = self._file.read_text()
        entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [entry for entry in entries if entry[0] == kind]

    async def until_more(self, kind: str, count: int) -> None:
        """Wait until it has received more than `count` of one kind."""
        await eventually(lambda: len(self.lines(kind)) > count)


@asynccontextmanager
async def official_clients(
    url: str, directory: Path, *transports: list[str]
) -> AsyncIterator[list[Official]]:
    """Start clients `io(url)` with these transports, in one Node.js process."""
    files = [directory / f"client{number}" for number in range(len(transports))]
    given = [
        {"kind": "bare", "url": url, "transports": each, "file": str(file)}
        for each, file in zip(transports, files, strict=True)
    ]
    process = await asyncio.create_subprocess_exec(
        require("node"), str(WATCH), json.dumps(given), stdin=asyncio.subprocess.PIPE
    )
    try:
        clients = [Official(file) for file in files]
        await eventually(lambda: all(client.lines("hello") for client in clients))
        yield clients
    finally:
        process.terminate()
        await process.wait()


async def test_the_official_client_through_every_interruption(
    server: RunningServer, connection: Connection, tmp_path: Path
) -> None:
    """Unmodified clients, using WebSocket, polling and an upgrade, live through kill -9, a restart
    and a lost connection during writes: each change exactly once, `recovered` each time.
    """
    written = 0
    writing = True

    async def write() -> None:
        nonlocal written
        while writing:
            await insert(connection, *(f"{written + i}" for i in range(3)))
            written += 3
            await asyncio.sleep(0.01)

    async def killed() -> None:
        server.kill()
        await asyncio.to_thread(server.start)

    async def restarted() -> None:
        await asyncio.to_thread(server.restart)

    async with (
        proxied(server.url) as (proxy, url),
        official_clients(
            url, tmp_path, ["websocket"], ["polling"], ["polling", "websocket"]
        ) as clients,
    ):

        async def cut() -> None:
            proxy.cut()

        task = asyncio.create_task(write())
        for interrupt in (killed, cut, restarted, killed):
            hellos = [len(client.lines("hello")) for client in clients]
            await asyncio.sleep(0.3)
            await interrupt()
            # A polling client does not notice a cut between two polls.
            noticing = 1 if interrupt is cut else len(clients)
            for client, count in list(zip(clients, hellos, strict=True))[:noticing]:
                await client.until_more("hello", count)
        writing = False
        await task
        for client in clients:
            await client.until_more("thing:create", written - 1)
            received = [int(line[1]["name"]) for line in client.lines("thing:create")]
            assert received == list(range(written))
            first, *others = client.lines("hello")
            assert first[1] is False and len(others) >= 3
            # A slow restart leaves the database away, and `socket.recovered` says nothing then.
            assert [hello for hello in others if not hello[1] or hello[3] is False] == []


# Where a client can continue


async def test_from_every_place_in_a_batch(
    app: App, connection: Connection, database_url: str
) -> None:
    """A client disconnected after any change of a transaction continues with the next one: on the
    same node, on another, and on one that has just started.
    """
    async with joined(app.url) as client, serving_here(database_url) as other:
        offsets = [client.offset]
        await insert(connection, *"abcde")
        offsets += [event[-1] for event in await client.take(5)]
        await insert(connection, "f")
        offsets += [event[-1] for event in await client.take(1)]
        for node in (app, other):
            for place, offset in enumerate(offsets):
                auth = {"pid": client.pid, "offset": offset}
                async with joined(node.url, auth) as again:
                    assert (again.recovered, again.pid, again.offset) == (True, client.pid, offset)
                    assert names(await again.take(6 - place)) == list("abcdef")[place:]
        await eventually(lambda: app.broadcast.stats().subscribers == 1 and other.empty)


async def test_from_a_rest_answer(app: App, connection: Connection) -> None:
    """A new client that sends the offset of its list receives exactly what came after the list."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        for number in range(10):
            await insert(connection, f"{number} before")
            answer = await http.get("/api/things")
            listed = {thing["name"] for thing in answer.json()}
            await insert(connection, f"{number} after")
            async with joined(app.url, {"since": answer.headers["Feed-Offset"]}) as client:
                assert client.recovered and client.offset == answer.headers["Feed-Offset"]
                assert names(await client.take(1)) == [f"{number} after"]
                assert f"{number} before" in listed and f"{number} after" not in listed


async def test_where_a_client_was_counts_more_than_its_list(
    app: App, connection: Connection
) -> None:
    """A client that returns with pid and offset, but still sends the offset of its first list,
    continues from the former.
    """
    async with joined(app.url) as client:
        since = client.offset
        await insert(connection, "seen")
        await client.take(1)
    await insert(connection, "missed")
    async with joined(app.url, credentials(client) | {"since": since}) as again:
        assert again.recovered and again.pid == client.pid
        assert names(await again.take(1)) == ["missed"]


async def test_from_a_node_that_is_ahead(
    app: App, connection: Connection, database_url: str
) -> None:
    """A client that comes from another node just as a change is made is not ahead of this node."""
    async with serving_here(database_url) as other:
        auth = None
        for number in range(20):
            here = (app, other)[number % 2]
            async with joined(here.url, auth) as client:
                assert client.recovered is (auth is not None)
                await insert(connection, f"{number}")
                assert names(await client.take(1)) == [f"{number}"]
                auth = credentials(client)


async def test_joining_at_any_moment_under_load(app: App, database_url: str) -> None:
    """Clients that connect and disconnect at random during writes each get every change once."""
    writing = True

    async def write(writer: int) -> None:
        connection = await connect(database_url)
        number = 0
        while writing:
            await insert(connection, f"{writer} {number}", f"{writer} {number + 1}")
            number += 2
            await asyncio.sleep(0.005)
        await connection.close()

    async def come_and_go(seed: int) -> list[list[Any]]:
        dice = random.Random(seed)
        auth, events = None, []
        for _ in range(8):
            async with joined(app.url, auth) as client:
                assert client.recovered is (auth is not None)
                for _ in range(dice.randint(0, 12)):
                    events.append(await client.event())
                auth = credentials(client)
            await asyncio.sleep(dice.random() * 0.05)
        return events

    writers = [asyncio.create_task(write(number)) for number in range(3)]
    try:
        histories = await asyncio.gather(*(come_and_go(seed) for seed in range(10)))
    finally:
        writing = False
        await asyncio.gather(*writers)
    for events in histories:
        by_writer: dict[str, list[int]] = {}
        for name in names(events):
            writer, number = name.split()
            by_writer.setdefault(writer, []).append(int(number))
        for numbers in by_writer.values():
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


# Where no client can continue


async def bad_offsets(app: App, connection: Connection) -> dict[str, str]:
    """Return offsets that this database did not issue or cannot continue from, by kind."""
    since = await log.current_position(connection)
    epoch = await log.current_epoch(connection)
    row = await connection.fetchrow("SELECT feed.epoch(), secret::text FROM feed.state")
    await insert(connection, "pruned", "pruned too")
    until = await log.current_position(connection)
    async with joined(app.url, {"since": epoch.format(Offset(until))}):
        pass  # the node has read so far,
    app.replay.clear()  # and forgets it
    async with asyncio.timeout(20):  # other tests' transactions may delay it
        while await connection.fetchval("SELECT count(*) FROM feed.change"):
            await log.prune(connection, 0, 10**9, 1000)
    # If other tests' transactions were running, the node's own position was pruned: restart it.
    assert await app.feed.look()
    good = epoch.format(Offset(until))
    ahead = Position(until.xmax + 1000, frozenset())
    return {
        "foreign": Epoch("ffffffff", row[1]).format(Offset(until)),
        "forged": Epoch(row[0], "another secret").format(Offset(until)),
        "changed": good.replace(f"{until.xmax}", f"{until.xmax - 1}"),
        "pruned": epoch.format(Offset(since)),
        "pruned within a batch": epoch.format(Offset(since, until, 1)),
        "of the future": epoch.format(Offset(ahead)),
        "of a future batch": epoch.format(Offset(until, ahead, 5)),
        "empty": "",
        "nonsense": "'; DROP TABLE things; --",
        "long": "1" * 60_000,
        "other letters": "é🎈\u0000",
    }


async def test_offsets_that_cannot_be_continued(
    app: App, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A client with a bad offset of any kind gets `recovered: false` at once and a new pid, and
    then receives what is written.
    """
    offsets = await bad_offsets(app, connection)
    caplog.clear()
    for number, (kind, offset) in enumerate(offsets.items()):
        for auth in ({"pid": "p", "offset": offset}, {"since": offset}):
            began = time.monotonic()
            async with joined(app.url, auth) as client:
                assert (client.recovered, client.pid == "p") == (False, False), kind
                assert time.monotonic() - began < 2, kind
                name = f"{number} {len(auth)}"
                await insert(connection, name)
                assert names(await client.take(1)) == [name], kind
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


async def test_a_history_that_ends_while_clients_watch(app: App, connection: Connection) -> None:
    """When the log is emptied, every client is disconnected and gets `recovered: false` when it
    returns, and can continue from a newly loaded list.
    """
    async with joined(app.url) as client:
        await insert(connection, "a")
        await client.take(1)
        await connection.execute("TRUNCATE feed.change")
        await client.closed()
    async with joined(app.url, credentials(client)) as again:
        assert again.recovered is False
    async with httpx.AsyncClient(base_url=app.url) as http:
        since = (await http.get("/api/things")).headers["Feed-Offset"]
    async with joined(app.url, {"since": since}) as again:
        assert again.recovered is True
        await insert(connection, "b")
        assert names(await again.take(1)) == ["b"]


# Many clients, long replays


async def test_a_long_replay(server: RunningServer, connection: Connection) -> None:
    """A client that missed 200,000 changes gets them all, in flat memory on the server, without
    delaying others.
    """
    count = scaled(50_000, 200_000)
    await until_ready(server.url)
    async with joined(server.url) as gone:
        pass
    await insert_many(connection, 1, count)
    process = psutil.Process(server.pid)
    now = await connection.fetchval("SELECT feed.offset()")
    async with joined(server.url, {"since": now}) as witness:
        before = most = process.memory_info().rss
        latencies: list[float] = []
        replayed = asyncio.Event()

        async def write() -> None:
            nonlocal most
            while not replayed.is_set():
                began = time.monotonic()
                await insert(connection, f"live {len(latencies)}")
                while "live" not in (await witness.frame()):
                    pass
                latencies.append(time.monotonic() - began)
                most = max(most, process.memory_info().rss)
                await asyncio.sleep(0.02)

        writing = asyncio.create_task(write())
        async with joined(server.url, credentials(gone)) as returning:
            assert returning.recovered
            for number in range(1, count + 1):
                assert f'"name":"{number}"' in await returning.frame()
                if number % 50 == 0:
                    await asyncio.sleep(0)  # the witness runs in this process too
        replayed.set()
        await writing
        assert most - before < 60 * 1024**2
        assert sorted(latencies)[len(latencies) // 2] < 0.5 and max(latencies) < 3


async def test_many_returning_clients_share_reads(
    app: App, connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of clients return at once, from a few offsets, to a node that has just started: they
    cost a few reads.
    """
    count = scaled(300, 2000)
    async with joined(app.url) as client:
        places = [client.offset]
        for number in range(4):
            await insert(connection, *(f"{number} {i}" for i in range(25)))
            places.append((await client.take(25))[-1][-1])
    reads = 0
    real = log.read

    async def counting(*arguments: Any, **options: Any) -> log.Page:
        nonlocal reads
        reads += len(arguments) == 4  # the feed's own reads have no end
        return await real(*arguments, **options)

    async with serving_here(database_url) as node, AsyncExitStack() as stack:
        monkeypatch.setattr(log, "read", counting)

        async def come_back(number: int) -> None:
            place = number % 5
            auth = {"pid": f"{number}", "offset": places[place]}
            client = await stack.enter_async_context(opened(node.url))
            await client.join(auth)
            assert client.recovered and client.pid == f"{number}"
            events = await client.take(25 * (4 - place))
            assert len({event[-1] for event in events}) == 25 * (4 - place)

        async with asyncio.timeout(60):
            await asyncio.gather(*(come_back(number) for number in range(count)))
        assert node.broadcast.stats().subscribers == count and reads <= 20


async def read_slowly(client: RawClient, seconds: float) -> None:
    """Read nothing for a while."""
    client.websocket.transport.pause_reading()
    await asyncio.sleep(seconds)
    client.websocket.transport.resume_reading()


async def test_a_slow_client_is_not_waited_for(connection: Connection, database_url: str) -> None:
    """While one client reads nothing, the others get everything at once; little is buffered for it,
    and when it reads again it gets everything, without a gap.
    """
    async with (
        serving_here(database_url, client_buffer=65536, client_stall=20) as app,
        joined(app.url) as slow,
        joined(app.url) as quick,
    ):
        reading = asyncio.create_task(read_slowly(slow, 2))
        await asyncio.sleep(0.05)
        for number in range(20):
            await insert_many(connection, number * 100, number * 100 + 99, 8000)
        assert names(await quick.take(2000)) == [f"{i}" for i in range(2000)]
        assert not reading.done(), "the others waited for the slow client"
        assert app.broadcast.stats().live == 1
        await reading
        assert names(await slow.take(2000)) == [f"{i}" for i in range(2000)]
        await eventually(lambda: app.broadcast.stats().live == 2)


async def test_a_client_that_takes_nothing_is_cut_off(
    connection: Connection, database_url: str
) -> None:
    """A client that reads nothing for longer than allowed is disconnected, and others are
    unaffected; when it returns it continues after what it had received.
    """
    async with serving_here(database_url, client_buffer=65536, client_stall=0.5) as app:
        async with joined(app.url) as stuck, joined(app.url) as quick:
            stuck.websocket.transport.pause_reading()
            for number in range(20):
                await insert_many(connection, number * 100, number * 100 + 99, 8000)
            assert len(await quick.take(2000)) == 2000
            await eventually(lambda: app.broadcast.stats().subscribers == 1)
            stuck.websocket.transport.resume_reading()
            taken = []
            with pytest.raises(ConnectionClosed):
                while True:
                    taken.append(await stuck.event())
        async with joined(app.url, credentials(stuck)) as again:
            assert again.recovered
            taken += await again.take(2000 - len(taken))
        assert names(taken) == [f"{i}" for i in range(2000)]


async def test_coming_and_going_leaves_nothing(
    server: RunningServer, connection: Connection
) -> None:
    """After thousands of connects and disconnects of every kind of client, the server's memory and
    file descriptors are back where they were.
    """
    process = psutil.Process(server.pid)
    await until_ready(server.url)
    async with joined(server.url) as first:
        pass
    await insert(connection, "missed")

    async def come_and_go(count: int) -> None:
        for number in range(count):
            async with opened(server.url) as client:
                kind = number % 4
                if kind == 1:
                    await client.send("40" + json.dumps(credentials(first)))
                elif kind > 1:
                    await client.join()
                if kind == 3:
                    await client.send("41")
                    await client.websocket.close()

    async def rounds(count: int) -> tuple[int, int]:
        await asyncio.gather(*(come_and_go(count // 8) for _ in range(8)))
        await eventually(lambda: process.num_fds() <= most_files)
        return process.memory_info().rss, process.num_fds()

    most_files = sys.maxsize
    await rounds(400)
    await asyncio.sleep(0.2)
    memory, files = process.memory_info().rss, process.num_fds()
    most_files = files + 3
    later, _ = await rounds(scaled(800, 10_000))
    assert later - memory < 8 * 1024**2


async def test_clients_of_many_kinds_leave_nothing_inside(app: App, connection: Connection) -> None:
    """Clients that disconnect while live, while catching up, or before joining leave nothing
    behind.
    """
    async with joined(app.url) as first:
        pass
    await insert_many(connection, 1, 3000)
    tasks = len(asyncio.all_tasks())
    for number in range(40):
        async with opened(app.url) as client:
            if number % 4 == 1:
                await client.send("40" + json.dumps(credentials(first)))
            elif number % 4 == 2:
                await client.join(credentials(first))
            elif number % 4 == 3:
                await client.join()
    await eventually(lambda: app.empty)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    assert app.broadcast.stats() == BroadcastStats(subscribers=0, live=0)
