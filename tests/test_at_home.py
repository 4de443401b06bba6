"""Tablecast in somebody else's database: ordinary roles, any search path, their own tables."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app.database import migration
from app.database.connections import connect
from app.database.embedded import Server
from tests.support.catalog import catalog
from tests.support.older import install_0_1_0
from tests.support.postgres import execute, in_thread
from tests.support.roles import Home, somebodys_database
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import joined, serving_here
from tests.support.subscribers import subscriber
from tests.test_cli import refusal, tablecast

pytestmark = pytest.mark.database

ROOT = Path(__file__).parent.parent
NOT_MIGRATED = "The database is not migrated yet: run `"
NO_REVISION = (
    "The schema feed holds a log, but nothing says which version of Tablecast has made it: restore"
    " the table feed.alembic_version, or run DROP SCHEMA feed CASCADE to install afresh."
)
OWN_THINGS = "CREATE TABLE public.things (thing text PRIMARY KEY)"


@pytest.fixture
def home(server_url: str) -> Iterator[Home]:
    """An empty database of an ordinary role."""
    with somebodys_database(server_url) as made:
        yield made


def migrate(url: str, things: bool = True) -> None:
    """Migrate, as `tablecast migrate` does."""
    in_thread(migration.migrate, url, things)


def refused(url: str, command: str = "migrate", *arguments: str, **settings: str) -> str:
    """Return the sentence with which a command ends."""
    return refusal(tablecast(command, *arguments, DATABASE_URL=url, PORT="0", **settings))


async def value(url: str, query: str) -> object:
    """Return what a query yields."""
    connection = await connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def use(server: RunningServer, url: str) -> None:
    """A client writes by REST and by SQL, and sees what it wrote; an altered table is noticed, and
    the log is pruned.
    """
    async with joined(server.url) as client, httpx.AsyncClient(base_url=server.url) as http:
        epoch = client.offset.split(".")[0]
        assert (await http.post("/api/things", json={"name": "by REST"})).status_code == 201
        assert (await client.event())[1]["name"] == "by REST"
        await execute(
            url,
            "SET synchronous_commit = off",  # the feed has to flush this
            "INSERT INTO public.things (name) VALUES ('by SQL')",
        )
        assert (await client.event())[1]["name"] == "by SQL"
        await execute(url, "ALTER TABLE public.things ADD COLUMN colour text")
        name, told, _ = await client.event()
        assert (name, told) == ("feed:hello", {"recovered": False, "topic": "thing"})
        await execute(url, "UPDATE public.things SET colour = 'red' WHERE name = 'by SQL'")
        assert (await client.event())[1]["colour"] == "red"
        assert (await http.delete("/api/things/by REST")).status_code == 204
        assert (await client.event())[:2] == ["thing:destroy", "by REST"]
        async with asyncio.timeout(20):
            while await value(url, "SELECT count(*) FROM feed.change") != 0:
                await asyncio.sleep(0.05)
        assert await value(url, "SELECT feed.epoch()") == epoch
        assert (await http.get("/readyz")).status_code == 200
    assert " ERROR " not in server.log


# Roles


async def test_the_owner_of_a_database_migrates_and_serves_it(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """An ordinary role that owns its database has Tablecast migrate it, serves it and uses it."""
    server = start_server("--migrate", database_url=home.as_owner, FEED_RETENTION="1s")
    await use(server, home.as_owner)
    migrate(home.as_owner)


async def test_an_ordinary_roles_database_is_like_any(home: Home, database_url: str) -> None:
    """What an ordinary role has migrated is what a superuser would have."""
    migrate(home.as_owner)
    mine, usual = await catalog(home.url), await catalog(database_url)
    # Grants name their owners, and CREATE DATABASE gave public to somebody.
    assert mine.keys() == usual.keys()
    assert [
        name
        for name in mine
        if name.startswith(("function", "trigger", "column")) and mine[name] != usual[name]
    ] == []


async def test_create_on_the_database_suffices_without_the_sample(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """A role that owns nothing migrates with CREATE on the database, and lacks each right in one
    sentence that says what to grant.
    """
    database = urlsplit(home.url).path[1:]
    assert refused(home.as_guest, THINGS="no") == (
        f"The role {home.guest} may not migrate this database: its owner must run"
        f" GRANT CREATE ON DATABASE {database} TO {home.guest}."
    )
    await execute(
        home.url,
        f"GRANT CREATE ON DATABASE {database} TO {home.guest}",
        f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
    )
    assert f"GRANT TEMPORARY ON DATABASE {database} TO {home.guest}." in refused(home.as_guest)
    await execute(home.url, f"GRANT TEMPORARY ON DATABASE {database} TO {home.guest}")
    before = await catalog(home.url)
    sentence = refused(home.as_guest)
    grant = f"GRANT USAGE, CREATE ON SCHEMA public TO {home.guest}"
    assert grant in sentence and "THINGS=no" in sentence
    assert await catalog(home.url) == before
    migrate(home.as_guest, things=False)
    assert await value(home.url, "SELECT to_regclass('public.things')") is None
    await execute(home.url, grant)
    migrate(home.as_guest)
    await use(start_server(database_url=home.as_guest, FEED_RETENTION="1s"), home.as_guest)


async def test_what_somebody_else_has_migrated_is_not_migrated_further(home: Home) -> None:
    """A role that does not own the schema is told whose it is."""
    migrate(home.as_owner)
    database = urlsplit(home.url).path[1:]
    await execute(home.url, f"GRANT CREATE ON DATABASE {database} TO {home.guest}")
    assert refused(home.as_guest) == (
        f"The role {home.guest} may not migrate this database: the schema feed belongs to"
        f" {home.owner}, so connect as that role or as a member of it."
    )


async def test_whoever_migrates_the_schemas_owner_has_it_all(home: Home) -> None:
    """A superuser, and then a member of the owning role, upgrade what an ordinary role installed;
    it still can do so itself.
    """
    migrate(home.as_owner)
    await execute(home.url, f"GRANT {home.owner} TO {home.guest}")
    whole = await catalog(home.url)
    for url in (home.url, home.as_guest, home.as_owner):
        await asyncio.to_thread(step, home.as_owner, "0002")
        migrate(url)
        assert await catalog(home.url) == whole


async def test_a_superusers_installation_is_given_to_an_ordinary_role(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """A superuser gives the schema and the sample table of 0.1.0 to an ordinary role and migrates;
    from then on the role does all of it.
    """
    await install_0_1_0(home.url)
    await execute(
        home.url,
        f"ALTER SCHEMA feed OWNER TO {home.owner}",
        f"ALTER TABLE things OWNER TO {home.owner}",
    )
    migrate(home.url)
    await asyncio.to_thread(step, home.as_owner, "0003")
    migrate(home.as_owner)
    await use(start_server(database_url=home.as_owner, FEED_RETENTION="1s"), home.as_owner)


def grants(sentence: str) -> list[str]:
    """The statements that a sentence says to run."""
    return [f"GRANT{part.rstrip('.')}" for part in sentence.split("GRANT")[1:]]


async def test_a_weaker_role_serves_what_the_owner_migrates(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """A role without any right is told what to grant, and needs no more than that to serve; default
    privileges see to it that an upgrade does not lock it out.
    """
    migrate(home.as_owner)
    await execute(home.as_owner, *grants(refused(home.as_guest, "serve")))
    sentence = refused(home.as_guest, "serve")
    assert sentence == (
        f"The role {home.guest} may not read the sample table public.things: run GRANT USAGE ON"
        f" SCHEMA public TO {home.guest}; GRANT SELECT, INSERT, UPDATE, DELETE ON public.things TO"
        f" {home.guest}; or set THINGS=no to do without it."
    )
    await execute(
        home.as_owner,
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON public.things TO {home.guest}",
    )
    server = start_server("--migrate", database_url=home.as_guest, FEED_RETENTION="1s")
    await use(server, home.as_owner)


async def test_the_documented_grants_suffice_and_outlive_an_upgrade(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """The owner grants what docs/databases.md says, and later another version migrates."""
    migrate(home.as_owner)
    text = (ROOT / "docs" / "databases.md").read_text(encoding="utf-8")
    [granted] = re.findall(r"^```sql\n(GRANT USAGE ON SCHEMA feed.*?)^```", text, re.M | re.S)
    await execute(home.as_owner, granted.replace("web", home.guest))
    await asyncio.to_thread(step, home.as_owner, "0002")
    migrate(home.as_owner)
    server = start_server(database_url=home.as_guest, FEED_RETENTION="1s")
    await use(server, home.as_owner)


async def test_a_weaker_role_reads_rows_as_the_log_has_them(home: Home) -> None:
    """A table has columns of types of the owner's: what a weaker role reads of it looks like what
    changes carry.
    """
    migrate(home.as_owner)
    await execute(
        home.as_owner,
        *(f"GRANT {right} IN SCHEMA feed TO {home.guest}"
          for right in ("SELECT ON ALL TABLES", "EXECUTE ON ALL FUNCTIONS")),
        f"GRANT USAGE ON SCHEMA feed TO {home.guest}",
        """
        CREATE SCHEMA shop;
        CREATE TYPE shop.address AS (street text, number int);
        CREATE TABLE shop.customers (
            id int PRIMARY KEY, at shop.address, before shop.address[], name text
        );
        SELECT feed.watch('shop.customers', 'customer');
        INSERT INTO shop.customers VALUES (1, ('x', 1), ARRAY[('y', 2)::shop.address], 'Sam')
        """,
        f"GRANT USAGE ON SCHEMA shop TO {home.guest}",
        f"GRANT SELECT ON shop.customers TO {home.guest}",
    )  # fmt: skip
    async with (
        serving_here(home.as_guest, things=False) as app,
        subscriber(app.url) as client,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        held = await client.loaded(await client.subscribe("/customer"))
        [read] = held.rows.values()
        assert read["at"] == {"street": "x", "number": 1}
        assert (await http.get("/topics/customer")).json() == [read]
        await execute(home.as_owner, "UPDATE shop.customers SET name = 'Kim'")
        await client.until(lambda: held.names[-1] == "customer:update")
        assert list(held.rows.values()) == [{**read, "name": "Kim"}]


def step(url: str, revision: str) -> None:
    """Migrate down to a revision."""
    from alembic import command

    from app.database.migration import configuration

    command.downgrade(configuration(url), revision)


# Search paths

SEARCH_PATHS = scaled(['"$user", app'], ["app, public", "''", '"$user", app'])


@pytest.mark.parametrize("search_path", SEARCH_PATHS)
async def test_any_search_path(
    home: Home, database_url: str, start_server: Callable[..., RunningServer], search_path: str
) -> None:
    """The role's search path leads elsewhere, where there are tables of the same names: the same
    schemas are migrated and served, and the others stay as they are.
    """
    await execute(
        home.as_owner,
        "CREATE SCHEMA app CREATE TABLE things (thing int) CREATE TABLE change (x int)"
        " CREATE TABLE alembic_version (version_num text PRIMARY KEY)",
        "INSERT INTO app.alembic_version VALUES ('0003')",
        f"CREATE SCHEMA {home.owner} CREATE TABLE topic (x int)",
        f"ALTER ROLE {home.owner} SET search_path = {search_path}",
    )
    server = start_server("--migrate", database_url=home.as_owner, FEED_RETENTION="1s")
    await use(server, home.as_owner)
    usual = await catalog(database_url)
    theirs = ("app", home.owner, "colour")
    found = [name for name in await catalog(home.url) if not any(part in name for part in theirs)]
    assert set(found) == set(usual)
    assert await value(home.url, "SELECT version_num FROM app.alembic_version") == "0003"


# The user's own alembic

ENVIRONMENT = """
import asyncio, os
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine

def run(connection):
    context.configure(connection)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    engine = create_async_engine(os.environ["URL"])
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()

asyncio.run(main())
"""
REVISION = """
from alembic import op

revision, down_revision = "{revision}", {before!r}

def upgrade():
    op.execute("CREATE TABLE theirs_{revision} (id int PRIMARY KEY)")

def downgrade():
    op.execute("DROP TABLE theirs_{revision}")
"""


class TheirProject:
    """A project with three revisions, named as ours are, that keeps its version table in public."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        self._url = url.replace("postgresql:", "postgresql+asyncpg:")
        (directory / "their" / "versions").mkdir(parents=True)
        (directory / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s/their\n")
        (directory / "their" / "env.py").write_text(ENVIRONMENT)
        for revision, before in (("0001", None), ("0002", "0001"), ("0003", "0002")):
            text = REVISION.format(revision=revision, before=before)
            (directory / "their" / "versions" / f"{revision}.py").write_text(text)

    def alembic(self, *arguments: str) -> str:
        """Run their alembic, as they do; return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self._directory,
            env=os.environ | {"URL": self._url},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.mark.parametrize("theirs", scaled(["0003"], ["0001", "0003"]))
async def test_beside_the_users_own_alembic(home: Home, tmp_path: Path, theirs: str) -> None:
    """The user's alembic, with revisions of the same names, runs before and after ours: each finds
    its own revision, and neither touches the other's.
    """
    url, project = home.as_owner, TheirProject(tmp_path, home.as_owner)
    project.alembic("upgrade", theirs)
    assert refused(url, "serve").startswith(NOT_MIGRATED)
    migrate(url)
    ours = await catalog(home.url)
    project.alembic("downgrade", "-1")
    project.alembic("upgrade", "head")
    assert project.alembic("current") == "0003 (head)\n"
    migrate(url)
    project.alembic("downgrade", "base")
    assert {name for name in ours if "theirs" not in name} == set(await catalog(home.url))
    await asyncio.to_thread(step, url, "base")
    project.alembic("upgrade", "head")
    migrate(url)
    assert project.alembic("current") == "0003 (head)\n"
    assert await value(url, "SELECT version_num FROM public.alembic_version") == "0003"


async def test_after_0_1_0_the_users_own_alembic_has_public_for_itself(
    home: Home, tmp_path: Path
) -> None:
    """0.1.0's version table was in the way of the user's alembic; after the upgrade it is not."""
    url = home.url
    await install_0_1_0(url)
    migrate(url)
    assert await value(url, "SELECT to_regclass('public.alembic_version')") is None
    project = TheirProject(tmp_path, url)
    project.alembic("upgrade", "0002")
    migrate(url)
    assert project.alembic("current") == "0002\n"


async def test_a_row_of_theirs_in_our_old_version_table_stays(home: Home) -> None:
    """Somebody had both revisions in one table; only ours is taken over."""
    await install_0_1_0(home.url)
    await execute(home.url, "INSERT INTO public.alembic_version VALUES ('abc')")
    migrate(home.url)
    assert (
        await value(home.url, "SELECT string_agg(version_num, ',') FROM public.alembic_version")
        == "abc"
    )


async def test_a_revision_that_did_not_make_the_log_is_theirs(home: Home) -> None:
    """0.1.0's revision was lost, and the user's alembic has one of a name of ours: it stays, and
    nothing is made of it.
    """
    await install_0_1_0(home.url)
    await execute(home.url, "UPDATE public.alembic_version SET version_num = '0003'")
    before = await catalog(home.url)
    assert refused(home.url) == NO_REVISION
    assert await catalog(home.url) == before
    assert await value(home.url, "SELECT version_num FROM public.alembic_version") == "0003"


LOST_VERSION = {
    "their own alembic is at a revision of ours": (
        "DROP TABLE feed.alembic_version",
        "CREATE TABLE public.alembic_version (version_num text PRIMARY KEY)",
        "INSERT INTO public.alembic_version VALUES ('0003')",
    ),
    "nothing else": ("DROP TABLE feed.alembic_version",),
}


@pytest.mark.parametrize("statements", LOST_VERSION.values(), ids=LOST_VERSION)
async def test_a_revision_of_theirs_is_never_taken_for_ours(
    home: Home, statements: tuple[str, ...]
) -> None:
    """Our version table was dropped by hand: whatever is in public is not taken for it."""
    migrate(home.as_owner)
    await execute(home.as_owner, *statements)
    before = await catalog(home.url)
    assert refused(home.as_owner) == NO_REVISION
    assert await catalog(home.url) == before
    if len(statements) > 1:
        kept = await value(home.url, "SELECT version_num FROM public.alembic_version")
        assert kept == "0003"


async def test_our_schema_where_the_log_was_dropped(home: Home) -> None:
    """A revision is there, and the log is not: nothing is served, and nothing is made of it."""
    migrate(home.as_owner)
    await execute(home.as_owner, "DROP TABLE feed.change CASCADE")
    assert "does not hold Tablecast's log" in refused(home.as_owner)


async def test_a_schema_of_theirs_named_feed_is_refused(home: Home) -> None:
    """The user has a schema of this name; an empty one, made for Tablecast, is welcome."""
    await execute(home.as_owner, "CREATE SCHEMA feed CREATE TABLE article (id int)")
    before = await catalog(home.url)
    assert refused(home.as_owner) == (
        "The schema feed, which Tablecast needs for itself, holds something else already: article."
    )
    assert await catalog(home.url) == before
    await execute(
        home.url, "DROP SCHEMA feed CASCADE", f"CREATE SCHEMA feed AUTHORIZATION {home.guest}"
    )
    migrate(home.as_guest, things=False)


# The sample table


async def test_their_own_things_is_refused_and_left_alone(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """The user has a table of this name: nothing is half done, and THINGS=no does without ours."""
    await execute(home.as_owner, OWN_THINGS)
    before = await catalog(home.url)
    for command in ("migrate", "serve"):
        arguments = ["--migrate"] if command == "serve" else []
        assert refused(home.as_owner, command, *arguments) == (
            "There is a public.things that is not Tablecast's sample table: set THINGS=no to leave"
            " it alone and do without the sample."
        )
        assert await catalog(home.url) == before
    migrate(home.as_owner, things=False)
    found = await catalog(home.url)
    assert before.items() <= found.items()
    assert "THINGS=no" in refused(home.as_owner, "serve")
    assert "THINGS=no" in refused(home.as_owner)
    await execute(home.as_owner, "SELECT feed.watch('public.things', 'theirs')")
    server = start_server(database_url=home.as_owner, THINGS="no")
    async with joined(server.url) as client:
        await execute(home.as_owner, "INSERT INTO public.things VALUES ('a')")
        assert (await client.event())[:2] == ["theirs:create", {"thing": "a"}]
    assert "THINGS=no" in refused(home.as_owner)


async def test_a_database_without_public(home: Home) -> None:
    """The user has dropped the schema public."""
    await execute(home.url, "DROP SCHEMA public")
    assert refused(home.as_owner) == (
        "There is no schema public for the sample table: create it, or set THINGS=no to do without"
        " the sample."
    )
    migrate(home.as_owner, things=False)


async def test_without_things_there_is_no_rest_for_them(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """THINGS=no: every method on every address of things is a 404 with a sentence, and the OpenAPI
    document has none of them.
    """
    server = start_server("--migrate", database_url=home.as_owner, THINGS="no")
    async with httpx.AsyncClient(base_url=server.url) as http:
        for path in ("/api/things", "/api/things/", "/api/things/a", "/api/things/?name=a"):
            for method in ("GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"):
                answer = await http.request(method, path)
                assert answer.status_code == 404, (method, path)
                assert answer.headers["Content-Type"] == "application/problem+json"
        assert "THINGS=no" in (await http.get("/api/things")).json()["detail"]
        document = (await http.get("/openapi.json")).json()
        assert not [path for path in document["paths"] if path.startswith("/api/things")]
        assert "/readyz" in document["paths"]
        assert "Thing" not in document["components"]["schemas"]
        for kind, components in document["components"].items():
            for name in components:
                assert f"#/components/{kind}/{name}" in json.dumps(document), name
        referred = set(re.findall(r"#/components/(\w+)/(\w+)", json.dumps(document)))
        assert all(name in document["components"][kind] for kind, name in referred)
    found = await catalog(home.url)
    assert [name for name in found if "things" in name] == []


async def test_the_sample_is_made_when_it_is_wanted_after_all(
    home: Home, database_url: str, start_server: Callable[..., RunningServer]
) -> None:
    """A database migrated without the sample gets it with the next migration, as if it had always
    had it; a later THINGS=no leaves it, its rows and its capture as they are.
    """
    url = home.as_owner
    migrate(url, things=False)
    assert "tablecast migrate` to have it" in refused(url, "serve")
    migrate(url)
    usual, found = await catalog(database_url), await catalog(home.url)
    assert usual.keys() == found.keys()
    await execute(url, "INSERT INTO public.things (name) VALUES ('kept')")
    migrate(url, things=False)
    assert await catalog(home.url) == found
    server = start_server(database_url=url, THINGS="no")
    async with joined(server.url) as client:
        await execute(url, "UPDATE public.things SET info = 'x'")
        assert (await client.event())[1]["name"] == "kept"


async def test_the_url_of_a_provider(home: Home) -> None:
    """A provider's URL has parameters for Postgres's own clients."""
    url = home.as_owner + "?sslmode=prefer&channel_binding=prefer&connect_timeout=10"
    assert tablecast("migrate", DATABASE_URL=f"{url}&keepalives_idle=30").returncode == 0
    assert tablecast("topics", DATABASE_URL=f"{url}&tcp_user_timeout=9").returncode == 0


async def test_a_database_that_quotes_every_name(home: Home) -> None:
    """Postgres is set to show each name in quotes."""
    migrate(home.as_owner)
    database = await value(home.url, "SELECT quote_ident(current_database())")
    await execute(home.url, f"ALTER DATABASE {database} SET quote_all_identifiers = on")
    migrate(home.as_owner)
    await migration.check(home.as_owner)


async def test_a_sample_that_is_not_followed_is_reported(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """Somebody has unwatched the sample table, and its page is served."""
    migrate(home.as_owner)
    await execute(home.as_owner, "SELECT feed.unwatch('public.things')")
    assert "no page follows it" in start_server(database_url=home.as_owner).log


async def test_a_renamed_sample_keeps_its_topic(home: Home) -> None:
    """Somebody has renamed the sample table, and migrates again: one sentence says what to do."""
    migrate(home.as_owner)
    await execute(home.as_owner, "ALTER TABLE public.things RENAME TO stuff")
    assert "is that of stuff: watch stuff under another topic" in refused(home.as_owner)
    migrate(home.as_owner, things=False)
    await execute(home.as_owner, "SELECT feed.watch('public.stuff', 'stuff')")
    migrate(home.as_owner)


async def test_a_guest_may_not_watch(home: Home) -> None:
    """A role that may only connect would watch a table of its own: it is told whose right that
    is, and with that right it can.
    """
    migrate(home.as_owner)
    await execute(
        home.url,
        f"CREATE TABLE public.his (id int PRIMARY KEY); ALTER TABLE his OWNER TO {home.guest}",
    )
    for arguments in (("watch", "his"), ("unwatch", "his")):
        assert refused(home.as_guest, *arguments) == (
            f"The role {home.guest} may not watch or unwatch tables: only the role that installed"
            f" Tablecast may. Connect as {home.owner}, or run GRANT {home.owner} TO {home.guest}."
        )
    await execute(home.url, f"GRANT {home.owner} TO {home.guest}")
    assert tablecast("watch", "his", DATABASE_URL=home.as_guest).returncode == 0


async def test_a_dropped_schema_is_installed_afresh(
    home: Home, start_server: Callable[..., RunningServer]
) -> None:
    """Somebody drops the schema and migrates again: all of it is there, and the things are kept."""
    url = home.as_owner
    migrate(url)
    before = await catalog(home.url)
    await execute(
        url, "INSERT INTO public.things (name) VALUES ('kept')", "DROP SCHEMA feed CASCADE"
    )
    assert refused(url, "serve").startswith(NOT_MIGRATED)
    migrate(url)
    assert (await catalog(home.url)).keys() == before.keys()
    assert await value(url, "SELECT string_agg(name, ',') FROM public.things") == "kept"
    await use(start_server(database_url=url, FEED_RETENTION="1s"), url)


async def test_a_dropped_schema_of_0_1_0_is_installed_afresh(home: Home) -> None:
    """The same with 0.1.0, whose version table stays behind in public."""
    await install_0_1_0(home.url)
    await execute(home.url, "DROP SCHEMA feed CASCADE")
    migrate(home.url)
    assert await value(home.url, "SELECT count(*) FROM feed.topic") == 1


async def test_a_sample_table_with_columns_of_the_users_goes_on(home: Home) -> None:
    """Somebody has added a column to the sample: while watched it is still the sample."""
    migrate(home.as_owner)
    await execute(home.as_owner, "ALTER TABLE public.things ADD COLUMN colour text")
    migrate(home.as_owner)


# Other databases


async def test_a_standby_is_refused(private_postgres: Callable[..., Server]) -> None:
    """The URL leads to a standby, which nothing can be written to."""
    server = private_postgres()
    await execute(server.url, "DROP SCHEMA feed CASCADE")
    await asyncio.to_thread(server.stop)
    (server.data / "standby.signal").touch(mode=0o644)
    await asyncio.to_thread(server.start)
    assert refused(server.url) == (
        "The database is a read-only standby: migrate the primary instead."
    )


async def test_an_unknown_revision_is_refused(home: Home) -> None:
    """A newer version has migrated the database."""
    migrate(home.as_owner)
    await execute(home.as_owner, "UPDATE feed.alembic_version SET version_num = '9999_future'")
    sentence = (
        "The database is at revision 9999_future, which this version of Tablecast does not know: a"
        " newer one has migrated it, so run that."
    )
    assert refused(home.as_owner) == refused(home.as_owner, "serve") == sentence
