"""An installation of 0.1.0 is upgraded while it is in use."""

import asyncio
import json
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from app.database import locking
from app.database.connections import Refusal, connect
from app.database.migration import migrate
from tests.support.catalog import catalog
from tests.support.feeds import eventually
from tests.support.machine import require
from tests.support.older import SCHEMA, install_0_1_0
from tests.support.postgres import execute
from tests.support.server import TABLECAST, RunningServer
from tests.support.sockets import joined
from tests.test_resume import WATCH, Official

pytestmark = pytest.mark.database

LONGEST_WAIT_S = 5.0  # for a writer; a machine that does nothing else takes a tenth of it
IN_USE = """
    CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);
    SELECT feed.watch('orders', 'order');
    INSERT INTO things (name) SELECT 'old ' || i FROM generate_series(1, 1000) AS i;
"""


class Writers:
    """Sessions that write to watched tables without a pause, until told to stop. Some of their
    transactions write to both tables, in either order.
    """

    TABLES = (("things",), ("orders",), ("things", "orders"), ("orders", "things"))

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopped = False
        self.written: list[str] = []
        self.longest_s = 0.0

    async def run(self) -> None:
        """Write until stopped. Raises whatever a write fails with."""
        await asyncio.gather(*(self._write(i, each) for i, each in enumerate(self.TABLES)))

    async def more(self) -> None:
        """Wait until they have written some more."""
        enough = len(self.written) + 100
        await eventually(lambda: len(self.written) > enough)

    async def _write(self, number: int, tables: tuple[str, ...]) -> None:
        connection = await connect(self._url)
        try:
            row = 0
            while not self._stopped:
                row += 1
                names = {table: f"{table} {number} {row}" for table in tables}
                started = time.monotonic()
                async with connection.transaction():
                    for table, name in names.items():
                        await connection.execute(f"INSERT INTO {table} (name) VALUES ($1)", name)
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.written += names.values()
        finally:
            connection.terminate()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Write during the block; then none of the writes has failed."""
        running = asyncio.create_task(self.run())
        try:
            await self.more()
            yield
            await self.more()
        finally:
            self._stopped = True
            await running


@asynccontextmanager
async def official_client(url: str, since: str, file: Path) -> AsyncIterator[Official]:
    """An official client in Node.js that has an offset, and a server that is not there yet."""
    given = [{"kind": "bare", "url": url, "since": since, "file": str(file)}]
    process = await asyncio.create_subprocess_exec(
        require("node"), str(WATCH), json.dumps(given), stdin=asyncio.subprocess.PIPE
    )
    try:
        yield Official(file)
    finally:
        process.terminate()
        await process.wait()


async def tablecast(*arguments: str, url: str) -> str:
    """Run the command; return what it prints on standard error."""
    process = await asyncio.create_subprocess_exec(
        TABLECAST,
        *arguments,
        env=os.environ | {"DATABASE_URL": url},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    return errors.decode()


async def test_an_upgrade_in_use(empty_database_url: str, tmp_path: Path) -> None:
    """Two nodes upgrade an installation of 0.1.0 at once, while others write to its tables: no
    write fails or waits for long, and the official client, which has an offset from before,
    continues with every change after it, each once.
    """
    url = empty_database_url
    await install_0_1_0(url)
    await execute(url, IN_USE)
    connection = await connect(url)
    since = await connection.fetchval("SELECT feed.offset()")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    writers = Writers(url)
    address = f"http://127.0.0.1:{port}"
    async with official_client(address, since, tmp_path / "client") as client:
        async with writers.writing():
            both = [tablecast("migrate", url=url) for _ in range(2)]
            assert await asyncio.gather(*both) == ["", ""]
        server = RunningServer(url, tmp_path / "log", PORT=port)
        try:
            await asyncio.to_thread(server.start)
            await eventually(lambda: len(creations(client)) >= len(writers.written))
            async with joined(server.url) as other:
                await execute(url, "INSERT INTO things (name) VALUES ('last')")
                assert (await other.event())[1]["name"] == "last"
            await eventually(lambda: "last" in creations(client))
        finally:
            server.kill()
            connection.terminate()
        assert client.lines("hello")[0][1] is True
    assert Counter(creations(client)) == Counter([*writers.written, "last"])
    assert writers.longest_s < LONGEST_WAIT_S


def creations(client: Official) -> list[str]:
    """The names of the rows that a client has seen created."""
    events = client.lines("thing:create") + client.lines("order:create")
    return [row["name"] for _, row, _ in events]


@pytest.mark.parametrize("things", [True, False])
async def test_0_1_0_refuses_what_a_later_version_has_migrated(
    empty_database_url: str, things: bool
) -> None:
    """Somebody starts a node of 0.1.0 after the upgrade, or has it migrate: it finds no revision
    where it looks for one, and what it makes is there already.
    """
    url = empty_database_url
    await asyncio.to_thread(migrate, url, things)
    before = await catalog(url)
    connection = await connect(url)
    assert await connection.fetchval("SELECT to_regclass('public.alembic_version')") is None
    with pytest.raises((asyncpg.DuplicateTableError, asyncpg.DuplicateSchemaError)):
        await connection.execute(SCHEMA.read_text(encoding="utf-8"))
    connection.terminate()
    assert await catalog(url) == before


async def test_an_upgrade_waits_for_a_writer_and_lets_the_others_through(
    empty_database_url: str,
) -> None:
    """A transaction that has written stays open: the upgrade waits for its end, while others go on
    writing.
    """
    url = empty_database_url
    await install_0_1_0(url)
    await execute(url, IN_USE)
    connection = await connect(url)
    writers = Writers(url)
    async with writers.writing():
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("INSERT INTO orders (name) VALUES ('open')")
        upgrade = asyncio.create_task(tablecast("migrate", url=url))
        await until_waiting(url)
        await writers.more()
        assert not upgrade.done()
        await transaction.commit()
        assert await upgrade == ""
    connection.terminate()
    assert writers.longest_s < LONGEST_WAIT_S


async def until_waiting(url: str) -> None:
    """Wait until a migration waits for a lock."""
    waiting = """
        SELECT EXISTS (SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
                       WHERE datname = current_database() AND NOT granted
                             AND mode = 'AccessExclusiveLock')
    """
    connection = await connect(url)
    async with asyncio.timeout(20):
        while not await connection.fetchval(waiting):
            await asyncio.sleep(0.02)
    connection.terminate()


async def test_a_table_that_stays_in_use_is_not_waited_for_forever(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump reads a watched table for longer than an upgrade waits."""
    url = empty_database_url
    await install_0_1_0(url)
    before = await catalog(url)
    monkeypatch.setattr(locking, "GIVE_UP_S", 0.5)
    connection = await connect(url)
    async with connection.transaction():
        await connection.execute("SELECT FROM things")
        with pytest.raises(Refusal, match="a long transaction or a dump"):
            await asyncio.to_thread(migrate, url)
    connection.terminate()
    assert await catalog(url) == before
    await asyncio.to_thread(migrate, url)
