"""docs/your-own-table.md, followed to the letter."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app.database.connections import Connection, connect
from app.live.subscriber import CloseReason
from tests.support.machine import require
from tests.support.postgres import execute, run
from tests.support.proxy import proxied
from tests.support.server import RunningServer

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "your-own-table.md").read_text(encoding="utf-8")
LIMIT_S = 60
WATCH = "SELECT feed.watch('orders', 'order')", "SELECT feed.watch('products', 'product')"
RENDER = ROOT / "tests" / "support" / "render.mjs"
FOLLOW = ROOT / "examples" / "follow.py"


def blocks(language: str) -> list[str]:
    """Return the document's code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def program(title: str) -> str:
    """Return the one block that begins with this line."""
    [found] = [text for text in blocks(r"\w+") if text.startswith(f"{title}\n")]
    return found


class Output:
    """Reads the output of a program until a line matches; `say` gives it a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, pattern: str) -> re.Match[str]:
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"no {pattern!r} in: {''.join(lines)}")

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


@contextmanager
def running(*command: str, cwd: Path, **environ: str) -> Iterator[Output]:
    """Run a program; yield what reads its output."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    alarm = threading.Timer(LIMIT_S, process.kill)
    alarm.start()

    with process:
        try:
            yield Output(process)
        finally:
            alarm.cancel()
            process.kill()


async def fetch(url: str, statement: str) -> tuple[str, str]:
    """Return the row that a statement returns."""
    connection = await connect(url)
    try:
        offset, rows = await connection.fetchrow(statement)
        return offset, rows
    finally:
        await connection.close()


class Place:
    """A directory for the document's programs, with Tablecast and the backend running."""

    def __init__(self, directory: Path, server: RunningServer, database_url: str) -> None:
        self.directory = directory
        self.server = server
        self.database_url = database_url
        self.addresses = {"http://127.0.0.1:8000": server.url}
        (directory / "node_modules").symlink_to(ROOT / "node_modules")

    def file(self, title: str) -> str:
        """Write the program that begins with this line; return its file's name."""
        text = program(title)
        for shown, real in self.addresses.items():
            text = text.replace(shown, real)
        name = title.split()[1]
        (self.directory / name).write_text(text, encoding="utf-8")
        return name

    def until_ready_says(self, status: int) -> None:
        """Wait until /readyz answers with this status."""
        deadline = time.monotonic() + LIMIT_S
        while (answer := httpx.get(f"{self.server.url}/readyz")).status_code != status:
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.05)

    def sql(self, *statements: str) -> None:
        """Run statements as the reader does in psql."""
        run(execute(self.database_url, *statements))


@pytest.fixture
def place(
    database_url: str, tmp_path: Path, start_server: Callable[..., RunningServer]
) -> Iterator[Place]:
    """The reader's table is watched, Tablecast runs, and so does the backend that lists it."""
    place = Place(tmp_path, start_server(LOG_LEVEL="debug"), database_url)
    place.sql(blocks("sql")[0], *WATCH)
    place.file("# orders.py")
    backend = [sys.executable, "-m", "uvicorn", "orders:app", "--port", "0"]
    with running(*backend, cwd=tmp_path, DATABASE_URL=database_url) as until:
        place.addresses["http://127.0.0.1:3000"] = until(r"http://\S+")[0]
        yield place


def test_changes_are_printed(place: Place) -> None:
    """The reader runs the first client and changes a row."""
    with running(require("node"), place.file("// changes.mjs"), cwd=place.directory) as until:
        until("feed:hello")
        place.sql(blocks("sql")[1])
        until(r"order:update \{ id: 1, customer: 'Sam', total: 11 \} \S+")


@pytest.mark.parametrize("title", ["// client.mjs", "# client.py"])
def test_a_client_has_the_table(place: Place, title: str) -> None:
    """The reader's client follows every kind of change, a restart, and a history that ended."""
    command = require("node") if title.startswith("//") else sys.executable
    with running(command, place.file(title), cwd=place.directory) as until:
        until(r"10.*20")
        place.sql(blocks("sql")[1], "INSERT INTO orders (customer, total) VALUES ('Ann', 5)")
        until(r"11.*20.*Ann")
        place.sql("DELETE FROM orders WHERE id = 2")
        until(r"11\D*3.*Ann")
        place.server.restart()
        place.sql("UPDATE orders SET customer = 'Eve' WHERE id = 3")
        until("Eve")
        place.sql("TRUNCATE orders", "TRUNCATE feed.change")
        until(r"^\[\]$")


@pytest.mark.parametrize("title", ["// client.mjs", "# client.py"])
def test_an_outage_of_the_database_is_no_change(place: Place, server_url: str, title: str) -> None:
    """The database is away for a while: the reader's client, which hears of that, shows nothing new
    until a row has changed.
    """
    name = urlsplit(place.database_url).path[1:]
    end_all = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    command = require("node") if title.startswith("//") else sys.executable
    with running(command, place.file(title), cwd=place.directory) as until:
        until(r"10.*20")
        place.sql(blocks("sql")[1])
        until(r"11.*20")
        for allowed, status in (("false", 503), ("true", 200)):
            run(execute(server_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}", end_all))
            place.until_ready_says(status)
        place.sql("UPDATE orders SET customer = 'Zoe' WHERE id = 2")
        assert "Zoe" in until("").string


def test_the_list_and_its_offset_are_of_one_moment(place: Place) -> None:
    """The reader tries the statement that reads both."""
    offset, rows = run(fetch(place.database_url, blocks("sql")[2]))
    assert offset and '"customer":"Sam"' in rows


def crash(place: Place, *statements: str) -> None:
    """Kill the server, change something, and start it again."""
    place.server.kill()
    place.sql(*statements)
    place.server.start()


def test_the_official_client_alone(place: Place) -> None:
    """The reader's client of one filter: rows come and leave, also while the server is down."""
    with running(require("node"), place.file("// orders.mjs"), cwd=place.directory) as until:
        until(r'^\[\{"id":2,"customer":"Sam","total":20\}\]$')
        place.sql("UPDATE orders SET total = 15 WHERE id = 1")
        until(r'"id":2.*"id":1')
        crash(place, "UPDATE orders SET total = 5 WHERE id = 2")
        until(r'^\[\{"id":1,"customer":"Sam","total":15\}\]$')


def test_the_python_example(place: Place) -> None:
    """The reader runs the program for two subscriptions, through a crash of the server and the end
    of a history, until a column that it asks for goes away.
    """
    with running(sys.executable, str(FOLLOW), place.server.url, cwd=place.directory) as until:
        until(r'"id": 2.*"total": 20\}\], \[\{"sku": "tea", "stock": 5\}\]\]$')
        crash(
            place,
            "UPDATE orders SET total = total + 7",
            "UPDATE products SET stock = 9 WHERE sku = 'rice'",
            "DELETE FROM products WHERE sku = 'tea'",
        )
        until(r'(17\}.*27\}|27\}.*17\}).*\[\{"sku": "rice", "stock": 9\}\]\]$')
        crash(place, "DELETE FROM orders", "TRUNCATE feed.change")
        until(r'^\[\[\], \[\{"sku": "rice", "stock": 9\}\]\]$')
        place.sql("ALTER TABLE products DROP COLUMN stock")
        until("unknown_column")


@pytest.mark.parametrize("silent", [False, True], ids=["cut", "silent"])
async def test_the_python_example_on_a_bad_line(
    start_server: Callable[..., RunningServer], connection: Connection, silent: bool
) -> None:
    """The line breaks, or falls silent, after the server has accepted the program's connection and
    before it has answered for the subscriptions, and it takes some attempts until it is good.
    """
    for statement in (blocks("sql")[0], *WATCH):
        await connection.execute(statement)
    server = start_server(PING_INTERVAL=1, PING_TIMEOUT=1)
    async with proxied(server.url) as (line, url), asyncio.timeout(LIMIT_S):
        line.hold_after(b'"sid"')
        program = await asyncio.create_subprocess_exec(
            sys.executable, str(FOLLOW), url, stdout=asyncio.subprocess.PIPE
        )
        try:
            while line.accepted < (3 if silent else 5):
                if not silent:
                    line.cut()
                await asyncio.sleep(0.05)
            line.pass_on()
            assert program.stdout is not None
            async for shown in program.stdout:
                orders, products = json.loads(shown)
                if orders and products:
                    break
        finally:
            program.kill()
            await program.wait()
        assert [order["id"] for order in orders] == [2]


def test_the_react_hook(place: Place) -> None:
    """The reader's component shows the rows of its filter, through a crash of the server; then of
    another filter, of one that follows a slider, and then why one is refused.
    """
    url = place.server.url
    (place.directory / "feed.mjs").write_bytes(httpx.get(f"{url}/feed.js").content)
    place.file("// useFeed.mjs")
    component = place.file("// Orders.jsx")
    (place.directory / RENDER.name).write_text(RENDER.read_text())
    with running(require("node"), RENDER.name, component, cwd=place.directory) as until:
        until.say("total=gte.15")
        until(r"^live: Sam: 20$")
        place.sql("UPDATE orders SET total = total + 5")
        until(r"^live: Sam: 25, Sam: 15$|^live: Sam: 15, Sam: 25$")
        crash(place, "UPDATE orders SET total = 1 WHERE id = 2")
        until(r"^live: Sam: 15$")
        until.say("total=lt.15")
        until(r"^live: Sam: 1$")
        for total in range(200, 0, -1):  # in a second
            until.say(f"total=gte.{total}")
            time.sleep(0.005)
        until(r"^live: Sam: 15, Sam: 1$|^live: Sam: 1, Sam: 15$")
        assert CloseReason.TOO_MANY_MESSAGES not in place.server.log
        until.say("colour=eq.red")
        until(r"^refused: .*colour.*$")
