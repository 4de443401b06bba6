"""What the database does to the server, one fault a test: nothing is lost, and readiness and REST
tell the truth meanwhile.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import asyncpg
import httpx
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from tests.faults.follower import Follower, followed, readiness, until_readiness
from tests.support.proxy import proxied
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import joined, until_ready

StartServer = Callable[..., RunningServer]
StartPostgres = Callable[..., Server]

BACKENDS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
OURS = f"{BACKENDS} AND datname = current_database()"
LISTENER = f"{OURS} AND query LIKE '%pg_notify%' OR query LIKE 'LISTEN%'"


async def ask_rest(url: str, seconds: float) -> int:
    """The status of a REST answer, which must come within so many seconds."""
    async with httpx.AsyncClient(base_url=url, timeout=seconds) as http:
        answer = await http.get("/api/things?limit=1")
        kind = answer.headers["Content-Type"]
        assert kind == ("application/json" if answer.is_success else "application/problem+json")
        return answer.status_code


def no_fault_shows(server: RunningServer) -> None:
    """The log tells of no fault of ours."""
    assert "Traceback" not in server.log


def immediate(postgres: Server) -> None:
    """Stop as `pg_ctl stop -m immediate` does: without a checkpoint, clients cut off."""
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGQUIT)
    deadline = time.monotonic() + 20
    while postgres.pid is not None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("end", [Server.stop, immediate, Server.kill])
async def test_postgres_goes_and_returns(
    private_postgres: StartPostgres, start_server: StartServer, end: Callable[[Server], None]
) -> None:
    """Postgres is stopped fast, at once, or killed, and stays away for a while: REST says 503 at
    once, readiness says why, and all goes on by itself when it is back.
    """
    postgres = private_postgres(fsync="off")
    server = start_server(database_url=postgres.url)
    async with followed(postgres.url, Follower(server.url)) as writer:
        await asyncio.to_thread(end, postgres)
        assert "database" in await until_readiness(server.url, 503, 10)
        away_until = time.monotonic() + scaled(1.0, 60)
        while time.monotonic() < away_until:
            assert await ask_rest(server.url, 1.0) == 503
            assert (await readiness(server.url))[0] == 503
            await asyncio.sleep(0.1)
        await asyncio.to_thread(postgres.start)
        await writer.write_on()
        await until_readiness(server.url, 200)
        assert await ask_rest(server.url, 5) == 200
    no_fault_shows(server)


async def test_postgres_is_restarted_again_and_again(
    private_postgres: StartPostgres, start_server: StartServer
) -> None:
    """Postgres is restarted before everybody is back from the last time."""
    postgres = private_postgres(fsync="off")
    server = start_server(database_url=postgres.url)
    async with followed(postgres.url, Follower(server.url)) as writer:
        for _ in range(scaled(3, 20)):
            await asyncio.to_thread(postgres.restart)
            await asyncio.sleep(0.1)  # some are back by then, some are not
        await writer.write_on()
    no_fault_shows(server)


@pytest.mark.parametrize("whom", [LISTENER, OURS])
async def test_killed_backends(
    server: RunningServer, database_url: str, connection: Connection, whom: str
) -> None:
    """The listener's backend, or every backend, the writer's too, is killed again and again."""
    async with followed(database_url, Follower(server.url)) as writer:
        until = time.monotonic() + scaled(2, 20)
        while time.monotonic() < until:
            await connection.execute(whom)
            await asyncio.sleep(0.15)  # the pace of the fault
        await writer.write_on()
        await until_readiness(server.url, 200)
    no_fault_shows(server)


async def test_a_black_hole_before_the_database(
    database_url: str, start_server: StartServer
) -> None:
    """Nothing comes through from, to, or between database and server: readiness and REST notice
    within seconds, and all goes on when the way is open again.
    """

    async with AsyncExitStack() as stack:
        proxies, servers = [], []
        for _ in range(3):
            proxy, url = await stack.enter_async_context(proxied(database_url))
            servers.append(await asyncio.to_thread(start_server, database_url=url))
            proxies.append(proxy)
        urls = [server.url for server in servers]
        async with followed(database_url, *map(Follower, urls)) as writer:
            proxies[0].hold(forth=False)
            proxies[1].hold(back=False)
            proxies[2].hold()
            for answer in asyncio.as_completed([ask_rest(url, 10) for url in urls]):
                assert await answer == 503
            assert all([await until_readiness(url, 503, 10) for url in urls])
            await writer.write_on()
            for proxy in proxies:
                proxy.pass_on()
            for url in urls:
                await until_readiness(url, 200)
                assert await ask_rest(url, 10) == 200
        for server in servers:
            no_fault_shows(server)


async def test_commits_out_of_order(
    server: RunningServer, database_url: str, connection: Connection
) -> None:
    """Ten writers draw their ids in one order and commit in the other, each let through by an
    advisory lock; a client has every change once, in the order of the commits.
    """
    await until_ready(server.url)
    writers = [await connect(database_url) for _ in range(10)]
    async with joined(server.url) as client:
        committing = []
        for number, writer in enumerate(writers):
            await connection.execute("SELECT pg_advisory_lock($1)", number)
            await writer.execute(
                f"BEGIN; INSERT INTO things (name) VALUES ('{number} a'), ('{number} b')"
            )
            gated = f"SELECT pg_advisory_xact_lock({number}); COMMIT"
            committing.append(asyncio.create_task(writer.execute(gated)))
        for number in reversed(range(10)):
            await connection.execute("SELECT pg_advisory_unlock($1)", number)
            await committing[number]
            names = [event[1]["name"] for event in await client.take(2)]
            assert names == [f"{number} a", f"{number} b"]
        assert await client.silent(0.2)
    for writer in writers:
        await writer.close()


async def test_a_serializable_transaction_that_fails_after_its_bell(
    server: RunningServer, database_url: str, connection: Connection
) -> None:
    """Of two serializable transactions that cannot both be, one is refused at its commit, after it
    rang: what it wrote is never sent, what the other wrote is.
    """
    await until_ready(server.url)
    async with joined(server.url) as client:
        other = await connect(database_url)
        for each in (connection, other):
            await each.execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM things")
        await connection.execute("INSERT INTO things (name) VALUES ('kept')")
        await other.execute("INSERT INTO things (name) VALUES ('refused')")
        await connection.execute("COMMIT")
        with pytest.raises(asyncpg.SerializationError):
            await other.execute("COMMIT")
        await connection.execute("INSERT INTO things (name) VALUES ('after')")
        assert [event[1]["name"] for event in await client.take(2)] == ["kept", "after"]
        await other.close()


async def test_a_prepared_transaction_left_open(
    private_postgres: StartPostgres, start_server: StartServer
) -> None:
    """A prepared transaction that nobody ends holds only its own changes back, and the log says
    so; when it is committed they come.
    """
    postgres = private_postgres(fsync="off", max_prepared_transactions=2)
    connection = await connect(postgres.url)
    await connection.execute(
        "BEGIN; INSERT INTO things (name) VALUES ('prepared'); PREPARE TRANSACTION 'p'"
    )
    server = start_server(database_url=postgres.url)
    await until_ready(server.url)
    async with joined(server.url) as client:
        await connection.execute("INSERT INTO things (name) VALUES ('other')")
        assert (await client.event())[1]["name"] == "other"
        async with asyncio.timeout(10):
            while "a prepared transaction holds back" not in server.log:
                await asyncio.sleep(0.05)
        await connection.execute("COMMIT PREPARED 'p'")
        assert (await client.event())[1]["name"] == "prepared"
    await connection.close()


def test_no_database_at_the_start(
    private_postgres: StartPostgres, start_server: StartServer
) -> None:
    """A server that finds no database says so in a sentence and ends."""
    postgres = private_postgres(fsync="off")
    postgres.stop()
    with pytest.raises(RuntimeError, match="The database cannot be reached") as failure:
        start_server(database_url=postgres.url)
    assert "Traceback" not in str(failure.value)
