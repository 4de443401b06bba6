"""What the tests of the page do again and again."""

import asyncio

from playwright.async_api import Locator, Page, expect

from app.database.connections import Connection

PATIENCE_S = 15.0
NINE = "INSERT INTO things (name) SELECT 'n' || n FROM generate_series(1, 9) n"

# Names and infos of the rows, except those of things that are gone.
ROWS = """
    [...document.querySelectorAll('.thing:not([inert]) .row')]
      .map((row) => [row.children[0].textContent, row.children[1].textContent])
"""


async def expect_state(page: Page, words: str) -> None:
    """Wait until the page shows this connection state."""
    await expect(page.locator("#state")).to_contain_text(words)


def row(page: Page, name: str) -> Locator:
    """Return the row of the thing with this name, unless the thing is gone."""
    exact = page.locator(".row .name").get_by_text(name, exact=True)
    return page.locator(".thing:not([inert])").filter(has=exact)


async def table(connection: Connection) -> list[list[str]]:
    found = await connection.fetch("SELECT name, info FROM things ORDER BY id")
    return [[thing["name"], thing["info"]] for thing in found]


async def expect_table(page: Page, connection: Connection) -> None:
    """Wait until the page shows the rows of the table, newest first."""
    await expect_value(page, ROWS, (await table(connection))[::-1])


async def expect_value(page: Page, expression: str, wanted: object) -> None:
    """Wait until a JavaScript expression has this value on the page."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while (value := await page.evaluate(expression)) != wanted:
        assert asyncio.get_running_loop().time() < deadline, (expression, value, wanted)
        await asyncio.sleep(0.05)


async def point_elsewhere(page: Page) -> None:
    """Move the pointer to where nothing is held for it."""
    await page.mouse.move(2, 2)
