"""What the database does to the server, one fault per test: nothing is lost, and readiness and REST
report the truth.
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
    """Return the status of a REST response, which must arrive within `seconds`."""
    async with httpx.AsyncClient(base_url=url, timeout=seconds) as http:
        answer = await http.get("/api/things?limit=1")
        kind = answer.headers["Content-Type"]
        assert kind == ("application/json" if answer.is_success else "application/problem+json")
        return answer.status_code


def no_fault_shows(server: RunningServer) -> None:
    """Check that the log shows no fault of ours."""
    assert "Traceback" not in server.log


def immediate(postgres: Server) -> None:
    """Stop like `pg_ctl stop -m immediate`: without a checkpoint, cutting clients off."""
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGQUIT)
    deadline = time.monotonic() + 20
    while postgres.pid is not None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("end", [Server.stop, immediate, Server.kill])
async def test_postgres_goes_and_returns(
    private_postgres: StartPostgres, start_server: StartServer, end: Callable[[Server], None]
) -> None:
    """Postgres is stopped fast, stopped immediately, or killed, and stays down for a while: REST
    answers 503 at once, readiness says why, and everything resumes by itself when it is back.
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
    """Postgres is restarted before all clients have recovered from the last restart."""
    postgres = private_postgres(fsync="off")
    server = start_server(database_url=postgres.url)
    async with followed(postgres.url, Follower(server.url)) as writer:
        for _ in range(scaled(3, 20)):
            await asyncio.to_thread(postgres.restart)
            while await ask_rest(server.url, 5) != 200:  # some are back by then, some are not
                await asyncio.sleep(0.02)
        await writer.write_on()
    no_fault_shows(server)


@pytest.mark.parametrize("whom", [LISTENER, OURS])
async def test_killed_backends(
    server: RunningServer, database_url: str, connection: Connection, whom: str
) -> None:
    """The listener's backend, or every backend including the writer's, is killed repeatedly."""
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
    """Packets to the database, from it, or both are lost: readiness and REST notice within seconds,
    and everything resumes when they get through again.
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
    """Ten writers draw their ids in one order and commit in another, each released by an advisory
    lock; a client receives every change once, in the order of the commits.
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
    """Of two conflicting serializable transactions, one fails at commit, after it rang: its changes
    are never sent, the other's are.
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
    """A prepared transaction that is left open holds back only its own changes, and the log says
    so; when it is committed they are sent.
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
    """A server that finds no database exits with a sentence that says so."""
    postgres = private_postgres(fsync="off")
    postgres.stop()
    with pytest.raises(RuntimeError, match="The database cannot be reached") as failure:
        start_server(database_url=postgres.url)
    assert "Traceback" not in str(failure.value)
