"""Between Tablecast and Postgres: poolers, several hosts, sockets."""

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from app.database.connections import CONNECT_TIMEOUT_S, Connection, connect
from app.database.embedded import Server
from app.database.migration import check, migrate
from tests.support.feeds import eventually, following
from tests.support.pgbouncer import pgbouncer
from tests.support.postgres import execute, in_thread, standby_of
from tests.support.proxy import Proxy
from tests.support.server import TABLECAST, RunningServer
from tests.support.sockets import joined, serving_here, until_ready
from tests.support.writing import insert

StartServer = Callable[..., RunningServer]
POOLED = "behind a pooler in transaction mode"
ODD = """
    SET TimeZone TO 'Asia/Tokyo'; SET DateStyle TO 'SQL'; SET search_path TO information_schema;
    SET statement_timeout TO '1ms'; SET bytea_output TO 'escape'; SET extra_float_digits TO -15
"""


# Poolers


def test_everything_works_through_a_session_pooler(
    empty_database_url: str, start_server: StartServer
) -> None:
    """pgbouncer with its default settings: migrate, serve, list, write and follow; rows look the
    same in every way.
    """
    with pgbouncer(empty_database_url, "session") as url:
        migrate(url)
        in_thread(asyncio.run, check(url))
        in_thread(asyncio.run, execute(url, ODD))  # by another client of the pooler
        server = start_server(database_url=url)

        async def use() -> None:
            await until_ready(server.url)
            async with httpx.AsyncClient(base_url=server.url) as http, joined(server.url) as client:
                await execute(url, ODD)
                assert (await http.post("/api/things", json={"name": "a"})).status_code == 201
                name, row, _ = await client.event()
                assert name == "thing:create" and row["created_at"].endswith("+00:00")
                assert (await http.get("/api/things")).json() == [row]
                assert client.states == []

        asyncio.run(use())
        assert "WARNING" not in server.log


async def test_a_pooled_session_is_as_ours_whoever_had_it_before(database_url: str) -> None:
    """Clients of the pooler change every setting and leave; ours sets its own."""
    with pgbouncer(database_url, "session") as url:
        for _ in range(3):
            await execute(url, ODD)
            connection = await connect(url, session={"search_path": "pg_catalog"})
            shown = [
                await connection.fetchval(f"SHOW {name}")
                for name in ("TimeZone", "DateStyle", "search_path", "bytea_output")
            ]
            assert shown == ["UTC", "ISO, MDY", "pg_catalog", "hex"]
            await connection.close()


async def test_a_node_does_not_hear_its_own_bell_through_a_pooler(database_url: str) -> None:
    """A leading node rings for another one; poolers invent backend numbers, so it must recognize
    itself by the real one.
    """
    with pgbouncer(database_url, "session") as url:
        async with following(url) as (one, first), following(url) as (two, second):
            await eventually(lambda: one.leading or two.leading)
            connection = await connect(database_url)
            for number in range(10):
                await insert(connection, f"{number}")
            await first.until(10)
            await second.until(10)
            await connection.close()
            before = one.stats().looks + two.stats().looks
            await asyncio.sleep(1)
            assert one.stats().looks + two.stats().looks - before < 20


@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_a_pooler_that_shares_sessions_is_reported(
    connection: Connection, database_url: str, start_server: StartServer, mode: str
) -> None:
    """Through a pooler that shares sessions nothing wrong is sent: /readyz and REST answer 503 and
    say what to do; the log says it once.
    """
    with pgbouncer(database_url, mode) as url:
        server = await asyncio.to_thread(start_server, database_url=url)
        async with httpx.AsyncClient(base_url=server.url) as http:

            async def refused(path: str) -> bool:
                answer = await http.get(path)
                assert answer.status_code in (200, 503), answer.text
                return answer.status_code == 503 and POOLED in answer.json()["detail"]

            async with asyncio.timeout(10):
                while not await refused("/readyz"):
                    await asyncio.sleep(0.05)
            for _ in range(20):
                assert await refused("/readyz") and await refused("/api/things")
            created = await asyncio.gather(
                *(http.post("/api/things", json={"name": f"{number}"}) for number in range(10))
            )
            assert {answer.status_code for answer in created} == {503}
    assert server.log.count(POOLED) == 1 and "Traceback" not in server.log


# Several hosts


def with_hosts(url: str, *hosts: str, **parameters: str) -> str:
    """Return a URL with other hosts."""
    at = urlsplit(url)
    netloc = f"{at.username}:{at.password}@{','.join(hosts)}"
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    return at._replace(netloc=netloc, query=query).geturl()


def host_of(url: str) -> str:
    """Return the host and port in a URL."""
    return urlsplit(url).netloc.rpartition("@")[2]


def test_the_first_host_is_dead(empty_database_url: str, start_server: StartServer) -> None:
    """Nothing listens at the first of two hosts: migrate, serve and psql use the second."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    url = with_hosts(empty_database_url, dead, host_of(empty_database_url))
    migrate(url)
    server = start_server(database_url=url)
    asyncio.run(until_ready(server.url))
    assert httpx.post(f"{server.url}/api/things", json={"name": "a"}).status_code == 201
    command = [str(TABLECAST), "psql", "-Atc", "SELECT name FROM things"]
    assert subprocess.check_output(command, env=os.environ | {"DATABASE_URL": url}) == b"a\n"


async def test_a_silent_host_does_not_use_up_the_time_of_the_next(database_url: str) -> None:
    """The first of two hosts accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        connection = await connect(
            with_hosts(database_url, f"127.0.0.1:{port}", host_of(database_url))
        )
        assert time.monotonic() - began < CONNECT_TIMEOUT_S
        await connection.close()


async def test_hosts_in_the_query(database_url: str) -> None:
    """A URL lists hosts and ports in its query, as libpq allows."""
    at = urlsplit(database_url)
    url = at._replace(
        netloc=f"{at.username}:{at.password}@",
        query=f"host=127.0.0.1,{at.hostname}&port=1,{at.port}",
    ).geturl()
    connection = await connect(url)
    assert await connection.fetchval("SELECT current_database()") == at.path[1:]
    await connection.close()


async def test_a_unix_socket(private_postgres: Callable[..., Server]) -> None:
    """A URL names the directory of a Unix socket, as the authority and in the query."""
    postgres = private_postgres(fsync="off", unix_socket_directories="/tmp")
    at = urlsplit(postgres.url)
    for netloc, query in (
        (f"{at.username}:{at.password}@%2Ftmp:{at.port}", ""),
        ("", f"user={at.username}&password={at.password}&host=/tmp&port={at.port}"),
    ):
        connection = await connect(f"postgresql://{netloc}{at.path}?{query}".rstrip("?"))
        assert await connection.fetchval("SELECT inet_server_port()") is None
        await connection.close()


async def test_a_password_with_every_special_character(server_url: str, database_url: str) -> None:
    """A role's password holds what URLs must encode."""
    admin = await connect(server_url)
    await admin.execute(
        "DROP ROLE IF EXISTS special; CREATE ROLE special LOGIN PASSWORD '/@:?#%,+ é'"
    )
    try:
        at = urlsplit(database_url)
        netloc = f"special:%2F%40%3A%3F%23%25%2C%2B%20%C3%A9@{at.hostname}:{at.port}"
        connection = await connect(at._replace(netloc=netloc).geturl())
        assert await connection.fetchval("SELECT current_user") == "special"
        await connection.close()
    finally:
        await admin.execute("DROP ROLE special")
        await admin.close()


async def test_a_failover(private_postgres: Callable[..., Server]) -> None:
    """The URL lists a standby and its primary and asks for one that takes writes. The primary dies
    and the standby is promoted: clients are told, learn whether they continue, and get what is
    written afterwards.
    """
    primary = await asyncio.to_thread(private_postgres, fsync="off")
    async with AsyncExitStack() as stack:
        standby = stack.enter_context(standby_of(primary))
        url = with_hosts(
            primary.url, host_of(standby.url), host_of(primary.url),
            target_session_attrs="read-write",
        )  # fmt: skip
        app = await stack.enter_async_context(serving_here(url))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=app.url))
        async with joined(app.url) as client:
            assert (await http.post("/api/things", json={"name": "before"})).status_code == 201
            assert (await client.event())[1]["name"] == "before"
            await until_replayed(primary, standby)
            primary.kill()
            assert (await client.state())["live"] is False
            connection = await connect(standby.url)
            await connection.execute("SELECT pg_promote()")
            await connection.close()
            await client.closed()  # the new primary's log is another history
            auth = {"pid": client.pid, "offset": client.offset}
        await eventually(lambda: app.feed.trouble() is None)
        async with joined(app.url, auth) as again:
            assert again.recovered is False
            assert (await http.post("/api/things", json={"name": "after"})).status_code == 201
            assert (await again.event())[1]["name"] == "after"
        names = [thing["name"] for thing in (await http.get("/api/things")).json()]
        assert names == ["before", "after"]


async def until_replayed(primary: Server, standby: Server) -> None:
    """Wait until a standby has everything that its primary has."""
    ahead, behind = await connect(primary.url), await connect(standby.url)
    end = await ahead.fetchval("SELECT pg_current_wal_lsn()")
    async with asyncio.timeout(20):
        while await behind.fetchval("SELECT pg_last_wal_replay_lsn() < $1", end):
            await asyncio.sleep(0.02)
    await ahead.close()
    await behind.close()


async def test_no_host_takes_writes(private_postgres: Callable[..., Server]) -> None:
    """Every host is a standby: the start ends with a sentence."""
    primary = await asyncio.to_thread(private_postgres, fsync="off")
    with standby_of(primary) as standby:
        url = with_hosts(standby.url, host_of(standby.url), target_session_attrs="read-write")
        with pytest.raises(ConnectionError, match="target_session_attrs"):
            await connect(url)


async def test_pools_take_the_same_way(database_url: str) -> None:
    """A pool of connections to several hosts: each is set up as a single one is."""
    async with Proxy("127.0.0.1", 1) as nobody:
        url = with_hosts(database_url, f"127.0.0.1:{nobody.port}", host_of(database_url))
        pool = await asyncpg.create_pool(url, connect=connect, min_size=0)
        assert await pool.fetchval("SHOW TimeZone") == "UTC"
        await pool.close()
