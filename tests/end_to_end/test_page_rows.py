"""Rows under a user's hand: they do not move, and deleting them can be undone."""

import asyncio
from collections.abc import Callable

from playwright.async_api import Page, Request, expect

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
from tests.support.server import RunningServer

# What happens above and below the row n5 while a user is about to use it.
MEANWHILE = (
    "INSERT INTO things (name) VALUES ('new 1'), ('new 2')",
    "INSERT INTO things (id, name) OVERRIDING SYSTEM VALUE VALUES (-5, 'below')",
    "UPDATE things SET info = repeat('long ', 40) WHERE name IN ('n9', 'n5', 'n1')",
    "DELETE FROM things WHERE name IN ('n8', 'n6', 'n2')",
    "UPDATE things SET info = 'the end' WHERE name = 'n9'",
)


async def place(page: Page, name: str) -> tuple[float, float]:
    """Return where the button Delete of a thing is."""
    box = (
        await page.get_by_role("button", name=f"deleting {name}")
        .or_(page.get_by_role("button", name=f"Delete {name}"))
        .bounding_box()
    )
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


async def do_meanwhile(page: Page, connection: Connection) -> None:
    for statement in MEANWHILE:
        await connection.execute(statement)
    await expect(row(page, "n9").locator(".info")).to_have_text("the end")


async def test_no_row_moves_under_a_resting_pointer(page: Page, connection: Connection) -> None:
    """The pointer rests on a Delete button while others insert, delete and update above and below;
    the click hits the row it was over, and new rows come when the pointer has left.
    """
    where = await place(page, "n5")
    await page.mouse.move(*where)
    await do_meanwhile(page, connection)
    await expect(page.get_by_role("button", name="2 new rows")).to_be_visible()
    await expect(row(page, "below")).to_be_visible()  # moves no other row
    await expect(page.locator(".gone")).to_have_count(3)
    assert await place(page, "n5") == where
    await page.mouse.down()
    await page.mouse.up()
    await expect(page.locator(".deleting .name")).to_have_text(["n5"])
    assert await place(page, "n5") == where
    await page.mouse.down()
    await page.mouse.up()  # undoes it
    await expect(page.locator(".deleting")).to_have_count(0)

    await point_elsewhere(page)
    await expect(page.locator("#held")).to_be_hidden()
    await expect_table(page, connection)


async def test_no_row_moves_under_a_finger(
    server: RunningServer, open_page: OpenPage, connection: Connection
) -> None:
    """On a phone, a user touches the list while others insert and delete; rows stay where they are
    until a moment after.
    """
    await connection.execute(NINE)
    page = await open_page(server.url, has_touch=True, viewport={"width": 390, "height": 800})
    await expect(row(page, "n1")).to_be_visible()
    where = await place(page, "n5")
    await page.touchscreen.tap(40, where[1])
    await do_meanwhile(page, connection)
    assert await place(page, "n5") == where
    await page.touchscreen.tap(*where)
    await expect(page.locator(".deleting .name")).to_have_text(["n5"])
    await expect(row(page, "new 2")).to_be_visible()
    await expect(page.locator(".gone")).to_have_count(0)


async def test_new_rows_come_when_asked_for(page: Page, connection: Connection) -> None:
    """A keyboard user is in the list while things are inserted, and asks for them."""
    await page.get_by_role("button", name="Edit n5").focus()
    await page.keyboard.press("ArrowDown")
    await connection.execute("INSERT INTO things (name) VALUES ('new')")
    button = page.get_by_role("button", name="1 new row")
    await expect(button).to_be_visible()
    await expect(row(page, "new")).to_have_count(0)
    await button.press("Enter")
    await expect(row(page, "new")).to_be_visible()
    await expect(button).to_be_hidden()


async def test_deleting_can_be_undone(page: Page, connection: Connection) -> None:
    """A user deletes four things, and takes one back in time. Another one is renamed by somebody
    else meanwhile, and is kept; one is only updated, and is deleted.
    """
    for name in ("n2", "n4", "n6", "n8"):
        await row(page, name).get_by_role("button", name="Delete").click()
    await page.get_by_role("button", name="Undo deleting n4").click()
    await expect(page.locator("#announcement")).to_contain_text("n4 is kept")
    await expect(page.locator(".deleting .name")).to_have_text(["n8", "n6", "n2"])
    await connection.execute("UPDATE things SET info = 'still here' WHERE name = 'n6'")
    await connection.execute("UPDATE things SET name = 'precious' WHERE name = 'n8'")
    await connection.execute("INSERT INTO things (name) VALUES ('n8')")
    await expect(row(page, "precious").get_by_role("alert")).to_contain_text("called “n8”")
    await point_elsewhere(page)
    await expect(page.get_by_role("button", name="Delete n8")).to_be_visible()

    await expect(row(page, "n2")).to_have_count(0)
    await expect(row(page, "n6")).to_have_count(0)
    await expect_table(page, connection)
    names = {name for name, _ in await table(connection)}
    assert names == {"n1", "n3", "n4", "n5", "n7", "n8", "n9", "precious"}


async def test_a_double_click_on_delete_deletes(page: Page) -> None:
    """A user clicks twice on Delete, as on a desktop's icons; that does not undo it."""
    await row(page, "n5").get_by_role("button", name="Delete").dblclick()
    await expect(page.locator(".deleting .name")).to_have_text(["n5"])


async def test_what_somebody_else_has_deleted_is_not_deleted_again(
    page: Page, connection: Connection
) -> None:
    """Somebody deletes a thing that a user is deleting, and creates another one of that name: it is
    not deleted.
    """
    requests: list[str] = []

    def note(request: Request) -> None:
        requests.append(f"{request.method} {request.url.rpartition('/')[2]}")

    page.on("request", note)
    await row(page, "n5").get_by_role("button", name="Delete").click()
    await row(page, "n3").get_by_role("button", name="Delete").click()
    await point_elsewhere(page)
    await connection.execute("DELETE FROM things WHERE name = 'n5'")
    await connection.execute("INSERT INTO things (name) VALUES ('n5')")
    await expect_value(page, "document.querySelector('.thing .name').textContent", "n5")
    await expect(row(page, "n3")).to_have_count(0)
    await expect_table(page, connection)
    assert [request for request in requests if "DELETE" in request] == ["DELETE n3"]


async def test_leaving_the_page_deletes_at_once(page: Page, connection: Connection) -> None:
    """A user deletes two things and leaves the page before the time to undo is over."""
    for name in ("n4", "n6"):
        await row(page, name).get_by_role("button", name="Delete").click()
    await page.goto("about:blank")
    async with asyncio.timeout(3):
        while len(await table(connection)) > 7:
            await asyncio.sleep(0.02)
    assert {"n4", "n6"}.isdisjoint(name for name, _ in await table(connection))


async def test_a_delete_that_fails_is_shown_in_its_row(
    page: Page, server: RunningServer, connection: Connection
) -> None:
    """The server is away when a thing is to be deleted: its row says so and stays, until the server
    is back.
    """
    await row(page, "n5").get_by_role("button", name="Delete").click()
    server.kill()
    await expect(row(page, "n5").get_by_role("alert")).to_contain_text("cannot be reached")
    await asyncio.to_thread(server.start)
    await expect_state(page, "Live")
    await expect(row(page, "n5").locator(".problem")).to_be_empty()
    await expect_table(page, connection)


async def test_a_thing_too_large_to_be_sent_can_be_edited(
    start_server: Callable[..., RunningServer], open_page: OpenPage, connection: Connection
) -> None:
    """A thing's info is longer than events may be: its row says so, and its editor loads it."""
    page = await open_page(start_server(MAX_EVENT_BYTES="64KiB").url)
    await expect_state(page, "Live")
    await connection.execute("INSERT INTO things (name, info) VALUES ('big', repeat('x', 100000))")
    await expect(row(page, "big").locator(".info")).to_contain_text("too large")
    await row(page, "big").get_by_role("button", name="Edit").click()
    await expect(page.locator(".editor").get_by_label("Info")).to_have_value("x" * 100_000)
    await page.locator(".editor").get_by_label("Name").fill("large")
    await page.locator(".editor").get_by_role("button", name="Save").click()
    await expect(row(page, "large")).to_be_visible()
    assert await table(connection) == [["large", "x" * 100_000]]


# A list of its own in a tab that paints nothing, under things that come and go: how many keys it
# looks up when it paints again.
COME_AND_GO = """async () => {
  const { ThingList } = await import('./list.js');
  const frames = [];
  window.requestAnimationFrame = (frame) => frames.push(frame);
  const asked = new Set();
  const items = new (class extends Map {
    get(key) {
      asked.add(key);
      return super.get(key);
    }
  })();
  const list = new ThingList(document.createElement('ul'), items);
  const thing = (id) => ({ id, name: `n${id}`, info: '' });
  for (let key = 0; key < 10_000; key += 1) {
    items.set(key, thing(key));
    list.changed([{ op: 'create', key }]);
    if (key % 100 === 0) {
      items.clear();
      list.changed([{ op: 'truncate' }]);
    } else {
      items.delete(key);
      list.changed([{ op: 'destroy', key }]);
    }
  }
  items.set(-1, thing(-1));
  list.changed([{ op: 'create', key: -1 }]);
  asked.clear();
  while (frames.length) frames.shift()();
  return [...asked];
}"""


async def test_a_hidden_page_forgets_what_has_come_and_gone(page: Page) -> None:
    """Nothing is painted, as in a hidden tab, while ten thousand things come and go, one by one or
    by TRUNCATE: the list holds none of them until it paints.
    """
    assert await page.evaluate(COME_AND_GO) == [-1]
