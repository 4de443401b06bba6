"""The page under load."""

import asyncio

from playwright.async_api import expect

from app.database.connections import Connection
from bench.smoothness import Smoothness, Writer, measure
from tests.end_to_end.conftest import OpenPage
from tests.end_to_end.steps import expect_state, expect_table, point_elsewhere
from tests.support.server import RunningServer

ROWS, CHANGES_PER_SECOND, SECONDS, WARM_UP_S = 5_000, 500, 4.0, 0.5
# Other tests run at the same time. On a machine of its own: 50 ms, 100 ms, half (bench/README.md).
FRAME_MS, LONGEST_TASK_MS, BUSY = 150, 500, 0.75
# Other programs only ever make a round worse, so one good round suffices, as in the benchmark.
ROUNDS = 3


async def test_five_thousand_things_stay_smooth(
    server: RunningServer, open_page: OpenPage, connection: Connection
) -> None:
    """500 changes a second hit 5,000 things while a user scrolls; nothing freezes, and the page
    shows the table afterwards.
    """
    writer = Writer(CHANGES_PER_SECOND, connection)
    await writer.fill(ROWS)
    page = await open_page(server.url)
    await expect_state(page, "Live")
    await expect(page.locator(".thing")).to_have_count(ROWS)

    async def scroll() -> None:
        await page.mouse.move(400, 500)
        while True:
            await page.mouse.wheel(0, 900)
            await asyncio.sleep(0.1)

    scrolling = asyncio.create_task(scroll())
    for _ in range(ROUNDS):
        found = await measure(page, writer, SECONDS, WARM_UP_S)
        if is_smooth(found):
            break
    scrolling.cancel()
    await point_elsewhere(page)
    await expect_table(page, connection)
    assert is_smooth(found), found


def is_smooth(found: Smoothness) -> bool:
    return (
        found.frame_ms < FRAME_MS and found.longest_task_ms < LONGEST_TASK_MS and found.busy < BUSY
    )
