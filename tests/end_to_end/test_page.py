"""The page in a real browser: changes from anywhere appear in every window."""

import asyncio
import os
import shlex
from collections.abc import Callable

from playwright.async_api import Page, expect

from app.database.connections import Connection
from tests.end_to_end.conftest import OpenPage
from tests.end_to_end.steps import (
    NINE,
    expect_state,
    expect_table,
    expect_value,
    point_elsewhere,
    row,
    table,
)
from tests.support.prefix_proxy import under_prefix
from tests.support.server import TABLECAST, RunningServer

# Follows the table with a second instance of the page's own module, and records what it receives.
FOLLOW = """
    async () => {
      const { io } = await import('./socket.io-client/socket.io.esm.min.js');
      const { Feed } = await import('./feed.js');
      const feed = new Feed({ io, topic: 'thing', timing: true });
      window.received = [];
      window.loads = [];
      feed.onchange = ({ op, row, before }) =>
        window.received.push(`${op} ${(row ?? before).name}`);
      feed.onload = (items) => window.loads.push(items.size);
      window.feed = feed;
      feed.start();
    }
"""


async def test_sql_changes_reach_every_window(windows: list[Page], connection: Connection) -> None:
    """SQL inserts, updates, renames, deletes and truncates; two windows follow."""
    await connection.execute(
        "INSERT INTO things (name, info) VALUES ('apple', 'red'), ('pear', '')"
    )
    for page in windows:
        await expect(row(page, "apple").locator(".info")).to_have_text("red")
        await expect(row(page, "pear")).to_be_visible()

    await connection.execute("UPDATE things SET info = 'green' WHERE name = 'apple'")
    for page in windows:
        await expect(row(page, "apple").locator(".info")).to_have_text("green")

    await connection.execute("UPDATE things SET name = 'quince' WHERE name = 'pear'")
    for page in windows:
        await expect(row(page, "quince")).to_be_visible()
        await expect(row(page, "pear")).to_have_count(0)
        await expect(page.locator("#recent li").first).to_contain_text("pear → quince")

    await connection.execute("DELETE FROM things WHERE name = 'apple'")
    for page in windows:
        await expect(row(page, "apple")).to_have_count(0)
        await expect_table(page, connection)

    await connection.execute("TRUNCATE things")
    for page in windows:
        await expect(page.locator(".thing")).to_have_count(0)
        await expect(page.locator("#notice")).to_contain_text("No things yet")
        ops = page.locator("#recent .op")
        await expect(ops).to_have_text(
            ["truncate", "destroy", "update", "update", "create", "create"]
        )
        await expect(page.locator("#recent .when").first).to_contain_text(" ms")


async def test_the_line_for_a_terminal_works(
    start_server: Callable[..., RunningServer], open_page: OpenPage, database_url: str
) -> None:
    """A user copies the page's psql line, with the command that the server names, and runs it
    twice; two things appear.
    """
    command = f"{shlex.quote(str(TABLECAST))} psql"
    page = await open_page(start_server(PSQL_COMMAND=command).url)
    await expect_state(page, "Live")
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="Copy").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    line = await page.evaluate("navigator.clipboard.readText()")
    assert line.startswith(f"{command} -c ")
    for count in (1, 2):
        shell = await asyncio.create_subprocess_shell(
            line,
            stdout=asyncio.subprocess.DEVNULL,
            env=os.environ | {"DATABASE_URL": database_url},
        )
        assert await shell.wait() == 0
        await expect(page.locator(".thing")).to_have_count(count)
    await expect(page.locator(".thing .name").first).to_contain_text("psql at ")


async def test_the_page_works_under_any_path_prefix(
    server: RunningServer, open_page: OpenPage, connection: Connection
) -> None:
    """A reverse proxy shows the server under /lab/cast/; the page loads, follows and writes there,
    and asks for nothing outside of that prefix.
    """
    async with under_prefix(server.url, "/lab/cast/") as (address, requests):
        page = await open_page(address)
        await expect_state(page, "Live")
        await page.get_by_label("Name").fill("fig")
        await page.get_by_role("button", name="Add").click()
        await expect(row(page, "fig")).to_be_visible()
        await connection.execute("UPDATE things SET info = 'ripe'")
        await expect(row(page, "fig").locator(".info")).to_have_text("ripe")
        assert [line for line in requests if " /lab/cast/" not in line] == []
        assert any(line.startswith("GET /lab/cast/socket.io-client/?") for line in requests)


async def test_names_handed_from_row_to_row(windows: list[Page], connection: Connection) -> None:
    """One statement passes every name to the next row, others change a key; the page is right."""
    await connection.execute(NINE)
    # From now on a scan goes from the highest id down, so that names can move up.
    for id in range(9, 0, -1):
        await connection.execute("UPDATE things SET info = '-' WHERE id = $1", id)
    await connection.execute("UPDATE things SET name = 'n' || substr(name, 2)::int + 1")
    await connection.execute("DELETE FROM things WHERE name = 'n4'")
    await connection.execute("UPDATE things SET id = DEFAULT WHERE name = 'n6'")
    await connection.execute("UPDATE things SET id = DEFAULT")
    await connection.execute("DELETE FROM things WHERE name = 'n7'")
    await expect_table(windows[0], connection)


async def test_a_name_is_never_markup(windows: list[Page], connection: Connection) -> None:
    """A thing's name is an image tag that runs a script; both windows show it as text."""
    name = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
    await connection.execute("INSERT INTO things (name, info) VALUES ($1, $1)", name)
    for page in windows:
        await expect(row(page, name).locator(".info")).to_have_text(name)
        await expect(page.locator("#recent .name").first).to_have_text(name)
        assert await page.locator(".thing img, .thing b, #recent img, #recent b").count() == 0
        assert await page.title() == "Tablecast"


async def test_a_person_adds_edits_and_deletes(windows: list[Page], connection: Connection) -> None:
    """A user adds, edits in place and deletes in one window; the other window follows."""
    here, there = windows
    odd = "a/b ?#%41 ü 🍐"
    for name in ("fig", odd, "."):
        await here.get_by_label("Name").fill(name)
        await here.get_by_label("Info").fill("sweet")
        await here.get_by_role("button", name="Add").click()
        await expect(row(there, name).locator(".info")).to_have_text("sweet")
        await expect(here.get_by_label("Name")).to_have_value("")

    for name in (odd, "."):
        await row(here, name).get_by_role("button", name="Edit").click()
        editor = here.locator(".editor")
        await expect(editor.get_by_label("Name")).to_be_focused()
        await editor.get_by_label("Info").fill("sour")
        await editor.get_by_label("Info").press("Enter")
        await expect(editor).to_have_count(0)
        await expect(row(there, name).locator(".info")).to_have_text("sour")

    for name in (odd, "."):
        await row(here, name).get_by_role("button", name="Delete").click()
    for name in (odd, "."):
        await expect(row(there, name)).to_have_count(0)
    await point_elsewhere(here)
    assert await table(connection) == [["fig", "sweet"]]
    await expect_table(here, connection)


async def test_a_refusal_is_shown_next_to_the_field(
    windows: list[Page], connection: Connection
) -> None:
    """A user types a taken, an empty and a too long name; a sentence appears next to the field."""
    page = windows[0]
    await connection.execute("INSERT INTO things (name) VALUES ('fig'), ('date')")
    await expect(row(page, "date")).to_be_visible()

    form = page.locator("#add")
    for name, words in (
        ("fig", "has this name"),
        ("", "Please type a name of 1 to 200 characters."),
        ("x" * 201, "This name has 201 characters; a name has 1 to 200."),
    ):
        await form.get_by_label("Name").fill(name)
        await form.get_by_label("Name").press("Enter")
        await expect(form.get_by_role("alert")).to_contain_text(words)
        await expect(form.get_by_label("Name")).to_have_attribute("aria-invalid", "true")
        await expect(form.get_by_label("Name")).to_have_value(name)

    await row(page, "date").get_by_role("button", name="Edit").click()
    editor = page.locator(".editor")
    for name, words in (("fig", "has this name"), ("", "1 to 200")):
        await editor.get_by_label("Name").fill(name)
        await editor.get_by_role("button", name="Save").click()
        await expect(editor.get_by_role("alert")).to_contain_text(words)
    await editor.press("Escape")
    await expect(editor).to_have_count(0)
    assert await table(connection) == [["fig", ""], ["date", ""]]

    await form.get_by_label("Name").fill("x")
    await expect(page.locator("#add-problem")).to_be_empty()
    await expect(form.get_by_label("Name")).to_have_attribute("aria-invalid", "false")


async def test_an_editor_survives_what_others_do(
    windows: list[Page], connection: Connection
) -> None:
    """A user types in an editor while others change and delete that thing; no text is lost."""
    page = windows[0]
    await connection.execute("INSERT INTO things (name) VALUES ('fig'), ('date')")
    await row(page, "fig").get_by_role("button", name="Edit").click()
    editor = page.locator(".editor")
    await editor.get_by_label("Info").fill("half a sent")

    await connection.execute("UPDATE things SET name = 'Fig' WHERE name = 'fig'")
    await expect(editor.get_by_role("status")).to_contain_text("Changed meanwhile: Fig")
    await editor.get_by_label("Info").press_sequentially("ence")
    await editor.get_by_role("button", name="Save").click()
    await expect(row(page, "Fig").locator(".info")).to_have_text("half a sentence")

    await row(page, "Fig").get_by_role("button", name="Edit").click()
    await connection.execute("DELETE FROM things WHERE name = 'Fig'")
    await expect(editor.get_by_role("status")).to_contain_text("Deleted meanwhile")
    await expect(editor.get_by_role("button", name="Save")).to_be_disabled()
    await editor.get_by_role("button", name="Cancel").click()
    await point_elsewhere(page)
    await expect_table(page, connection)


async def test_the_keyboard_suffices(windows: list[Page], connection: Connection) -> None:
    """A user adds, moves through the rows with arrow keys, deletes and edits without a mouse."""
    page = windows[0]
    await connection.execute(NINE)
    await expect(row(page, "n9")).to_be_visible()
    await page.locator("#things-title").focus()
    for key in ("Tab", "ArrowDown", "ArrowDown"):
        await page.keyboard.press(key)
    await expect(page.get_by_role("button", name="Edit n7")).to_be_focused()
    await expect(page.locator("#things [tabindex='0']")).to_have_count(2)
    for key in ("Tab", "Enter"):
        await page.keyboard.press(key)
    await expect(page.get_by_role("button", name="Undo deleting n7")).to_be_focused()
    await expect(page.locator("#announcement")).to_contain_text("n7 will be deleted in 5 seconds")
    for key in ("Enter", "Enter"):
        await page.keyboard.press(key)
    await expect(row(page, "n7")).to_have_count(0)
    await expect(page.get_by_role("button", name="Edit n6")).to_be_focused()
    for key in ("End", "Enter"):
        await page.keyboard.press(key)
    await page.keyboard.type("first")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Edit first")).to_be_focused()
    await connection.execute("INSERT INTO things (name) VALUES ('last')")
    await expect(page.get_by_role("button", name="1 new row")).to_be_visible()
    await page.locator("#things-title").focus()  # leaves the list
    await expect_table(page, connection)


async def test_the_page_outlives_the_server(
    server: RunningServer, windows: list[Page], connection: Connection
) -> None:
    """The server is killed and started again during writes; nothing is lost or doubled."""
    page, other = windows
    await other.evaluate(FOLLOW)
    await expect_value(other, "window.feed.state.name", "live")
    await connection.execute("INSERT INTO things (name) VALUES ('before')")
    await expect(row(page, "before")).to_be_visible()

    server.kill()
    await expect_state(page, "Reconnecting")
    await page.get_by_label("Name").fill("not now")
    await page.get_by_role("button", name="Add").click()
    await expect(page.locator("#add-problem")).to_contain_text("cannot be reached")
    for n in range(20):
        await connection.execute("INSERT INTO things (name) VALUES ($1)", f"during {n}")
    await asyncio.to_thread(server.start)
    await expect_state(page, "caught up 20 changes")
    await expect(page.locator("#add-problem")).to_be_empty()
    await expect(page.get_by_label("Name")).to_have_value("not now")
    for n in range(20):
        await connection.execute("INSERT INTO things (name) VALUES ($1)", f"after {n}")

    for window in windows:
        await expect_table(window, connection)
    names = [name for name, _ in await table(connection)]
    await expect_value(other, "window.received", [f"create {name}" for name in names])
    assert await other.evaluate("window.loads") == [0]
    await expect_state(page, "Live")


async def test_an_ended_history_makes_the_page_load_again(
    server: RunningServer, open_page: OpenPage, connection: Connection
) -> None:
    """While the server is down, the log is emptied, so that it cannot continue from a page's
    offset; page and module load again, with no gap.
    """
    await connection.execute("INSERT INTO things (name) VALUES ('old')")
    page = await open_page(server.url)
    await expect_state(page, "Live")
    await page.evaluate(FOLLOW)
    await expect_value(page, "window.feed.state.name", "live")
    server.kill()
    await expect_state(page, "Reconnecting")
    await connection.execute("INSERT INTO things (name) VALUES ('never sent as a change')")
    await connection.execute("TRUNCATE feed.change")
    await asyncio.to_thread(server.start)
    await expect_state(page, "Live again, list reloaded")
    await expect_value(page, "window.loads", [1, 2])
    await connection.execute("INSERT INTO things (name) VALUES ('new')")
    await expect_value(page, "window.received", ["create new"])
    await expect_table(page, connection)


async def test_an_altered_table_is_loaded_again(
    windows: list[Page], connection: Connection
) -> None:
    """After ALTER TABLE rewrites every row, which no trigger sees, both windows show the new rows
    within seconds; when another table is altered they load nothing.
    """
    page, other = windows
    await connection.execute("INSERT INTO things (name, info) VALUES ('a', 'quiet'), ('b', 'calm')")
    await page.evaluate(FOLLOW)
    await expect_value(page, "window.loads.length", 1)
    await connection.execute("CREATE TABLE elsewhere (id int PRIMARY KEY)")
    await connection.execute("SELECT feed.watch('elsewhere', 'elsewhere')")
    await connection.execute("ALTER TABLE elsewhere ADD n int DEFAULT 1")
    await connection.execute("ALTER TABLE things ALTER info TYPE text USING upper(info)")
    for window in (page, other):
        await expect_table(window, connection)
    await expect_value(page, "window.loads.length", 2)
    await connection.execute("UPDATE things SET info = 'after' WHERE name = 'a'")
    for window in (page, other):
        await expect_table(window, connection)
    await expect_value(page, "window.loads.length", 2)
