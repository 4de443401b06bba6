"""Rows larger than an event may be: clients get what identifies them, and nobody else is harmed."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import pytest

from app.database.connections import Connection
from app.feed import log
from tests.support.feeds import eventually
from tests.support.floods import Watch
from tests.support.node_client import node_client
from tests.support.python_client import Things
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.subscribers import Held, subscriber
from tests.support.writing import current_offset, insert

pytestmark = pytest.mark.database

MIB = 1024 * 1024
PATIENCE_S = 60
HUGE_BYTES = scaled(20, 150) * MIB
# Text that does not compress: lines of digests.
NOISE = "SELECT string_agg(md5(i::text), '') FROM generate_series(1, $1::int / 32) AS i"


async def test_clients_stay_connected(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A row of 5 MB and one of 20 MB are written while a Python and a Node.js client are connected:
    both get the rows' keys and names and everything after, on one connection; the server's memory
    hardly grows.
    """
    server = start_server()
    python = Things(server.url, ["websocket"])
    following = asyncio.create_task(python.follow())
    async with node_client(server.url, "websocket") as events:
        await eventually(lambda: python.offset is not None and len(events) >= 2)
        before = psutil.Process(server.pid).memory_info().rss
        for name, size in (("large", 5 * MIB), ("huge", HUGE_BYTES)):
            noise = NOISE.replace("$1", str(size))
            await connection.execute(
                f"INSERT INTO things (name, info) VALUES ('{name}', ({noise}))"
            )
        await connection.execute("UPDATE things SET info = info || '!'")
        await insert(connection, "after")

        def received() -> list[list[Any]]:  # how busy the machine was does not matter
            return [event for event in events if event[0] != "feed:state"]

        await eventually(lambda: len(python.items) == 3 and len(received()) == 7, PATIENCE_S)
        assert [event[0] for event in received()] == [
            "connect", "feed:hello", "thing:create", "thing:create", "thing:update",
            "thing:update", "thing:create",
        ]  # fmt: skip
        ids = [row["id"] for row in await connection.fetch("SELECT id FROM things ORDER BY id")]
        cut = [
            {"id": id, "name": name, "too_large": True}
            for id, name in zip(ids, ("large", "huge"), strict=False)
        ]
        assert [event[1] for event in received()[2:6]] == [*cut, *cut]
        assert [python.items[id] for id in ids[:2]] == cut
        assert psutil.Process(server.pid).memory_info().rss - before < 15 * MIB
        await connection.execute("DELETE FROM things WHERE name <> 'after'")
        await eventually(lambda: len(python.items) == 1, PATIENCE_S)
    following.cancel()
    await asyncio.wait([following])


async def test_a_replay_of_large_rows_is_not_kept(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A client with a subscription returns to many changes of a row that is just not too large:
    what the server has read for it does not stay in memory.
    """
    await connection.execute(
        "CREATE TABLE texts (id int PRIMARY KEY, n int, text text);"
        "INSERT INTO texts VALUES (1, 0, repeat('x', 900000)); SELECT feed.watch('texts', 'text')"
    )
    server = start_server()
    since = await connection.fetchval("SELECT feed.offset()")
    for _ in range(scaled(100, 400)):
        await connection.execute("UPDATE texts SET n = n + 1")
    with Watch(server).looking() as watch:
        async with subscriber(server.url) as client:
            held = await client.subscribe("/text", where="n=gt.0", columns="n", since=since)
            await client.until(lambda: held.names.count("text:update") == scaled(99, 399))
            assert held.recovered
    assert watch.grown_mib < 60


async def test_a_replay_for_many_filters_is_not_kept(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A client with fifty different subscriptions returns to a page of changes: what is made of
    the page for each does not stay in memory.
    """
    await connection.execute(
        "CREATE TABLE texts (id int PRIMARY KEY, n int, text text);"
        "INSERT INTO texts SELECT i, 0, repeat('x', 2000) FROM generate_series(1, 900) AS i;"
        "SELECT feed.watch('texts', 'text')"
    )
    server = start_server()
    since = await connection.fetchval("SELECT feed.offset()")
    await connection.execute("UPDATE texts SET n = n + 1")
    with Watch(server).looking() as watch:
        async with subscriber(server.url) as client:
            options = {"columns": "id,n,text", "since": since}
            for number in range(50):
                where = f"id=gt.-{number}"
                held = await client.subscribe(f"/text/{number}", where=where, **options)
                await client.until(partial(has_rows, held, 900))
    assert watch.grown_mib < 75


def has_rows(held: Held, count: int) -> bool:
    return len(held.rows) == count


async def test_the_limit_is_exact(connection: Connection) -> None:
    """Rows just as long as an event may be come whole, those one byte longer do not, whether
    Postgres stores them compressed or not.
    """
    await connection.execute(
        "CREATE TABLE t (a text, id int PRIMARY KEY, b text); SELECT feed.watch('t', 't')"
    )
    limit = 100_000
    for filler in ("repeat('x', $1::int)", f"left(({NOISE.replace('$1', '200000')}), $1)"):
        await connection.execute("TRUNCATE t, feed.change")
        await connection.execute(f"INSERT INTO t SELECT '', 1, {filler}", limit // 2)
        length = await connection.fetchval(
            "SELECT octet_length(new::text) FROM feed.change WHERE op = 'create'"
        )
        since = await current_offset(connection)
        for id, longer in ((2, 0), (3, 1)):
            size = limit // 2 + limit - length + longer
            await connection.execute(f"INSERT INTO t SELECT '', {id}, {filler}", size)
        whole, cut = (await log.read(connection, since, event_bytes=limit)).changes
        assert len(whole.body or "") == limit and json.loads(whole.body or "")["id"] == 2
        assert json.loads(cut.body or "") == {"id": 3, "too_large": True}
        await connection.execute("UPDATE t SET a = 'y' WHERE id = 3")
        await connection.execute("DELETE FROM t WHERE id = 3")
        *_, updated, destroyed = (await log.read(connection, since, event_bytes=limit)).changes
        assert json.loads(updated.body or "") == {"id": 3, "too_large": True}
        assert json.loads(destroyed.body or "") == {"id": 3}


async def test_destroys_with_a_column_called_too_large(connection: Connection) -> None:
    """A row is too large, and destroys carry a column of the name `too_large`: the mark would hide
    it, so clients load again.
    """
    await connection.execute(
        "CREATE TABLE t (id int PRIMARY KEY, too_large text UNIQUE NOT NULL, long text);"
        "SELECT feed.watch('t', 't', 'too_large')"
    )
    since = await current_offset(connection)
    await connection.execute("INSERT INTO t VALUES (1, 'name', repeat('long', 50000))")
    [change] = (await log.read(connection, since, event_bytes=64 * 1024)).changes
    assert (change.op, change.body) == ("reload", None)


@pytest.mark.parametrize("document", ['"\\u0000"', '"\\ud800"', "[" * 6000 + "]" * 6000])
async def test_rows_that_cannot_be_cut_are_reloads(connection: Connection, document: str) -> None:
    """A row is too large, and holds a document that Postgres stores and cannot parse: clients of
    its topic load again or get its key, the others come as always.
    """
    await connection.execute(
        "CREATE TABLE t (id int PRIMARY KEY, doc json, long text); SELECT feed.watch('t', 't')"
    )
    since = await current_offset(connection)
    await connection.execute("INSERT INTO t VALUES (1, $1::json, repeat('long', 50000))", document)
    await connection.execute("UPDATE t SET long = ''")
    changes = (await log.read(connection, since, event_bytes=64 * 1024)).changes
    cut = (changes[0].op, changes[0].body and json.loads(changes[0].body))
    assert cut in [("reload", None), ("create", {"id": 1, "too_large": True})]
    assert changes[1].op == "update" and (changes[1].body or "").endswith('"long":""}')
