"""Subscriptions that nothing happens to, outages, and how many subscriptions there can be."""

import asyncio
from types import ModuleType
from typing import Any

import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.feed.health import DEAF, Outage
from app.live import broadcast as broadcast_module
from app.live import room as room_module
from app.socketio import server as server_module
from tests.support.feeds import eventually
from tests.support.postgres import execute
from tests.support.scale import scaled
from tests.support.sockets import serving_here
from tests.support.subscribers import Subscriber, subscriber
from tests.test_subscriptions import OPEN, ORDERS, mark

pytestmark = pytest.mark.database


@pytest.fixture
async def orders(connection: Connection) -> Connection:
    """A connection to a database with the watched table `orders`."""
    await connection.execute(ORDERS)
    return connection


@pytest.mark.parametrize(
    "settings", [{"feed_retention": 1.0}, {"feed_max_changes": 40}], ids=["time", "count"]
)
async def test_a_quiet_subscription_can_always_continue(
    orders: Connection, database_url: str, settings: dict[str, Any]
) -> None:
    """A client hears nothing for so long that the log is pruned of all that was there when it did;
    it is told its offset meanwhile, and continues from there after a cut.
    """
    async with serving_here(database_url, **settings) as app, subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        first = held.offset
        oldest = await orders.fetchval("SELECT min(id) FROM feed.change")
        async with asyncio.timeout(30):
            while await orders.fetchval("SELECT min(id) FROM feed.change") <= oldest + 50:
                for _ in range(5):
                    await orders.execute("INSERT INTO things (name) VALUES (gen_random_uuid())")
                await client.drain()
        await client.drain()
        assert set(held.names[2:]) == {"feed:offset"} and held.offset != first
    # Another node, which has none of the changes in memory.
    async with serving_here(database_url, **settings) as app, subscriber(app.url) as client:
        await client.resume("/order", held, where=OPEN)
        last = await mark(orders)
        await client.until(lambda: last in held.ids)
        assert held.recovered
        stale = await client.subscribe("/order/stale", where=OPEN, since=first)
        await client.loaded(stale)
        assert stale.recovered is False


@pytest.mark.parametrize("away", scaled([False], [False, True]))
async def test_silence_after_part_of_a_transaction(
    orders: Connection, database_url: str, away: bool
) -> None:
    """A change that concerns a client is not the last one of its transaction, which is the last one
    of all. When the log has been pruned of it, the client continues all the same.
    """
    async with serving_here(database_url, feed_retention=1.0) as app:
        async with subscriber(app.url) as client:
            held = await client.loaded(await client.subscribe("/order", where=OPEN))
            if not away:
                last = await write_both(orders)
                await client.until(lambda: last in held.ids)
                await until_pruned(orders, client)
        if away:
            last = await write_both(orders)
            async with subscriber(app.url) as client:
                await client.resume("/order", held, where=OPEN)
                await client.until(lambda: last in held.ids)
                await until_pruned(orders, client)
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        held.recovered = None
        await client.resume("/order", held, where=OPEN)
        await client.until(lambda: held.recovered is not None)
        assert held.recovered and last in held.ids


async def write_both(orders: Connection) -> int:
    """In one transaction, write an order and something else; return the order's id."""
    async with orders.transaction():
        last = await mark(orders)
        await orders.execute("INSERT INTO things (name) VALUES ('after it')")
    return last


async def until_pruned(orders: Connection, client: Subscriber) -> None:
    """Take what comes until the log is empty, and what is on its way then."""
    async with asyncio.timeout(30):
        while await orders.fetchval("SELECT EXISTS (SELECT FROM feed.change)"):
            await client.drain()
    await client.drain()


async def test_a_replay_without_events_moves_the_offset(
    orders: Connection, database_url: str
) -> None:
    """A client missed only what does not concern it: it is told how far it is now."""
    async with serving_here(database_url) as app:
        async with subscriber(app.url) as client:
            held = await client.loaded(await client.subscribe("/order", where=OPEN))
        before = held.offset
        await orders.execute("INSERT INTO things (name) VALUES ('a')")
        assert await app.feed.look()
        async with subscriber(app.url) as client:
            await client.resume("/order", held, where=OPEN)
            await client.until(lambda: held.names[-1] == "feed:offset")
            assert held.recovered and held.offset != before


async def test_too_many_on_one_connection(
    orders: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection asks for one subscription too many: that one is refused. When it leaves one,
    there is room.
    """
    monkeypatch.setattr(server_module, "MOST_NAMESPACES", 3)
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        for number in range(3):
            await client.loaded(await client.subscribe(f"/order/{number}"))
        refused = await client.refusal(await client.subscribe("/order/3"))
        assert refused["code"] == "too_many"
        await client.client.send("41/order/1,")
        await client.loaded(await client.subscribe("/order/3"))


async def test_a_namespace_that_is_too_long(orders: Connection, database_url: str) -> None:
    """A client makes up a long label: that is refused, and its other subscription goes on."""
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        refused = await client.refusal(await client.subscribe("/order/" + "x" * 200))
        assert refused == {
            "code": "too_many",
            "detail": "The namespace has 207 characters, and 200 are allowed: use a shorter label.",
            "field": "topic",
        }
        last = await mark(orders)
        await client.until(lambda: last in held.ids)


async def test_as_many_as_one_connection_may_hold(orders: Connection, database_url: str) -> None:
    """A client with all subscriptions that a connection may hold, with long filters, returns."""
    where = "status=in.(open," + ",".join(f"s{number:012}" for number in range(199)) + ")"
    async with serving_here(database_url) as app:
        for _ in range(2):
            async with subscriber(app.url) as client:
                held = [
                    await client.subscribe(f"/order/{number}", where=where)
                    for number in range(server_module.MOST_NAMESPACES)
                ]
                for each in held:
                    await client.loaded(each)
                    assert each.ids == [1, 2]


@pytest.mark.parametrize(
    ("module", "name", "where"),
    [
        (broadcast_module, "MOST_SUBSCRIPTIONS", "id=eq.{}"),
        (room_module, "MOST_FILTERS", "id=eq.{}"),
        (room_module, "MOST_SCANNED_FILTERS", "id=gt.{}"),
    ],
)
async def test_too_many_on_a_node(
    orders: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch,
    module: ModuleType, name: str, where: str,
) -> None:  # fmt: skip
    """A node is asked for one subscription, or one different filter, too many: that one is refused.
    When another is left, there is room.
    """
    most = 3
    monkeypatch.setattr(module, name, most)
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        for number in range(most):
            held = await client.subscribe(f"/order/{number}", where=where.format(number))
            await client.loaded(held)
        namespace, options = "/order/more", {"where": where.format(most)}
        refused = await client.refusal(await client.subscribe(namespace, **options))
        assert refused["code"] == "too_many"
        if name != "MOST_SUBSCRIPTIONS":  # the same filter again takes no room
            await client.loaded(await client.subscribe("/order/same", where=where.format(0)))
        await client.client.send("41/order/1,")
        await client.loaded(await client.subscribe(namespace, **options))
        await client.client.send("41/order/0,")
    await eventually(lambda: app.empty)


async def test_an_altered_table_takes_no_more_room(
    orders: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node has as many filters as it can, each for two clients, when the table is altered: all of
    them go on.
    """
    monkeypatch.setattr(room_module, "MOST_SCANNED_FILTERS", 3)
    async with (
        serving_here(database_url) as app,
        subscriber(app.url) as one,
        subscriber(app.url) as other,
    ):
        for number in range(3):
            for client in (one, other):
                held = await client.subscribe(f"/order/{number}", where=f"id=gt.{number}")
                await client.loaded(held)
        await orders.execute("ALTER TABLE orders ADD extra int; SELECT feed.check_topics()")
        last = await mark(orders)
        for client in (one, other):
            for held in client.held.values():
                await client.until(lambda: held.names.count("feed:loaded") == 2)  # noqa: B023
                await client.until(lambda: last in held.ids)  # noqa: B023


async def test_an_outage(private_postgres: Any) -> None:
    """The database goes away: clients are told, those that come meanwhile are held, a changed
    filter among them, and all continue when it is back.
    """
    postgres: Server = private_postgres()
    await execute(postgres.url, ORDERS)
    async with serving_here(postgres.url) as app:
        async with subscriber(app.url) as client:
            returning = await client.loaded(await client.subscribe("/order", where=OPEN))
        async with subscriber(app.url) as client:
            changing = await client.loaded(await client.subscribe("/order", where=OPEN))
        async with subscriber(app.url) as client:
            staying = await client.loaded(await client.subscribe("/order", where=OPEN))
            await asyncio.to_thread(postgres.stop)
            await client.until(lambda: staying.names[-1] == "feed:state")
            new = await client.subscribe("/order/new", where="total=gt.100")
            await client.until(lambda: new.pid)
            await client.resume("/order/returning", returning, where=OPEN)
            await client.resume("/order/changing", changing, where="status=eq.shipped")
            await client.until(lambda: changing.names[-1] == "feed:state")
            await asyncio.to_thread(postgres.start)
            await client.until(lambda: new.is_whole and changing.is_whole)
            await client.until(lambda: staying.names[-1] == "feed:state" and returning.recovered)
            await execute(postgres.url, "UPDATE orders SET status = 'open', total = 1 WHERE id = 3")
            await client.until(lambda: all(3 in held.ids for held in (staying, returning)))
            await client.until(lambda: not changing.ids and new.ids == [2])
        async with subscriber(app.url) as client:
            await client.resume("/order", changing, where="status=eq.shipped")
            await client.until(lambda: changing.recovered)


async def test_rows_that_come_again_during_an_outage(orders: Connection, database_url: str) -> None:
    """While clients know that changes arrive late, a table is altered: the hello before its rows is
    followed by the bad news, which they would take it for the end of.
    """
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        app.broadcast.state_changed(Outage(0, DEAF))
        await client.until(lambda: held.names[-1] == "feed:state")
        await orders.execute("ALTER TABLE orders ADD colour text")
        await client.until(lambda: held.names[-1] == "feed:loaded")
        assert held.names[-3:] == ["feed:hello", "feed:state", "feed:loaded"]


async def test_a_catalogue_that_cannot_be_read_for_a_while(
    orders: Connection, database_url: str
) -> None:
    """What a client asks for cannot be looked up at once: CONNECT is answered all the same, because
    Python's client would give up, and the rows follow.
    """
    other = await connect(database_url)
    async with serving_here(database_url) as app, subscriber(app.url) as client:
        async with other.transaction():
            await other.execute("LOCK TABLE feed.topic")
            held = await client.subscribe("/order", where=OPEN)
            await client.until(lambda: held.pid)
            assert held.names == []
        await client.loaded(held)
        assert held.ids == [1, 2] and held.names == ["feed:hello", "feed:loaded"]
    await other.close()
