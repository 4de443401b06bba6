"""static/feed.js in Node.js, on tables of any kind: it shows their rows and no others."""

import asyncio
import contextlib
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.database.connections import Connection
from tests.support.machine import require
from tests.support.scale import scaled
from tests.support.server import RunningServer

FOLLOW = Path(__file__).parent / "support" / "feeds.mjs"
FORGET = FOLLOW.with_name("forgotten.mjs")
FEED_JS = Path(__file__).parents[1] / "static" / "feed.js"
WAIT_S = 20.0
SEED = 20_261_128
ROUNDS, OPERATIONS = 6, 25

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table, and statements for the random test."""

    name: str
    definition: str
    statements: list[str] = field(default_factory=list)


# $i and $j become small numbers, so that the statements hit the same few rows again and again.
CUSTOMERS = Table(
    "customers",
    "id int PRIMARY KEY, name text, note text DEFAULT ''",
    [
        "INSERT INTO customers VALUES ($i, 'Sam'), ($i + 50, NULL) ON CONFLICT DO NOTHING",
        "INSERT INTO customers VALUES ($i, 'Kim') ON CONFLICT (id) DO UPDATE SET note = '$j'",
        "UPDATE customers SET name = nullif(name, 'Sam') WHERE id % 7 = $i % 7",
        "UPDATE customers SET name = CASE WHEN id % 2 = 0 THEN 'Sam' END, note = '$j'",
        "UPDATE customers SET id = id + 100 WHERE id BETWEEN $i AND $i + 2 AND id < 100",
        "UPDATE customers SET id = -id, name = 'Sam' WHERE id = $i",
        "DELETE FROM customers WHERE id = $i OR id = $j + 50",
        "DELETE FROM customers WHERE id IN (SELECT id FROM customers WHERE name = 'Sam' LIMIT 2)",
    ],
)
SEATS = Table(
    "seats",
    '"row" int, seat text, holder text, PRIMARY KEY ("row", seat) DEFERRABLE',
    [
        "INSERT INTO seats SELECT $i, letter FROM unnest('{a,b,\"a,1\"}'::text[]) AS letter"
        ' WHERE NOT EXISTS (SELECT FROM seats WHERE "row" = $i)',
        'UPDATE seats SET "row" = "row" + 1',
        "UPDATE seats SET seat = CASE seat WHEN 'a' THEN 'b' WHEN 'b' THEN 'a' ELSE seat END",
        "UPDATE seats SET holder = '$j' WHERE \"row\" = $i",
        "DELETE FROM seats WHERE \"row\" = $i AND seat = 'a'",
        'DELETE FROM seats WHERE "row" > 60',
    ],
)
DOCUMENTS = Table(
    "documents",
    "doc jsonb PRIMARY KEY, n numeric",
    [
        "INSERT INTO documents VALUES ('[$i]', $j), ('\"[$i]\"', 1.50) ON CONFLICT DO NOTHING",
        """INSERT INTO documents VALUES ('{"b": [$i, null], "a": {}}') ON CONFLICT DO NOTHING""",
        "UPDATE documents SET doc = jsonb_build_array(doc) WHERE doc = '[$i]'",
        "UPDATE documents SET n = $j",
        "DELETE FROM documents WHERE doc IN ('[$i]', '\"[$j]\"') OR n = $i",
    ],
)
THINGS = Table(
    "things",
    "",
    [
        "INSERT INTO things (name) VALUES ('n$i') ON CONFLICT (name) DO UPDATE SET info = '$j'",
        "INSERT INTO things (name) SELECT 'n' || n FROM generate_series($i, $i + 5) n"
        " ON CONFLICT DO NOTHING",
        "UPDATE things SET info = '$i' WHERE id % 3 = $j % 3",
        "UPDATE things SET name = 'n' || substr(name, 2)::bigint + 1000",
        "UPDATE things SET id = DEFAULT WHERE name = (SELECT min(name) FROM things)",
        "WITH gone AS (DELETE FROM things WHERE name LIKE 'n_$i%' RETURNING name)"
        " INSERT INTO things (name) SELECT name || '0' FROM gone ON CONFLICT DO NOTHING",
        "DELETE FROM things WHERE name LIKE 'n%$i'",
    ],
)
TABLES = [CUSTOMERS, SEATS, DOCUMENTS, THINGS]


@dataclass(frozen=True)
class Seen:
    """What a Feed has; the changes, and how many came in each batch, are those since it was last
    asked. What begins with `connections` is about all Feeds together.
    """

    state: str
    states: list[str]
    problem: dict[str, Any] | None
    keys: list[Any]
    rows: list[Row]
    changes: list[dict[str, Any]]
    batches: list[int]
    loads: int
    connections: int
    open: int  # of these
    attempts: int  # to connect
    reported: int  # errors of callbacks


class Followers:
    """feed.js following tables in a Node.js process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.changes: defaultdict[int, list[Any]] = defaultdict(list)  # of each Feed, so far

    async def ask(self, command: str = "") -> list[Seen]:
        """Return what every Feed has; before that, `start N` or `stop N` one of them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\n".encode())
        answer = await asyncio.wait_for(self._process.stdout.readline(), WAIT_S)
        found = [Seen(**seen) for seen in json.loads(answer)]
        for number, seen in enumerate(found):
            self.changes[number] += seen.changes
        return found

    async def until(self, true: Callable[[list[Seen]], object]) -> list[Seen]:
        """Ask until something holds."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while not true(seen := await self.ask()):
            assert asyncio.get_running_loop().time() < deadline, seen
            await asyncio.sleep(0.02)
        return seen

    async def until_state(self, name: str) -> list[Seen]:
        """Wait until every Feed is in a state."""
        return await self.until(lambda seen: {each.state for each in seen} == {name})

    async def until_they_show(self, connection: Connection, *queries: str) -> None:
        """Wait until they hold exactly the rows of these tables or queries."""
        wanted = [await rows_of(connection, query) for query in queries]
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while (shown := [in_order(seen.rows) for seen in await self.ask()]) != wanted:
            if asyncio.get_running_loop().time() > deadline:
                assert shown == wanted
            await asyncio.sleep(0.05)


def in_order(rows: list[Row]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


async def rows_of(connection: Connection, query: str) -> list[str]:
    found = await connection.fetch(f"SELECT row_to_json(t)::text FROM {query} AS t")
    return in_order([json.loads(row[0]) for row in found])


async def watch(connection: Connection, *tables: Table) -> None:
    """Create tables and watch them."""
    for table in tables:
        if table is not THINGS:
            if table.definition:
                await connection.execute(f"CREATE TABLE {table.name} ({table.definition})")
            await connection.execute("SELECT feed.watch($1::text::regclass, $1)", table.name)


@asynccontextmanager
async def feeds(server: RunningServer, *options: Row) -> AsyncIterator[Followers]:
    """Run a Feed with each of these options."""
    given = json.dumps([{"server": server.url, **each} for each in options])
    process = await asyncio.create_subprocess_exec(
        require("node"), str(FOLLOW), given,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24,
    )  # fmt: skip
    try:
        yield Followers(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), WAIT_S)
        except TimeoutError:
            process.kill()
            raise


@asynccontextmanager
async def following(
    server: RunningServer, connection: Connection, *tables: Table
) -> AsyncIterator[Followers]:
    """Create the tables, watch them, and follow them with feed.js."""
    await watch(connection, *tables)
    options = [{"topic": "thing" if table is THINGS else table.name} for table in tables]
    async with feeds(server, *options) as followers:
        await followers.until_state("live")
        yield followers


async def test_two_rows_of_one_name(server: RunningServer, connection: Connection) -> None:
    """Two customers are called Sam, two have no name; the second of each is deleted."""
    async with following(server, connection, CUSTOMERS) as followers:
        await connection.execute(
            "INSERT INTO customers VALUES (1, 'Sam'), (2, 'Sam'), (3, NULL), (4, NULL)"
        )
        await connection.execute("DELETE FROM customers WHERE id IN (2, 4)")
        await followers.until_they_show(connection, "customers")
        [seen] = await followers.ask()
        assert seen.keys == [1, 3]


async def test_keys_that_change(server: RunningServer, connection: Connection) -> None:
    """Keys of two columns move on by one row, change places and are swapped in bulk."""
    async with following(server, connection, SEATS) as followers:
        await connection.execute(
            "INSERT INTO seats SELECT n, s FROM generate_series(1, 5) n, unnest('{a,b}'::text[]) s"
        )
        await connection.execute('UPDATE seats SET "row" = "row" + 1')
        await connection.execute("UPDATE seats SET seat = translate(seat, 'ab', 'ba')")
        await connection.execute("DELETE FROM seats WHERE seat = 'a' AND \"row\" > 3")
        await followers.until_they_show(connection, "seats")
        [seen] = await followers.ask()
        assert sorted(seen.keys)[:3] == ['[2,"a"]', '[2,"b"]', '[3,"a"]']


async def test_keys_of_any_type(server: RunningServer, connection: Connection) -> None:
    """Keys are documents, among them an array and a text that looks like it."""
    async with following(server, connection, DOCUMENTS) as followers:
        await connection.execute(
            """INSERT INTO documents VALUES ('[1]'), ('"[1]"'), ('1'), ('"1"'), ('{"a": 1}')"""
        )
        await connection.execute("""DELETE FROM documents WHERE doc IN ('"[1]"', '"1"')""")
        await connection.execute("""UPDATE documents SET n = 2 WHERE doc = '{"a": 1}'""")
        await followers.until_they_show(connection, "documents")


CODED = Table("coded", "id int PRIMARY KEY, code text NOT NULL UNIQUE")
NESTED = """
    CREATE TABLE nested (
        id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL UNIQUE
    );
    CREATE FUNCTION leave_and_go() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO nested (name) VALUES (old.name);
        DELETE FROM nested WHERE name = old.name;
        RETURN NULL;
    END $$;
    INSERT INTO nested (name) VALUES ('a');
    CREATE TRIGGER leave AFTER UPDATE ON nested FOR EACH ROW EXECUTE FUNCTION leave_and_go()
"""


@pytest.mark.parametrize(
    "change",
    [
        "SELECT feed.watch('coded', 'coded', 'code')",
        "ALTER TABLE coded DROP CONSTRAINT coded_pkey, ADD PRIMARY KEY (code), ADD UNIQUE (id);"
        "SELECT feed.check_topics()",
    ],
    ids=["other destroys", "another key"],
)
async def test_a_key_that_becomes_another(
    server: RunningServer, connection: Connection, change: str
) -> None:
    """While feed.js follows a table by its key, the topic's destroys begin to carry something else,
    or the table gets another key: it shows the rows all the same.
    """
    async with following(server, connection, CODED) as followers:
        await connection.execute("INSERT INTO coded VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        await connection.execute(change)
        await followers.until_they_show(connection, "coded")
        await connection.execute("DELETE FROM coded WHERE id = 1")
        await followers.until_they_show(connection, "coded")


async def test_a_destroy_of_a_name_that_two_rows_had(
    server: RunningServer, connection: Connection
) -> None:
    """Within the statement that renames a row, another one of the old name comes and goes."""
    await connection.execute(NESTED)
    async with following(server, connection, Table("nested", "")) as followers:
        await connection.execute("SELECT feed.watch('nested', 'nested', 'name')")
        await followers.until_they_show(connection, "nested")
        await connection.execute("UPDATE nested SET name = 'b'")
        await followers.until_they_show(connection, "nested")


async def test_a_row_too_large_to_be_sent(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A customer's note is longer than events may be: the row is kept by its key, and no longer
    with what it held before.
    """
    server = start_server(MAX_EVENT_BYTES="64KiB")
    async with following(server, connection, CUSTOMERS) as followers:
        await connection.execute("INSERT INTO customers VALUES (1, 'Sam', 'short'), (2, 'Kim', '')")
        await connection.execute("UPDATE customers SET note = repeat('long', 50000) WHERE id = 1")
        large = {"id": 1, "too_large": True}
        [seen] = await followers.until(lambda seen: large in seen[0].rows)
        last = followers.changes[0][-1]
        assert last["op"] == "update" and last["row"] == large
        assert seen.keys == [1, 2]
        await connection.execute("UPDATE customers SET note = 'short again' WHERE id = 1")
        await followers.until_they_show(connection, "customers")


@pytest.mark.parametrize("seed", scaled([SEED], [SEED, SEED + 1]))
async def test_random_operations(server: RunningServer, connection: Connection, seed: int) -> None:
    """Whatever is done to tables of four kinds, by single statements and by transactions, feed.js
    shows their rows whenever it has caught up.
    """
    chosen = random.Random(seed)

    def statement(table: Table) -> str:
        text = chosen.choice(table.statements)
        return text.replace("$i", str(chosen.randrange(20))).replace(
            "$j", str(chosen.randrange(20))
        )

    async with following(server, connection, *TABLES) as followers:
        for _ in range(ROUNDS):
            for _ in range(OPERATIONS):
                table = chosen.choice(TABLES)
                script = "; ".join(statement(table) for _ in range(chosen.choice([1, 1, 3])))
                with contextlib.suppress(asyncpg.UniqueViolationError):  # then nothing happened
                    await connection.execute(script)
            if chosen.random() < 0.3:
                await connection.execute(f"TRUNCATE {chosen.choice(TABLES).name}")
            await followers.until_they_show(connection, *(table.name for table in TABLES))


ORDERS = """
    CREATE TABLE orders (id int PRIMARY KEY, status text NOT NULL, total numeric, note text);
    SELECT feed.watch('orders', 'order');
    INSERT INTO orders SELECT n, CASE WHEN n % 2 = 0 THEN 'open' ELSE 'gone' END, n, ''
    FROM generate_series(1, 100) AS n;
"""
OPEN = {"topic": "order", "where": "status=eq.open"}
OPEN_ROWS = "(SELECT * FROM orders WHERE status = 'open')"


@pytest.fixture
async def orders(connection: Connection) -> Connection:
    """A connection to a database with a hundred orders, every other one open."""
    await connection.execute(ORDERS)
    return connection


async def test_several_filters_on_one_connection(server: RunningServer, orders: Connection) -> None:
    """Four Feeds, three of one topic, with different filters and columns, share one connection;
    each holds its rows while orders move in and out of them, through a `kill -9`.
    """
    options: list[Row] = [
        OPEN,
        {"topic": "order", "where": "total=gt.50", "columns": ["id", "total"]},
        {"topic": "order", "label": "every one, in full"},
        {"topic": "thing"},
    ]
    shown = (OPEN_ROWS, "(SELECT id, total FROM orders WHERE total > 50)", "orders", "things")
    async with feeds(server, *options) as followers:
        await followers.until_state("live")
        await followers.until_they_show(orders, *shown)
        await orders.execute("UPDATE orders SET status = 'open', total = total + 20 WHERE id < 40")
        await orders.execute("UPDATE orders SET status = 'gone' WHERE id > 80")
        await orders.execute("INSERT INTO things (name) VALUES ('a')")
        await followers.until_they_show(orders, *shown)
        server.kill()
        await followers.until_state("connecting")
        await orders.execute("UPDATE orders SET status = 'open' WHERE id > 90")
        await orders.execute("DELETE FROM orders WHERE id % 3 = 0")
        await asyncio.to_thread(server.start)
        await followers.until_they_show(orders, *shown)
        seen = await followers.until_state("live")
        assert [each.loads for each in seen] == [1, 1, 1, 1]
        assert seen[0].connections == 1


async def test_what_a_change_says(server: RunningServer, orders: Connection) -> None:
    """A row comes, changes and leaves: each change has its key, and the row before and after."""
    async with feeds(server, OPEN, OPEN | {"columns": "note", "old": True}) as followers:
        await followers.until_state("live")
        await orders.execute("UPDATE orders SET status = 'open' WHERE id = 1")
        await orders.execute("UPDATE orders SET note = 'x' WHERE id = 1")
        await orders.execute("UPDATE orders SET status = 'gone' WHERE id = 1")
        await orders.execute("TRUNCATE orders")
        await followers.until(lambda seen: not any(each.rows for each in seen))
        whole = {"id": 1, "status": "open", "total": 1, "note": ""}
        for number, before in enumerate((whole, {"id": 1, "note": ""})):
            after = before | {"note": "x"}
            assert [
                (change["op"], change.get("key"), change.get("before"), change["row"])
                for change in followers.changes[number]
            ] == [
                ("create", 1, None, before),
                ("update", 1, before, after),
                ("destroy", 1, after, None),
                ("truncate", None, None, None),
            ]
            assert all(change["offset"] for change in followers.changes[number])


async def test_a_bulk_of_changes_is_few_batches(server: RunningServer, orders: Connection) -> None:
    """A statement changes five thousand rows: whoever repaints for each batch repaints a few times,
    and the batches are all the changes.
    """
    async with feeds(server, {"topic": "order"}) as followers:
        await followers.until_state("live")
        await orders.execute(
            "INSERT INTO orders SELECT n, 'open', n FROM generate_series(1001, 6000) n"
        )
        batches: list[int] = []
        async with asyncio.timeout(WAIT_S):
            while sum(batches) < 5_000:
                [seen] = await followers.ask()
                batches += seen.batches
        assert sum(batches) == 5_000 and len(batches) <= 50


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"topic": "nothing"}, "unknown_topic", "topic"),
        ({"topic": "order", "where": "status=open"}, "bad_filter", "where"),
        ({"topic": "order", "columns": ["colour"]}, "unknown_column", "columns"),
    ],
)
async def test_a_refused_feed_says_why(
    server: RunningServer, orders: Connection, options: Row, code: str, field: str
) -> None:
    """A Feed asks for what there is not: it says so and stays away, and another one on the
    connection is live.
    """
    async with feeds(server, options, OPEN) as followers:
        refused, live = await followers.until(
            lambda seen: [each.state for each in seen] == ["refused", "live"]
        )
        assert refused.problem is not None and refused.problem["detail"].endswith(".")
        assert (refused.problem["code"], refused.problem["field"]) == (code, field)
        await orders.execute("UPDATE orders SET note = 'x'")
        await followers.until(lambda seen: all(row["note"] == "x" for row in seen[1].rows))
        assert refused.connections == 1 and live.loads == 1


async def test_a_feed_is_refused_in_place(server: RunningServer, orders: Connection) -> None:
    """The column that a Feed filters by is dropped: it says why it ends, and keeps its rows; the
    other Feed on the connection goes on. Once there is such a column again, start() loads again.
    """
    async with feeds(server, OPEN, {"topic": "order", "where": "total=gt.90"}) as followers:
        await followers.until_state("live")
        await orders.execute("ALTER TABLE orders DROP COLUMN status")
        states = ["refused", "live"]
        seen = await followers.until(lambda seen: [each.state for each in seen] == states)
        assert len(seen[0].rows) == 50 and seen[0].problem is not None
        assert (seen[0].problem["code"], seen[0].problem["field"]) == ("unknown_column", "where")
        await followers.until(lambda seen: "status" not in seen[1].rows[0])
        await orders.execute("ALTER TABLE orders ADD COLUMN status text DEFAULT 'open'")
        await followers.until(lambda seen: "status" in seen[1].rows[0])
        await followers.ask("start 0")
        await followers.until_they_show(orders, "orders", "(SELECT * FROM orders WHERE total > 90)")


async def test_a_feed_is_stopped_and_started(server: RunningServer, orders: Connection) -> None:
    """A component that shows a Feed comes and goes, at once and later: no callback is called after
    it has gone, the connection is kept for the others, and when it is back it has the rows.
    """
    async with feeds(server, OPEN, {"topic": "order"}) as followers:
        for command in ("stop 0", "start 0", "stop 0", "start 0"):
            await followers.ask(command)
        await followers.until_state("live")
        await followers.ask("stop 0")
        await orders.execute("UPDATE orders SET status = 'open' WHERE id < 20")
        await followers.until(lambda seen: sum(r["status"] == "open" for r in seen[1].rows) == 60)
        await followers.ask("start 0")
        await followers.until_they_show(orders, OPEN_ROWS, "orders")
        seen = await followers.until_state("live")
        assert seen[0].connections == 1
        server.kill()
        await followers.ask("stop 0")
        await followers.until(lambda seen: seen[1].state == "connecting")
        await followers.ask("start 0")
        await asyncio.to_thread(server.start)
        await followers.until_state("live")
        await followers.until_they_show(orders, OPEN_ROWS, "orders")


PLACES = [
    "connecting 1", "loading 1", "onload 1", "live 1", "onchange 1", "onbatch 1",
    "connecting 2", "returning 1", "live 2",
]  # fmt: skip


@pytest.mark.parametrize("manager", [False, True])
async def test_a_callback_stops_its_feed(
    server: RunningServer, orders: Connection, manager: bool
) -> None:
    """Feeds are stopped within a callback, each within another one: none of their callbacks is
    called afterwards, none says that it is live, and when all have stopped nothing is connected.
    """
    options = [{"topic": "order", "stopIn": place, "manager": manager} for place in PLACES]
    async with feeds(server, *options) as followers:
        until = {place: number for number, place in enumerate(PLACES)}
        await followers.until(lambda seen: seen[until["live 2"]].state == "live")
        await orders.execute("UPDATE orders SET note = 'x'")
        await followers.until(lambda seen: seen[until["onbatch 1"]].batches)
        server.kill()
        await followers.until(lambda seen: seen[until["connecting 2"]].states[3:])
        await asyncio.to_thread(server.start)
        await followers.until(lambda seen: seen[until["live 2"]].states[5:])
        seen = await followers.until(lambda seen: not seen[0].open)
        assert {each.state for each in seen} == {"connecting"}
        everything = ["connecting", "loading", "live", "connecting", "returning", "live"]
        assert [len(each.states) for each in seen] == [1, 2, 2, 3, 3, 3, 4, 5, 6]
        assert all(each.states == everything[: len(each.states)] for each in seen)


async def test_a_callback_starts_its_feed_again(server: RunningServer, orders: Connection) -> None:
    """When the connection is lost, a callback stops its Feed and starts it again: this one and the
    other on the connection come back, then and the next time.
    """
    async with feeds(server, OPEN | {"againIn": "connecting 2"}, OPEN) as followers:
        for _ in range(2):
            await followers.until_state("live")
            server.kill()
            await followers.until_state("connecting")
            await orders.execute("UPDATE orders SET note = note || 'x'")
            await asyncio.to_thread(server.start)
            await followers.until_they_show(orders, OPEN_ROWS, OPEN_ROWS)


async def test_callbacks_that_throw(server: RunningServer, orders: Connection) -> None:
    """All callbacks of a Feed throw each time, through a `kill -9`: it has the rows, and has heard
    of the changes that another Feed has, each once; and the errors are reported.
    """
    async with feeds(server, OPEN, OPEN | {"failing": True}) as followers:
        await followers.until_state("live")
        for change in range(20):
            await orders.execute(f"UPDATE orders SET note = '{change}' WHERE id = {change} * 2")
        await followers.until_they_show(orders, OPEN_ROWS, OPEN_ROWS)
        server.kill()
        await followers.until_state("connecting")
        await orders.execute("UPDATE orders SET status = 'open' WHERE id > 90")
        await asyncio.to_thread(server.start)
        await followers.until_they_show(orders, OPEN_ROWS, OPEN_ROWS)
        seen = await followers.until_state("live")
        assert seen[0].states == seen[1].states
        whole, failing = (
            [(each["op"], each["key"], each["row"]) for each in followers.changes[number]]
            for number in (0, 1)
        )
        assert failing == whole and seen[0].reported > len(whole)


async def test_a_stopped_feed_takes_no_memory(server: RunningServer, orders: Connection) -> None:
    """A page shows one Feed after the other, by connections of the client's and by one that they
    share: the rows of those that have gone are freed.
    """
    process = await asyncio.create_subprocess_exec(
        require("node"), "--expose-gc", str(FORGET), server.url, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert int(output) == 0


async def test_rows_stay_until_others_are_complete(
    server: RunningServer, orders: Connection
) -> None:
    """The table is altered, so that all rows come again: there is no moment without rows."""
    async with feeds(server, {"topic": "order"}) as followers:
        await followers.until_state("live")
        await orders.execute("ALTER TABLE orders ADD COLUMN extra int DEFAULT 7")
        async with asyncio.timeout(WAIT_S):
            while True:
                [seen] = await followers.ask()
                assert len(seen.rows) == 100
                if seen.loads == 2:
                    break
        assert {row["extra"] for row in seen.rows} == {7}


async def test_a_table_that_loses_its_key(server: RunningServer, orders: Connection) -> None:
    """A table's primary key is dropped, so that nothing tells its rows apart: its Feed says so,
    keeps what it has, and follows again once there is a key, of other columns.
    """
    async with feeds(server, {"topic": "order", "where": "id=lte.3"}) as followers:
        await followers.until_state("live")
        await orders.execute("ALTER TABLE orders DROP CONSTRAINT orders_pkey")
        [seen] = await followers.until_state("refused")
        assert seen.problem is not None and seen.problem["code"] == "no_key"
        assert seen.keys == [1, 2, 3]
        await orders.execute("ALTER TABLE orders ADD PRIMARY KEY (status, id)")
        await orders.execute("SELECT feed.check_topics()")
        await followers.ask("start 0")
        [seen] = await followers.until_state("live")
        assert sorted(seen.keys) == ['["gone",1]', '["gone",3]', '["open",2]']


async def test_keys_that_javascript_cannot_tell_apart(
    server: RunningServer, orders: Connection
) -> None:
    """Two rows have keys that are one number in JavaScript: their Feed shows none of them and says
    why; with one of them, it is live.
    """
    await orders.execute(
        "ALTER TABLE orders ALTER id TYPE bigint;"
        "INSERT INTO orders VALUES (9007199254740992, 'huge'), (9007199254740993, 'huge');"
    )
    async with feeds(server, {"topic": "order", "where": "status=eq.huge"}) as followers:
        [seen] = await followers.until_state("refused")
        assert seen.problem is not None and seen.problem["code"] == "same_key"
        assert seen.rows == []
        await orders.execute("DELETE FROM orders WHERE id = 9007199254740993")
        await followers.ask("start 0")
        await followers.until(lambda seen: seen[0].keys == [9007199254740992])


@pytest.mark.parametrize("label", ["same", "", "2"])
async def test_feeds_of_one_label_and_one_manager(
    server: RunningServer, orders: Connection, label: str
) -> None:
    """Feeds have the same label, or the one that another one would get, at once and one after the
    other: each has its own rows.
    """
    options = [
        {"topic": "order", "label": chosen, "where": f"id=lte.{number}", "manager": True}
        for number, chosen in enumerate([label, label, "", ""], 1)
    ]
    async with feeds(server, *options) as followers:
        for command in ("", "stop 0", "start 0", "stop 2", "start 2"):
            await followers.ask(command)
            queries = [f"(SELECT * FROM orders WHERE id <= {n})" for n in (1, 2, 3, 4)]
            if command.startswith("stop"):
                continue
            await followers.until_they_show(orders, *queries)
        assert (await followers.until_state("live"))[0].connections == 1


async def test_a_state_is_told_once(server: RunningServer, orders: Connection) -> None:
    """The server is away for several attempts to connect: the Feed says so once."""
    async with feeds(server, OPEN) as followers:
        await followers.until_state("live")
        server.kill()
        await followers.until(lambda seen: seen[0].attempts >= 3)
        [seen] = await followers.ask()
        assert seen.states == ["connecting", "loading", "live", "connecting"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("{ topic: 'order' }", "io must be"),
        ("{ io, server: 'http://127.0.0.1' }", "topic must name"),
        ("{ io, topic: 'order' }", "server must be the server's URL"),
        ("{ io, topic: 'order', server: '127.0.0.1:8000' }", "server must be the server's URL"),
        ("{ io, topic: 'order', server: 'http://127.0.0.1', wher: '' }", "no option wher."),
    ],
)
async def test_options_that_cannot_work(options: str, complaint: str) -> None:
    """A Feed gets a wrong option: it says which."""
    script = f"""
        import {{ io }} from 'socket.io-client';
        import {{ Feed }} from '{FEED_JS.as_uri()}';
        new Feed({options});
    """
    process = await asyncio.create_subprocess_exec(
        require("node"), "--input-type=module", "--eval", script,
        stderr=asyncio.subprocess.PIPE, cwd=FOLLOW.parent,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert complaint in errors.decode() and process.returncode == ("no option" not in complaint)
