"""What the page says when something is in the way, and what it looks like."""

import asyncio
import re
from collections.abc import Callable

import pytest
from playwright.async_api import Page, expect

from app.database.connections import Connection
from app.database.embedded import Server
from tests.end_to_end.conftest import OpenPage
from tests.end_to_end.steps import PATIENCE_S, expect_state, expect_value, row
from tests.support.prefix_proxy import under_prefix
from tests.support.server import RunningServer

# How wide things are and where: what overlaps or is cut off shows in these.
LAYOUT = """
    () => {
      const box = (selector) => document.querySelector(selector).getBoundingClientRect();
      return {
        overflow: document.documentElement.scrollWidth - innerWidth,
        stateEnds: box('#state').right,
        name: box('.row .name').width,
        actionsEnd: box('.row .actions').right - box('#things').right,
        rowsBeforeSide: box('#things').top < box('aside').top,
        rowsBegin: box('#things').top,
      };
    }
"""
BUTTON_WIDTHS = """
    () => {
      const thing = document.querySelector('.thing');
      const button = thing.querySelector('.delete');
      const was = button.textContent;
      const widths = ['Undo', 'Deleting…', was].map((text) => {
        thing.classList.toggle('deleting', text !== was);
        button.textContent = text;
        return button.getBoundingClientRect().width;
      });
      return widths;
    }
"""
LONG = "hello at 2026-11-28 10:30:58+00"
AMBER = "getComputedStyle(document.querySelector('#state'), '::before').backgroundColor"


async def test_a_database_that_is_away_is_reported(
    private_postgres: Callable[..., Server],
    start_server: Callable[..., RunningServer],
    open_page: OpenPage,
) -> None:
    """Postgres stops under an open page: it says within seconds since when, and of when its rows
    are. So does a page opened meanwhile; both recover by themselves, and complaints vanish.
    """
    postgres = private_postgres()
    server = start_server(database_url=postgres.url)
    page = await open_page(server.url)
    await page.get_by_label("Name").fill("here")
    await page.get_by_role("button", name="Add").click()
    await expect(row(page, "here")).to_be_visible()
    await expect_state(page, "Live")
    green = await page.evaluate(AMBER)

    await asyncio.to_thread(postgres.stop)
    await expect_state(page, "Database away since ")
    await expect(page.locator("#notice")).to_contain_text(
        re.compile(
            r"The database has been away since .*\d\d:\d\d:\d\d; rows as of .*\d\d:\d\d:\d\d\."
        )
    )
    assert await page.evaluate(AMBER) != green
    await page.get_by_label("Name").fill("fig")
    await page.get_by_role("button", name="Add").click()
    away = "The database cannot be reached: nothing listens at its address."
    await expect(page.locator("#add-problem")).to_have_text(away)
    late = await open_page(server.url)
    # The server still has the rows for a few seconds.
    await expect(late.locator("#notice-text")).to_have_text(
        re.compile(
            rf"^{away} The list will load as soon as it is back\.$"
            rf"|^The database has been away since .*; rows as of .*\. {away}$"
        )
    )
    await expect(late.locator("#state")).to_have_text(
        re.compile("^(Waiting for the database|Database away since .*)$")
    )

    await page.get_by_role("button", name="Hide").click()
    await expect(page.locator("#notice")).to_be_hidden()
    await expect_state(page, "Database away since ")

    await asyncio.to_thread(postgres.start)
    for each in (page, late):
        await expect(each.locator("#state")).to_have_text(re.compile("^Live"))
        await expect(each.locator("#notice")).to_be_hidden()
    await expect(page.locator("#add-problem")).to_be_empty()
    await expect(page.get_by_label("Name")).to_have_value("fig")
    await page.get_by_role("button", name="Add").click()
    for each in (page, late):
        await expect(row(each, "fig")).to_be_visible()


async def test_a_refused_page_says_why(server: RunningServer, open_page: OpenPage) -> None:
    """A proxy names another host than the browser does, so that the page counts as foreign: it
    shows the server's reason, and asks less and less often.
    """
    async with under_prefix(server.url, "/", host="localhost") as (address, requests):
        page = await open_page(address)
        await expect(page.locator("#notice")).to_contain_text(
            "the server's own origin is http://localhost"
        )
        await expect_state(page, "Refused by the server")
        begin = asyncio.get_running_loop().time()
        async with asyncio.timeout(PATIENCE_S):
            while len([line for line in requests if "transport=websocket" in line]) < 5:
                await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - begin > 2.5  # 0.5 + 1 + 2 + 4 s, less jitter


async def test_without_things_the_page_explains_itself(
    start_server: Callable[..., RunningServer], open_page: OpenPage
) -> None:
    """The server has no sample table: the page says how to watch another one, and asks for nothing
    that is not there.
    """
    page = await open_page(start_server(THINGS="no").url)
    await expect(page.locator("body")).to_contain_text("This server shows no things")
    await expect(page.locator("body")).to_contain_text("tablecast watch TABLE")
    for hidden in ("#add", "#things-title", "#recent", "#state", "#notice"):
        await expect(page.locator(hidden)).to_be_hidden()


@pytest.mark.parametrize("width", [390, 700, 900, 1400])
async def test_the_layout_fits(
    server: RunningServer, open_page: OpenPage, connection: Connection, width: int
) -> None:
    """On a phone, a tablet, half a screen and a whole one, with long and right-to-left names:
    nothing is cut off, names have room, and rows come before the side panel.
    """
    await connection.execute(
        f"INSERT INTO things (name, info) VALUES ('שלום עולם', ''), ('{LONG}', ''),"
        " ('fig', E'two\\nlines'),"
        " ('Donaudampfschifffahrtsgesellschaft', repeat('x', 250))"
    )
    page = await open_page(server.url, viewport={"width": width, "height": 800})
    await expect(row(page, "fig")).to_be_visible()
    layout = await page.evaluate(LAYOUT)
    assert layout["overflow"] <= 0
    cell = row(page, LONG).locator(".name")
    assert await cell.evaluate("e => e.scrollWidth <= e.clientWidth")
    assert await cell.evaluate("e => e.scrollHeight <= e.clientHeight + 1")
    ends = [await row(page, name).locator(".delete").bounding_box() for name in ("fig", LONG)]
    assert ends[0] and ends[1] and ends[0]["x"] == ends[1]["x"]
    assert layout["stateEnds"] <= width
    assert layout["name"] >= 120
    assert layout["actionsEnd"] <= 0
    assert layout["rowsBeforeSide"] or width >= 800
    assert layout["rowsBegin"] < 260
    await long_words(page, width)
    assert len(set(await page.evaluate(BUTTON_WIDTHS))) == 1  # else the row's columns move

    await row(page, "Donaudampfschifffahrtsgesellschaft").get_by_role("button", name="Edit").click()
    for label in ("Name", "Info"):
        field = await page.locator(".editor").get_by_label(label).bounding_box()
        assert field and field["width"] >= 100 and field["x"] + field["width"] <= width


async def test_a_problem_with_an_edit_is_in_view(
    server: RunningServer, open_page: OpenPage, connection: Connection
) -> None:
    """On a phone, the editor is at the bottom of the window: its problem is scrolled into view."""
    await connection.execute("INSERT INTO things (name) VALUES ('last'), ('b'), ('taken')")
    page = await open_page(server.url, viewport={"width": 390, "height": 420})
    await row(page, "last").get_by_role("button", name="Edit").click()
    editor = page.locator(".editor")
    await editor.get_by_label("Name").fill("taken")
    await page.evaluate("document.querySelector('.editor input').scrollIntoView({block: 'end'})")
    await editor.get_by_label("Name").press("Enter")
    await expect(editor.locator(".problem")).to_contain_text("Another thing has this name")
    await expect(editor.locator(".problem")).to_be_in_viewport(ratio=1)


async def long_words(page: Page, width: int) -> None:
    """Also with the longest words, the top keeps its height and nothing leaves the window."""
    await page.evaluate(
        "document.getElementById('state').textContent = 'Live, caught up 1,234,567 changes'"
    )
    await expect_value(page, "document.querySelector('.top').offsetHeight", 56)
    assert (
        await page.evaluate("document.querySelector('#state').getBoundingClientRect().right")
        <= width
    )
