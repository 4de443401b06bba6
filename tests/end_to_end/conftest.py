"""A real browser for the tests of the page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, Request, async_playwright, expect

from app.database.connections import Connection
from tests.end_to_end.steps import NINE, PATIENCE_S, expect_state, row
from tests.support.chromium import CHROMIUM, CHROMIUM_OPTIONS
from tests.support.machine import require
from tests.support.server import RunningServer

# What the browser itself reports when a server refuses or is down: not a fault of the page.
EXPECTED_REPORTS = ("Failed to load resource:", "WebSocket connection to")

# Chromium drops what it is loading when a network interface of the machine comes or goes.
NETWORK_CHANGED = "net::ERR_NETWORK_CHANGED"
expect.set_options(timeout=PATIENCE_S * 1000)

OpenPage = Callable[..., Awaitable[Page]]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A headless Chromium."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=require(*CHROMIUM), args=CHROMIUM_OPTIONS
        )
        yield browser
        await browser.close()


@pytest.fixture
async def open_page(browser: Browser) -> AsyncIterator[OpenPage]:
    """Opens a URL in its own window; no page may report an error or a CSP violation.

    Options are those of a browser's context: `open_page(url, has_touch=True)`.
    """
    reports: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED_REPORTS):
            reports.append(message.text)

    async def open_page(address: str, **options: Any) -> Page:
        size = {"width": 1280, "height": 800}
        context = await browser.new_context(**({"viewport": size} | options))
        page = await context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", listen)
        page.on("pageerror", lambda error: reports.append(str(error)))
        interrupted: list[Request] = []

        def note(request: Request) -> None:
            if request.failure == NETWORK_CHANGED:
                interrupted.append(request)

        page.on("requestfailed", note)
        await page.goto(address)
        while interrupted:
            interrupted.clear()
            await page.reload()
        return page

    yield open_page
    assert reports == []


@pytest.fixture
async def windows(server: RunningServer, open_page: OpenPage) -> list[Page]:
    """Two live windows."""
    pages = await asyncio.gather(open_page(server.url), open_page(server.url))
    for page in pages:
        await expect_state(page, "Live")
    return list(pages)


@pytest.fixture
async def page(server: RunningServer, open_page: OpenPage, connection: Connection) -> Page:
    """A live window with nine things."""
    await connection.execute(NINE)
    page = await open_page(server.url)
    await expect_state(page, "Live")
    await expect(row(page, "n1")).to_be_visible()
    return page
