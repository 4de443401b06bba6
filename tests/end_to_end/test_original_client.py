"""A page as in the project's first client, which knows nothing of offsets or resuming."""

from playwright.async_api import Browser, Route, expect

from app.database.connections import Connection
from tests.support.server import RunningServer

ORIGINAL = """<!doctype html>
<title>original</title>
<ul></ul>
<script src="socket.io-client/socket.io.js"></script>
<script>
  const things = [];
  const show = () => {
    const list = document.querySelector('ul');
    list.replaceChildren(...things.map((thing) => {
      const item = document.createElement('li');
      item.textContent = thing.name;
      return item;
    }));
  };
  const add = (name) => fetch('/api/things', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ name, info: '' }),
  });
  const remove = (name) => fetch('/api/things/' + name, { method: 'DELETE' });
  fetch('/api/things').then((answer) => answer.json()).then((list) => {
    things.push(...list);
    show();
    const socket = io('', { path: '/socket.io-client' });
    socket.on('connect', () => { document.title = 'connected'; });
    socket.on('thing:create', (thing) => { things.push(thing); show(); });
    socket.on('thing:destroy', (name) => {
      things.splice(things.findIndex((thing) => thing.name === name), 1);
      show();
    });
  });
</script>
"""


async def test_the_original_client_works_unchanged(
    server: RunningServer, connection: Connection, browser: Browser
) -> None:
    """The original client loads the list, appends creates, and removes by name."""
    await connection.execute("INSERT INTO things (name) VALUES ('apple'), ('pear')")
    page = await browser.new_page()
    page.set_default_timeout(15_000)

    async def original(route: Route) -> None:
        await route.fulfill(body=ORIGINAL, content_type="text/html")

    await page.route("**/original.html", original)
    await page.goto(f"{server.url}/original.html")
    await expect(page).to_have_title("connected")
    items = page.locator("li")
    await expect(items).to_have_text(["apple", "pear"])

    await page.evaluate("add('fig')")
    await expect(items).to_have_text(["apple", "pear", "fig"])
    await page.evaluate("remove('apple')")
    await expect(items).to_have_text(["pear", "fig"])
    await connection.execute("INSERT INTO things (name) VALUES ('date')")
    await connection.execute("DELETE FROM things WHERE name = 'pear'")
    await expect(items).to_have_text(["fig", "date"])
