"""The page behind nginx and HAProxy, with TLS."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from playwright.async_api import Browser, expect

from tests.support.gateway import MakeGateway, haproxy, nginx
from tests.support.server import RunningServer


@pytest.mark.parametrize("make", [nginx, haproxy], ids=["nginx", "HAProxy"])
async def test_the_page_and_rest_behind_a_proxy(
    make: MakeGateway,
    start_server: Callable[..., RunningServer],
    browser: Browser,
    tmp_path: Path,
) -> None:
    """A user opens the page by HTTP and is led to HTTPS; it is live, and shows what another client
    writes through the proxy. A foreign page is still refused.
    """
    nodes = [await asyncio.to_thread(start_server) for _ in range(2)]
    async with make(tmp_path)([node.port for node in nodes]) as entrance:
        context = await browser.new_context(ignore_https_errors=True)
        page = await context.new_page()
        await page.goto(f"{entrance.url}/")
        await expect(page.get_by_text("Live", exact=True)).to_be_visible(timeout=15_000)
        connector = aiohttp.TCPConnector(ssl=entrance.trust())
        async with aiohttp.ClientSession(entrance.url, connector=connector) as http:
            async with http.post("/api/things", json={"name": "by the proxy"}) as answer:
                assert answer.status == 201
            await expect(page.get_by_text("by the proxy").first).to_be_visible(timeout=15_000)
            plain = f"http://127.0.0.1:{entrance.plain_port}/page?a=b"
            async with http.get(plain, allow_redirects=False) as answer:
                assert answer.status == 301
                assert answer.headers["Location"].startswith("https://127.0.0.1")
                assert answer.headers["Location"].endswith("/page?a=b")
            foreign = {"Origin": "https://other.example"}
            async with http.get("/socket.io/?EIO=4&transport=polling", headers=foreign) as answer:
                refusal = await answer.json()
                assert answer.status == 403 and entrance.url in refusal["message"]
    assert not any("ERROR" in node.log for node in nodes)
