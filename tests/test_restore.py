"""Dumps restored as docs/operation.md says, under a running server."""

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.database.embedded import binary
from tests.support.postgres import execute
from tests.support.server import RunningServer
from tests.support.sockets import joined, until_ready

pytestmark = pytest.mark.database

ROOT = Path(__file__).parent.parent


def documented(word: str) -> str:
    """Return the command in the documentation that begins with a word, without its comment."""
    lines = (ROOT / "docs" / "operation.md").read_text().splitlines()
    [line] = [line.strip() for line in lines if line.startswith(f"    {word} ")]
    return line.partition("    #")[0].rstrip()


async def run(command: str, url: str, directory: Path) -> None:
    """Run a documented command with the Postgres programs of the tests."""
    programs = Path(binary("pg_dump")).parent
    done = await asyncio.to_thread(
        subprocess.run, command, shell=True, cwd=directory, capture_output=True, text=True,
        env={"PATH": f"{programs}:/usr/bin:/bin", "DATABASE_URL": url},
    )  # fmt: skip
    # Servers before 17 do not know the setting that a newer pg_dump resets.
    assert done.returncode == 0 or "transaction_timeout" in done.stderr, done.stderr


async def test_a_dump_is_restored_twice_under_a_running_server(
    start_server: Callable[..., RunningServer], database_url: str, tmp_path: Path
) -> None:
    """The server goes on, clients learn that they must load again, and everything works as it did
    when the dump was made.
    """
    await execute(
        database_url,
        "CREATE TABLE orders (id bigint PRIMARY KEY, total int)",
        "SELECT feed.watch('orders', 'order')",
        "INSERT INTO orders SELECT n, n FROM generate_series(1, 1000) AS n",
    )
    await run(documented("pg_dump"), database_url, tmp_path)
    server = start_server()
    for _ in range(2):
        async with joined(server.url) as client:
            await execute(database_url, "INSERT INTO orders VALUES (2000, 1)")
            assert (await client.event())[0] == "order:create"
            seen = {"pid": client.pid, "offset": client.offset}
            await run(documented("psql"), database_url, tmp_path)
            await run(documented("pg_restore"), database_url, tmp_path)
            await client.closed()
        await until_ready(server.url)
        async with joined(server.url, seen) as client, httpx.AsyncClient() as http:
            assert client.recovered is False
            await execute(database_url, "UPDATE orders SET total = 0 WHERE id = 7")
            while (event := await client.event())[0] == "feed:hello":
                pass  # the inspection has found triggers that are not those it knew
            assert event[:2] == ["order:update", {"id": 7, "total": 0}]
            assert (await http.get(f"{server.url}/api/things")).status_code == 200
    assert "Traceback" not in server.log
