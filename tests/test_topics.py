"""A check of the tables notices what no trigger can capture, and reports it once."""

import pytest

from app.database.connections import Connection, connect

pytestmark = pytest.mark.database

NOT_CAPTURED = "triggers are disabled or missing: what is written now is not captured"
SHARES_ROWS = (
    "public.watched cannot be watched: it shares its rows with another table"
    " (partition or inheritance)."
)
HAS_CHILDREN = "its table has children, whose rows are not captured"
NOTICED = [
    ("ALTER TABLE watched ALTER v TYPE text USING upper(v)", None),
    ("ALTER TABLE watched ADD w int DEFAULT 7", None),
    ("ALTER TABLE watched ADD g text GENERATED ALWAYS AS (v || '!') STORED", None),
    ("ALTER TABLE watched RENAME v TO w", None),
    ("ALTER TABLE watched DROP v", None),
    ("CREATE TABLE child () INHERITS (watched)", HAS_CHILDREN),
    ("ALTER TABLE watched DISABLE TRIGGER ALL", NOT_CAPTURED),
    ("DROP TRIGGER feed_delete ON watched", NOT_CAPTURED),
    ("ALTER TABLE watched DISABLE TRIGGER ALL; ALTER TABLE watched ENABLE TRIGGER ALL", None),
    ("ALTER TABLE watched DROP CONSTRAINT watched_pkey", "its table has no primary key any more"),
    ("DROP TABLE watched", "its table was dropped"),
    ("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'", None),
    ("ALTER TYPE pair RENAME ATTRIBUTE n TO number", None),
    ("ALTER TABLE watched SET UNLOGGED",
     "public.watched cannot be watched: only ordinary, permanent tables can."),
    ("CREATE TABLE papa (id int NOT NULL, v text, m mood, p pair);"
     "ALTER TABLE watched INHERIT papa", SHARES_ROWS),
    ("BEGIN; ALTER TABLE watched DISABLE TRIGGER ALL; INSERT INTO watched VALUES (2);"
     "ALTER TABLE watched ENABLE ALWAYS TRIGGER feed_begin; "
     "ALTER TABLE watched ENABLE ALWAYS TRIGGER feed_insert; "
     "ALTER TABLE watched ENABLE ALWAYS TRIGGER feed_update; "
     "ALTER TABLE watched ENABLE ALWAYS TRIGGER feed_delete; "
     "ALTER TABLE watched ENABLE ALWAYS TRIGGER feed_truncate; COMMIT", None),
]  # fmt: skip
PASSED_OVER = [
    "VACUUM FULL watched", "CLUSTER watched USING watched_pkey", "ANALYZE watched",
    "REINDEX TABLE watched", "CREATE INDEX ON watched (v)", "UPDATE watched SET v = v || '!'",
    "ALTER TABLE watched ADD CHECK (v <> '')", "ALTER TABLE watched SET (fillfactor = 80)",
]  # fmt: skip


@pytest.fixture
async def watched(connection: Connection) -> Connection:
    """A connection to a database with one more watched table, which has a row."""
    await connection.execute(
        """
        CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (n int, s text);
        CREATE TABLE watched (id int PRIMARY KEY, v text, m mood, p pair)
        """
    )
    await connection.execute("SELECT feed.watch('watched', 'watched')")
    await connection.execute("INSERT INTO watched VALUES (1, 'a')")
    return connection


async def look(connection: Connection) -> list[tuple[str, str | None]]:
    """Return what a check of the tables finds."""
    rows = await connection.fetch("SELECT topic, problem FROM feed.check_topics()")
    return [(row["topic"], row["problem"]) for row in rows]


async def reloads(connection: Connection) -> int:
    """Return how often clients of the table have been asked to load it again since it was watched,
    which is the first time.
    """
    count: int = await connection.fetchval(
        "SELECT count(*) - 1 FROM feed.change WHERE op = 'reload' AND topic = 'watched'"
    )
    return count


@pytest.mark.parametrize(("ddl", "problem"), NOTICED)
async def test_what_changes_a_table_is_noticed_once(
    watched: Connection, ddl: str, problem: str | None
) -> None:
    """After a change to the table or its triggers, the next check makes clients load it again and
    reports what is wrong; the one after that finds nothing.
    """
    assert await look(watched) == []
    await watched.execute(ddl)
    assert await look(watched) == [("watched", problem)]
    assert await look(watched) == [] and await reloads(watched) == 1


@pytest.mark.parametrize("statement", PASSED_OVER)
async def test_what_changes_no_row_is_passed_over(watched: Connection, statement: str) -> None:
    """Maintenance of a table, and changes that triggers capture, make no client load again."""
    await watched.execute(statement)
    assert await look(watched) == [] and await reloads(watched) == 0


async def test_lost_triggers_are_put_back(watched: Connection) -> None:
    """Triggers that were disabled and enabled fire for every session again after a check."""
    await watched.execute("ALTER TABLE watched DISABLE TRIGGER ALL")
    await look(watched)
    await watched.execute("INSERT INTO watched VALUES (2, 'unseen')")
    await watched.execute("ALTER TABLE watched ENABLE TRIGGER ALL")
    assert await look(watched) == [("watched", None)] and await reloads(watched) == 2
    await watched.execute("SET session_replication_role = replica; INSERT INTO watched VALUES (3)")
    newest = await watched.fetchval("SELECT new ->> 'id' FROM feed.change ORDER BY id DESC LIMIT 1")
    assert newest == "3"


async def test_a_dropped_table_leaves_nothing(watched: Connection) -> None:
    """Dropping a table removes its topic and its capture function."""
    count = """
        SELECT (SELECT count(*) FROM feed.topic),
               (SELECT count(*) FROM pg_proc WHERE proname ~ '^capture_[0-9]')
    """
    assert tuple(await watched.fetchrow(count)) == (2, 2)
    await watched.execute("DROP TABLE watched")
    await look(watched)
    assert tuple(await watched.fetchrow(count)) == (1, 1)


async def test_a_lock_delays_the_capture_and_not_the_news(
    watched: Connection, database_url: str
) -> None:
    """While a transaction that has read the table stays open, clients still learn of its change,
    once; capture follows when the lock is gone.
    """
    reader = await connect(database_url)
    await watched.execute("ALTER TABLE watched ADD w int DEFAULT 7")
    async with reader.transaction():
        await reader.fetch("SELECT * FROM watched")
        assert await look(watched) == [("watched", None)]
        assert await look(watched) == [] and await reloads(watched) == 1
        await watched.execute("INSERT INTO watched VALUES (2)")
    assert await look(watched) == [] and await reloads(watched) == 1
    shape = "SELECT shape ~ 'told' FROM feed.topic WHERE topic = 'watched'"
    assert not await watched.fetchval(shape)
    newest = await watched.fetchval(
        "SELECT new ->> 'w' FROM feed.change WHERE op = 'create' ORDER BY id DESC"
    )
    assert newest == "7"
    await reader.close()
