"""`feed:state`: every client learns soon that the database is away, and that it is back."""

import asyncio
import json
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import psutil
import pytest
import socketio

from app.application import end
from app.database.connections import Connection
from app.database.embedded import Server
from app.feed import health, pacing
from tests.support.feeds import eventually
from tests.support.node_client import node_client
from tests.support.proxy import Proxy, proxied
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import (
    App,
    PollingClient,
    RawClient,
    joined,
    opened,
    serving_here,
    until_ready,
)
from tests.support.writing import insert

SOON_S = 2.0
STOP_S = 5.0
SENTENCE = re.compile(r"[A-Z][^\n]*\.")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
StartPostgres = Callable[..., Server]


def suspend(postgres: Server, how: signal.Signals) -> None:
    """Stop or continue every process of a Postgres."""
    postmaster = psutil.Process(postgres.pid)
    for process in (postmaster, *postmaster.children()):
        process.send_signal(how)


def kill(postgres: Server, _: Proxy) -> None:
    postgres.kill()


def shut_down(postgres: Server, _: Proxy) -> None:
    postgres.stop()


def fall_silent(postgres: Server, _: Proxy) -> None:
    suspend(postgres, signal.SIGSTOP)


def become_a_black_hole(_: Server, network: Proxy) -> None:
    network.hold()


def swallow_answers(_: Server, network: Proxy) -> None:
    network.hold(forth=False)


def come_back(postgres: Server, network: Proxy) -> None:
    """Undo any of these."""
    if postgres.pid is None:
        postgres.start()
    else:
        suspend(postgres, signal.SIGCONT)
        network.pass_on()


def is_outage(state: dict[str, Any]) -> bool:
    """Check a `feed:state` and return whether it says that the database is away."""
    if state == {"live": True}:
        return False
    assert state.keys() == {"live", "since", "reason"} and state["live"] is False
    assert TIME.fullmatch(state["since"]) and SENTENCE.fullmatch(state["reason"])
    return True


async def reports(client: RawClient, outage: bool, timeout: float = 10) -> None:
    """Wait until a client is told that the database is away, or that it is back."""
    while is_outage(await client.state(timeout)) != outage:
        assert not outage  # another reason


@pytest.mark.parametrize(
    "leave", [kill, shut_down, fall_silent, become_a_black_hole, swallow_answers]
)
async def test_clients_learn_within_two_seconds_that_the_database_is_away(
    private_postgres: StartPostgres, leave: Callable[[Server, Proxy], None]
) -> None:
    """The database is killed, shut down, suspended, or cut off: clients on every transport are told
    so within two seconds, and so is /readyz; when it is back, that it is, and changes follow.
    """
    postgres = private_postgres(fsync="off")
    async with AsyncExitStack() as stack:
        network, url = await stack.enter_async_context(proxied(postgres.url))
        app = await stack.enter_async_context(serving_here(url))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=app.url, timeout=30))
        client = await stack.enter_async_context(joined(app.url))
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        await polling.poll()
        offset = client.offset
        began = time.monotonic()
        await asyncio.to_thread(leave, postgres, network)
        await reports(client, outage=True, timeout=SOON_S + 0.5)
        assert time.monotonic() - began < SOON_S + 0.5  # the time it takes to leave, too
        [packet] = await polling.poll()
        assert is_outage(json.loads(packet[2:])[1])
        refused = (await http.get("/readyz")).json()
        assert refused["detail"] == client.states[-1]["reason"]
        assert client.offset == offset

        await asyncio.to_thread(come_back, postgres, network)
        network.cut()
        await reports(client, outage=False, timeout=20)
        assert app.feed.trouble() is None
        packets = await polling.poll()
        assert json.loads(packets[-1][2:]) == ["feed:state", {"live": True}]
        assert (await http.post("/api/things", json={"name": "after"})).status_code == 201
        assert (await client.event())[1]["name"] == "after"


async def test_the_second_outage_is_noticed_like_the_first(
    private_postgres: StartPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database comes back after more time than any rule waits for, and then falls silent."""
    monkeypatch.setattr(health, "BEHIND_S", 2.0)
    postgres = private_postgres(fsync="off")
    async with (
        proxied(postgres.url) as (network, url),
        serving_here(url) as app,
        joined(app.url) as client,
    ):
        for leave in (shut_down, fall_silent, fall_silent):
            await asyncio.to_thread(leave, postgres, network)
            await reports(client, outage=True, timeout=SOON_S + 0.5)
            await asyncio.sleep(health.BEHIND_S)
            await asyncio.to_thread(come_back, postgres, network)
            network.cut()
            await reports(client, outage=False, timeout=20)


async def test_a_connection_replaced_at_once_is_not_mentioned(
    app: App, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator ends the feed's backends: it reconnects, clients hear only of changes."""
    monkeypatch.setattr(health, "GRACE_S", 10)  # however slow the machine is
    monkeypatch.setattr(health, "SILENT_S", 10)
    async with joined(app.url) as client:
        for number in range(3):
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
            await insert(connection, f"{number}")
            assert (await client.event())[1]["name"] == f"{number}"
        assert client.states == []


async def test_who_connects_meanwhile_stays_and_is_told(
    private_postgres: StartPostgres,
) -> None:
    """While the database is away, clients connect: without an offset, with one that is known, and
    with one that cannot be judged. All are answered at once, told of the outage, and stay; once it
    is back, each continues or is told to load again.
    """
    postgres = private_postgres(fsync="off")
    async with serving_here(postgres.url) as app, AsyncExitStack() as stack:
        async with joined(app.url) as first, httpx.AsyncClient(base_url=app.url) as http:
            known = {"pid": first.pid, "offset": first.offset}
            for name in ("a", "b"):
                assert (await http.post("/api/things", json={"name": name})).status_code == 201
            await first.take(2)
            current = {"pid": first.pid, "offset": first.offset}
        app.replay.clear()
        postgres.kill()
        await eventually(lambda: app.feed.outage)

        new = await stack.enter_async_context(joined(app.url))
        up_to_date = await stack.enter_async_context(joined(app.url, current))
        behind = await stack.enter_async_context(opened(app.url))
        await behind.send("40" + json.dumps(known))
        connected = json.loads((await behind.frame())[2:])
        assert connected["pid"] != first.pid  # which would say that it can continue
        for client in (new, up_to_date, behind):
            assert is_outage(await client.state())
        assert (new.recovered, up_to_date.recovered) == (False, True)
        assert await behind.silent()

        await asyncio.to_thread(postgres.start)
        name, hello, _ = await behind.event()
        assert (name, hello) == ("feed:hello", {"recovered": True})
        assert [event[1]["name"] for event in await behind.take(2)] == ["a", "b"]
        for client in (new, up_to_date, behind):
            await reports(client, outage=False)
        async with httpx.AsyncClient(base_url=app.url) as http:
            assert (await http.post("/api/things", json={"name": "c"})).status_code == 201
        for client in (new, up_to_date, behind):
            assert (await client.event())[1]["name"] == "c"


async def test_a_node_that_never_reached_its_database(private_postgres: StartPostgres) -> None:
    """A node starts just as the database goes away: a client is answered, told, and served when the
    database is there.
    """
    postgres = private_postgres(fsync="off")
    async with proxied(postgres.url) as (network, url):
        network.hold()
        async with serving_here(url, ready=False) as app, opened(app.url) as client:
            await client.send("40")
            assert (await client.frame()).startswith("40{")
            assert is_outage(await client.state())
            network.cut()
            network.pass_on()
            name, hello, _ = await client.event(20)
            assert (name, hello) == ("feed:hello", {"recovered": False})
            await reports(client, outage=False)


@pytest.mark.parametrize("transport", ["websocket", "polling"])
async def test_official_clients_are_told_and_stay_connected(
    private_postgres: StartPostgres, transport: str
) -> None:
    """The Node.js and Python clients, unmodified, are told of an outage; while it lasts, others of
    their kind connect and are told as well. Nobody is disconnected.
    """
    postgres = private_postgres(fsync="off")
    async with serving_here(postgres.url) as app, AsyncExitStack() as stack:

        async def python_client() -> list[dict[str, Any]]:
            client = socketio.AsyncClient(reconnection=False)
            states: list[dict[str, Any]] = []
            client.on("feed:state", states.append)
            client.on("disconnect", lambda *_: states.append({"disconnected": True}))
            await client.connect(app.url, transports=[transport])
            stack.push_async_callback(client.disconnect)
            return states

        node = await stack.enter_async_context(node_client(app.url, transport))
        await eventually(lambda: any(line[0] == "feed:hello" for line in node))
        python = await python_client()
        app.replay.clear()
        postgres.kill()
        await eventually(lambda: len(python) == 1 and node[-1][0] == "feed:state")
        assert is_outage(python[0]) and is_outage(node[-1][1])
        late_node = await stack.enter_async_context(node_client(app.url, transport))
        late_python = await python_client()
        await eventually(lambda: late_python and late_node and late_node[-1][0] == "feed:state")
        assert is_outage(late_python[0]) and is_outage(late_node[-1][1])
        await asyncio.to_thread(postgres.start)
        live = {"live": True}
        for states in (python, late_python):
            await eventually(lambda states=states: states[-1] == live)  # type: ignore[misc]
        for lines in (node, late_node):
            await eventually(lambda lines=lines: lines[-1] == ["feed:state", live])  # type: ignore[misc]
            assert [line[0] for line in lines].count("connect") == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", range(2))
async def test_the_last_state_a_client_has_seen_is_the_feeds(
    connection: Connection, database_url: str, seed: int
) -> None:
    """The network to the database fails at random while rows are written and clients come, go,
    resume and read slowly: whenever it rests, each has last been told what is so.
    """
    dice = random.Random(seed)
    async with AsyncExitStack() as stack:
        network, url = await stack.enter_async_context(proxied(database_url))
        app = await stack.enter_async_context(serving_here(url))
        clients: list[tuple[RawClient, asyncio.Task[None]]] = []
        offset = ""
        for number in range(12):
            match dice.choice(["hold", "cut", "pass"]):
                case "hold":
                    network.hold(forth=dice.random() < 0.5)
                case "cut":
                    network.cut()
                case "pass":
                    network.cut()
                    network.pass_on()
            await insert(connection, f"{seed} {number}")
            if dice.random() < 0.5:
                app.replay.clear()
            client = await stack.enter_async_context(opened(app.url))
            await client.send("40" + json.dumps({"since": offset} if offset else {}))
            clients.append((client, asyncio.create_task(listen(client))))
            await asyncio.sleep(dice.random() * 0.8)
            offset = next((c.offset for c, _ in clients if c.offset and dice.random() < 0.5), "")
        network.cut()
        network.pass_on()
        await eventually(lambda: app.feed.trouble() is None)
        assert any(client.states for client, _ in clients)
        await eventually(lambda: all(thinks_live(client) for client, _ in clients))
        network.hold()
        await eventually(lambda: app.feed.trouble())
        await eventually(lambda: not any(thinks_live(client) for client, _ in clients))
        for client, listening in clients:
            assert not listening.done()
            assert client.states[-1]["reason"] == app.feed.trouble()
            listening.cancel()


async def test_a_node_that_stood_still(app: App, connection: Connection) -> None:
    """A node did nothing for longer than the database may be silent: that is not the database's
    silence, so nobody is told of an outage.
    """
    async with joined(app.url) as client:
        for number in range(scaled(1, 10)):
            asyncio.get_running_loop().call_soon(time.sleep, health.SILENT_S + 0.5)
            await asyncio.sleep(0)
            await insert(connection, f"{number}")
            assert (await client.any_event())[1]["name"] == f"{number}"


@pytest.mark.parametrize("pause_s", [0.1, 0.5, 0.9])
async def test_a_locked_log_is_no_absence(app: App, connection: Connection, pause_s: float) -> None:
    """Somebody locks the log for some seconds, whenever the feed has last looked: the database
    answers, so nobody is told that it does not.
    """
    async with joined(app.url) as client:
        await insert(connection, "seen")
        await client.event()
        await asyncio.sleep(pause_s)
        async with connection.transaction():
            await connection.execute("LOCK TABLE feed.change")
            assert await client.silent(3)
        await insert(connection, "later")
        assert (await client.any_event())[1]["name"] == "later"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens every time, so that a test sees many outages."""
    monkeypatch.setattr(health, "GRACE_S", 0.1)
    monkeypatch.setattr(health, "SILENT_S", 0.5)
    monkeypatch.setattr(pacing, "LOOK_S", 0.1)
    monkeypatch.setattr("app.feed.listener.COMMAND_TIMEOUT_S", 0.6)
    monkeypatch.setattr("app.feed.feed.READ_TIMEOUT_S", 0.6)
    monkeypatch.setattr("app.database.connections.CONNECT_TIMEOUT_S", 0.6)


async def listen(client: RawClient) -> None:
    """Take whatever comes."""
    while True:
        frame = await client.frame(timeout=60)
        if frame.startswith("40"):
            continue
        event = json.loads(frame[2:])
        if event[0] == "feed:state":
            client.states.append(event[1])
        elif isinstance(event[-1], str):
            client.offset = event[-1]


def thinks_live(client: RawClient) -> bool:
    """Whether a client's last news of the database, if any, is good."""
    return not client.states or client.states[-1] == {"live": True}


def test_the_log_says_why_in_plain_words(
    private_postgres: StartPostgres, start_server: Callable[..., RunningServer]
) -> None:
    """The database is suspended, then killed: the log and /readyz give a reason that anybody
    understands, and the log has a line when the feed is listening again.
    """
    postgres = private_postgres(fsync="off")
    server = start_server(database_url=postgres.url)
    asyncio.run(until_ready(server.url))
    suspend(postgres, signal.SIGSTOP)
    detail = until_unready(server.url)
    assert detail == "The database cannot be reached: it does not answer."
    suspend(postgres, signal.SIGCONT)
    asyncio.run(until_ready(server.url))
    postgres.kill()
    assert until_unready(server.url).startswith("The database cannot be reached: ")
    postgres.start()
    asyncio.run(until_ready(server.url))
    assert server.log.count("INFO tablecast.feed: listening") >= 3
    assert "cannot switch" not in server.log and "Traceback" not in server.log


async def test_a_server_stops_soon_while_the_database_is_silent(
    database_url: str, start_server: Callable[..., RunningServer]
) -> None:
    """The network swallows everything, statements of every task among it, and the server is asked
    to stop.
    """
    async with proxied(database_url) as (network, url):
        server = await asyncio.to_thread(start_server, database_url=url)
        await until_ready(server.url)
        network.hold()
        await asyncio.to_thread(until_unready, server.url)
        began = time.monotonic()
        assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
        assert time.monotonic() - began < STOP_S


async def test_a_task_that_misses_a_cancellation_is_cancelled_again() -> None:
    """A background task gets what it waited for just as the server stops."""
    arrived = asyncio.get_running_loop().create_future()

    async def wait_twice() -> None:
        await asyncio.wait_for(arrived, 60)
        await asyncio.Event().wait()

    task = asyncio.create_task(wait_twice())
    await asyncio.sleep(0)
    arrived.set_result(None)
    async with asyncio.timeout(10):
        await end([task])
    assert task.cancelled()


def until_unready(url: str) -> str:
    """Wait until a server is not ready, and return why."""
    deadline = time.monotonic() + 10
    while (answer := httpx.get(f"{url}/readyz")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    detail: str = answer.json()["detail"]
    return detail
