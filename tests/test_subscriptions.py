"""Subscriptions: each client holds exactly the rows it asked for, and says where it continues."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from app.database.connections import Connection
from app.socketio.server import MOST_NAMESPACES
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import App, PollingClient, serving_here
from tests.support.subscribers import subscriber

pytestmark = pytest.mark.database

ORDERS = """
    CREATE TABLE orders (
        id int PRIMARY KEY, status text NOT NULL, total numeric, note text NOT NULL DEFAULT ''
    );
    SELECT feed.watch('orders', 'order');
    INSERT INTO orders VALUES (1, 'open', 10), (2, 'open', 200), (3, 'shipped', 300);
"""
OPEN = "status=eq.open"
WAIT_S = 20.0


@pytest.fixture
async def orders(connection: Connection) -> Connection:
    """A connection to a database with the watched table `orders`."""
    await connection.execute(ORDERS)
    return connection


@pytest.fixture(params=scaled([False], [False, True]))
async def app(
    orders: Connection, database_url: str, request: pytest.FixtureRequest
) -> AsyncIterator[App]:
    """The application on a database with orders."""
    async with serving_here(database_url, plain=request.param) as served:
        yield served


async def mark(connection: Connection, number: int = 1000) -> int:
    """Write a row that every subscription to open orders receives, after everything before."""
    await connection.execute("INSERT INTO orders VALUES ($1, 'open', 1e6)", number)
    return number


async def test_rows_come_change_and_leave(orders: Connection, any_app: App) -> None:
    """A client asks for open orders: it gets those there are, then each that becomes one, changes
    as one or ceases to be one; and nothing of others.
    """
    async with subscriber(any_app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        assert held.ids == [1, 2]
        await orders.execute("UPDATE orders SET status = 'open' WHERE id = 3")
        await orders.execute("UPDATE orders SET total = 11 WHERE id = 1")
        await orders.execute("UPDATE orders SET status = 'shipped' WHERE id = 2")
        await orders.execute("INSERT INTO orders VALUES (4, 'shipped', 1)")
        await orders.execute("DELETE FROM orders WHERE id = 1")
        last = await mark(orders)
        await client.until(lambda: last in held.ids)
        assert [event[:-1] for event in held.events[2:]] == [
            ["order:create", {"id": 3, "status": "open", "total": 300, "note": ""}],
            ["order:update", {"id": 1, "status": "open", "total": 11, "note": ""}],
            ["order:destroy", {"id": 2}],
            ["order:destroy", {"id": 1}],
            ["order:create", {"id": last, "status": "open", "total": 1000000, "note": ""}],
        ]
        assert held.ids == [3, last]


async def test_the_beginning(app: App) -> None:
    """A new subscription is answered by CONNECT, hello with an offset that says "loading", the
    rows, and the offset that they are of.
    """
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order/all"))
        (hello, loaded) = held.events
        assert hello == ["feed:hello", {"recovered": False}, "loading"]
        assert loaded[0] == "feed:loaded" and len(loaded) == 2
        assert held.ids == [1, 2, 3] and held.pid


async def test_an_empty_snapshot(app: App, orders: Connection) -> None:
    """Nothing matches yet: the client is told so, and gets what comes."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where="total=gt.5000"))
        assert held.chunks == 0 and not held.rows
        last = await mark(orders)
        await client.until(lambda: held.ids == [last])


async def test_truncate(app: App, orders: Connection) -> None:
    """The table is truncated: all rows are gone, from every subscription."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        await orders.execute("TRUNCATE orders")
        await client.until(lambda: not held.rows)
        assert held.events[-1][0] == "order:truncate" and len(held.events[-1]) == 2


async def test_several_on_one_connection(app: App, orders: Connection) -> None:
    """One connection holds a topic twice with different filters, another topic, and everything."""
    async with subscriber(app.url) as client:
        everything = await client.subscribe("/")
        some = await client.subscribe("/order/open", where=OPEN)
        large = await client.subscribe("/order/large", where="total=gte.200")
        things = await client.subscribe("/thing")
        for held in (some, large, things):
            await client.loaded(held)
        await orders.execute("UPDATE orders SET status = 'open', total = 3 WHERE id = 3")
        await orders.execute("INSERT INTO things (name) VALUES ('a')")
        await client.until(lambda: things.rows and len(everything.events) == 3)
        assert (some.ids, large.ids) == ([1, 2, 3], [2])
        assert [row["name"] for row in things.rows.values()] == ["a"]
        assert everything.names == ["feed:hello", "order:update", "thing:create"]


async def test_many_filters_at_once(server: RunningServer, orders: Connection) -> None:
    """A page with several lists is the first to ask a new server for a topic: each list comes."""
    for _ in range(3):
        await asyncio.to_thread(server.restart)
        async with subscriber(server.url) as client:
            lists = [
                await client.subscribe(f"/order/{n}", where=f"total=gte.{100 * n}")
                for n in range(10)
            ]
            async with asyncio.timeout(WAIT_S):
                for held in lists:
                    await client.loaded(held)
            assert [len(held.rows) for held in lists] == [3, 2, 2, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("old", [False, True])
async def test_columns(app: App, orders: Connection, old: bool) -> None:
    """A client asks for some columns: it gets these and the key, and no update that changes none of
    them; if it likes, with the row as it was.
    """
    async with subscriber(app.url) as client:
        options = {"where": OPEN, "columns": "total", "old": str(old).lower()}
        held = await client.loaded(await client.subscribe("/order", **options))
        assert list(held.rows.values()) == [{"id": 1, "total": 10}, {"id": 2, "total": 200}]
        await orders.execute("UPDATE orders SET note = 'x'")
        await orders.execute("UPDATE orders SET total = 12, note = 'y' WHERE id = 1")
        await orders.execute("UPDATE orders SET status = 'gone', total = 13 WHERE id = 1")
        last = await mark(orders)
        await client.until(lambda: last in held.ids)
        before = [[{"id": 1, "total": 10}], [{"id": 1, "total": 12}]] if old else [[], []]
        assert [event[:-1] for event in held.events[2:-1]] == [
            ["order:update", {"id": 1, "total": 12}, *before[0]],
            ["order:destroy", {"id": 1}, *before[1]],
        ]


async def test_without_a_snapshot(app: App, orders: Connection) -> None:
    """A client that wants no rows gets what happens from now on."""
    async with subscriber(app.url) as client:
        held = await client.subscribe("/order", where=OPEN, snapshot="false")
        await client.until(lambda: held.recovered is False)
        assert held.offset != "loading"
        last = await mark(orders)
        await client.until(lambda: held.ids == [last])
        assert held.names == ["feed:hello", "order:create"]


async def test_resuming(app: App, orders: Connection) -> None:
    """A client returns with its offset: it gets what it missed, without the rows."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
    pid = held.pid
    await orders.execute("UPDATE orders SET status = 'shipped' WHERE id = 1")
    await orders.execute("UPDATE orders SET note = 'x' WHERE id = 3")
    last = await mark(orders)
    async with subscriber(app.url) as client:
        await client.resume("/order", held, where=OPEN)
        await client.until(lambda: last in held.ids)
        assert held.recovered and held.pid == pid and held.ids == [2, last]
        events = [name for name in held.names[2:] if name != "feed:offset"]
        assert events == ["feed:hello", "order:destroy", "order:create"]


@pytest.mark.parametrize(
    "changed",
    [
        {"where": "status=eq.shipped"},
        {"where": OPEN, "columns": "id"},
        {"where": OPEN, "old": "true"},
        {},
    ],
)
async def test_another_subscription_is_not_resumed(
    app: App, orders: Connection, changed: dict[str, Any]
) -> None:
    """A client returns with the offset of another filter, or other columns: it gets the rows."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
    async with subscriber(app.url) as client:
        await client.resume("/order", held, **changed)
        await client.until(lambda: held.names.count("feed:loaded") == 2)
        assert held.recovered is False
        await orders.execute("INSERT INTO orders VALUES (50, 'open', 1), (51, 'shipped', 1)")
        await client.until(lambda: {50, 51} & set(held.ids))
        held = await client.resume("/order/again", held, **changed)
        await client.until(lambda: held.recovered)


async def test_a_cut_before_the_hello_of_another_subscription(app: App) -> None:
    """A client returns with another filter, and the line breaks when it has read the answer to its
    CONNECT and nothing more: it has a `pid` for that filter, and an offset of the other one's rows.
    """
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
    old, other = held.offset, {"where": "status=eq.shipped"}
    held.recovered = None
    async with subscriber(app.url) as client:
        await client.resume("/order", held, **other)
        await client.until(lambda: held.recovered is False)
    async with subscriber(app.url) as client:
        held = await client.subscribe("/order", pid=held.pid, offset=old, **other)
        await client.loaded(held)
        assert held.recovered is False and held.ids == [3]


async def test_a_cut_within_a_snapshot(app: App) -> None:
    """A client is cut off after hello, before the rows are complete: it gets all of them again."""
    async with subscriber(app.url) as client:
        held = await client.subscribe("/order")
        await client.until(lambda: held.names == ["feed:hello"])
    async with subscriber(app.url) as client:
        await client.resume("/order", held)
        await client.loaded(held)
        assert held.names == ["feed:hello", "feed:hello", "feed:loaded"] and held.ids == [1, 2, 3]


async def test_options_by_topic(app: App) -> None:
    """A client that sends one payload to all its namespaces gives the options by topic, or by topic
    and label.
    """
    payload = {"topics": {"order": {"where": OPEN}, "order/3": {"where": "id=eq.3"}}}
    async with subscriber(app.url) as client:
        for topics in (payload, {"topics": json.dumps(payload["topics"])}):
            held = await client.loaded(await client.subscribe("/order/x", **topics))
            third = await client.loaded(await client.subscribe("/order/3", **topics))
            thing = await client.loaded(await client.subscribe("/thing", **topics))
            assert (held.ids, third.ids, thing.ids) == ([1, 2], [3], [])
            for namespace in ("/order/x", "/order/3", "/thing"):
                await client.client.send(f"41{namespace},")


@pytest.mark.parametrize(
    ("namespace", "options", "code", "field"),
    [
        ("/nothing", {}, "unknown_topic", "topic"),
        ("/Order", {}, "unknown_topic", "topic"),
        ("/order", {"where": "status=open"}, "bad_filter", "where"),
        ("/order", {"where": "colour=eq.red"}, "unknown_column", "where"),
        ("/order", {"where": "total=eq.red"}, "bad_value", "where"),
        ("/order", {"where": "status=gt.a"}, "unsupported", "where"),
        ("/order", {"where": 5}, "bad_option", "where"),
        ("/order", {"where": "status=eq." + "a" * 5000}, "too_many", "where"),
        ("/order", {"columns": "id,colour"}, "unknown_column", "columns"),
        ("/order", {"old": "perhaps"}, "bad_option", "old"),
        ("/order", {"topics": "["}, "bad_option", "topics"),
        ("/order", {"topics": "\ud800"}, "bad_option", "topics"),
    ],
)
async def test_refusals(
    app: App, namespace: str, options: dict[str, Any], code: str, field: str
) -> None:
    """A client asks for what there is not, or wrongly: it gets a sentence, and the connection and
    its other subscriptions live on.
    """
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order/good"))
        refused = await client.refusal(await client.subscribe(namespace, **options))
        assert (refused["code"], refused["field"]) == (code, field)
        again = await client.refusal(await client.subscribe(namespace, **options))
        assert again == refused
        await client.loaded(await client.subscribe("/order/other"))
        assert held.ids == [1, 2, 3]


async def test_a_table_is_altered(app: App, orders: Connection) -> None:
    """A column is added: the client loads the rows again, and has it."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        await orders.execute("ALTER TABLE orders ADD COLUMN extra int DEFAULT 7")
        await client.until(lambda: held.names.count("feed:loaded") == 2)
        assert [row["extra"] for row in held.rows.values()] == [7, 7]
        await orders.execute("UPDATE orders SET extra = 8")
        await client.until(lambda: [row["extra"] for row in held.rows.values()] == [8, 8])


async def test_what_the_server_has_not_noticed_yet(app: App, orders: Connection) -> None:
    """A column is added, and another one gets a type that has more operators and values: filters
    that need that are not refused, although the server looks for altered tables only now and then.
    """
    async with subscriber(app.url) as client, httpx.AsyncClient(base_url=app.url) as http:
        await client.loaded(await client.subscribe("/order", where=OPEN))
        await orders.execute(
            "ALTER TABLE orders ADD COLUMN extra int DEFAULT 7, ALTER note DROP DEFAULT,"
            " ALTER note TYPE int USING id"
        )
        for number, where in enumerate(("extra=eq.7", "note=gte.2")):
            answer = await http.get(f"/topics/order?{where}")
            assert answer.status_code == 200 and answer.json()
            fresh = await client.loaded(await client.subscribe(f"/order/{number}", where=where))
            assert 2 in fresh.ids
            refused = await client.refusal(await client.subscribe("/order/bad", where="no=eq.1"))
            assert refused["code"] == "unknown_column"


async def test_a_column_of_the_filter_goes_away(app: App, orders: Connection) -> None:
    """The column that a client's filter names is dropped: its subscription ends with a reason."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN))
        await orders.execute("ALTER TABLE orders DROP COLUMN status")
        refused = await client.refusal(held)
        assert (refused["code"], refused["field"]) == ("unknown_column", "where")


async def test_the_type_of_a_column_changes(app: App, orders: Connection) -> None:
    """The type of the column that a client filters by changes, before the server has noticed, and
    rows are written: the client ends up with the right rows.
    """
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where="total=eq.200"))
        assert held.ids == [2]
        await orders.execute(
            "BEGIN; ALTER TABLE orders ALTER total TYPE text;"
            " INSERT INTO orders VALUES (7, 'open', '200');"
            " UPDATE orders SET total = '2e2' WHERE id = 2; COMMIT"
        )
        await client.until(lambda: held.ids == [7])


async def test_a_thing_that_is_too_large(database_url: str, connection: Connection) -> None:
    """Things are too large to be sent whole: they come with their id and their name, which the page
    shows them by, in a snapshot and as a change.
    """
    write = "INSERT INTO things (name, info) VALUES ($1, repeat('long', 50000))"
    await connection.execute(write, "first")
    async with (
        serving_here(database_url, max_event_bytes=64 * 1024) as app,
        subscriber(app.url) as client,
    ):
        held = await client.loaded(await client.subscribe("/thing"))
        await connection.execute(write, "second")
        await client.until(lambda: len(held.rows) == 2)
        assert list(held.rows.values()) == [
            {"id": 1, "name": "first", "too_large": True},
            {"id": 2, "name": "second", "too_large": True},
        ]


async def test_a_topic_is_unwatched(app: App, orders: Connection) -> None:
    """A table is not watched any more: its subscriptions end with a reason."""
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order"))
        await orders.execute("SELECT feed.unwatch('orders')")
        assert (await client.refusal(held))["code"] == "unknown_topic"
        await orders.execute("SELECT feed.watch('orders', 'order')")
        await client.loaded(await client.subscribe("/order"))


async def test_tables_swap_their_names(app: App, orders: Connection) -> None:
    """Another table takes the name of the one a client subscribes to: it holds the rows of the one
    that is watched.
    """
    await orders.execute(
        "CREATE TABLE newer (LIKE orders); INSERT INTO newer VALUES (9, 'open', 9, '')"
    )
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order"))
        await orders.execute(
            "BEGIN; ALTER TABLE orders RENAME TO older; ALTER TABLE newer RENAME TO orders; COMMIT"
        )
        for namespace in ("/order/2", "/order/3"):
            held = await client.loaded(
                await client.subscribe(namespace, where="total=gt.0", columns="id")
            )
            assert held.ids == [1, 2, 3]


async def test_columns_of_any_name(app: App, orders: Connection) -> None:
    """Columns have the names that the server's own query uses: they can be selected and listed."""
    names = [
        "part",
        "whole",
        "is_too_large",
        "rendered",
        "listed",
        "made",
        "found",
        "row",
        "text",
        "x",
        "place",
        "shown",
    ]
    columns = ", ".join(f"{name} int" for name in names)
    await orders.execute(
        f"CREATE TABLE odd (id int PRIMARY KEY, {columns}); SELECT feed.watch('odd', 'odd');"
        f" INSERT INTO odd VALUES (1{', 7' * len(names)})"
    )
    async with subscriber(app.url) as client:
        for name in names:
            held = await client.loaded(
                await client.subscribe(f"/odd/{name}", columns=name, where=f"{name}=eq.7")
            )
            assert list(held.rows.values()) == [{"id": 1, name: 7}]
        whole = await client.loaded(await client.subscribe("/odd"))
        assert set(whole.rows["[1]"]) == {"id", *names}


async def test_the_key_for_clients_that_ask(app: App, orders: Connection) -> None:
    """A client asks for the key columns: every hello names them, also when the client returns, or
    when the table gets another key. Others do not hear of them.
    """
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", where=OPEN, key="true"))
        assert held.events[0][1] == {"recovered": False, "key": ["id"]}
        other = await client.loaded(await client.subscribe("/order/other", where=OPEN))
        assert other.events[0][1] == {"recovered": False}
    async with subscriber(app.url) as client:
        await client.resume("/order", held, where=OPEN, key=True)
        last = await mark(orders)
        await client.until(lambda: last in held.ids)
        greetings = [event[1] for event in held.events if event[0] == "feed:hello"]
        assert greetings[1] == {"recovered": True, "key": ["id"]}
        await orders.execute(
            "ALTER TABLE orders DROP CONSTRAINT orders_pkey, ADD PRIMARY KEY (status, id);"
            "SELECT feed.check_topics()"
        )
        held.key = ("status", "id")
        await client.until(lambda: held.names[-1] == "feed:loaded")
        greetings = [event[1] for event in held.events if event[0] == "feed:hello"]
        assert greetings[2:] == [{"recovered": False, "key": ["status", "id"]}]


async def test_a_large_row_has_no_column_that_was_not_asked_for(
    orders: Connection, database_url: str
) -> None:
    """The topic's destroys carry a code. A row that is too large comes with it to whoever asks for
    everything, and without it to whoever asks for something else; in lists, too.
    """
    await orders.execute(
        "ALTER TABLE orders ADD code text NOT NULL UNIQUE DEFAULT gen_random_uuid();"
        "SELECT feed.watch('orders', 'order', 'code')"
    )
    async with (
        serving_here(database_url, max_event_bytes=2000) as app,
        subscriber(app.url) as client,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        some = await client.loaded(await client.subscribe("/order", columns="note"))
        all = await client.loaded(await client.subscribe("/order/all"))
        await orders.execute("UPDATE orders SET note = repeat('x', 5000), code = 'c' WHERE id = 1")
        await client.until(lambda: "too_large" in all.rows["[1]"])
        await client.until(lambda: "too_large" in some.rows["[1]"])
        assert all.rows["[1]"] == {"id": 1, "code": "c", "too_large": True}
        assert some.rows["[1]"] == {"id": 1, "too_large": True}
        again = await client.loaded(await client.subscribe("/order/again", columns="note"))
        assert again.rows["[1]"] == some.rows["[1]"]
        listed = (await http.get("/topics/order?columns=note&id=eq.1")).json()
        assert listed == [some.rows["[1]"]]


async def test_a_column_called_too_large(app: App, orders: Connection) -> None:
    """A row that looks as if something were left out of it is whole: an update of a column that was
    not asked for is nothing.
    """
    await orders.execute("ALTER TABLE orders ADD too_large boolean DEFAULT true")
    async with subscriber(app.url) as client:
        held = await client.loaded(await client.subscribe("/order", columns="too_large"))
        await orders.execute("UPDATE orders SET note = 'new'")
        last = await mark(orders)
        await client.until(lambda: last in held.ids)
        assert held.rows["[1]"] == {"id": 1, "too_large": True}
        assert held.names[-1] == "order:create" and "order:update" not in held.names


async def test_a_key_called_too_large(database_url: str, connection: Connection) -> None:
    """A row is too large, and has a key column of the name `too_large`: clients get the key."""
    await connection.execute(
        "CREATE TABLE odd (too_large int PRIMARY KEY, body text); SELECT feed.watch('odd', 'odd');"
        " INSERT INTO odd VALUES (1, repeat('x', 5000)), (2, 'short')"
    )
    async with (
        serving_here(database_url, max_event_bytes=2000) as app,
        subscriber(app.url) as client,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        held = await client.loaded(await client.subscribe("/odd", "too_large"))
        assert list(held.rows.values()) == [{"too_large": 1}, {"too_large": 2, "body": "short"}]
        assert (await http.get("/topics/odd")).json() == list(held.rows.values())
        await connection.execute("UPDATE odd SET body = repeat('y', 5000) WHERE too_large = 2")
        await client.until(lambda: held.rows.get("[2]") == {"too_large": 2})
        await client.loaded(held)
        await connection.execute("DELETE FROM odd WHERE too_large = 2")
        await client.until(lambda: list(held.rows) == ["[1]"])


async def test_a_label_of_an_enum_is_renamed(
    app: App, orders: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A label is renamed, and clients ask for the old one before the server has noticed: they are
    told that there is none, and the connection lives on.
    """
    await orders.execute(
        "CREATE TYPE size AS ENUM ('small', 'large');"
        "CREATE TABLE shirts (id int PRIMARY KEY, size size);"
        "INSERT INTO shirts VALUES (1, 'small'), (2, 'large'); SELECT feed.watch('shirts', 'shirt')"
    )
    async with subscriber(app.url) as client, httpx.AsyncClient(base_url=app.url) as http:
        held = await client.loaded(await client.subscribe("/order"))
        for old, new in (("small", "s"), ("s", "small")):
            await client.loaded(await client.subscribe(f"/shirt/{old}", where=f"size=eq.{old}"))
            await orders.execute(f"ALTER TYPE size RENAME VALUE '{old}' TO '{new}'")
            asked = await client.subscribe(f"/shirt/few/{old}", where=f"size=eq.{old}&id=lt.9")
            assert (await client.refusal(asked))["code"] == "bad_value"
            response = await http.get(f"/topics/shirt?size=eq.{old}")
            assert (response.status_code, response.json()["code"]) == (422, "bad_value")
            listed = await http.get(f"/topics/shirt?size=eq.{new}")
            assert listed.json() == [{"id": 1, "size": new}]
        last = await mark(orders)
        await client.until(lambda: last in held.ids)
    assert "Traceback" not in caplog.text


async def test_as_many_connects_in_one_request_as_allowed(app: App) -> None:
    """A client that polls sends the CONNECTs of all its namespaces at once, as official ones do."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        polling = PollingClient(http)
        await polling.open()
        await polling.subscribe("order", MOST_NAMESPACES)


async def test_packets_after_a_refusal_in_place(app: App, orders: Connection) -> None:
    """A client has not heard yet that a subscription has ended, and leaves it or sends an event:
    its other subscriptions live on.
    """
    async with subscriber(app.url) as client:
        other = await client.loaded(await client.subscribe("/thing"))
        held = await client.loaded(await client.subscribe("/order"))
        await orders.execute("SELECT feed.unwatch('orders')")
        await client.refusal(held)
        await client.client.send('42/order,["event"]')
        await client.client.send("41/order,")
        await orders.execute("INSERT INTO things (name) VALUES ('a')")
        await client.until(lambda: other.rows)


async def test_a_client_that_wants_the_rows_after_all(app: App) -> None:
    """A client had no snapshot, and asks for one when it returns: that is a new subscription."""
    async with subscriber(app.url) as client:
        held = await client.subscribe("/order", where=OPEN, snapshot="false")
        await client.until(lambda: held.recovered is False)
    async with subscriber(app.url) as client:
        await client.loaded(await client.resume("/order", held, where=OPEN))
        await client.until(lambda: held.ids == [1, 2])
