"""The page of docs/your-own-table.md, in a browser."""

import asyncio
from collections.abc import Callable

from playwright.async_api import expect

from app.database.connections import Connection
from tests.end_to_end.conftest import OpenPage
from tests.end_to_end.test_other_origin import Site
from tests.support.server import RunningServer
from tests.test_your_own_table import WATCH, blocks, program


async def test_two_tables_on_a_page_of_ten_lines(
    start_server: Callable[..., RunningServer], open_page: OpenPage, connection: Connection
) -> None:
    """The reader's page, of an allowed origin, shows some rows of two tables: they come, change and
    leave, also while the server is killed (-9).
    """
    for statement in (blocks("sql")[0], *WATCH):
        await connection.execute(statement)
    async with Site() as site:
        server = start_server(ALLOWED_ORIGINS=site.origin)
        site.page = program("<!-- shop.html -->").replace("http://127.0.0.1:8000", server.url)
        page = await open_page(site.origin)
        orders, products = page.locator("#order"), page.locator("#product")
        await expect(orders).to_have_text('[{"id":2,"customer":"Sam","total":20}]')
        await expect(products).to_have_text('[{"sku":"tea","stock":5}]')
        server.kill()
        await connection.execute("UPDATE orders SET total = 30 - total")
        await connection.execute("DELETE FROM products WHERE sku = 'tea'")
        await connection.execute("UPDATE products SET stock = 1 WHERE sku = 'rice'")
        await asyncio.to_thread(server.start)
        await expect(orders).to_have_text('[{"id":1,"customer":"Sam","total":20}]')
        await expect(products).to_have_text('[{"sku":"rice","stock":1}]')
        await connection.execute("UPDATE products SET stock = stock + 1")
        await expect(products).to_have_text('[{"sku":"rice","stock":2}]')
