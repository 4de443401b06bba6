"""Served under a path prefix (ROOT_PATH), by proxies that take the prefix away and that do not."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.support.sockets import App, PollingClient, joined, serving_here

PREFIX = "/app/live"


@pytest.fixture
async def prefixed(database_url: str, plain: bool) -> AsyncIterator[App]:
    async with serving_here(database_url, plain=plain, root_path=PREFIX) as app:
        yield app


@pytest.mark.parametrize("seen", ["", PREFIX], ids=["taken away", "passed on"])
async def test_everything_is_served_under_a_prefix(prefixed: App, seen: str) -> None:
    """A proxy passes requests on with the prefix or without: REST, files, polling and WebSockets
    work, and whatever a client is sent to is below the prefix.
    """
    async with httpx.AsyncClient(base_url=prefixed.url) as http:
        for name in ("one", "two", "ü/?"):
            answer = await http.post(f"{seen}/api/things", json={"name": name})
            assert answer.headers["Location"].startswith(f"{PREFIX}/api/things/")
        created = await http.get(seen + answer.headers["Location"].removeprefix(PREFIX))
        assert created.json()["name"] == "ü/?"
        page = await http.get(f"{seen}/api/things?limit=1")
        assert page.headers["Link"].startswith(f"<{PREFIX}/api/things?limit=1&after=")
        document = (await http.get(f"{seen}/openapi.json")).json()
        assert document["servers"] == [{"url": PREFIX}]
        for path in ("/", "/feed.js", "/socket.io/socket.io.js", "/readyz"):
            assert (await http.get(seen + path)).status_code == 200, path
        assert (await http.get(f"{seen}/nowhere")).status_code == 404
        for path in ("/socket.io/", "/socket.io-client/"):
            polling = PollingClient(http, seen + path)
            await polling.open()
            await polling.post("40")
            assert (await polling.poll())[0].startswith("40{")
            async with joined(prefixed.url, path=seen + path) as client:
                assert client.recovered is False


async def test_the_prefix_itself_leads_to_the_page(prefixed: App) -> None:
    """A user leaves out the last slash; the page's relative URLs would then miss the prefix."""
    async with httpx.AsyncClient(base_url=prefixed.url) as http:
        answer = await http.get(f"{PREFIX}?a=b")
        assert (answer.status_code, answer.headers["Location"]) == (308, f"{PREFIX}/?a=b")
        answer = await http.get(PREFIX, headers={"Host": "evil.example"})
        assert answer.status_code == 421
        assert (await http.get(f"{PREFIX}live/feed.js")).status_code == 404


async def test_without_a_prefix_nothing_has_one(app: App) -> None:
    """A server at the root of its host names paths from the root."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        answer = await http.post("/api/things", json={"name": "one"})
        assert answer.headers["Location"] == "/api/things/one"
        assert (await http.get("/openapi.json")).json()["servers"] == [{"url": "/"}]
