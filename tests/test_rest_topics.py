"""REST for any watched table: what is watched, and the rows of a topic, page by page."""

import asyncio
import json
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import asyncpg
import httpx
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.live.refusal import RefusalCode
from tests.support.postgres import clone, execute, run
from tests.support.roles import PASSWORD
from tests.support.server import RunningServer
from tests.support.sockets import App, serving_here
from tests.support.subscribers import Held, subscriber

pytestmark = pytest.mark.database

SOON_S = 4.0
ROLE = """
    CREATE ROLE {role} LOGIN PASSWORD '{password}';
    GRANT USAGE ON SCHEMA feed, public TO {role};
    GRANT ALL ON ALL TABLES IN SCHEMA feed TO {role};
    GRANT ALL ON ALL FUNCTIONS IN SCHEMA feed TO {role};
    GRANT SELECT ON things TO {role}
"""
ORDERS = """
    CREATE TYPE mood AS ENUM ('sad', 'fine');
    CREATE TABLE orders (
        id int PRIMARY KEY, status text NOT NULL, total numeric, note text, mood mood, "limit" int,
        "odd, ""name" text, document json
    );
    SELECT feed.watch('orders', 'order');
    INSERT INTO orders (id, status, total, note, mood, "limit", "odd, ""name") VALUES
        (1, 'open', 10, 'a b', 'sad', 5, NULL), (2, 'open', 200, 'ü&+%', 'fine', 6, 'x'),
        (3, 'shipped', 300.50, '', NULL, 5, 'y'), (4, 'lost', NULL, NULL, 'fine', NULL, 'y');
"""


@pytest.fixture(scope="module")
def topics_server(
    server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server with orders for many tests; it must get through them without a traceback."""
    with clone(server_url, migrated_template) as database_url:
        run(execute(database_url, ORDERS))
        server = RunningServer(database_url, tmp_path_factory.mktemp("topics") / "server.log")
        server.start()
        yield server
        server.kill()
        assert "Traceback" not in server.log and " ERROR " not in server.log


@pytest.fixture
async def sql(topics_server: RunningServer) -> AsyncIterator[Connection]:
    """A connection to the database of `topics_server`."""
    connection = await connect(topics_server.env["DATABASE_URL"])
    yield connection
    connection.terminate()


@pytest.fixture
async def client(topics_server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `topics_server`."""
    async with httpx.AsyncClient(base_url=topics_server.url, timeout=30) as opened:
        yield opened


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check the form of an error response; return it."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    details: dict[str, Any] = response.json()
    assert details["detail"].endswith(".") and "\n" not in details["detail"]
    return details


def next_of(response: httpx.Response) -> str | None:
    """The address of the next page, if there is one."""
    link = response.headers.get("Link")
    if link is None:
        return None
    found = re.fullmatch(r'<([^<>\s]+)>; rel="next"', link)
    assert found
    return found[1]


async def raw_answer(server: RunningServer, target: str) -> str:
    """What a server answers to GET, for a target that no client library changes."""
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"GET {target} HTTP/1.0\r\nHost: {address.netloc}\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer


async def pages(client: httpx.AsyncClient, address: str) -> AsyncIterator[httpx.Response]:
    """Follow the links from the first page on."""
    following: str | None = address
    while following is not None:
        page = await client.get(following)
        assert page.status_code == 200, page.text
        yield page
        following = next_of(page)


# What is watched


async def test_topics(client: httpx.AsyncClient) -> None:
    """A client asks what is watched: topics with their keys, columns, types and operators."""
    response = await client.get("/topics")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    found = {topic["topic"]: topic for topic in response.json()}
    order = found["order"]
    assert order["key"] == ["id"] and found["thing"]["key"] == ["id"]
    columns = {column["name"]: (column["type"], column["operators"]) for column in order["columns"]}
    numbers = ["eq", "neq", "lt", "lte", "gt", "gte", "in", "is"]
    assert columns == {
        "id": ("integer", numbers),
        "status": ("text", ["eq", "neq", "in", "is"]),
        "total": ("numeric", numbers),
        "note": ("text", ["eq", "neq", "in", "is"]),
        "mood": ("public.mood", ["eq", "neq", "in", "is"]),
        "limit": ("integer", numbers),
        'odd, "name': ("text", ["eq", "neq", "in", "is"]),
        "document": ("json", []),
    }


async def test_a_server_without_things(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A server without the sample table serves topics, and describes them."""
    await connection.execute(ORDERS)
    server = start_server(THINGS="no")
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert [row["id"] for row in (await client.get("/topics/order")).json()] == [1, 2, 3, 4]
        document = (await client.get("/openapi.json")).json()
        assert {"/topics", "/topics/{topic}"} <= document["paths"].keys()
        assert "ListedTopic" in document["components"]["schemas"]
        assert {"404", "422"} <= document["components"]["responses"].keys()


# Rows


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("", [1, 2, 3, 4]),
        ("&", [1, 2, 3, 4]),
        ("columns=", [1, 2, 3, 4]),
        ("status=eq.open", [1, 2]),
        ("status=eq.open&total=gt.100", [2]),
        ("total=is.null", [4]),
        ("status=not.eq.open", [3, 4]),
        ("or=(status.eq.lost,total.lt.100)", [1, 4]),
        ("note=eq.a+b", [1]),
        ("note=eq.a%20b", [1]),
        ("note=eq.%C3%BC%26%2B%25", [2]),
        ("note=eq.ü%26%2B%25", [2]),
        ("note=eq.", [3]),
        ("mood=in.(sad,fine)", [1, 2, 4]),
        ('"limit"=eq.5', [1, 3]),
        ("%22limit%22=eq.5&limit=1", [1]),
        ("and=(limit.eq.5)", [1, 3]),
        ('"odd, \\"name"=eq.y', [3, 4]),
        ("limit=2", [1, 2]),
        ("after=2", [3, 4]),
        ("after=-7&limit=1", [1]),
        ("after=4", []),
        ("after=4&limit=3", []),
        ("a%66ter=2&l%69mit=1", [3]),
        ("status=eq.nothing&limit=1", []),
    ],
)
async def test_filters(topics_server: RunningServer, query: str, ids: list[int]) -> None:
    """A client asks for some rows in the syntax of subscriptions; limit, after and columns are
    options, and columns of these names are written in quotes or within parentheses.
    """
    sent = quote(query, safe="%!$&'()*+,;=:@/?-._~")  # as it is, but for what no server takes
    answer = await raw_answer(topics_server, f"/topics/order?{sent}")
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200"), answer
    assert [row["id"] for row in json.loads(body)] == ids


async def test_columns(client: httpx.AsyncClient) -> None:
    """A client asks for some columns: it gets these and the key, in the table's order."""
    response = await client.get(
        "/topics/order", params={"columns": '"odd, \\"name",total', "status": "neq.open"}
    )
    assert response.json() == [
        {"id": 3, "total": 300.5, 'odd, "name': "y"},
        {"id": 4, "total": None, 'odd, "name': "y"},
    ]


@pytest.mark.parametrize(
    ("query", "status", "field", "says"),
    [
        ("status=open", 422, "where", "operator"),
        ("colour=eq.red", 422, "where", "no column 'colour'"),
        ("total=eq.red", 422, "where", 'invalid input syntax for type numeric: "red"'),
        ("status=gt.a", 422, "where", "operator gt"),
        ("document=is.null", 422, "where", "cannot be filtered"),
        ("status", 422, "where", "no value"),
        ("limit", 422, "where", "no value"),
        ("=eq.1", 422, "where", "name of a column"),
        ("status=eq.%", 422, "where", "%25"),
        ("status=eq.%FF", 422, "where", "UTF-8"),
        ("status=eq.%00", 422, "where", "U+0000"),
        ("status=eq.%ED%A0%80", 422, "where", "surrogate"),
        ("status=eq." + "a" * 5000, 422, "where", "4000"),
        ("columns=id,colour", 422, "columns", "no column 'colour'"),
        ("columns=id,,", 422, "columns", "name of a column"),
        ("columns=%00", 422, "columns", "U+0000"),
        ("columns=id&columns=id", 422, "columns", "only once"),
        ("limit=0", 422, "limit", "whole number from 1 to 10000"),
        ("limit=10001", 422, "limit", "whole number from 1 to 10000"),
        ("limit=", 422, "limit", "whole number from 1 to 10000"),
        ("limit=eq.5", 422, "limit", "whole number from 1 to 10000"),
        ("limit=1&limit=1", 422, "limit", "only once"),
        ("after=1&after=2", 422, "after", "only once"),
        ("after=", 422, "after", 'invalid input syntax for type integer: ""'),
        ("after=a", 422, "after", 'invalid input syntax for type integer: "a"'),
        ("after=1,2", 422, "after", 'invalid input syntax for type integer: "1,2"'),
        ("after=99999999999", 422, "after", "out of range"),
        ("after=%00", 422, "after", "U+0000"),
        ("after=%FF", 422, "where", "UTF-8"),
        ("after=%ED%A0%80", 422, "after", "surrogate"),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, query: str, status: int, field: str, says: str
) -> None:
    """A client asks for what there is not, or wrongly: it gets a sentence, the field, and the code
    of such a refusal.
    """
    details = problem(await client.get(f"/topics/order?{query}"), status)
    assert details["field"] == field and says in details["detail"], details
    assert field == "limit" or details["code"] in set(RefusalCode), details


@pytest.mark.parametrize(
    "topic", ["nothing", "Order", "order%00", "order%0A", "%FF", "%2e%2e%20", "order%2F", "'", "ü"]
)
async def test_an_unknown_topic(client: httpx.AsyncClient, topic: str) -> None:
    """A client asks for a topic that there is not."""
    problem(await client.get(f"/topics/{topic}"), 404)
    problem(await client.get(f"/topics/{topic}?limit=1"), 404)


async def test_methods(client: httpx.AsyncClient) -> None:
    """HEAD says what GET would, and any other method is refused."""
    for path in ("/topics", "/topics/order?limit=1"):
        got, head = await client.get(path), await client.head(path)
        assert head.status_code == 200 and not head.content
        for name in ("Content-Type", "Content-Length", "Feed-Offset", "Link", "Cache-Control"):
            assert head.headers.get(name) == got.headers.get(name)
        assert (await client.options(path)).headers["Allow"] == "GET, HEAD, OPTIONS"
        problem(await client.post(path, json={}), 405)
    assert (await client.head("/topics/nothing")).status_code == 404


# Rows look as in a snapshot


async def test_rows_are_those_of_a_snapshot(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A client that asks by REST gets the rows, the offset and the refusals of one that subscribes:
    also of rows that are too large for an event.
    """
    await connection.execute(ORDERS)
    await connection.execute(
        """UPDATE orders SET note = repeat('x', 30000) WHERE id = 2;
        INSERT INTO orders (id, status, document) VALUES (9, 'open', '{"a" : [1,  2]}')"""
    )
    server = start_server(MAX_EVENT_BYTES=2048)
    async with subscriber(server.url) as subscribed, httpx.AsyncClient() as client:
        for number, (where, columns) in enumerate(
            [("", ""), ("", "total"), ("status=eq.open", ""), ("", "note")]
        ):
            held = await subscribed.subscribe(f"/order/{number}", where=where, columns=columns)
            await subscribed.loaded(held)
            listed = await client.get(f"{server.url}/topics/order?{where}&columns={columns}")
            assert listed.json() == list(held.rows.values())
            assert listed.headers["Feed-Offset"] == held.offset
        assert {"id": 2, "too_large": True} in listed.json()


async def test_too_many_bytes(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """A list is longer than a snapshot may be: the client is told to page, and that works."""
    await connection.execute(ORDERS)
    await connection.execute(
        "INSERT INTO orders (id, status) SELECT id, 'many' FROM generate_series(10, 1000) AS id"
    )
    server = start_server(SNAPSHOT_BYTES="20KiB")
    async with httpx.AsyncClient(base_url=server.url) as client:
        details = problem(await client.get("/topics/order"), 422)
        assert details["field"] == "limit"
        for word in ("20480 bytes", "limit", "filter", "columns", "Link"):
            assert word in details["detail"]
        problem(await client.get("/topics/order?limit=900"), 422)
        assert len((await client.get("/topics/order?status=neq.many")).json()) == 4
        listed = [row["id"] async for page in pages(client, "/topics/order?limit=100")
                  for row in page.json()]  # fmt: skip
        assert listed == [1, 2, 3, 4, *range(10, 1001)]


# Pages

ODD_TEXTS = [
    "", " ", ",", '"', "\\", 'a,"b', "a\\,b", "a b", "a+b", "a%2Fb", "a&b=c", "#", "?", "<>",
    "a\nb", "\r\n", "\t", "A", "a", "B", "b", "Z", "é", "e\u0301", "É", "ß", "ss", "ﬁ", "\u0001",
    "\u200b", "\u2028", "\ufeff", "\uffff", "😀", "שלום", "null", "(1,2)", "{a}", ";",
    "a;b", "x" * 2000,
]  # fmt: skip
EPOCHS = [
    "-infinity", "4713-01-01 BC", "0044-03-15 12:00:00.000001+00 BC", "1970-01-01 00:00:00+00",
    "2026-11-28 18:00:00.123456+05:30", "2026-11-28 18:00:00.123457+05:30", "9999-12-31",
    "294276-12-31 23:59:59.999999+00", "infinity",
]  # fmt: skip
KEYS: dict[str, tuple[str, list[Any]]] = {
    "int": ("int", [-(2**31), -5, 0, 1, 2, 3, 10, 2**31 - 1]),
    "bigint": ("bigint", [-(2**63), -1, 0, 2**53 + 1, 2**63 - 1]),
    "numeric": ("numeric", ["NaN", "-Infinity", "Infinity", "1e200", "-1e-200", "0.10", "3",
                            "12345678901234567890.123"]),
    "numeric(10,2)": ("numeric(10,2)", ["0.10", "3.00", "-7.25"]),
    "float8": ("float8", ["NaN", "-Infinity", "Infinity", "-0", "1e-300", "0.1", "1e22",
                          "0.30000000000000004"]),
    "float4": ("float4", ["NaN", "0.1", "16777216", "1e-30", "-2.5"]),
    "boolean": ("boolean", ["true", "false"]),
    "text": ("text", ODD_TEXTS),
    "text C": ('text COLLATE "C"', ODD_TEXTS),
    "text ICU": ('text COLLATE "de-x-icu"', ODD_TEXTS),
    "text nondeterministic": ("text COLLATE caseless", [*"aBcDß", "ä", "", "e f", ",", "Zz"]),
    "varchar": ("varchar(30)", ["a", "A", "b", "a ", "é"]),
    "char": ("char(5)", ["a", "A", "b,", "é", ""]),
    "name": ("name", ["a", "B", "b", 'q"']),
    '"char"': ('"char"', ["a", "B", ",", ""]),
    "uuid": ("uuid", [f"{n:032x}" for n in (0, 1, 2**64, 2**127, 2**128 - 1)]),
    "date": ("date", ["-infinity", "0001-01-01 BC", "2026-11-28", "12345-01-01", "infinity"]),
    "time": ("time", ["00:00", "12:30:00.000001", "24:00"]),
    "timetz": ("timetz", ["00:00+00", "12:30:00.5-07:30", "23:59+14"]),
    "timestamp": ("timestamp", ["-infinity", "0044-03-15 BC", "2026-11-28 18:00:00.1"]),
    "timestamptz": ("timestamptz", EPOCHS),
    "timestamptz(3)": ("timestamptz(3)", ["2026-11-28 18:00:00.123+00", "2026-11-28 18:00+05"]),
    "interval": ("interval", ["1 year -2 mons", "-3 days 04:05:06.7", "0", "100000 hours"]),
    "bytea": ("bytea", ["", "\\x00", "\\xff00", "\\x5c2c22", "\\x7f"]),
    "inet": ("inet", ["10.0.0.1", "10.0.0.0/8", "::1", "fe80::/10"]),
    "bit": ("bit varying", ["", "0", "1", "101"]),
    "jsonb": ("jsonb", ['"a,b"', "null", "1", "[1, 2]", '{"a": "\\""}', "true"]),
    "int[]": ("int[]", ["{}", "{1}", "{1,2}", "{2}", "{NULL}"]),
    "text[]": ("text[]", ["{}", '{"a,b"}', '{"q\\"",NULL}', "{a}"]),
    "range": ("int4range", ["empty", "[1,5)", "(,3)", "[7,)"]),
    "enum": ("size", ["small", "large", "a,b"]),
    "enum[]": ("size[]", ["{small}", "{large,small}", "{}"]),
    "domain": ("positive", [1, 2, 30]),
    "domain of an enum": ("sizes", ["small", "large"]),
    "domain of an array": ("ints", ["{}", "{1,2}", "{3}"]),
    "composite": ("pair", ['(1,"a,b")', "(2,)", '(2,"q""")', "(,x)"]),
}  # fmt: skip
# Sorted by their texts, because Postgres's own operators are not to be relied on for their types.
SORTED_AS_TEXT = {"enum[]", "domain of an enum", "composite", "citext"}
TYPES = """
    CREATE TYPE size AS ENUM ('small', 'large', 'a,b');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE DOMAIN sizes AS size;
    CREATE DOMAIN ints AS int[];
"""
CASELESS = """
    CREATE COLLATION caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false)
"""


@pytest.fixture(scope="module")
def types(topics_server: RunningServer) -> None:
    """The types of keys."""
    run(execute(topics_server.env["DATABASE_URL"], TYPES))


async def keyed(sql: Connection, table: str, columns: str, key: str) -> None:
    """Make a watched table."""
    await sql.execute(f"CREATE TABLE {table} ({columns}, note int, PRIMARY KEY ({key}))")
    await sql.execute(f"SELECT feed.watch('{table}', '{table}')")


async def in_order(sql: Connection, table: str, order: str) -> str:
    """The list of a table's rows, by Postgres."""
    rows = await sql.fetch(f"SELECT row_to_json(x)::text FROM {table} AS x ORDER BY {order}")
    return f"[{','.join(row[0] for row in rows)}]"


async def check_pages(
    client: httpx.AsyncClient, topic: str, expected: str, limits: tuple[int, ...] = (1, 2, 3)
) -> None:
    """Check that the list is as expected, at once and page by page, whatever their length."""
    whole = await client.get(f"/topics/{topic}")
    assert whole.text == expected and "Link" not in whole.headers
    count = len(json.loads(expected))
    for limit in limits:
        texts = [page.text[1:-1] async for page in pages(client, f"/topics/{topic}?limit={limit}")]
        assert f"[{','.join(texts)}]" == expected
        assert len(texts) == max(1, -(-count // limit))


@pytest.mark.parametrize("name", KEYS)
async def test_pages_by_any_key(
    client: httpx.AsyncClient, sql: Connection, types: None, name: str
) -> None:
    """A client follows the links of a table with a key of any type: it gets each row once, in the
    order of the key.
    """
    type, values = KEYS[name]
    if name in ("text ICU", "text nondeterministic"):
        try:
            await sql.execute(
                CASELESS if "caseless" in type else "SELECT 'a' < 'b' COLLATE \"de-x-icu\""
            )
        except (asyncpg.FeatureNotSupportedError, asyncpg.UndefinedObjectError):
            pytest.skip(
                "this Postgres was built without ICU, like the embedded one (see make matrix)"
            )
    table = f"key{list(KEYS).index(name)}"
    await keyed(sql, table, f"k {type}", "k")
    for value in random.Random(1).sample(values, len(values)):
        await sql.execute(
            f"INSERT INTO {table} VALUES ($1::text::{type.split(' COLL')[0]}, 1)", str(value)
        )
    order = "format('%s', k) COLLATE \"C\"" if name in SORTED_AS_TEXT else "k"
    await check_pages(client, table, await in_order(sql, table, order))


async def test_a_key_too_long_for_an_address(client: httpx.AsyncClient, sql: Connection) -> None:
    """A page would end with a key that no link can name: it is refused, and another limit helps."""
    await keyed(sql, "long_keys", "k text", "k")
    await sql.execute("INSERT INTO long_keys VALUES ('a', 1), (repeat('b', 20000), 2), ('c', 3)")
    answer = await client.get("/topics/long_keys?limit=2")
    assert answer.status_code == 422 and answer.json()["code"] == "too_large"
    for limit in (1, 3):
        assert len((await client.get(f"/topics/long_keys?limit={limit}")).json()) == limit


async def test_pages_by_citext(client: httpx.AsyncClient, sql: Connection) -> None:
    """A key has a type of an extension, whose order no operator of Postgres's own knows."""
    try:
        await sql.execute("CREATE EXTENSION citext")
    except (asyncpg.FeatureNotSupportedError, asyncpg.UndefinedFileError):
        pytest.skip("this Postgres has no citext")
    await keyed(sql, "mails", "k citext", "k")
    await sql.execute("INSERT INTO mails VALUES ('b'), ('A'), ('C'), ('d'), ('Ä,'), ('')")
    await check_pages(client, "mails", await in_order(sql, "mails", 'k::text COLLATE "C"'))


async def test_pages_by_a_composite_key(client: httpx.AsyncClient, sql: Connection) -> None:
    """A client follows the links of a table whose key has several columns with odd names, not in
    the order of the table.
    """
    await keyed(
        sql,
        "places",
        '"b ""c, d" text, at timestamptz, "select" numeric',
        '"select", "b ""c, d", at',
    )
    rows = [(number, text, at) for number in ("1", "1.5", "NaN") for text in ODD_TEXTS[:12]
            for at in EPOCHS[::4]]  # fmt: skip
    await sql.executemany(
        "INSERT INTO places VALUES ($2, $3::text::timestamptz, $1::text::numeric)", rows
    )
    expected = await in_order(sql, "places", 'x."select", x."b ""c, d", at')
    await check_pages(client, "places", expected, (1, 7, 50, 108, 1000))
    for after in ("1", "1,a", "1,a,infinity,2", "", '"1,a,infinity"'):
        details = problem(await client.get("/topics/places", params={"after": after}), 422)
        assert details["field"] == "after" and 'select, b "c, d and at' in details["detail"]
    for after in ("1,a,soon", "one,a,infinity"):
        details = problem(await client.get("/topics/places", params={"after": after}), 422)
        assert details["field"] == "after" and "invalid input syntax" in details["detail"]
    for after in ('"1', '1,"a"b,infinity'):
        details = problem(await client.get("/topics/places", params={"after": after}), 422)
        assert details["field"] == "after" and "malformed" in details["detail"]


@pytest.mark.parametrize("seed", range(6))
async def test_random_lists(client: httpx.AsyncClient, sql: Connection, seed: int) -> None:
    """Clients page through random parts of a random table: the pages are the rows that Postgres
    returns.
    """
    chosen, table = random.Random(seed), f"random{seed}"
    await keyed(sql, table, "a text, b int", chosen.choice(["a, b", "b, a"]))
    texts = ODD_TEXTS[: chosen.randint(1, len(ODD_TEXTS) - 1)]
    await sql.execute(
        f"INSERT INTO {table} SELECT a, b, (random() * 5)::int FROM unnest($1::text[]) AS a,"
        f" generate_series(1, $2) AS b WHERE random() < 0.7",
        texts, chosen.randint(1, 9),
    )  # fmt: skip
    key = await sql.fetchval("SELECT string_agg(k, ', ') FROM feed.topic, unnest(key) AS k"
                             " WHERE topic = $1", table)  # fmt: skip
    for _ in range(4):
        text, number, limit = chosen.choice(ODD_TEXTS), chosen.randint(0, 5), chosen.randint(1, 40)
        rows = await sql.fetch(
            f"SELECT a, b FROM {table} WHERE a <> $1 AND note >= $2 ORDER BY {key}", text, number
        )
        query = urlencode({"a": f"neq.{text}", "note": f"gte.{number}", "limit": limit})
        found = [row async for page in pages(client, f"/topics/{table}?{query}&columns=b")
                 for row in page.json()]  # fmt: skip
        assert found == [dict(row) for row in rows]


async def test_the_link_keeps_everything(topics_server: RunningServer) -> None:
    """The next page has the filter and the columns exactly as they were sent."""
    sent = "note=neq.%61+b%20%C3%BC'&&columns=total,%22limit%22&limit=1&after=0&and=(id.gt.0)"
    answer = await raw_answer(topics_server, f"/topics/order?{sent}")
    found = re.search(r'(?i)^link: <(\S+)>; rel="next"\r$', answer, re.MULTILINE)
    assert found, answer
    kept = sent.replace("&after=0", "").replace("&&", "&")
    assert found[1] == f"/topics/order?{kept}&after=1"


async def test_without_a_key(server: RunningServer, connection: Connection) -> None:
    """A watched table loses its primary key: its rows can be listed, but not page by page."""
    await keyed(connection, "keyless", "id int", "id")
    await connection.execute("INSERT INTO keyless VALUES (1), (2)")
    await connection.execute("ALTER TABLE keyless DROP CONSTRAINT keyless_pkey")
    await connection.execute("SELECT feed.check_topics()")
    async with httpx.AsyncClient(base_url=server.url) as client:
        await check_keyless(client)


async def check_keyless(client: httpx.AsyncClient) -> None:
    assert sorted(row["id"] for row in (await client.get("/topics/keyless")).json()) == [1, 2]
    for query in ("limit=1", "after=1"):
        assert (
            "no primary key" in problem(await client.get(f"/topics/keyless?{query}"), 422)["detail"]
        )


# Offsets


LAST = 1000


def is_up_to_date(held: Held) -> bool:
    """Whether a client has continued, and got the last row."""
    return bool(held.recovered) and LAST in held.ids


@pytest.mark.parametrize("limit", [None, 7])
async def test_a_subscription_continues_from_a_list(
    any_app: App, connection: Connection, limit: int | None
) -> None:
    """Clients load a list, at once or page by page, while rows are written, and subscribe from its
    (first) offset: they end up with what the table has.
    """
    await connection.execute(ORDERS)
    await connection.execute(
        "INSERT INTO orders (id, status) SELECT id, 'open' FROM generate_series(10, 60) AS id"
    )
    where, writing = "status=eq.open", asyncio.Event()

    async def write() -> None:
        chosen = random.Random(5)
        for number in range(300):
            id, status = chosen.randint(1, 80), chosen.choice(["open", "shipped"])
            await connection.execute(
                "INSERT INTO orders (id, status, total) VALUES ($1, $2, $3) ON CONFLICT (id) DO"
                " UPDATE SET status = excluded.status, total = excluded.total", id, status, number
            )  # fmt: skip
            if number % 5 == 0:
                await connection.execute("DELETE FROM orders WHERE id = $1", chosen.randint(1, 80))
            if number == 50:
                writing.set()

    writer = asyncio.create_task(write())
    await writing.wait()
    async with (
        httpx.AsyncClient(base_url=any_app.url) as client,
        subscriber(any_app.url) as held_by,
    ):
        for number in range(5):
            address = f"/topics/order?{where}" + (f"&limit={limit}" if limit else "")
            listed = [page async for page in pages(client, address)]
            since = listed[0].headers["Feed-Offset"]
            held = await held_by.subscribe(f"/order/{number}", where=where, since=since)
            held.rows = {held.place(row): row for page in listed for row in page.json()}
        await writer
        await connection.execute("INSERT INTO orders (id, status) VALUES ($1, 'open')", LAST)
        rows = await connection.fetch(
            "SELECT row_to_json(x)::text FROM orders AS x WHERE status = 'open' ORDER BY id"
        )
        for held in held_by.held.values():
            await held_by.until(partial(is_up_to_date, held))
            assert [held.rows[f"[{id}]"] for id in held.ids] == [json.loads(row[0]) for row in rows]


async def test_a_list_has_what_was_written_before(
    client: httpx.AsyncClient, sql: Connection
) -> None:
    """A client writes, then lists: it sees its own write, also one that is not yet flushed."""
    await keyed(sql, "written", "id int", "id")
    await sql.execute("SET synchronous_commit = off")
    for number in range(1, 30):
        await sql.execute("INSERT INTO written VALUES ($1)", number)
        assert len((await client.get("/topics/written")).json()) == number


# Headers


async def test_prefix_and_other_origins(connection: Connection, database_url: str) -> None:
    """A page of another origin may read the offset and the link, which is below the prefix; long
    lists are compressed.
    """
    await connection.execute(ORDERS)
    await connection.execute("UPDATE orders SET note = repeat('x', 5000)")
    origin = "https://shop.example"
    async with (
        serving_here(database_url, root_path="/live", allowed_origins=(origin,)) as app,
        httpx.AsyncClient(base_url=app.url, headers={"Origin": origin}) as client,
    ):
        response = await client.get("/live/topics/order?limit=1")
        assert next_of(response) == "/live/topics/order?limit=1&after=1"
        assert response.headers["Access-Control-Allow-Origin"] == origin
        exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"Feed-Offset", "Link"} <= set(exposed)
        assert response.headers["Content-Encoding"] == "gzip"
        assert len([page async for page in pages(client, "/live/topics/order?limit=1")]) == 4


# A database that refuses, is away, busy, or being altered


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may follow the feed."""
    name = f"role_{uuid.uuid4().hex[:8]}"
    run(execute(database_url, ROLE.format(role=name, password=PASSWORD)))
    yield name
    run(execute(database_url, f"DROP OWNED BY {name}; DROP ROLE {name}"))


async def test_rights(
    start_server: Callable[..., RunningServer],
    connection: Connection,
    database_url: str,
    role: str,
) -> None:
    """The server's role may not read a table: 403, the log says what to grant, and with that it
    works. A table with row-level security is refused.
    """
    await connection.execute(ORDERS)
    await connection.execute(f"GRANT SELECT ON orders TO {role}")
    netloc = f"{role}:{PASSWORD}@{urlsplit(database_url).netloc.rpartition('@')[2]}"
    server = start_server(database_url=urlsplit(database_url)._replace(netloc=netloc).geturl())
    await connection.execute(f"REVOKE SELECT ON orders FROM {role}")
    async with httpx.AsyncClient(base_url=server.url) as client:
        details = problem(await client.get("/topics/order"), 403)
        assert details["field"] == "topic" and "log" in details["detail"]
        grant = f"GRANT SELECT ON public.orders TO {role}"
        assert grant in server.log
        await connection.execute(grant)
        assert (await client.get("/topics/order")).status_code == 200
        await connection.execute("ALTER TABLE orders ENABLE ROW LEVEL SECURITY")
        assert "row-level" in problem(await client.get("/topics/order"), 403)["detail"]
    assert "Traceback" not in server.log


async def test_a_busy_database(server: RunningServer, connection: Connection) -> None:
    """A table is locked: clients get 503 soon, however many ask, and others soon after."""
    await connection.execute(ORDERS)
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        assert (await client.get("/topics/order")).status_code == 200
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders")
            began = time.monotonic()
            asked = (client.get("/topics/order") for _ in range(20))
            for response in await asyncio.gather(*asked):
                problem(response, 503)
                assert int(response.headers["Retry-After"]) >= 1
            assert time.monotonic() - began < 2 * SOON_S
        assert (await client.get("/topics/order")).status_code == 200
    assert "Traceback" not in server.log


async def test_a_stopped_database(
    private_postgres: Callable[..., Server], start_server: Callable[..., RunningServer]
) -> None:
    """Postgres is killed and started again: 503 at once, then rows; a bad request is refused even
    without a database.
    """
    postgres = private_postgres()
    server = start_server(database_url=postgres.url)
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/topics/thing")).status_code == 200
        postgres.kill()
        began = time.monotonic()
        for path in ("/topics", "/topics/thing", "/topics/thing?limit=1", "/topics/other"):
            problem(await client.get(path), 503)
        problem(await client.get("/topics/thing?limit=x"), 422)
        assert time.monotonic() - began < SOON_S
        await asyncio.to_thread(postgres.start)
        for path in ("/topics", "/topics/thing"):
            assert (await client.get(path)).status_code == 200
    assert "Traceback" not in server.log


async def test_a_table_is_altered(server: RunningServer, connection: Connection) -> None:
    """A table is altered: the next list is of the table as it is, before the server has noticed."""
    await connection.execute(ORDERS)
    async with httpx.AsyncClient(base_url=server.url) as client:
        query = "/topics/order?total=eq.200&columns=total"
        assert (await client.get(query)).json() == [{"id": 2, "total": 200}]
        await connection.execute("ALTER TABLE orders ALTER total TYPE text")
        assert (await client.get(query)).json() == [{"id": 2, "total": "200"}]
        await connection.execute("ALTER TABLE orders RENAME TO orders_of_old")
        assert (await client.get(query)).json() == [{"id": 2, "total": "200"}]
        await connection.execute("ALTER TABLE orders_of_old DROP COLUMN total")
        assert "no column 'total'" in problem(await client.get(query), 422)["detail"]
        await connection.execute("DROP TABLE orders_of_old")
        problem(await client.get("/topics/order"), 404)
    assert "Traceback" not in server.log
