"""static/feed.js in Node.js, on tables of any kind: it shows their rows and no others."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web

from app.database.connections import Connection, connect
from tests.support.machine import require
from tests.support.server import RunningServer

FOLLOW = Path(__file__).parent / "support" / "feeds.mjs"
WAIT_S = 20.0
SEED = 20_261_128
ROUNDS, OPERATIONS = 6, 25

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table, the key that feed.js is told of, and statements for the random test."""

    name: str
    definition: str
    key: str | list[str]
    statements: list[str] = field(default_factory=list)


# $i and $j become small numbers, so that the statements hit the same few rows again and again.
CUSTOMERS = Table(
    "customers",
    "id int PRIMARY KEY, name text, note text DEFAULT ''",
    "id",
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
    ["row", "seat"],
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
    "doc",
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
    "id",
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
LIST = """
    SELECT feed.offset() AS "offset", coalesce(json_agg(row_to_json(listed)), '[]')::text AS list
    FROM {} AS listed
"""


class Followers:
    """feed.js following tables in a Node.js process."""

    def __init__(self, process: asyncio.subprocess.Process, tables: list[Table]) -> None:
        self._process = process
        self._tables = tables

    async def ask(self) -> list[list[Any]]:
        """Return state, keys, rows and new changes of every table."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        answer = await self._process.stdout.readline()
        found: list[list[Any]] = json.loads(answer)
        return found

    async def until_live(self) -> None:
        """Wait until every table was loaded and is followed."""
        async with asyncio.timeout(WAIT_S):
            while {state for state, *_ in await self.ask()} != {"live"}:
                await asyncio.sleep(0.02)

    async def until_they_show(self, connection: Connection) -> None:
        """Wait until they hold exactly the rows of the tables."""
        wanted = [await rows_of(connection, table) for table in self._tables]
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while (shown := [in_order(rows) for _, _, rows, _ in await self.ask()]) != wanted:
            if asyncio.get_running_loop().time() > deadline:
                assert shown == wanted
            await asyncio.sleep(0.05)


def in_order(rows: list[Row]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


async def rows_of(connection: Connection, table: Table) -> list[str]:
    found = await connection.fetch(f"SELECT row_to_json(t)::text FROM {table.name} AS t")
    return in_order([json.loads(row[0]) for row in found])


@asynccontextmanager
async def lists(url: str) -> AsyncIterator[str]:
    """Serve every table as a list with its Feed-Offset, as a user's own endpoint would."""

    async def answer(request: web.Request) -> web.Response:
        connection = await connect(url)
        found = await connection.fetchrow(LIST.format(request.match_info["table"]))
        await connection.close()
        headers = {"Feed-Offset": found["offset"]}
        return web.Response(text=found["list"], content_type="application/json", headers=headers)

    application = web.Application()
    application.router.add_get("/{table}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def following(
    server: RunningServer, connection: Connection, tables: list[Table]
) -> AsyncIterator[Followers]:
    """Create the tables, watch them, and follow them with feed.js."""
    for table in tables:
        if table is not THINGS:
            if table.definition:
                await connection.execute(f"CREATE TABLE {table.name} ({table.definition})")
            await connection.execute("SELECT feed.watch($1::text::regclass, $1)", table.name)
    async with lists(server.env["DATABASE_URL"]) as address:
        options = [
            {
                "topic": "thing" if table is THINGS else table.name,
                "key": table.key,
                "list": address + table.name,
                "server": server.url,
            }
            for table in tables
        ]
        process = await asyncio.create_subprocess_exec(
            require("node"), str(FOLLOW), json.dumps(options),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24,
        )  # fmt: skip
        try:
            followers = Followers(process, tables)
            await followers.until_live()
            yield followers
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await asyncio.wait_for(process.wait(), WAIT_S)


async def test_two_rows_of_one_name(server: RunningServer, connection: Connection) -> None:
    """Two customers are called Sam, two have no name; the second of each is deleted."""
    async with following(server, connection, [CUSTOMERS]) as followers:
        await connection.execute(
            "INSERT INTO customers VALUES (1, 'Sam'), (2, 'Sam'), (3, NULL), (4, NULL)"
        )
        await connection.execute("DELETE FROM customers WHERE id IN (2, 4)")
        await followers.until_they_show(connection)
        [[_, keys, _, _]] = await followers.ask()
        assert keys == [1, 3]


async def test_keys_that_change(server: RunningServer, connection: Connection) -> None:
    """Keys of two columns move on by one row, change places and are swapped in bulk."""
    async with following(server, connection, [SEATS]) as followers:
        await connection.execute(
            "INSERT INTO seats SELECT n, s FROM generate_series(1, 5) n, unnest('{a,b}'::text[]) s"
        )
        await connection.execute('UPDATE seats SET "row" = "row" + 1')
        await connection.execute("UPDATE seats SET seat = translate(seat, 'ab', 'ba')")
        await connection.execute("DELETE FROM seats WHERE seat = 'a' AND \"row\" > 3")
        await followers.until_they_show(connection)
        [[_, keys, _, _]] = await followers.ask()
        assert sorted(keys)[:3] == ['[2,"a"]', '[2,"b"]', '[3,"a"]']


async def test_keys_of_any_type(server: RunningServer, connection: Connection) -> None:
    """Keys are documents, among them an array and a text that looks like it."""
    async with following(server, connection, [DOCUMENTS]) as followers:
        await connection.execute(
            """INSERT INTO documents VALUES ('[1]'), ('"[1]"'), ('1'), ('"1"'), ('{"a": 1}')"""
        )
        await connection.execute("""DELETE FROM documents WHERE doc IN ('"[1]"', '"1"')""")
        await connection.execute("""UPDATE documents SET n = 2 WHERE doc = '{"a": 1}'""")
        await followers.until_they_show(connection)


CODED = Table("coded", "id int PRIMARY KEY, code text NOT NULL UNIQUE", "id")
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
async def test_destroys_that_the_options_do_not_fit(
    server: RunningServer, connection: Connection, change: str
) -> None:
    """While feed.js follows a table by its key, destroys begin to carry something else: it has no
    row under that, and loads the list again.
    """
    async with following(server, connection, [CODED]) as followers:
        await connection.execute("INSERT INTO coded VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        await connection.execute(change)
        await followers.until_they_show(connection)
        await connection.execute("DELETE FROM coded WHERE id = 1")
        await followers.until_they_show(connection)


async def test_a_destroy_of_a_name_that_two_rows_had(
    server: RunningServer, connection: Connection
) -> None:
    """Within the statement that renames a row, another one of the old name comes and goes."""
    await connection.execute(NESTED)
    async with following(server, connection, [Table("nested", "", "id")]) as followers:
        await connection.execute("SELECT feed.watch('nested', 'nested', 'name')")
        await followers.until_they_show(connection)
        await connection.execute("UPDATE nested SET name = 'b'")
        await followers.until_they_show(connection)


async def test_a_row_too_large_to_be_sent(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A customer's note is longer than events may be: the row is kept by its key, and no longer
    with what it held before.
    """
    server = start_server(MAX_EVENT_BYTES="64KiB")
    async with following(server, connection, [CUSTOMERS]) as followers:
        await connection.execute("INSERT INTO customers VALUES (1, 'Sam', 'short'), (2, 'Kim', '')")
        await connection.execute("UPDATE customers SET note = repeat('long', 50000) WHERE id = 1")
        changes: list[Any] = []
        async with asyncio.timeout(WAIT_S):
            while len(changes) < 3:
                [[_, keys, rows, more]] = await followers.ask()
                changes += more
        assert changes[-1][:2] == ["update", 1] and changes[-1][3] is True
        assert keys == [1, 2]
        assert rows[0] == {"id": 1, "too_large": True}
        await connection.execute("UPDATE customers SET note = 'short again' WHERE id = 1")
        await followers.until_they_show(connection)


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
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

    async with following(server, connection, TABLES) as followers:
        for _ in range(ROUNDS):
            for _ in range(OPERATIONS):
                table = chosen.choice(TABLES)
                script = "; ".join(statement(table) for _ in range(chosen.choice([1, 1, 3])))
                with contextlib.suppress(asyncpg.UniqueViolationError):  # then nothing happened
                    await connection.execute(script)
            if chosen.random() < 0.3:
                await connection.execute(f"TRUNCATE {chosen.choice(TABLES).name}")
            await followers.until_they_show(connection)
