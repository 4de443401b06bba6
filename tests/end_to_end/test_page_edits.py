"""Editing and deleting while others write, the page is not up to date, or the server is slow."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from playwright.async_api import Locator, Page, expect

from app.database.connections import Connection, connect
from tests.end_to_end.conftest import OpenPage
from tests.end_to_end.steps import expect_state, expect_table, point_elsewhere, row, table
from tests.support.server import RunningServer

# A thing is renamed, and another one gets its name.
PASS_ON = (
    "UPDATE things SET name = 'was n5' WHERE name = 'n5';"
    "INSERT INTO things (name, info) VALUES ('n5', 'another one')"
)
# What feed.rewrite_history does: clients load again.
NEW_HISTORY = "UPDATE feed.state SET history = gen_random_uuid(), redrawn = pg_current_xact_id()"


@asynccontextmanager
async def holding(url: str, statement: str) -> AsyncIterator[Connection]:
    """Another session, which holds the locks that a statement takes."""
    connection = await connect(url)
    try:
        async with connection.transaction():
            await connection.execute(statement)
            yield connection
    finally:
        await connection.close()


async def edit(page: Page, name: str) -> Locator:
    """Open the editor of a thing."""
    await row(page, name).get_by_role("button", name="Edit").click()
    return page.locator(".editor")


async def infos(connection: Connection) -> dict[str, str]:
    """Return the info of each thing in the table."""
    return dict(await table(connection))


async def test_an_editor_follows_its_thing_across_a_new_list(
    page: Page, connection: Connection
) -> None:
    """A thing that a user edits is renamed, another one gets its name, and the page has to load the
    list again: the editor says so, and saves to the thing that the user meant.
    """
    editor = await edit(page, "n5")
    await editor.get_by_label("Info").fill("mine")
    async with connection.transaction():
        await connection.execute(PASS_ON)
        await connection.execute(NEW_HISTORY)
    await expect_state(page, "reloaded")
    await expect(editor.get_by_role("status")).to_contain_text("Changed meanwhile: was n5")
    await editor.get_by_role("button", name="Save").click()
    await expect(editor).to_have_count(0)
    found = await infos(connection)
    assert (found["was n5"], found["n5"]) == ("mine", "another one")


async def test_a_page_that_is_behind_changes_no_other_thing(
    page: Page, connection: Connection, database_url: str
) -> None:
    """The page has not heard yet that a name was passed on: neither an edit nor a deletion reaches
    the thing that has the name now.
    """
    async with holding(database_url, "LOCK TABLE feed.state"):
        await connection.execute(PASS_ON)
        editor = await edit(page, "n5")
        await editor.get_by_label("Info").fill("mine")
        await editor.get_by_role("button", name="Save").click()
        await expect(editor.locator(".problem")).to_contain_text("not called “n5” any more")
        await editor.get_by_role("button", name="Cancel").click()
        await row(page, "n5").get_by_role("button", name="Delete").click()
        await expect(row(page, "n5").get_by_role("button", name="Deleting n5")).to_be_visible(
            timeout=10_000
        )
    await expect(row(page, "was n5").get_by_role("alert")).to_contain_text("called “n5”")
    await point_elsewhere(page)
    await expect_table(page, connection)
    assert (await infos(connection))["n5"] == "another one"
    assert len(await table(connection)) == 10


async def test_a_page_that_is_behind_edits_no_other_large_thing(
    start_server: Callable[..., RunningServer],
    open_page: OpenPage,
    connection: Connection,
    database_url: str,
) -> None:
    """A thing is too large to be sent, so that the page loads it to edit it; its name was passed on
    and the page has not heard yet: it shows no form with the thing that has the name now.
    """
    page = await open_page(start_server(MAX_EVENT_BYTES="64KiB").url)
    await expect_state(page, "Live")
    await connection.execute("INSERT INTO things (name, info) VALUES ('n5', repeat('x', 100000))")
    await expect(row(page, "n5")).to_contain_text("too large")
    async with holding(database_url, "LOCK TABLE feed.state"):
        await connection.execute(PASS_ON)
        await row(page, "n5").get_by_role("button", name="Edit").click()
        await expect(row(page, "n5").get_by_role("alert")).to_contain_text("called “n5” any more")
        await expect(page.locator(".editor")).to_have_count(0)


async def test_a_deleted_thing_that_was_put_back_is_shown(
    page: Page, connection: Connection, database_url: str
) -> None:
    """A backup is restored right after a user's deletion: the thing is there again."""
    async with holding(database_url, "LOCK TABLE feed.state") as other:
        async with page.expect_event(
            "requestfinished", lambda request: request.method == "DELETE", timeout=10_000
        ):
            await row(page, "n5").get_by_role("button", name="Delete").click()
        assert "n5" not in await infos(connection)
        await other.execute(
            "INSERT INTO things (id, name) OVERRIDING SYSTEM VALUE VALUES (5, 'n5')"
        )
        await other.execute(NEW_HISTORY)
    await expect(page.get_by_role("button", name="Delete n5")).to_be_visible()
    await point_elsewhere(page)
    await expect_table(page, connection)


async def test_what_is_typed_while_a_save_is_slow_is_kept(
    page: Page, server: RunningServer, database_url: str
) -> None:
    """A user cancels a save that takes long, and edits again; the answer to the first leaves that
    editor alone. While a save is under way, its fields take no text.
    """
    async with holding(database_url, "SELECT FROM things WHERE name = 'n5' FOR UPDATE"):
        editor = await edit(page, "n5")
        await editor.get_by_label("Info").fill("first")
        async with page.expect_request(lambda request: request.method == "PATCH") as patch:
            await editor.get_by_role("button", name="Save").click()
        await expect(editor.get_by_label("Info")).not_to_be_editable()
        await page.keyboard.press("Escape")
        await expect(editor).to_have_count(0)
        editor = await edit(page, "n5")
        await editor.get_by_label("Info").fill("second")
    await (await patch.value).response()
    await expect(editor.get_by_role("status")).to_contain_text("Changed meanwhile: n5 – first")
    await expect(editor.get_by_label("Info")).to_have_value("second")
    await editor.get_by_role("button", name="Cancel").click()

    async with holding(database_url, "SELECT FROM things WHERE name = 'n5' FOR UPDATE"):
        editor = await edit(page, "n5")
        await editor.get_by_label("Info").fill("third")
        async with page.expect_request(lambda request: request.method == "PATCH"):
            await editor.get_by_role("button", name="Save").click()
        await page.keyboard.press("Escape")
        server.kill()
        await expect(row(page, "n5").get_by_role("alert")).to_contain_text("cannot be reached")


async def test_the_next_thing_cannot_be_typed_into_the_form_of_the_last(
    page: Page, database_url: str
) -> None:
    """Adding takes long: the fields take no text, which would be lost when it is done."""
    async with holding(database_url, "LOCK TABLE things IN SHARE MODE"):
        name = page.locator("#add").get_by_label("Name")
        await name.fill("fig")
        async with page.expect_request(lambda request: request.method == "POST"):
            await name.press("Enter")
        await expect(name).not_to_be_editable()
    await expect(name).to_be_editable()
    await expect(name).to_have_value("")


async def test_a_double_click_opens_one_editor(
    start_server: Callable[..., RunningServer], open_page: OpenPage, connection: Connection
) -> None:
    """A user clicks twice on the Edit button of a thing that has to be loaded first."""
    page = await open_page(start_server(MAX_EVENT_BYTES="64KiB").url)
    await expect_state(page, "Live")
    await connection.execute("INSERT INTO things (name, info) VALUES ('big', repeat('x', 100000))")
    await row(page, "big").get_by_role("button", name="Edit").dblclick()
    await expect(page.locator(".editor")).to_have_count(1)
    await page.locator(".editor").get_by_role("button", name="Cancel").click()
    await expect(page.locator(".editor")).to_have_count(0)
    await expect(row(page, "big")).to_be_visible()


async def test_an_editor_notices_that_its_thing_is_back(page: Page, connection: Connection) -> None:
    """Somebody deletes a thing that a user edits, and puts it back as it was: it can be saved."""
    editor = await edit(page, "n5")
    await editor.get_by_label("Info").fill("mine")
    await connection.execute("DELETE FROM things WHERE name = 'n5'")
    await expect(editor.get_by_role("status")).to_have_text("Deleted meanwhile.")
    await expect(editor.get_by_role("button", name="Save")).to_be_disabled()
    await connection.execute(
        "INSERT INTO things (id, name) OVERRIDING SYSTEM VALUE VALUES (5, 'n5')"
    )
    await expect(editor.get_by_role("status")).to_have_text("Changed meanwhile: n5")
    await editor.get_by_role("button", name="Save").click()
    await expect(editor).to_have_count(0)
    assert (await infos(connection))["n5"] == "mine"
