"""Watches a server with pages in Chromium and writes down everything they receive, like watch.mjs.

Argument: a JSON array of {url, transports, file}. Stops when standard input ends. Certificates are
not checked.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from playwright.async_api import Page, async_playwright

from tests.support.chromium import CHROMIUM, CHROMIUM_OPTIONS
from tests.support.machine import require

DRAIN_S = 0.2
# static/feed.js in the server's own origin, with the transports of this client.
FOLLOW = """
    async (transports) => {
      const { io } = await import('/socket.io-client/socket.io.esm.min.js');
      const { Feed } = await import('/feed.js');
      window.entries = [];
      const write = (...entry) => window.entries.push(JSON.stringify(entry));
      const watched = (address, options) => {
        const fast = { reconnectionDelay: 200, reconnectionDelayMax: 1000, timeout: 5000 };
        const socket = io(address, { ...options, ...fast, transports });
        socket.on('feed:offset', (offset) => write('quiet', offset));
        socket.on('feed:hello', ({ recovered }, offset) => {
          // Before the first list there is nothing to continue from.
          if (recovered || feed.offset) write('hello', recovered, offset, null);
        });
        return socket;
      };
      const feed = new Feed({ io: watched, topic: 'thing' });
      let isFirst = true;
      feed.onload = (items) => {
        write('list', feed.offset, [...items.values()]);
        if (isFirst) write('hello', true, feed.offset, null);
        isFirst = false;
      };
      feed.onchange = ({ op, row, before, offset }) =>
        write(`thing:${op}`, row ?? before?.name ?? null, offset);
      feed.start();
      window.stop = () => {
        write('state', [...feed.items.values()]);
        feed.stop();
      };
    }
"""


class Watcher:
    """One page."""

    def __init__(self, page: Page, file: str) -> None:
        self._page = page
        self._file = Path(file).open("a", encoding="utf-8")  # noqa: SIM115  # until the end

    async def follow(self, url: str, transports: list[str]) -> None:
        await self._page.goto(f"{url}/healthz")  # a small document of the origin
        await self._page.evaluate(FOLLOW, transports)

    async def drain(self) -> None:
        """Write down what the page has received since the last time."""
        entries: list[str] = await self._page.evaluate("window.entries.splice(0)")
        self._file.writelines(f"{entry}\n" for entry in entries)
        self._file.flush()

    async def stop(self) -> None:
        await self._page.evaluate("window.stop()")
        await self.drain()


async def watch(clients: list[dict[str, Any]]) -> None:
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=require(*CHROMIUM), args=CHROMIUM_OPTIONS
        )
        watchers = []
        for client in clients:
            context = await browser.new_context(ignore_https_errors=True)
            watcher = Watcher(await context.new_page(), client["file"])
            await watcher.follow(client["url"], client["transports"])
            watchers.append(watcher)
        while not ended.done():
            await asyncio.wait([ended], timeout=DRAIN_S)
            for watcher in watchers:
                await watcher.drain()
        for watcher in watchers:
            await watcher.stop()
        await browser.close()


if __name__ == "__main__":
    asyncio.run(watch(json.loads(sys.argv[1])))
