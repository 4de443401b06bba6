"""The REST resource, over a real socket."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from app.database.connections import Connection, connect
from app.feed.log import current_epoch
from app.rest.requests import BODY_LIMIT_BYTES
from tests.support.postgres import clone
from tests.support.server import RunningServer

pytestmark = pytest.mark.database

ODD_NAMES = [
    "plain",
    "with space",
    "a/b",
    "/",
    "//",
    "ends with a slash/",
    "../things",
    "a/../b",
    ".",
    "..",
    "...",
    "%",
    "%2F",
    "100%41",
    "a+b",
    "a?b=c&d",
    "#",
    "?name=x",
    "'; DROP TABLE things --",
    '"\\',
    "<img onerror=alert(1)>",
    "two\nlines",
    "ends with a line break\n",
    "\x01\x1f\x7f",
    "\u0085\u2028",
    "\ufeff\ufffd\uffff",
    "naïve",
    "nai\u0308ve",
    "שלום",
    "👩‍👩‍👧‍👦",
    "😀" * 200,
    "null",
    "0",
]


@pytest.fixture(scope="module")
def rest(
    server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for all tests in this file; it must get through them without a traceback."""
    with clone(server_url, migrated_template) as database_url:
        server = RunningServer(database_url, tmp_path_factory.mktemp("rest") / "server.log")
        server.start()
        yield server
        server.kill()
        assert "Traceback" not in server.log


@pytest.fixture
async def sql(rest: RunningServer) -> AsyncIterator[Connection]:
    """A connection to the database of `rest`, emptied for this test."""
    connection = await connect(rest.env["DATABASE_URL"])
    await connection.execute("TRUNCATE things RESTART IDENTITY")
    yield connection
    await connection.close()


@pytest.fixture
async def client(rest: RunningServer, sql: Connection) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of `rest`, whose table is empty."""
    async with httpx.AsyncClient(base_url=rest.url, timeout=10) as client:
        yield client


async def raw(server: RunningServer, request: bytes) -> tuple[int, bytes, bytes]:
    """Send bytes as they are; return the status, head and body of the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(request)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            return status, head, await reader.readexactly(int(length or 0))
    finally:
        writer.close()


def problem(response: httpx.Response, status: int) -> Any:
    """Return the body of an error response, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    details = response.json()
    assert details["status"] == status
    assert details["title"]
    assert details["detail"][-1] in ".!"
    return details


# The list


async def test_an_empty_table_is_an_empty_list(client: httpx.AsyncClient) -> None:
    """A client lists an empty table."""
    response = await client.get("/api/things")
    assert (response.status_code, response.text) == (200, "[]")


async def test_the_list_is_every_thing_by_id_as_postgres_renders_it(
    client: httpx.AsyncClient, sql: Connection
) -> None:
    """A client lists things that SQL wrote in another order, some with unusual values."""
    await sql.execute(
        """INSERT INTO things (id, name, info, created_at) OVERRIDING SYSTEM VALUE VALUES
           (7, 'seven', E'"\\\\\\n\\u0001😀', 'infinity'), (-3, 'minus three', '', '0044-03-15 BC'),
           (2, 'two', repeat('x', 3000000), '2026-11-22 22:00:00.123456+00')"""
    )
    response = await client.get("/api/things")
    rows = await sql.fetch("SELECT row_to_json(things)::text FROM things ORDER BY id")
    assert response.text == f"[{','.join(row[0] for row in rows)}]"
    assert [thing["id"] for thing in response.json()] == [-3, 2, 7]
    assert response.json()[1]["created_at"] == "2026-11-22T22:00:00.123456+00:00"
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"


async def test_the_offset_continues_exactly_where_the_list_ends(
    client: httpx.AsyncClient, rest: RunningServer, sql: Connection
) -> None:
    """A client lists repeatedly during writes: the list plus later changes is everything."""

    async def write(writer: int) -> None:
        connection = await connect(rest.env["DATABASE_URL"])
        for number in range(40):
            async with connection.transaction():
                await connection.execute(
                    "INSERT INTO things (name) VALUES ($1)", f"{writer}/{number}"
                )
                await asyncio.sleep(random.random() / 200)
        await connection.close()

    writers = asyncio.gather(*(write(writer) for writer in range(6)))
    lists = []
    while not writers.done():
        lists.append(await client.get("/api/things"))
    await writers
    assert len({response.headers["Feed-Offset"] for response in lists}) > 5

    epoch = await current_epoch(sql)
    everything = {f"{writer}/{number}" for writer in range(6) for number in range(40)}
    for response in lists:
        listed = {thing["name"] for thing in response.json()}
        later = await sql.fetch(
            """SELECT new ->> 'name' FROM feed.change
               WHERE op = 'create' AND NOT pg_visible_in_snapshot(xid, $1::text::pg_snapshot)""",
            str(epoch.parse(response.headers["Feed-Offset"]).position),
        )
        assert sorted([*listed, *(row[0] for row in later)]) == sorted(everything)


async def test_pages_follow_each_other_by_link(client: httpx.AsyncClient, sql: Connection) -> None:
    """A client pages by tens through twenty-one things, then twenty, which fill two pages."""
    await sql.execute("INSERT INTO things (name) SELECT n FROM generate_series(1, 21) AS n")
    for expected in ([10, 10, 1], [10, 10]):
        pages = []
        address: str | None = "/api/things?limit=10"
        while address:
            response = await client.get(address)
            pages.append(response.json())
            address = response.links.get("next", {}).get("url")
        assert [len(page) for page in pages] == expected
        whole = (await client.get("/api/things")).json()
        assert [thing for page in pages for thing in page] == whole
        await sql.execute("DELETE FROM things WHERE id = 21")
    assert "Link" not in (await client.get("/api/things")).headers


async def test_a_page_starts_after_an_id(client: httpx.AsyncClient, sql: Connection) -> None:
    """A client asks for things after an id that may or may not exist."""
    await sql.execute("INSERT INTO things (name) SELECT n FROM generate_series(1, 5) AS n")
    await sql.execute("INSERT INTO things (id, name) OVERRIDING SYSTEM VALUE VALUES (-5, 'minus')")
    for query, ids in (
        ("after=3", [4, 5]),
        ("after=0&limit=2", [1, 2]),
        ("after=-5", [1, 2, 3, 4, 5]),
        ("after=-9223372036854775808&limit=1", [-5]),
        ("after=9223372036854775807", []),
    ):
        response = await client.get(f"/api/things?{query}")
        assert [thing["id"] for thing in response.json()] == ids


@pytest.mark.parametrize("parameter", ["limit", "after"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "1.0",
        "1e3",
        " 1",
        "+1",
        "1_0",
        "٣",
        "0x1",
        "9223372036854775808",
        "9" * 5000,
        "1%00",
    ],
)
async def test_a_page_that_cannot_be_is_refused(
    client: httpx.AsyncClient, parameter: str, value: str
) -> None:
    """A client asks for a page with invalid numbers."""
    response = await client.get(f"/api/things?{parameter}={value}")
    assert problem(response, 422)["field"] == parameter


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=10001", "limit=1&limit=2"])
async def test_a_limit_out_of_range_is_refused(client: httpx.AsyncClient, query: str) -> None:
    """A client asks for no things, for too many, or gives two limits."""
    assert problem(await client.get(f"/api/things?{query}"), 422)["field"] == "limit"


# One thing


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_any_name_can_be_created_read_changed_and_deleted(
    client: httpx.AsyncClient, name: str
) -> None:
    """A client follows Location to a thing whose name is awkward in a URL."""
    created = await client.post("/api/things", json={"name": name, "info": "old"})
    assert created.status_code == 201, created.text
    assert created.json()["name"] == name
    address = created.headers["Location"]
    assert address.isascii()

    read = await client.get(address)
    assert (read.status_code, read.content) == (200, created.content)
    changed = await client.patch(address, json={"info": "new"})
    assert changed.json() == created.json() | {"info": "new"}
    assert (await client.get("/api/things")).json() == [changed.json()]

    gone = await client.delete(address)
    assert (gone.status_code, gone.content) == (204, b"")
    for again in (await client.delete(address), await client.get(address)):
        problem(again, 404)


async def test_info_may_be_left_out(client: httpx.AsyncClient) -> None:
    """A client creates a thing with only a name."""
    created = await client.post("/api/things", json={"name": "a"})
    assert created.status_code == 201
    assert created.json().keys() == {"id", "name", "info", "created_at"}
    assert created.json()["info"] == ""


async def test_a_taken_name_is_refused(client: httpx.AsyncClient) -> None:
    """A client creates a thing that exists, and renames another to its name."""
    await client.post("/api/things", json={"name": "a", "info": "first"})
    assert problem(await client.post("/api/things", json={"name": "a"}), 409)["field"] == "name"
    await client.post("/api/things", json={"name": "b"})
    renamed = await client.patch("/api/things/b", json={"name": "a"})
    assert problem(renamed, 409)["field"] == "name"
    listed = (await client.get("/api/things")).json()
    assert [(thing["name"], thing["info"]) for thing in listed] == [("a", "first"), ("b", "")]


async def test_a_thing_is_renamed(client: httpx.AsyncClient) -> None:
    """A client renames a thing: it keeps its id, and the old name is free."""
    created = (await client.post("/api/things", json={"name": "old", "info": "kept"})).json()
    renamed = await client.patch("/api/things/old", json={"name": "new/name"})
    assert renamed.json() == created | {"name": "new/name"}
    problem(await client.get("/api/things/old"), 404)
    assert (await client.get("/api/things/new%2Fname")).json() == renamed.json()


async def test_an_empty_patch_changes_nothing(client: httpx.AsyncClient, sql: Connection) -> None:
    """A client patches with an empty object: it gets the thing as it is, and the feed has no
    change.
    """
    created = await client.post("/api/things", json={"name": "a", "info": "b"})
    before = await sql.fetchval("SELECT count(*) FROM feed.change")
    patched = await client.patch("/api/things/a", json={})
    assert (patched.status_code, patched.content) == (200, created.content)
    assert await sql.fetchval("SELECT count(*) FROM feed.change") == before


async def test_what_is_not_there_is_not_found(client: httpx.AsyncClient) -> None:
    """A client reads, changes and deletes a thing that does not exist."""
    for address in ("/api/things/a", "/api/things/", "/api/things/?name=a", "/api/nothing"):
        problem(await client.get(address), 404)
    problem(await client.patch("/api/things/a", json={"info": ""}), 404)
    problem(await client.delete("/api/things/a"), 404)


@pytest.mark.parametrize("encoded", ["%00", "%FF", "a%C0%80", "%ED%A0%80", "%F0%9F", "x" * 1000])
async def test_what_no_name_can_be_is_not_found(
    client: httpx.AsyncClient, rest: RunningServer, encoded: str
) -> None:
    """A client asks for bytes that are not UTF-8, for U+0000, and for a name that is too long."""
    await client.post("/api/things", json={"name": "\ufffd"})
    await client.post("/api/things", json={"name": "a\ufffd\ufffd"})
    for address in (f"/api/things/{encoded}", f"/api/things/?name={encoded}"):
        for method in ("GET", "DELETE"):
            request = f"{method} {address} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert (await raw(rest, request.encode()))[0] == 404
    assert len((await client.get("/api/things")).json()) == 2


async def test_dots_in_a_raw_path_are_a_name(
    client: httpx.AsyncClient, rest: RunningServer
) -> None:
    """A client that does not normalize paths reads the thing `..` by its path."""
    await client.post("/api/things", json={"name": ".."})
    for path in (b"/api/things/..", b"/api/things/%2e%2E"):
        assert (await raw(rest, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == 200


async def test_constraints_of_others_refuse_with_a_sentence(
    client: httpx.AsyncClient, sql: Connection
) -> None:
    """A user's foreign key, trigger and check refuse what REST wants to write; the client learns
    the reason, but not the row.
    """
    await client.post("/api/things", json={"name": "a"})
    async with sql.transaction():
        await sql.execute("CREATE TABLE parts (thing text REFERENCES things (name))")
        await sql.execute("INSERT INTO parts VALUES ('a')")
        await sql.execute(
            """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
               AS $$ BEGIN RAISE 'no more things'; END $$;
               CREATE TRIGGER refuse BEFORE INSERT ON things EXECUTE FUNCTION refuse()"""
        )
    try:
        assert "parts" in problem(await client.delete("/api/things/a"), 409)["detail"]
        created = await client.post("/api/things", json={"name": "b"})
        assert "no more things" in problem(created, 409)["detail"]
        await sql.execute(
            """CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
               AS $$ BEGIN RETURN NULL; END $$;
               CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON things
               FOR EACH ROW EXECUTE FUNCTION refuse()"""
        )
        problem(await client.post("/api/things", json={"name": "b"}), 409)
        await sql.execute(
            """DROP TRIGGER refuse ON things;
               ALTER TABLE things ADD secret text DEFAULT 'top secret',
                   ADD CONSTRAINT polite CHECK (info <> 'rude')"""
        )
        rude = {"name": "b", "info": "rude"}
        detail = problem(await client.post("/api/things", json=rude), 409)["detail"]
        assert "polite" in detail and "secret" not in detail and "\n" not in detail
    finally:
        await sql.execute(
            """DROP TABLE parts; DROP FUNCTION refuse CASCADE;
               ALTER TABLE things DROP COLUMN IF EXISTS secret, DROP CONSTRAINT IF EXISTS polite"""
        )


# Bodies


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("{}", "name"),
        ('{"info": "x"}', "name"),
        ('{"name": ""}', "name"),
        ('{"name": null}', "name"),
        ('{"name": 1}', "name"),
        ('{"name": ["a"]}', "name"),
        ('{"name": "a\\u0000b"}', "name"),
        (json.dumps({"name": "😀" * 201}), "name"),
        ('{"name": ' + "9" * 5000 + "}", "name"),
        ('{"name": 1e999999}', "name"),
        ('{"name": ' + "[" * 100_000, "name"),
        ('{"name": "a", "info": null}', "info"),
        ('{"name": "a", "info": "\\u0000"}', "info"),
        ('{"name": "a", "id": 1}', None),
        ('{"name": "a", "Info": ""}', None),
        ('{"name": "a", "' + "x" * 10_000 + '": ""}', None),
        ('{"a":' * 100_000, None),
        ("[" * 100_000, None),
        ("[]", None),
        ("null", None),
        ('"a"', None),
        ("9" * 5000, None),
    ],
)
async def test_a_body_that_does_not_fit_is_refused(
    client: httpx.AsyncClient, body: str, field: str | None
) -> None:
    """A client posts JSON that is not a thing, and learns which field to fix."""
    headers = {"Content-Type": "application/json"}
    response = await client.post("/api/things", content=body, headers=headers)
    details = problem(response, 422)
    assert details.get("field") == field
    assert field is None or field in details["detail"]
    assert len(response.content) < 500
    assert (await client.get("/api/things")).text == "[]"


@pytest.mark.parametrize("body", ['{"name": ""}', '{"name": null}', '{"id": 2}', "[]"])
async def test_a_patch_that_does_not_fit_is_refused(client: httpx.AsyncClient, body: str) -> None:
    """A client sends an invalid patch, and the thing stays as it was."""
    created = await client.post("/api/things", json={"name": "a"})
    headers = {"Content-Type": "application/json"}
    problem(await client.patch("/api/things/a", content=body, headers=headers), 422)
    assert (await client.get("/api/things/a")).content == created.content


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"name": "a"',
        b"{'name': 'a'}",
        b'{"name": "a"} b',
        b'\xef\xbb\xbf{"name": "a"}',
        b'{"name": "\xff"}',
        b'{"name": "\xed\xa0\x80"}',
        b'{"name": "\\ud800"}',
        b'{"name": "\\ud83d\\ud83d"}',
        b'{"name": "\\udc00\\ud800"}',
        b'{"\xff": 1}',
        b'{"name": "a\nb"}',
        '{"name": "a"}'.encode("utf-16"),
    ],
)
async def test_a_body_that_is_not_json_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    """A client posts a body that is not JSON, not UTF-8, or ends within a character."""
    headers = {"Content-Type": "application/json"}
    problem(await client.post("/api/things", content=body, headers=headers), 400)


async def test_mangled_bodies_are_understood_or_refused(client: httpx.AsyncClient) -> None:
    """A client posts a thing with a few bytes changed, five hundred times."""
    chance = random.Random(1)
    whole = '{"name": "naïve 😀 \\ud83d\\ude00 \\u0041\\n", "info": "\\"x\\""}'.encode()
    for _ in range(500):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            body[chance.randrange(len(body))] = chance.choice(
                b'\x00"\\{}[],:eu8d0\xf0\xc3\xa9 n\xff'
            )
        response = await client.post(
            "/api/things", content=bytes(body), headers={"Content-Type": "application/json"}
        )
        if response.status_code == 201:
            assert response.json().items() >= json.loads(body).items()
        else:
            problem(response, response.status_code)
            assert response.status_code in (400, 409, 422)


@pytest.mark.parametrize(
    "media_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json", ";"],
)
async def test_a_body_of_another_type_is_refused(
    client: httpx.AsyncClient, media_type: str | None
) -> None:
    """A client posts JSON without declaring it, as a form on another site would."""
    headers = {} if media_type is None else {"Content-Type": media_type}
    for method, address in (("POST", "/api/things"), ("PATCH", "/api/things/a")):
        response = await client.request(method, address, content=b'{"name": "a"}', headers=headers)
        problem(response, 415)


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON ;"])
async def test_the_media_type_may_be_written_otherwise(
    client: httpx.AsyncClient, media_type: str
) -> None:
    """A client declares JSON with a parameter, or in capitals."""
    response = await client.post(
        "/api/things", content=b'{"name": "a"}', headers={"Content-Type": media_type}
    )
    assert response.status_code == 201


async def test_a_body_may_have_a_mebibyte_and_no_more(client: httpx.AsyncClient) -> None:
    """A client posts the maximum, then one byte more, with Content-Length and in chunks."""

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 60_000):
            yield body[start : start + 60_000]

    headers = {"Content-Type": "application/json"}
    frame = len('{"name":"a","info":""}')
    body = f'{{"name":"a","info":"{"x" * (BODY_LIMIT_BYTES - frame)}"}}'.encode()
    assert len(body) == BODY_LIMIT_BYTES
    for content in (body + b" ", chunks(body + b" "), chunks(body * 3)):
        problem(await client.post("/api/things", content=content, headers=headers), 413)
    for content in (body, chunks(body)):
        created = await client.post("/api/things", content=content, headers=headers)
        assert created.status_code == 201
        assert (await client.delete("/api/things/a")).status_code == 204


async def test_too_large_a_body_is_refused_unseen(rest: RunningServer) -> None:
    """A client that sends Expect: 100-continue learns at once that its gigabyte is too much."""
    status, head, _ = await raw(
        rest,
        b"POST /api/things HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1073741824\r\nExpect: 100-continue\r\n\r\n",
    )
    assert status == 413
    assert b"application/problem+json" in head


async def test_a_client_may_leave_in_the_middle(
    client: httpx.AsyncClient, rest: RunningServer
) -> None:
    """A client disconnects halfway through a body: nothing is stored, and the server goes on."""
    _, writer = await asyncio.open_connection("127.0.0.1", rest.port)
    writer.write(
        b"POST /api/things HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 100\r\n\r\n{"name": "a"'
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await client.get("/api/things")).text == "[]"


# Methods


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("/api/things", {"GET", "HEAD", "OPTIONS", "POST"}),
        ("/api/things/a", {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH"}),
        ("/api/things/?name=a", {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH"}),
        ("/openapi.json", {"GET", "HEAD", "OPTIONS"}),
        ("/healthz", {"GET", "HEAD", "OPTIONS"}),
        ("/readyz", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_every_address_knows_its_methods(
    client: httpx.AsyncClient, rest: RunningServer, address: str, allowed: set[str]
) -> None:
    """A client asks for the allowed methods, tries the others, and sends HEAD."""
    await client.post("/api/things", json={"name": "a"})
    options = await client.options(address)
    assert (options.status_code, options.content) == (204, b"")
    assert set(options.headers["Allow"].split(", ")) == allowed

    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"} - allowed:
        refused = await client.request(method, address)
        problem(refused, 405)
        assert set(refused.headers["Allow"].split(", ")) == allowed

    client.headers["Accept-Encoding"] = "identity"  # else a long answer's length is another
    got, head = await client.get(address), await client.head(address)
    assert (head.status_code, head.content) == (got.status_code, b"")
    for headers in (got.headers, head.headers):
        del headers["Date"]
    assert head.headers == got.headers
    assert int(head.headers["Content-Length"]) == len(got.content)


async def test_head_of_what_is_not_there(rest: RunningServer, client: httpx.AsyncClient) -> None:
    """HEAD of a missing thing returns the length of the problem, without the problem."""
    got, head = await client.get("/api/things/a"), await client.head("/api/things/a")
    assert head.status_code == 404
    assert head.content == b""
    assert head.headers["Content-Length"] == str(len(got.content))


# Other origins


async def test_other_origins_are_answered_only_where_allowed(
    start_server: Any, client: httpx.AsyncClient
) -> None:
    """A page from another origin can read the offset if it is allowed, and nothing otherwise."""
    origin = {"Origin": "https://example.org"}
    assert (
        "Access-Control-Allow-Origin"
        not in (await client.get("/api/things", headers=origin)).headers
    )

    server = start_server(ALLOWED_ORIGINS="https://example.org")
    async with httpx.AsyncClient(base_url=server.url) as elsewhere:
        answer = await elsewhere.get("/api/things", headers=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
        exposed = answer.headers["Access-Control-Expose-Headers"]
        assert {"Feed-Offset", "Location", "Link"} <= set(exposed.split(", "))
        asked = await elsewhere.options(
            "/api/things/a",
            headers=origin
            | {
                "Access-Control-Request-Method": "PATCH",
                "Access-Control-Request-Headers": "content-type",
            },
        )
        assert asked.status_code == 204
        assert "PATCH" in asked.headers["Access-Control-Allow-Methods"]
        stranger = await elsewhere.get("/api/things", headers={"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in stranger.headers
