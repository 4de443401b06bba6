"""What a Socket.IO client sees, frame by frame, and what it may not do."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import httpx
import pytest
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from app.database.connections import Connection
from app.live import broadcast as broadcast_module
from app.live.replay import Replay
from app.live.subscriber import CloseReason
from app.socketio import engine as engine_module
from app.socketio import frames
from app.socketio.codec import POLL_PACKETS
from tests.support.feeds import eventually
from tests.support.server import RunningServer
from tests.support.sockets import (
    PATH,
    QUERY,
    App,
    PollingClient,
    joined,
    opened,
    serving_here,
    until_ready,
)
from tests.support.writing import insert

WAITING_TO_READ = """
    SELECT count(*) FROM pg_locks WHERE relation = 'feed.change'::regclass AND NOT granted
"""
BOTH_PATHS = pytest.mark.parametrize("path", ["/socket.io-client/", "/socket.io/"])


@pytest.fixture
async def http(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=app.url, timeout=10) as client:
        yield client


# The contract


@BOTH_PATHS
@pytest.mark.parametrize("plain", [False, True])
async def test_the_contract(
    connection: Connection, database_url: str, path: str, plain: bool
) -> None:
    """A client joins, gets hello and then every change as Postgres renders it, each with an
    offset, under both paths, from our server and from any ASGI server.
    """
    async with serving_here(database_url, plain=plain) as app, opened(app.url, path) as client:
        assert client.opening["pingInterval"] == 25_000 and client.opening["maxPayload"] > 0
        await client.send("40")
        answer = json.loads((await client.frame())[2:])
        assert set(answer) == {"sid", "pid"}
        name, hello, offset = json.loads((await client.frame())[2:])
        assert (name, hello) == ("feed:hello", {"recovered": False})
        offsets = [offset]

        created = await connection.fetchval(
            "INSERT INTO things (name, info) VALUES ('é\"\\ 🎈', '<b>')"
            " RETURNING row_to_json(things)::text"
        )
        frame = await client.frame()
        assert frame.startswith(f'42["thing:create",{created},"')
        offsets.append(json.loads(frame[2:])[-1])
        updated = await connection.fetchval(
            "UPDATE things SET info = 'new' RETURNING row_to_json(things)::text"
        )
        frame = await client.frame()
        assert frame.startswith(f'42["thing:update",{updated},"')
        offsets.append(json.loads(frame[2:])[-1])
        await connection.execute("DELETE FROM things")
        name, gone, offset = await client.event()
        assert (name, gone) == ("thing:destroy", 'é"\\ 🎈')
        offsets.append(offset)
        await connection.execute("TRUNCATE things")
        name, offset = await client.event()
        assert name == "thing:truncate"
        offsets.append(offset)
        assert len(set(offsets)) == 5
        assert all(re.fullmatch(r"[A-Za-z0-9.:,_-]+", each) for each in offsets)


async def test_every_client_gets_every_change_once(app: App, connection: Connection) -> None:
    """Twenty clients join one after the other; each sees all that was written since its hello, up
    to the end, each change once.
    """
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(20):
            clients.append(await stack.enter_async_context(joined(app.url)))
            await insert(connection, f"{number}")
        for number, client in enumerate(clients):
            names = [(await client.event())[1]["name"]]
            while names[-1] != "19":
                names.append((await client.event())[1]["name"])
            assert int(names[0]) <= number
            assert names == [f"{later}" for later in range(int(names[0]), 20)]


@pytest.mark.parametrize("timing", [True, False])
async def test_timing_is_for_those_who_ask(app: App, connection: Connection, timing: bool) -> None:
    """A client that asks for timing learns when the next events were written; others do not."""
    async with joined(app.url, {"timing": timing}) as client:
        await insert(connection, "a", "b")
        if timing:
            name, times = await client.event()
            assert name == "feed:timing" and 0 <= times["now"] - times["at"] < 10_000
        assert [event[0] for event in await client.take(2)] == ["thing:create"] * 2
        assert await client.silent(0.2)


@BOTH_PATHS
@pytest.mark.parametrize("name", ["socket.io.js", "socket.io.min.js", "socket.io.esm.min.js"])
async def test_the_client_is_served(http: httpx.AsyncClient, path: str, name: str) -> None:
    """The official client and its source map are where Socket.IO servers have them."""
    answer = await http.get(path + name)
    assert answer.status_code == 200 and "javascript" in answer.headers["Content-Type"]
    source_map = re.search(r"sourceMappingURL=(\S+)", answer.text)
    assert source_map
    assert (await http.get(path + source_map[1])).json()["version"] == 3
    assert (await http.get(path + "nothing.js")).status_code == 404
    assert (await http.get(path + "../package.json")).status_code == 404


# Polling


async def test_polling(app: App, http: httpx.AsyncClient, connection: Connection) -> None:
    """A client without WebSockets joins and gets the same events, at most 16 an answer."""
    client = PollingClient(http)
    opening = await client.open()
    assert opening["upgrades"] == ["websocket"]
    assert (await client.post("40")).status_code == 200
    answer, hello = await client.poll()
    assert answer.startswith('40{"sid"') and hello.startswith('42["feed:hello"')
    await insert(connection, *(f"{number}" for number in range(50)))
    packets: list[str] = []
    while len(packets) < 50:
        some = await client.poll()
        assert 1 <= len(some) <= POLL_PACKETS == 16
        packets += some
    assert [json.loads(packet[2:])[1]["name"] for packet in packets] == [str(i) for i in range(50)]
    await client.post("1")
    await eventually(lambda: app.empty)
    assert (await client.post("40")).status_code == 400


async def test_upgrading(app: App, http: httpx.AsyncClient, connection: Connection) -> None:
    """A client that changes from polling to WebSocket on the way misses and doubles nothing."""
    polling = PollingClient(http)
    await polling.open()
    await polling.post("40")
    received = (await polling.poll())[2:]
    names: list[str] = []

    async def write() -> None:
        for number in range(60):
            await insert(connection, f"{number}")
            await asyncio.sleep(0.005)

    async def poll_until_released() -> None:
        while True:
            packets = await polling.poll()
            received.extend(packet for packet in packets if packet != "6")
            if "6" in packets:
                return

    writing = asyncio.create_task(write())
    address = app.url.replace("http", "ws") + polling.address.replace("polling", "websocket")
    async with open_websocket(address, proxy=None) as websocket:
        polls = asyncio.create_task(poll_until_released())
        await asyncio.sleep(0.1)
        await websocket.send("2probe")
        assert await websocket.recv() == "3probe"
        await polls
        await websocket.send("5")
        names = [json.loads(packet[2:])[1]["name"] for packet in received]
        async with asyncio.timeout(10):
            while len(names) < 60:
                frame = str(await websocket.recv())
                if frame != "6":  # "nothing", for a poll that was not waiting
                    names.append(json.loads(frame[2:])[1]["name"])
        await writing
        assert names == [str(i) for i in range(60)]
        assert (await polling.post("3")).status_code == 400
    await eventually(lambda: app.empty)


async def test_an_upgrade_that_is_given_up(
    app: App, http: httpx.AsyncClient, connection: Connection
) -> None:
    """A client whose WebSocket fails while it tries to upgrade goes on by polling."""
    client = PollingClient(http)
    await client.open()
    await client.post("40")
    await client.poll()
    address = app.url.replace("http", "ws") + client.address.replace("polling", "websocket")
    for sent in ([], ["nonsense"], ["2probe"], ["2probe", "nonsense"]):
        async with open_websocket(address, proxy=None) as websocket:
            for frame in sent:
                await websocket.send(frame)
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
    await insert(connection, "a")
    packets: list[str] = []
    while not any("thing:create" in packet for packet in packets):
        packets += await client.poll()
    assert app.broadcast.stats().subscribers == 1


# Joining


async def test_nothing_before_joining(app: App, connection: Connection) -> None:
    """A client that has not sent CONNECT gets no event, and none of before it joined."""
    async with opened(app.url) as client:
        async with joined(app.url) as other:
            await insert(connection, "before")
            await other.take(1)
        assert await client.silent(0.2)
        await client.join()
        await insert(connection, "after")
        assert (await client.event())[1]["name"] == "after"


async def offset_of_before(app: App, connection: Connection) -> str:
    """An offset that the server has to read the log to judge."""
    offset: str = await connection.fetchval("SELECT feed.offset()")
    await insert(connection, "since")
    async with joined(app.url):
        assert await app.feed.look()
    app.replay.clear()
    return offset


async def test_nothing_while_joining(app: App, connection: Connection) -> None:
    """While a client's offset is being judged it gets nothing, whatever is written; then hello,
    what it missed, and what came meanwhile, in order.
    """
    since = await offset_of_before(app, connection)
    async with opened(app.url) as client, connection.transaction():
        await connection.execute("LOCK TABLE feed.change IN ACCESS EXCLUSIVE MODE")
        await client.send("40" + json.dumps({"since": since}))
        await insert(connection, "meanwhile")
        assert await client.silent(0.3)
        await connection.execute("COMMIT")
        assert (await client.frame()).startswith("40{")
        assert (await client.event())[:2] == ["feed:hello", {"recovered": True}]
        assert [event[1]["name"] for event in await client.take(2)] == ["since", "meanwhile"]
        await connection.execute("BEGIN")


async def test_joining_before_the_server_is_ready(server: RunningServer) -> None:
    """A client that comes in the moment the server starts waits a little, and is not sent away."""
    async with joined(server.url) as client:
        assert client.recovered is False


async def test_departure_while_joining(app: App, connection: Connection) -> None:
    """A client that goes while its offset is being judged leaves nothing behind."""
    since = await offset_of_before(app, connection)
    async with connection.transaction():
        await connection.execute("LOCK TABLE feed.change IN ACCESS EXCLUSIVE MODE")
        for _ in range(5):
            async with opened(app.url) as client:
                await client.send("40" + json.dumps({"since": since}))
                await eventually(lambda: app.broadcast.stats().subscribers)
    await eventually(lambda: app.empty)


async def test_a_stall_while_joining(
    app: App, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is locked: a client whose offset cannot be judged is held, and continues when the log
    can be read again.
    """
    monkeypatch.setattr(broadcast_module, "JOIN_TIMEOUT_S", 0.2)
    since = await offset_of_before(app, connection)
    async with opened(app.url) as client:
        async with connection.transaction():
            await connection.execute("LOCK TABLE feed.change IN ACCESS EXCLUSIVE MODE")
            await client.send("40" + json.dumps({"since": since}))
            assert (await client.frame()).startswith("40{")
            assert (await client.state())["live"] is False
        assert (await client.event())[:2] == ["feed:hello", {"recovered": True}]
    await eventually(lambda: app.empty)


async def test_an_offset_that_cannot_be_judged_although_the_feed_reads(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client whose offset cannot be judged in time is let go, so that it tries again; it is
    not refused, because after that it would not.
    """

    async def stall(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(broadcast_module, "JOIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(Replay, "judge", stall)
    monkeypatch.setattr(Replay, "judge_at_once", lambda *_: (False, None))
    async with opened(app.url) as client:
        await client.send("40")
        assert await client.closed() == []
    await eventually(lambda: app.empty)


async def test_an_exception_while_joining(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of ours while a client joins closes its connection, is logged, and leaves nothing."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Replay, "judge", fail)
    monkeypatch.setattr(Replay, "judge_at_once", lambda *_: (False, None))
    async with opened(app.url) as client:
        await client.send("40")
        assert await client.closed() == []
    assert (
        app.empty and "the replay has failed" in caplog.text and "ZeroDivisionError" in caplog.text
    )


async def test_an_exception_while_welcoming(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of ours in the moment a client joins closes its connection, is logged, and leaves
    nothing, by either transport.
    """

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(frames, "hello", fail)
    async with opened(app.url) as client, httpx.AsyncClient(base_url=app.url) as http:
        await client.send("40")
        assert await client.closed() == []
        polling = PollingClient(http)
        await polling.open()
        assert (await polling.post("40")).status_code == 400
    await eventually(lambda: app.empty)
    assert app.socketio.stats().closed[CloseReason.INTERNAL_ERROR] == 2
    assert "ZeroDivisionError" in caplog.text


async def test_leaving_and_joining_again(app: App, connection: Connection) -> None:
    """A client may leave the namespace on its connection, hears nothing then, and may return."""
    async with joined(app.url) as client:
        await client.send("41")
        await eventually(lambda: not app.broadcast.stats().subscribers)
        await insert(connection, "unheard")
        assert await client.silent(0.2)
        await client.join({"pid": client.pid, "offset": client.offset})
        assert client.recovered and (await client.event())[1]["name"] == "unheard"


async def test_a_session_without_connect_is_closed(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that opens a session and does not join, or leaves and does not return, is closed."""
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.3)
    async with (
        serving_here(database_url) as app,
        httpx.AsyncClient(base_url=app.url, timeout=10) as http,
    ):
        async with opened(app.url) as silent, opened(app.url) as left:
            await left.join()
            await left.send("41")
            assert await silent.closed() == [] and await left.closed() == []
        polling = PollingClient(http)
        await polling.open()
        assert (await http.get(polling.address)).status_code == 400
        await eventually(lambda: app.empty)
        assert app.socketio.stats().closed[CloseReason.NO_CONNECT] == 3


async def test_joining_in_time_stops_the_deadline(
    database_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has joined is not closed when the time to join is over."""
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.2)
    async with serving_here(database_url) as app, joined(app.url) as client:
        await asyncio.sleep(0.4)
        await insert(connection, "a")
        assert (await client.event())[0] == "thing:create"


# The end of a connection


async def test_a_vanished_client_is_noticed(database_url: str) -> None:
    """A client that no longer answers is gone after ping interval and timeout; one that answers
    stays, and both transports are judged alike.
    """
    async with (
        serving_here(database_url, ping_interval=0.2, ping_timeout=0.2) as app,
        joined(app.url) as lively,
        joined(app.url) as vanished,
        httpx.AsyncClient(base_url=app.url, timeout=10) as http,
    ):
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        answering = asyncio.create_task(lively.closed(20))
        await eventually(lambda: app.broadcast.stats().subscribers == 1, 5)
        with pytest.raises(ConnectionClosed):
            while True:
                await vanished.websocket.recv()
        await asyncio.sleep(0.6)
        assert app.broadcast.stats().subscribers == 1 and not answering.done()
        answering.cancel()
        await asyncio.wait([answering])


async def test_shutting_down(server: RunningServer) -> None:
    """When the server stops it closes the transports; a Socket.IO DISCONNECT would keep clients
    from coming back.
    """
    await until_ready(server.url)
    async with joined(server.url) as client, httpx.AsyncClient(base_url=server.url) as http:
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        await polling.poll()
        waiting = asyncio.create_task(polling.poll())
        await asyncio.sleep(0.1)
        assert await asyncio.to_thread(server.stop) == 0
        assert await client.closed() == []
        with suppress(httpx.HTTPError):
            assert "41" not in await waiting
    assert "Traceback" not in server.log and "ERROR" not in server.log


async def test_shutting_down_while_clients_join(
    server: RunningServer, connection: Connection
) -> None:
    """A server that stops does not wait for clients whose offsets cannot be judged just now, and
    has nothing to complain of.
    """
    connect = "40" + json.dumps({"since": await connection.fetchval("SELECT feed.offset()")})
    await insert(connection, "missed")
    await asyncio.to_thread(server.restart)  # so that it must read the log to judge
    await until_ready(server.url)
    async with (
        opened(server.url) as client,
        httpx.AsyncClient(base_url=server.url) as http,
        connection.transaction(),
    ):
        await connection.execute("LOCK TABLE feed.change IN ACCESS EXCLUSIVE MODE")
        polling = PollingClient(http)
        await polling.open()
        posting = asyncio.create_task(polling.post(connect))
        await client.send(connect)
        async with asyncio.timeout(10):
            while await connection.fetchval(WAITING_TO_READ) < 3:  # the feed, and two who join
                await asyncio.sleep(0.02)
        assert await asyncio.to_thread(server.stop) == 0
        assert await client.closed() == []
        with suppress(httpx.HTTPError):
            await posting
    assert "Traceback" not in server.log and "ERROR" not in server.log


async def test_a_stopping_node_opens_no_sessions(any_app: App) -> None:
    """A proxy passes another client on to a node that has just closed its sessions."""
    async with httpx.AsyncClient(base_url=any_app.url) as http:
        any_app.socketio.close()
        answer = await http.get(f"{PATH}{QUERY}polling")
        assert answer.status_code == 503 and "stopping" in answer.json()["message"]
        with pytest.raises(InvalidStatus):
            async with opened(any_app.url):
                pass
