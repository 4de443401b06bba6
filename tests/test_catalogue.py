"""The catalogue: requests for a topic are bound to its table as it is, all to the same."""

import asyncio

import pytest

from app.database.connections import Connection, create_subscription_pool
from app.live.catalogue import Catalogue
from app.live.filter import parse_filter
from app.live.subscription import Request
from app.settings import Settings

pytestmark = pytest.mark.database

AT_ONCE = 4
ROUNDS = 10


async def test_requests_that_come_together(database_url: str) -> None:
    """Several clients ask for a topic that the server has not looked at yet, each with a filter of
    its own: they are bound to one table, and stay so.
    """
    async with await create_subscription_pool(Settings(database_url=database_url), AT_ONCE) as pool:
        catalogue = Catalogue(pool, AT_ONCE)
        for _ in range(ROUNDS):
            requests = [Request("thing", parse_filter(f"id=eq.{n}")) for n in range(AT_ONCE * 2)]
            bound = await asyncio.gather(*map(catalogue.bind, requests))
            assert {id(each.table) for each in bound} == {id(bound[0].table)}
            assert all(map(catalogue.is_current, bound))
            catalogue.clear()


async def test_a_topic_changes_during_the_look(database_url: str, connection: Connection) -> None:
    """A table is altered, and the server hears of it, while a look at the table waits for a
    connection or is under way: what was found before does not stay.
    """
    await connection.execute("SELECT feed.watch('things', 'thing', 'name')")
    async with await create_subscription_pool(Settings(database_url=database_url), AT_ONCE) as pool:
        catalogue = Catalogue(pool, AT_ONCE)
        for number in range(ROUNDS):
            binding = asyncio.create_task(catalogue.bind(Request("thing")))
            await connection.execute(f"ALTER TABLE things ADD COLUMN extra{number} int")
            catalogue.forget("thing")
            await binding
            found = await catalogue.bind(Request("thing"))
            assert found.table.columns[-1].name == f"extra{number}"
            catalogue.clear()
