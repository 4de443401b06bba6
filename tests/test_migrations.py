"""Migrations: up and down lead where they should, even for two nodes at once."""

import asyncio
from itertools import pairwise

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from app.database.connections import Connection, Refusal, connect
from app.database.migration import configuration, migrate, newest_revision
from app.feed import log
from app.feed.offset import Offset
from tests.support.catalog import catalog, digest
from tests.support.older import install_0_1_0
from tests.support.postgres import execute

pytestmark = pytest.mark.database

REVISIONS = [
    script.revision for script in ScriptDirectory.from_config(configuration("")).walk_revisions()
][::-1]


async def test_up_down_up(empty_database_url: str) -> None:
    """Migrating up, all the way down and up again gives the same schema as the first time, and
    going down leaves nothing behind.
    """
    url = empty_database_url
    before = await catalog(url)
    await asyncio.to_thread(migrate, url)
    first = await catalog(url)
    await asyncio.to_thread(command.downgrade, configuration(url), "base")
    assert await catalog(url) == before
    await asyncio.to_thread(migrate, url)
    assert await catalog(url) == first
    assert "relation feed.change" in first


async def test_each_step_down_and_up(empty_database_url: str) -> None:
    """One step down from any version, and up again, gives the same schemas as before."""
    url = empty_database_url
    seen = [await catalog(url)]
    for revision in REVISIONS:
        await asyncio.to_thread(command.upgrade, configuration(url), revision)
        seen.append(await catalog(url))
    for before, after in reversed(list(pairwise(seen))):
        await asyncio.to_thread(command.downgrade, configuration(url), "-1")
        assert await catalog(url) == before
        await asyncio.to_thread(command.upgrade, configuration(url), "+1")
        assert await catalog(url) == after
        await asyncio.to_thread(command.downgrade, configuration(url), "-1")


async def test_unchanged_tables_are_not_loaded_again(empty_database_url: str) -> None:
    """A revision writes the shape of tables in another way: those that are as they were are found
    so after it and after the step back, and what has changed is noticed all the same.
    """
    url = empty_database_url
    await asyncio.to_thread(command.upgrade, configuration(url), "0007")
    await execute(
        url,
        "CREATE TYPE mood AS ENUM ('sad', 'glad');"
        "CREATE TABLE same (id int PRIMARY KEY, m mood); CREATE TABLE other (id int PRIMARY KEY);"
        "SELECT feed.watch('same', 'same'), feed.watch('other', 'other')",
    )
    connection = await connect(url)
    up, down = command.upgrade, command.downgrade
    for number, (move, step) in enumerate([(up, "+1"), (up, "+1"), (down, "-1"), (down, "-1")]):
        await connection.execute(f"ALTER TABLE other ADD c{number} int")
        await asyncio.to_thread(move, configuration(url), step)
        checked = await connection.fetch("SELECT topic FROM feed.check_topics()")
        assert [row["topic"] for row in checked] == ["other"]
    await connection.close()


async def test_a_step_down_without_tables_that_cannot_be_watched(empty_database_url: str) -> None:
    """Watched tables were dropped, or have lost their key or their independence, and nobody has
    looked since: a downgrade forgets them.
    """
    url = empty_database_url
    await asyncio.to_thread(migrate, url)
    await execute(
        url,
        "CREATE TABLE gone (id int PRIMARY KEY); CREATE TABLE keyless (id int PRIMARY KEY);"
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "SELECT feed.watch('gone', 'gone'), feed.watch('keyless', 'keyless'),"
        " feed.watch('parent', 'parent')",
        "DROP TABLE gone; ALTER TABLE keyless DROP CONSTRAINT keyless_pkey;"
        "CREATE TABLE child () INHERITS (parent)",
    )
    await asyncio.to_thread(command.downgrade, configuration(url), "0002")
    await asyncio.to_thread(migrate, url)
    connection = await connect(url)
    topics = await connection.fetch("SELECT topic FROM feed.topic")
    assert [row["topic"] for row in topics] == ["thing"]
    await connection.close()


# A digest of what each released revision makes; a release adds its own. They also change where
# tests/support/catalog.py looks at more than before: then write them again, in a commit without
# any other change.
RELEASED = {
    "0001": "2ed0bb239551b89a8f60a26099bf2712",
    "0002": "e1d19744a5b221bdcb5bc20b6604fba2",
    "0003": "a57df60b995cee4509f4c95374b8d271",
    "0004": "c4fd4ec02cfbe2ddf3531b890ef22739",
    "0005": "d8ee3be25e772112aee1d49bd59067ec",
    "0006": "2a8691bbc030235c122bf2e6064a6886",
    "0007": "8f6f28b852cf10f6717965ccce2cbc4d",
    "0008": "ba03323200e006c1554b53eadbb82495",
    "0009": "99bfab43e8878e87bda11d4e20c2ad84",
}


async def test_a_released_revision_makes_what_it_always_made(empty_database_url: str) -> None:
    """Somebody edits a released revision or its SQL so that it makes something else."""
    for revision, released in RELEASED.items():
        await asyncio.to_thread(command.upgrade, configuration(empty_database_url), revision)
        assert digest(await catalog(empty_database_url)) == released, (
            f"Revision {revision} no longer makes what it made when it was released. Databases that"
            " have run it will not run it again: restore it and its SQL files, and make the"
            " change in a new revision."
        )


async def test_two_at_once(empty_database_url: str) -> None:
    """Of two nodes that start together one migrates, and the other finds nothing to do."""
    await asyncio.gather(*(asyncio.to_thread(migrate, empty_database_url) for _ in range(2)))
    connection = await connect(empty_database_url)
    try:
        assert await connection.fetchval("SELECT count(*) FROM feed.alembic_version") == 1
        await connection.execute("INSERT INTO things (name) VALUES ('a')")
        assert await connection.fetchval("SELECT count(*) FROM feed.change") == 1
    finally:
        await connection.close()


async def test_migrating_again_changes_nothing(database_url: str) -> None:
    """Migrating a migrated database keeps its data and history."""
    connection = await connect(database_url)
    try:
        await connection.execute("INSERT INTO things (name) VALUES ('a')")
        before = await connection.fetchval("SELECT feed.epoch()")
        await asyncio.to_thread(migrate, database_url)
        assert await connection.fetchval("SELECT feed.epoch()") == before
        assert await connection.fetchval("SELECT count(*) FROM things") == 1
    finally:
        await connection.close()


async def test_tables_that_share_a_topic_are_named(empty_database_url: str) -> None:
    """Two tables share a topic, as was possible before: the migration says which, and changes
    nothing; once one of them has another topic, it goes through.
    """
    url = empty_database_url
    await asyncio.to_thread(command.upgrade, configuration(url), "0003")
    before = await catalog(url)
    connection = await connect(url)
    try:
        await connection.execute(
            "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, name text);"
            "SELECT feed.watch('a', 'same'), feed.watch('b', 'same')"
            ";CREATE TABLE c (id int PRIMARY KEY); SELECT feed.watch('c', 'other'); DROP TABLE c"
        )
        with pytest.raises(Refusal, match=r"topic same is used by the tables (a and b|b and a)"):
            await asyncio.to_thread(migrate, url)
        await connection.execute("SELECT feed.watch('b', 'other')")
        await asyncio.to_thread(migrate, url)
        since = Offset(await log.current_position(connection))
        await connection.execute("INSERT INTO b VALUES (1, 'Sam'); DELETE FROM b")
        await connection.execute("INSERT INTO things (name) VALUES ('a'); DELETE FROM things")
        changes = (await log.read(connection, since)).changes
        assert [change.body for change in changes if change.op == "destroy"] == ['{"id": 1}', '"a"']
        await connection.execute("SELECT feed.unwatch('a'), feed.unwatch('b'); DROP TABLE a, b")
    finally:
        await connection.close()
    await asyncio.to_thread(command.downgrade, configuration(url), "0003")
    assert await catalog(url) == before


# An installation of 0.1.0

# What revision 0002 creates now, and what it created when 0.1.0 was released.
INSTALLATIONS = ("as it is", "as it was")


async def install(url: str, installation: str) -> None:
    """Create an installation of 0.1.0."""
    if installation == "as it is":
        await asyncio.to_thread(command.upgrade, configuration(url), "0002")
    else:
        await install_0_1_0(url)


WATCHED_BY_HAND = """
    CREATE SCHEMA "Odd ""Schema";
    CREATE TABLE "Odd ""Schema"."T'able" (a int, b int, v text, PRIMARY KEY (a, b));
    CREATE TABLE orders (id int PRIMARY KEY, v text);
    SELECT feed.watch('"Odd ""Schema"."T''able"', 'odd-one'), feed.watch('orders', 'order');
    INSERT INTO things (name) VALUES ('a'), ('b');
    INSERT INTO orders VALUES (1, 'x');
"""
TOPICS = [
    ('"Odd ""Schema"."T\'able"', "odd-one"), ("orders", "order"), ("things", "thing"),
]  # fmt: skip


@pytest.mark.parametrize("installation", INSTALLATIONS)
async def test_an_installation_of_0_1_0_is_upgraded_in_place(
    empty_database_url: str, installation: str
) -> None:
    """Data, log, epoch and watched tables of 0.1.0 are kept, offsets remain valid, and later writes
    are captured in the new way; the same goes for a downgrade and another upgrade.
    """
    url = empty_database_url
    await install(url, installation)
    connection = await connect(url)
    position_and_offset = "SELECT feed.position()::text, feed.offset()"
    await connection.execute(WATCHED_BY_HAND)
    taken = [await connection.fetchrow(position_and_offset)]
    await connection.execute("UPDATE things SET info = 'x'; DELETE FROM things WHERE name = 'a'")
    taken.append(await connection.fetchrow(position_and_offset))
    await connection.execute("TRUNCATE orders")
    epoch = await connection.fetchval("SELECT feed.epoch()")
    logged = await connection.fetch("SELECT id, topic, op, row::text FROM feed.change ORDER BY id")
    for _ in range(2):
        await asyncio.to_thread(migrate, url)
        kept = await connection.fetch(
            "SELECT id, topic, op, new::text FROM feed.change WHERE id <= $1 ORDER BY id",
            logged[-1]["id"],
        )
        assert [tuple(row) for row in kept] == [tuple(row) for row in logged]
        assert await connection.fetchval("SELECT feed.epoch()") == epoch
        for position, offset in taken:
            assert await connection.fetchval(
                "SELECT feed.continues($1::text::pg_snapshot)", position
            )
            parsed = (await log.current_epoch(connection)).parse(offset)
            assert str(parsed.position) == position
        watched = await connection.fetch("SELECT relation::text, topic FROM feed.topic ORDER BY 1")
        assert [tuple(row) for row in watched] == TOPICS
        assert await images_of_writes(connection) == [(None, "a"), ("a", "b"), ("b", None)]
        await asyncio.to_thread(command.downgrade, configuration(url), "0002")
        row = await connection.fetchrow("SELECT op, row ->> 'v' FROM feed.change ORDER BY id DESC")
        assert tuple(row) == ("destroy", "b")
    await connection.close()


async def images_of_writes(connection: Connection) -> list[tuple[str | None, ...]]:
    """Return the old and new rows that the log holds after a replica's session creates, updates and
    destroys a row.
    """
    newest = await connection.fetchval("SELECT max(id) FROM feed.change")
    await connection.execute(
        """
        SET session_replication_role = replica;
        INSERT INTO "Odd ""Schema"."T'able" VALUES (1, 2, 'a');
        UPDATE "Odd ""Schema"."T'able" SET v = 'b';
        DELETE FROM "Odd ""Schema"."T'able";
        RESET session_replication_role;
        """
    )
    rows = await connection.fetch(
        "SELECT old ->> 'v', new ->> 'v' FROM feed.change WHERE id > $1 ORDER BY id", newest
    )
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("written", ["'x', 'reload'", "'thing', 'create'"])
async def test_what_0_1_0_cannot_tell_begins_another_history(
    database_url: str, written: str
) -> None:
    """After a downgrade, a log that says a topic must be loaded again makes all clients load
    everything.
    """
    connection = await connect(database_url)
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    await connection.execute(f"INSERT INTO feed.change (topic, op) VALUES ({written})")
    epoch = await connection.fetchval("SELECT feed.epoch()")
    await asyncio.to_thread(command.downgrade, configuration(database_url), "0002")
    assert await connection.fetchval("SELECT feed.epoch()") != epoch
    assert await connection.fetchval("SELECT array_agg(row ->> 'name') FROM feed.change") == ["a"]
    await connection.close()


@pytest.mark.parametrize("installation", INSTALLATIONS)
async def test_an_upgraded_database_is_like_a_new_one(
    empty_database_url: str, database_url: str, installation: str
) -> None:
    """The schema of an upgraded 0.1.0 database is the same as that of a new one."""
    await install(empty_database_url, installation)
    await asyncio.to_thread(migrate, empty_database_url)
    assert await catalog(empty_database_url) == await catalog(database_url)


def test_the_newest_revision_is_alembics() -> None:
    """A server that starts reads the newest revision from the files, and sees what alembic sees."""
    head = ScriptDirectory.from_config(configuration("")).get_current_head()
    assert newest_revision() == head
