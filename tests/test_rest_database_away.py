"""REST while the database is down, shutting down, or busy: 503 soon, and recovery afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import httpx
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from tests.support.proxy import Proxy
from tests.support.server import RunningServer

SOON_S = 4.0  # sooner than any statement timeout
DEAD_NETWORK_S = 9.5
BLOCKED = """
    SELECT pid FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND datname = current_database() AND query LIKE '%UPDATE%'
"""


@pytest.fixture
async def locked_thing(database_url: str) -> AsyncIterator[None]:
    """The thing `a`, locked by another open transaction."""
    connection = await connect(database_url)
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    async with connection.transaction():
        await connection.execute("SELECT FROM things WHERE name = 'a' FOR UPDATE")
        yield
    await connection.close()


def unavailable(response: httpx.Response) -> None:
    """Check that a response tells the client to try again later."""
    assert response.status_code == 503, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert int(response.headers["Retry-After"]) >= 1


async def blocked_backend(connection: Connection) -> int:
    """Return the process id of the backend that waits for a lock, once there is one."""
    deadline = time.monotonic() + 5
    while (pid := await connection.fetchval(BLOCKED)) is None:
        assert time.monotonic() < deadline, "no backend is waiting for the lock"
        await asyncio.sleep(0.01)
    assert isinstance(pid, int)
    return pid


async def back_in_service(client: httpx.AsyncClient) -> None:
    """Wait until the list is available again, retrying as a client would."""
    deadline = time.monotonic() + 15
    while (response := await client.get("/api/things")).status_code != 200:
        unavailable(response)
        assert time.monotonic() < deadline, "the database is back, but requests still fail"
        await asyncio.sleep(0.05)


async def everything(client: httpx.AsyncClient) -> list[httpx.Response]:
    """Send one request of every kind, all at once."""
    responses = await asyncio.gather(
        client.get("/api/things"),
        client.head("/api/things"),
        client.post("/api/things", json={"name": "b"}),
        client.get("/api/things/a"),
        client.patch("/api/things/a", json={"info": "new"}),
        client.delete("/api/things/a"),
    )
    return list(responses)


async def test_a_stopped_database_comes_back(
    private_postgres: Callable[..., Server], start_server: Callable[..., RunningServer]
) -> None:
    """Postgres is killed and started again during requests: 503 at once, then normal responses."""
    postgres = private_postgres()
    server = start_server(database_url=postgres.url)
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.post("/api/things", json={"name": "kept"})).status_code == 201
        postgres.kill()
        began = time.monotonic()
        for response in [*await everything(client), *await everything(client)]:
            unavailable(response)
        assert time.monotonic() - began < SOON_S
        # A bad request is refused even without a database.
        assert (await client.post("/api/things", json={})).status_code == 422
        await asyncio.to_thread(postgres.start)
        assert (await client.get("/api/things/kept")).status_code == 200
        assert (await client.post("/api/things", json={"name": "b"})).status_code == 201
    assert "Traceback" not in server.log


async def test_a_database_behind_a_dead_network(
    database_url: str, start_server: Callable[..., RunningServer]
) -> None:
    """The network swallows everything between server and database: no response takes forever."""
    at = urlsplit(database_url)
    assert at.hostname and at.port
    async with Proxy(at.hostname, at.port) as proxy:
        through = at._replace(netloc=f"{at.username}:{at.password}@127.0.0.1:{proxy.port}")
        server = await asyncio.to_thread(start_server, database_url=through.geturl())
        async with httpx.AsyncClient(base_url=server.url, timeout=15) as client:
            assert (await client.get("/api/things")).status_code == 200
            proxy.hold()
            began = time.monotonic()
            for response in await everything(client):
                unavailable(response)
            assert time.monotonic() - began < DEAD_NETWORK_S
            proxy.pass_on()
            proxy.cut()
            await back_in_service(client)
    assert "Traceback" not in server.log


async def test_a_killed_backend_is_not_retried(
    server: RunningServer, connection: Connection, locked_thing: None
) -> None:
    """An administrator kills the backend that is writing: 503, and nothing is written."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        patch = asyncio.create_task(client.patch("/api/things/a", json={"info": "new"}))
        pid = await blocked_backend(connection)
        await connection.execute("SELECT pg_terminate_backend($1)", pid)
        unavailable(await patch)
        assert (await client.get("/api/things/a")).json()["info"] == ""
    assert "Traceback" not in server.log


async def test_all_connections_killed_while_idle(
    server: RunningServer, connection: Connection
) -> None:
    """An administrator kills every idle backend: the next requests open new connections."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        await asyncio.gather(*(client.get("/api/things") for _ in range(10)))
        ended = await connection.fetchval(
            """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid()"""
        )
        assert ended > 1
        await back_in_service(client)
        answers = await asyncio.gather(*(client.get("/api/things") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
    assert "Traceback" not in server.log


async def test_a_pool_without_a_free_connection(
    start_server: Callable[..., RunningServer], connection: Connection, locked_thing: None
) -> None:
    """A request waits for a lock on the only connection: others get 503 soon."""
    server = start_server(POOL_SIZE=1)
    async with httpx.AsyncClient(base_url=server.url, timeout=15) as client:
        patch = asyncio.create_task(client.patch("/api/things/a", json={"info": "new"}))
        await blocked_backend(connection)
        began = time.monotonic()
        unavailable(await client.get("/api/things"))
        assert time.monotonic() - began < SOON_S
        unavailable(await patch)  # by the statement timeout
        assert (await client.get("/api/things")).status_code == 200
    assert "Traceback" not in server.log


async def test_a_database_that_is_being_restored(
    server: RunningServer, connection: Connection
) -> None:
    """A dump is restored over the running database: 503 while the table does not exist."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/api/things")).status_code == 200
        await connection.execute("ALTER TABLE things RENAME TO things_restored")
        for response in await everything(client):
            unavailable(response)
        await connection.execute("ALTER TABLE things_restored RENAME TO things")
        assert (await client.get("/api/things")).status_code == 200
        await connection.execute("ALTER TABLE things ADD COLUMN colour text NOT NULL DEFAULT 'red'")
        created = await client.post("/api/things", json={"name": "b"})
        assert created.json()["colour"] == "red"
        assert (await client.get("/api/things/b")).content == created.content
        assert (await client.get("/api/things")).json() == [created.json()]
    assert "Traceback" not in server.log
