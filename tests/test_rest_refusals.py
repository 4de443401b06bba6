"""REST where the database refuses: privileges, policies, encodings, and triggers with any error."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from app.database.connections import Connection
from app.database.migration import migrate
from tests.support.postgres import execute, in_thread, run, with_database
from tests.support.server import RunningServer

StartServer = Callable[..., RunningServer]
ROLE = """
    CREATE ROLE {role} LOGIN PASSWORD 'p';
    GRANT USAGE ON SCHEMA feed, public TO {role};
    GRANT ALL ON ALL TABLES IN SCHEMA feed TO {role};
    GRANT ALL ON ALL FUNCTIONS IN SCHEMA feed TO {role};
    GRANT SELECT ON things TO {role}
"""
RAISE = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'on purpose' USING ERRCODE = NEW.name; END $$;
    CREATE TRIGGER fail BEFORE INSERT ON things FOR EACH ROW EXECUTE FUNCTION fail()
"""
ERRORS: list[Any] = [error for error in vars(asyncpg).values() if hasattr(error, "sqlstate")]
SQLSTATES = sorted({error.sqlstate for error in ERRORS if error.sqlstate} - {"00000"})


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may follow the feed, but has no rights on things."""
    name = f"role_{uuid.uuid4().hex[:8]}"
    run(execute(database_url, ROLE.format(role=name)))
    yield name
    run(execute(database_url, f"DROP OWNED BY {name}; DROP ROLE {name}"))


@pytest.fixture
def server_of_role(start_server: StartServer, database_url: str, role: str) -> RunningServer:
    """The server, connected as that role. (It would not start without the right to read.)"""
    at = urlsplit(database_url)
    netloc = f"{role}:p@{at.hostname}:{at.port}"
    server = start_server(database_url=at._replace(netloc=netloc).geturl())
    run(execute(database_url, f"REVOKE SELECT ON things FROM {role}"))
    return server


def problem(response: httpx.Response, status: int) -> str:
    """Check the form of an error response; return its sentence."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    detail: str = body["detail"]
    assert detail[0].isupper() and detail.endswith(".") and "\n" not in detail
    return detail


async def everything(url: str) -> list[httpx.Response]:
    """Send a request of each kind."""
    async with httpx.AsyncClient(base_url=url) as client:
        return [
            await client.get("/api/things"),
            await client.get("/api/things/a"),
            await client.post("/api/things", json={"name": "b"}),
            await client.patch("/api/things/a", json={"info": "new"}),
            await client.delete("/api/things/a"),
        ]


async def test_a_role_without_privileges(
    server_of_role: RunningServer, connection: Connection, role: str
) -> None:
    """The server's role may not use the table: 403, the log says what to grant, and with that it
    works.
    """
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    for response in await everything(server_of_role.url):
        assert "log" in problem(response, 403)
    grant = f"GRANT SELECT, INSERT, UPDATE, DELETE ON things TO {role}"
    assert grant in server_of_role.log
    await connection.execute(grant)
    responses = await everything(server_of_role.url)
    assert [response.status_code for response in responses] == [200, 200, 201, 200, 204]
    assert "Traceback" not in server_of_role.log


async def test_a_policy_refuses(
    server_of_role: RunningServer, connection: Connection, role: str
) -> None:
    """Row-level security hides a row and refuses others: 404 and 403."""
    await connection.execute(
        "ALTER TABLE things ENABLE ROW LEVEL SECURITY;"
        f"GRANT ALL ON things TO {role};"
        "CREATE POLICY partly ON things USING (name <> 'hidden') WITH CHECK (name <> 'no');"
        "INSERT INTO things (name) VALUES ('hidden'), ('a')"
    )
    async with httpx.AsyncClient(base_url=server_of_role.url) as client:
        refused = await client.post("/api/things", json={"name": "no"})
        assert "policy" in problem(refused, 403)
        problem(await client.patch("/api/things/a", json={"name": "no"}), 403)
        problem(await client.get("/api/things/hidden"), 404)
        assert [thing["name"] for thing in (await client.get("/api/things")).json()] == ["a"]
    assert "Traceback" not in server_of_role.log


async def test_a_trigger_fails_in_every_way_there_is(
    server: RunningServer, connection: Connection
) -> None:
    """A user's trigger raises each error that Postgres knows, and one it does not: never a 500."""
    await connection.execute(RAISE)
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        for sqlstate in [*SQLSTATES, "U0001"]:
            response = await client.post("/api/things", json={"name": sqlstate})
            assert response.status_code in (403, 409, 422, 503), (sqlstate, response.text)
            problem(response, response.status_code)
    assert "Traceback" not in server.log


async def test_a_table_that_lacks_a_column(server: RunningServer, connection: Connection) -> None:
    """A user has renamed a column: reading works, writing it is refused."""
    await connection.execute("ALTER TABLE things RENAME info TO about")
    reading, one, *writing = await everything(server.url)
    assert reading.status_code == 200
    problem(one, 404)
    for response in writing[:2]:
        problem(response, 409)
    assert "Traceback" not in server.log


@pytest.mark.parametrize("encoding", ["WIN1252", "SQL_ASCII"])
async def test_a_database_in_another_encoding(
    server_url: str, start_server: StartServer, encoding: str
) -> None:
    """A database that cannot hold every character refuses those it cannot; bytes that are no text
    make a list unavailable.
    """
    name = f"encoded_{uuid.uuid4().hex[:8]}"
    in_thread(run, execute(server_url, create(name, encoding)))
    url = with_database(server_url, name)
    try:
        in_thread(migrate, url)
        server = start_server(database_url=url)
        async with httpx.AsyncClient(base_url=server.url) as client:
            created = await client.post("/api/things", json={"name": "日本"})
            if encoding == "WIN1252":
                assert "store" in problem(created, 422)
            else:
                assert created.status_code == 201
                odd = "INSERT INTO things (name) SELECT convert_from('\\xff', 'SQL_ASCII')"
                await execute(url, odd)
                problem(await client.get("/api/things"), 503)
        assert "Traceback" not in server.log
        server.kill()
    finally:
        in_thread(run, execute(server_url, f"DROP DATABASE {name} WITH (FORCE)"))


def create(name: str, encoding: str) -> str:
    """Return SQL for a database in an encoding."""
    return f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
