"""A page of another site that uses a server by the official client."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from playwright.async_api import Browser, Error, Page

from app.database.connections import Connection
from tests.support.server import RunningServer

StartServer = Callable[..., RunningServer]

PAGE = """<!doctype html>
<title>elsewhere</title>
<script src="{url}/socket.io-client/socket.io.js"></script>
<script>
  window.seen = [];
  window.refusals = 0;
  async function start() {
    const list = await fetch('{url}/api/things');
    const since = list.headers.get('Feed-Offset');
    window.names = (await list.json()).map((thing) => thing.name);
    connect(since);
  }
  function connect(since) {
    const socket = io('{url}', { auth: { since } });
    socket.on('connect_error', () => { window.refusals += 1; });
    socket.io.on('open', () => {
      window.first = socket.io.engine.transport.name;
      socket.io.engine.on('upgrade', (transport) => { window.upgraded = transport.name; });
    });
    socket.on('feed:hello', ({ recovered }) => { window.recovered = recovered; });
    socket.on('thing:create', (thing) => window.seen.push(thing.name));
  }
  const write = (name) => fetch('{url}/api/things', {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ name }),
  }).then((answer) => answer.headers.get('Location'));
</script>
"""


class Site:
    """Another web site, with one page."""

    def __init__(self) -> None:
        self.origin = ""
        self.page = ""

    async def __aenter__(self) -> "Site":
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.origin = f"http://localhost:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n")
        writer.write(self.page.encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as opened:
        yield opened


@pytest.fixture
async def page(browser: Browser) -> Page:
    page = await browser.new_page()
    page.set_default_timeout(15_000)
    return page


@pytest.mark.parametrize("anyone", [False, True], ids=["listed", "any"])
async def test_a_page_of_an_allowed_origin_follows_the_table(
    start_server: StartServer, connection: Connection, site: Site, page: Page, anyone: bool
) -> None:
    """A page of an allowed origin loads the list with its offset, connects by the client's default
    transports (polling, then WebSocket), misses nothing, and writes.
    """
    await connection.execute("INSERT INTO things (name) VALUES ('apple')")
    server = start_server(ALLOWED_ORIGINS="*" if anyone else site.origin.upper())
    site.page = PAGE.replace("{url}", server.url)
    await page.goto(site.origin)
    await page.evaluate("start()")
    await page.wait_for_function("window.upgraded")
    await connection.execute("INSERT INTO things (name) VALUES ('pear')")
    assert await page.evaluate("write('fig')") == "/api/things/fig"
    await page.wait_for_function("window.seen.length === 2")
    found = await page.evaluate("[names, first, upgraded, recovered, seen, refusals]")
    assert found == [["apple"], "polling", "websocket", True, ["pear", "fig"], 0]


async def test_a_page_of_another_origin_gets_nothing(
    start_server: StartServer, connection: Connection, site: Site, page: Page
) -> None:
    """A page whose origin is not listed can neither read, nor write, nor connect."""
    server = start_server(ALLOWED_ORIGINS="https://example.org")
    site.page = PAGE.replace("{url}", server.url)
    await page.goto(site.origin)
    for forbidden in ("start()", "write('fig')"):
        with pytest.raises(Error, match="Failed to fetch"):
            await page.evaluate(forbidden)
    await page.evaluate("connect()")
    await page.wait_for_function("window.refusals")
    assert not await connection.fetchval("SELECT count(*) FROM things")
    assert f"a page of {site.origin}," in server.log and "ERROR" not in server.log
