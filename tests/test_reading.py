"""Obstacles to reading: a crash, rows that cannot be read, errors, altered tables."""

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from alembic import command

from app.database.connections import Connection, connect
from app.database.embedded import Server, binary
from app.database.migration import configuration, migrate
from app.feed import feed as feed_module
from app.feed import log
from app.feed.feed import Feed
from app.feed.inspection import Inspection
from app.feed.log import Page
from app.feed.retention import Retention
from tests.support.feeds import eventually, following
from tests.support.postgres import clone, in_thread, with_database
from tests.support.server import RunningServer
from tests.support.sockets import App, joined, opened, serving_here, until_ready
from tests.support.subscribers import subscriber
from tests.support.writing import current_offset, insert

# A crash


async def test_what_a_crash_could_take_back_is_not_shown(
    private_postgres: Callable[..., Server],
) -> None:
    """A commit that did not wait for the disk, older in the log than a flushed one, is on disk once
    a reader has it: after a crash it is still there.
    """
    server = private_postgres(wal_writer_delay="10s", wal_writer_flush_after="1GB")
    reader, lazy, careful = [await connect(server.url) for _ in range(3)]
    since = await current_offset(reader)
    await lazy.execute("SET synchronous_commit = off")
    async with lazy.transaction():
        await insert(lazy, "lazy")
        await insert(careful, "careful")
    page = await log.read(reader, since)
    assert len(page.changes) == 2
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    again = await connect(server.url)
    assert await again.fetchval("SELECT count(*) FROM things") == 2
    assert (await log.read(again, page.until)).changes == []
    for connection in (reader, lazy, careful, again):
        connection.terminate()


async def test_without_a_flush_a_crash_takes_it_back(
    private_postgres: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the flush, a crash loses what was shown: the test above can fail."""

    async def nothing(_: object) -> None: ...

    monkeypatch.setattr(log, "flush", nothing)
    server = private_postgres(wal_writer_delay="10s", wal_writer_flush_after="1GB")
    reader, lazy = [await connect(server.url) for _ in range(2)]
    since = await current_offset(reader)
    await lazy.execute("SET synchronous_commit = off")
    await insert(lazy, "lazy")
    assert len((await log.read(reader, since)).changes) == 1
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    again = await connect(server.url)
    assert await again.fetchval("SELECT count(*) FROM things") == 0
    for connection in (reader, lazy, again):
        connection.terminate()


async def test_a_feed_that_fails_while_it_begins_begins_again(
    database_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection fails just as a history begins, the audience receives the history on the
    next attempt, and every change after it.
    """
    tries = 0

    async def failing_once(reader: Connection) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ConnectionError

    monkeypatch.setattr(feed_module, "flush", failing_once)
    async with following(database_url) as (_, recorder):
        await insert(connection, "a")
        await recorder.until(1)
    assert tries == 2 and len(recorder.histories) == 1


# Rows that cannot be read


@pytest.fixture
def foreign_url(server_url: str) -> Iterator[Callable[[str], str]]:
    """Creates migrated databases with another encoding."""
    made: list[str] = []

    def make(encoding: str) -> str:
        name = f"foreign_{encoding.lower()}_{id(made)}"

        async def create() -> None:
            admin = await connect(server_url)
            await admin.execute(
                f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
            )
            await admin.close()

        in_thread(asyncio.run, create())
        made.append(name)
        url = with_database(server_url, name)
        in_thread(migrate, url)
        return url

    yield make
    for name in made:
        with clone(server_url, "template0"):
            in_thread(asyncio.run, _drop(server_url, name))


async def _drop(server_url: str, name: str) -> None:
    admin = await connect(server_url)
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.mark.parametrize(("encoding", "bytes"), [("SQL_ASCII", "\\xff"), ("WIN1252", "\\x81")])
async def test_a_row_that_cannot_be_read_is_isolated(
    foreign_url: Callable[[str], str],
    encoding: str,
    bytes: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A row with bytes that are not UTF-8 is among others, live and in a replay: clients of its
    topic are asked to load again, everything else arrives, and the log reports it.
    """
    url = foreign_url(encoding)
    writer = await asyncpg.connect(url, server_settings={"client_encoding": encoding})
    await writer.execute("CREATE TABLE odd (id int PRIMARY KEY, v text)")
    await writer.execute("SELECT feed.watch('odd', 'odd')")
    async with serving_here(url) as app, joined(app.url) as client:
        since = client.offset
        await writer.execute(
            f"INSERT INTO odd SELECT i, CASE i WHEN 40 THEN convert_from('{bytes}', '{encoding}')"
            " ELSE 'v' || i END FROM generate_series(1, 90) AS i"
        )
        await writer.execute("INSERT INTO things (name) VALUES ('after')")
        live = await client.take(91)
        app.replay.clear()
        async with joined(app.url, {"since": since}) as returning:
            assert returning.recovered
            replayed = await returning.take(91)
        assert live[39][:2] == ["feed:hello", {"recovered": False, "topic": "odd"}]
        for events in (live, replayed):
            assert [event[0] for event in events] == (
                ["odd:create"] * 39 + ["feed:hello"] + ["odd:create"] * 50 + ["thing:create"]
            )
        assert [event[:2] for event in live] == [event[:2] for event in replayed]
        assert app.feed.stats().unreadable == app.replay.stats().unreadable == 1
    assert "of the topic odd cannot be read" in caplog.text
    writer.terminate()


@pytest.mark.parametrize(("encoding", "bytes"), [("SQL_ASCII", "\\xff"), ("WIN1252", "\\x81")])
async def test_a_subscription_to_a_row_that_cannot_be_read(
    foreign_url: Callable[[str], str], encoding: str, bytes: str
) -> None:
    """A row with bytes that are not UTF-8 comes into a table: the subscription to it is refused in
    place, and the connection's others go on.
    """
    url = foreign_url(encoding)
    writer = await asyncpg.connect(url, server_settings={"client_encoding": encoding})
    await writer.execute("CREATE TABLE odd (id int PRIMARY KEY, v text)")
    await writer.execute("SELECT feed.watch('odd', 'odd')")
    async with serving_here(url) as app, subscriber(app.url) as client:
        things = await client.loaded(await client.subscribe("/thing"))
        odd = await client.loaded(await client.subscribe("/odd"))
        await writer.execute(f"INSERT INTO odd VALUES (1, convert_from('{bytes}', '{encoding}'))")
        assert (await client.refusal(odd))["code"] == "unreadable"
        await writer.execute("INSERT INTO things (name) VALUES ('after')")
        await client.until(lambda: things.rows)
    writer.terminate()


async def test_rows_that_no_parser_takes_come_like_any(app: App, connection: Connection) -> None:
    """Documents with U+0000, half a surrogate pair, or nested as deep as Postgres accepts are
    created and destroyed while clients watch.
    """
    await connection.execute("CREATE TABLE documents (id int PRIMARY KEY, name text, doc json)")
    await connection.execute("SELECT feed.watch('documents', 'document')")
    await app.feed.look()
    deep = 6000
    async with joined(app.url) as client:
        for doc in ('"\\u0000"', '"\\ud83d"', "[" * deep + "]" * deep):
            await connection.execute("INSERT INTO documents VALUES (1, 'a', $1::json)", doc)
            await connection.execute("DELETE FROM documents")
            assert doc in await client.frame()
            name, body, _ = await client.event()
            assert (name, body) == ("document:destroy", {"id": 1})


# Errors in the tasks


async def test_a_replay_that_fails_ends_its_client_alone(
    app: App,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unexpected error in one client's replay disconnects that client and is logged; others
    continue.
    """
    async with joined(app.url) as gone:
        pass
    await insert(connection, "missed")
    assert await app.feed.look()
    async with joined(app.url) as witness:
        app.replay.clear()
        real = log.read

        async def failing(*arguments: Any, **options: Any) -> Page:
            if len(arguments) == 4:  # a replay
                raise KeyError("unforeseen")
            return await real(*arguments, **options)

        monkeypatch.setattr(log, "read", failing)
        async with opened(app.url) as client:
            await client.send("40" + json.dumps({"pid": "p", "offset": gone.offset}))
            frames = await client.closed()
            assert [frame[:3] for frame in frames] == ["40{", "42["]
        assert "the replay has failed" in caplog.text and "unforeseen" in caplog.text
        await insert(connection, "more")
        assert (await witness.event())[1]["name"] == "more"
    await eventually(lambda: app.empty)


FAILING = """
import app.cli
from {module} import {name}

async def fail(self, *_):
    raise KeyError("unforeseen")

{name}.run = fail
app.cli.main()
"""


@pytest.mark.parametrize("task", [Feed, Retention, Inspection], ids=lambda task: task.__name__)
def test_a_task_that_fails_ends_the_process(
    database_url: str, tmp_path: Path, task: type[Feed | Retention | Inspection]
) -> None:
    """If the feed, the retention or the inspection fails, the process logs why and exits with code
    1, so that a supervisor restarts it.
    """
    server = RunningServer(database_url, tmp_path / "log")
    source = FAILING.format(module=task.__module__, name=task.__name__)
    server.command = [server.command[0].replace("tablecast", "python"), "-c", source, "serve"]
    try:
        server.start()
    except RuntimeError:
        pass  # it exited before printing its URL
    else:
        assert server.wait() == 1
    assert f"the task {task.__name__.lower()} has failed" in server.log
    assert "unforeseen" in server.log and "internal error" in server.log


# Tables that change under the feed


async def test_clients_load_an_altered_table_again(app: App, connection: Connection) -> None:
    """Within seconds after ALTER TABLE rewrites a table, connected clients and one that returns are
    asked to load its topic, with an offset to continue from; later writes arrive with the new
    column.
    """
    async with joined(app.url) as client:
        await insert(connection, "a")
        await client.take(1)
        since = client.offset
        await connection.execute("ALTER TABLE things ALTER info TYPE text USING upper(info)")
        await connection.execute("ALTER TABLE things ADD extra int DEFAULT 7")
        name, hello, _ = await client.event()
        while (name, hello) == ("feed:hello", {"recovered": False, "topic": "thing"}):
            await insert(connection, f"after {client.offset}")
            name, hello, _ = await client.event()
        assert (name, hello["extra"]) == ("thing:create", 7)
        assert app.inspection.stats().reloads >= 1
    async with joined(app.url, {"since": since}) as returning:
        assert returning.recovered
        assert (await returning.event())[:2] == [
            "feed:hello",
            {"recovered": False, "topic": "thing"},
        ]


# An installation of 0.1.0


async def test_clients_of_an_older_installation_continue(
    empty_database_url: str, tmp_path: Path
) -> None:
    """Clients with an offset from a node of 0.1.0 continue after the database is migrated: after
    its changes, with everything written before and after, each change once.
    """
    url = empty_database_url
    await asyncio.to_thread(command.upgrade, configuration(url), "0002")
    connection = await connect(url)
    await insert(connection, "seen", "old")
    since = await connection.fetchval("SELECT feed.offset()")
    await connection.execute("INSERT INTO things (name) VALUES ('b'), ('c')")
    await connection.execute("UPDATE things SET info = 'changed' WHERE name = 'b'")
    await connection.execute("DELETE FROM things WHERE name IN ('old', 'c')")
    between = await connection.fetchval("SELECT feed.offset()")
    await asyncio.to_thread(migrate, url)
    await connection.execute("DELETE FROM things WHERE name = 'b'")
    server = RunningServer(url, tmp_path / "log")
    await asyncio.to_thread(server.start)
    try:
        async with joined(server.url, {"pid": "p", "offset": since}) as client:
            assert client.recovered and client.pid == "p"
            events = await client.take(6)
            told = [
                (name, what if isinstance(what, str) else what["name"]) for name, what, _ in events
            ]
            assert told == [
                ("thing:create", "b"), ("thing:create", "c"), ("thing:update", "b"),
                ("thing:destroy", "old"), ("thing:destroy", "c"), ("thing:destroy", "b"),
            ]  # fmt: skip
            assert await client.silent()
        async with joined(server.url, {"since": between}) as client:
            assert client.recovered
            assert (await client.take(1))[0][:2] == ["thing:destroy", "b"]
        async with joined(server.url, {"since": events[2][2]}) as client:
            assert client.recovered
            assert (await client.take(3))[0][:2] == ["thing:destroy", "old"]
    finally:
        server.kill()
        connection.terminate()


async def test_a_list_holds_nothing_that_a_crash_takes_back(
    private_postgres: Callable[..., Server],
) -> None:
    """A thing committed without waiting for the disk survives a crash once a list has shown it."""
    server = private_postgres(wal_writer_delay="10s", wal_writer_flush_after="1GB")
    lazy = await connect(server.url)
    await lazy.execute("SET synchronous_commit = off")
    async with serving_here(server.url) as app, httpx.AsyncClient(base_url=app.url) as http:
        await insert(lazy, "lazy")
        assert [thing["name"] for thing in (await http.get("/api/things")).json()] == ["lazy"]
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await until_ready(app.url)
        assert [thing["name"] for thing in (await http.get("/api/things")).json()] == ["lazy"]
    lazy.terminate()


# The end of an epoch of transaction ids


async def test_the_feed_goes_on_where_an_epoch_of_ids_ends(
    private_postgres: Callable[..., Server],
) -> None:
    """While transaction ids pass 2^32, with a transaction open across, the feed publishes every
    change once, and each of its positions can be continued from.
    """
    server = private_postgres(fsync="off")
    for database in ("tablecast", "postgres", "template1"):
        connection = await connect(with_database(server.url, database))
        await connection.execute("VACUUM FREEZE")  # otherwise its rows would be in the future
        await connection.close()
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(set_next_xid, server, 2**32 - 40)
    await asyncio.to_thread(server.start)
    connection, other = await connect(server.url), await connect(server.url)
    async with following(server.url) as (feed, recorder):
        left_open = other.transaction()
        await left_open.start()
        await insert(other, "across")
        for number in range(80):
            await insert(connection, f"{number}")
            await recorder.until(number + 1)
        await left_open.commit()
        await recorder.until(81)
        assert feed.trouble() is None
        assert recorder.ids == [*range(2, 82), 1]
        assert int(await connection.fetchval("SELECT pg_current_xact_id()::text")) > 2**32
        for page in recorder.pages:
            rest, offset = 0, page.since
            while offset != recorder.pages[-1].until:
                found = await log.read(connection, offset, recorder.pages[-1].until.position)
                rest, offset = rest + len(found.changes), found.until
            before = recorder.pages[: recorder.pages.index(page)]
            assert rest == 81 - sum(len(earlier.changes) for earlier in before)
    connection.terminate()
    other.terminate()


def set_next_xid(server: Server, xid: int) -> None:
    """Make a stopped server continue with a given transaction id, using Postgres's own tool."""
    epoch, low = divmod(xid, 2**32)
    as_owner = ["setpriv", f"--reuid={server.data.stat().st_uid}", "--clear-groups"]
    command = [binary("pg_resetwal"), "-D", str(server.data), "-e", str(epoch), "-x", str(low)]
    subprocess.run(as_owner * (os.geteuid() == 0) + command, check=True, capture_output=True)
    # Postgres would have created the commit log file for this id on the way there.
    segment = server.data / "pg_xact" / f"{low // (8192 * 4 * 32):04X}"
    segment.write_bytes(bytes(8192 * 32))
    os.chown(segment, server.data.stat().st_uid, server.data.stat().st_gid)
