"""A check of the tables notices what no trigger can capture, and reports it once."""

import asyncio

import asyncpg
import pytest

from app.database.connections import Connection, connect
from app.feed import log
from tests.support.writing import current_offset

pytestmark = pytest.mark.database

NOT_CAPTURED = "triggers are disabled or missing: what is written now is not captured"
HAS_CHILDREN = "its table has children, whose rows are not captured"
NOTICED = [
    ("ALTER TABLE watched ALTER v TYPE text USING upper(v)", None),
    ("ALTER TABLE watched ADD x int DEFAULT 7", None),
    ("ALTER TABLE watched ADD g text GENERATED ALWAYS AS (v || '!') STORED", None),
    ("ALTER TABLE watched RENAME v TO x", None),
    ("ALTER TABLE watched DROP v", None),
    ("CREATE TABLE child () INHERITS (watched)", HAS_CHILDREN),
    ("ALTER TABLE watched DISABLE TRIGGER ALL", NOT_CAPTURED),
    ("DROP TRIGGER feed_delete ON watched", NOT_CAPTURED),
    ("ALTER TABLE watched DISABLE TRIGGER ALL; ALTER TABLE watched ENABLE TRIGGER ALL", None),
    ("ALTER TABLE watched DROP CONSTRAINT watched_pkey", "its table has no primary key any more"),
    ("DROP TABLE watched", "its table was dropped"),
    ("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'", None),
    ("ALTER TYPE mood RENAME VALUE 'sad' TO 'x'; ALTER TYPE mood RENAME VALUE 'glad' TO 'sad';"
     "ALTER TYPE mood RENAME VALUE 'x' TO 'glad'", None),
    ("ALTER TYPE mood RENAME VALUE 'sad' TO 'x'; ALTER TYPE mood RENAME VALUE 'x' TO 'sad'", None),
    ("ALTER TYPE weather RENAME VALUE 'rain' TO 'snow'", None),
    ("ALTER TYPE size RENAME VALUE 'large' TO 'huge'", None),
    ("CREATE CAST (mood AS json) WITH FUNCTION shown(mood)", None),
    ("ALTER TABLE watched DROP CONSTRAINT watched_pkey, ADD PRIMARY KEY (id) DEFERRABLE", None),
    ("ALTER TYPE pair RENAME ATTRIBUTE n TO number", None),
    ("ALTER TABLE watched SET UNLOGGED",
     "public.watched cannot be watched: only ordinary, permanent tables can."),
    ("CREATE TABLE papa (id int NOT NULL, v text, m mood, p pair, s outside, r many_sizes);"
     "ALTER TABLE watched INHERIT papa",
     "its table has a parent: what is written through that is not captured"),
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
        CREATE TYPE weather AS ENUM ('sun', 'rain'); CREATE TYPE size AS ENUM ('small', 'large');
        CREATE TYPE sizes AS RANGE (SUBTYPE = size, MULTIRANGE_TYPE_NAME = many_sizes);
        CREATE DOMAIN inside AS weather; CREATE DOMAIN outside AS inside;
        CREATE FUNCTION shown(mood) RETURNS json LANGUAGE sql AS $$SELECT to_json($1::text)$$;
        CREATE TABLE watched (
            id int PRIMARY KEY, v text, m mood, p pair, s outside, r many_sizes
        )
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
    await watched.execute("ALTER TABLE watched ADD x int DEFAULT 7")
    async with reader.transaction():
        await reader.fetch("SELECT * FROM watched")
        assert await look(watched) == [("watched", None)]
        assert await look(watched) == [] and await reloads(watched) == 1
        await watched.execute("INSERT INTO watched VALUES (2)")
    assert await look(watched) == [] and await reloads(watched) == 1
    shape = "SELECT shape ~ 'told' FROM feed.topic WHERE topic = 'watched'"
    assert not await watched.fetchval(shape)
    newest = await watched.fetchval(
        "SELECT new ->> 'x' FROM feed.change WHERE op = 'create' ORDER BY id DESC"
    )
    assert newest == "7"
    await reader.close()


# Watching


async def ops(connection: Connection) -> list[tuple[str, str]]:
    """The log as (topic, operation), in log order."""
    rows = await connection.fetch("SELECT topic, op FROM feed.change ORDER BY id")
    return [(row["topic"], row["op"]) for row in rows]


async def test_a_topic_is_one_tables(connection: Connection) -> None:
    """Somebody watches a second table under a topic: one sentence names the table that has it. Once
    that is unwatched or dropped, the topic is free.
    """
    await connection.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY);"
        "SELECT feed.watch('a', 'same')"
    )
    with pytest.raises(asyncpg.UniqueViolationError) as refused:
        await connection.execute("SELECT feed.watch('b', 'same')")
    assert refused.value.args[0] == "The topic same is taken by the table public.a: choose another."
    await connection.execute("DROP TABLE a; SELECT feed.watch('b', 'same')")
    await connection.execute("CREATE TABLE c (id int PRIMARY KEY)")
    await connection.execute("SELECT feed.unwatch('b'), feed.watch('c', 'same')")
    topics = await connection.fetch("SELECT topic, relation::text FROM feed.topic ORDER BY 1")
    assert [tuple(row) for row in topics] == [("same", "c"), ("thing", "things")]
    captures = "SELECT count(*) FROM pg_proc WHERE proname ~ '^capture_[0-9]'"
    assert await connection.fetchval(captures) == 2


async def test_watching_tells_whoever_may_have_missed_something(watched: Connection) -> None:
    """A table is watched again as it was: nobody is told. Under another topic, unwatched, altered,
    or with lost triggers: the clients of the topics concerned load again.
    """
    await watched.execute("TRUNCATE feed.change")
    for statement, told in (
        ("SELECT feed.watch('watched', 'watched')", []),
        ("SELECT feed.watch('watched', 'other')", ["watched", "other"]),
        ("SELECT feed.watch('watched', 'other')", []),
        ("SELECT feed.unwatch('watched')", ["other"]),
        ("SELECT feed.unwatch('watched')", []),
        ("SELECT feed.watch('watched', 'other')", ["other"]),
        ("DROP TRIGGER feed_insert ON watched; SELECT feed.watch('watched', 'other')", ["other"]),
        ("ALTER TABLE watched ADD w int; SELECT feed.watch('watched', 'other')", ["other"]),
        ("DROP TABLE watched; SELECT feed.unwatch('things')", ["other", "thing"]),
    ):
        await watched.execute("TRUNCATE feed.change")
        await watched.execute(statement)
        assert await ops(watched) == [(topic, "reload") for topic in told], statement


DESTROYED = [
    ("id int PRIMARY KEY, name text", "(5, 'Sam')", None, '{"id": 5}'),
    ("b int, a numeric, PRIMARY KEY (a, b)", "(1, 2.50)", None, '{"a": 2.50, "b": 1}'),
    ('"q""\\ ö\n$body$" text PRIMARY KEY', "('x\"y')", None, '{"q\\"\\\\ ö\\n$body$": "x\\"y"}'),
    ("doc jsonb PRIMARY KEY", """('{"id": [1, "}"]}')""", None, '{"doc": {"id": [1, "}"]}}'),
    ("id int PRIMARY KEY, doc json", """(1, '["\\u0000"]')""", None, '{"id": 1}'),
    ("id int PRIMARY KEY, n text UNIQUE NOT NULL", "(1, 'one')", "n", '"one"'),
]


@pytest.mark.parametrize(("columns", "row", "destroy_with", "body"), DESTROYED)
async def test_a_destroy_carries_the_key(
    connection: Connection, columns: str, row: str, destroy_with: str | None, body: str
) -> None:
    """A row of a table with any kind of key is deleted: the destroy carries the key, exactly as the
    row has it, or the column that the table was watched with.
    """
    await connection.execute(f"CREATE TABLE t ({columns})")
    await connection.execute("SELECT feed.watch('t', 't', $1)", destroy_with)
    since = await current_offset(connection)
    await connection.execute(f"INSERT INTO t VALUES {row}; DELETE FROM t")
    created, destroyed = (await log.read(connection, since)).changes
    assert (created.op, destroyed.op, destroyed.body) == ("create", "destroy", body)


async def test_what_was_deleted_before_an_unwatch_is_a_reload(connection: Connection) -> None:
    """A client returns to changes of a topic that is not watched any more: what its destroys
    carried is not known, so it is told to load again.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY); SELECT feed.watch('t', 't')")
    since = await current_offset(connection)
    await connection.execute("INSERT INTO t VALUES (1); DELETE FROM t; SELECT feed.unwatch('t')")
    changes = (await log.read(connection, since)).changes
    assert [(change.op, change.body) for change in changes] == [
        ("create", '{"id":1}'), ("reload", None), ("reload", None),
    ]  # fmt: skip


@pytest.mark.parametrize("ddl", ["RENAME n TO m", "DROP n"])
async def test_a_destroy_without_its_column_is_a_reload(connection: Connection, ddl: str) -> None:
    """The column that a topic's destroys carry is renamed or dropped, and a row is deleted: clients
    load again, and never get a key where they expect the column's value.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY, n text UNIQUE NOT NULL)")
    await connection.execute("SELECT feed.watch('t', 't', 'n')")
    await connection.execute("INSERT INTO t VALUES (1, 'one'), (2, 'two')")
    await connection.execute(f"ALTER TABLE t {ddl}")
    since = await current_offset(connection)
    await connection.execute("DELETE FROM t WHERE id = 1")
    [(_, problem)] = await look(connection)
    assert problem == "the column that its destroys carry is not NOT NULL and UNIQUE any more"
    await connection.execute("DELETE FROM t")
    changes = (await log.read(connection, since)).changes
    assert [(change.op, change.body) for change in changes] == [("reload", None)] * 3


UNFIT = [
    ("id int PRIMARY KEY, name text", "name"),
    ("id int PRIMARY KEY, name text UNIQUE", "name"),
    ("id int PRIMARY KEY, name text NOT NULL", "name"),
    ("id int PRIMARY KEY, name text NOT NULL UNIQUE DEFERRABLE", "name"),
    ("id int PRIMARY KEY", "missing"),
    ("id int PRIMARY KEY, doc jsonb NOT NULL UNIQUE", "doc"),
    ("id int PRIMARY KEY, pair pair NOT NULL UNIQUE", "pair"),
    ("id int PRIMARY KEY, pair wrapped NOT NULL UNIQUE", "pair"),
]


@pytest.mark.parametrize(("columns", "column"), UNFIT)
async def test_a_destroy_carries_only_what_identifies_a_row(
    connection: Connection, columns: str, column: str
) -> None:
    """Somebody wants destroys to carry a column that two rows may share, that may be NULL, or that
    is not there: one sentence refuses it.
    """
    await connection.execute("CREATE TYPE pair AS (id int); CREATE DOMAIN wrapped AS pair")
    await connection.execute(f"CREATE TABLE t ({columns})")
    with pytest.raises(asyncpg.InvalidParameterValueError, match="NOT NULL and UNIQUE"):
        await connection.execute("SELECT feed.watch('t', 't', $1)", column)


async def test_a_promise_not_to_be_null_must_have_been_checked(connection: Connection) -> None:
    """A column with NULLs is declared NOT NULL for new rows only, as Postgres 18 can."""
    if connection.get_server_version().major < 18:
        pytest.skip("only Postgres 18 and later have NOT NULL that is not checked")
    await connection.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n text UNIQUE); INSERT INTO t VALUES (1), (2);"
        "ALTER TABLE t ADD CONSTRAINT checked NOT NULL n NOT VALID"
    )
    with pytest.raises(asyncpg.InvalidParameterValueError, match="NOT NULL and UNIQUE"):
        await connection.execute("SELECT feed.watch('t', 't', 'n')")


async def test_a_table_that_stays_with_its_topic_keeps_its_destroys(connection: Connection) -> None:
    """Somebody watches the things again without saying what destroys carry: still the name."""
    await connection.execute("SELECT feed.watch('things', 'thing')")
    column = "SELECT destroy_with FROM feed.topic WHERE topic = 'thing'"
    assert await connection.fetchval(column) == "name"
    await connection.execute("SELECT feed.unwatch('things'), feed.watch('things', 'thing')")
    assert await connection.fetchval(column) is None


async def test_a_kept_column_must_still_identify_a_row(connection: Connection) -> None:
    """The column that destroys carry may be shared by two rows now, and the table is watched again:
    one sentence refuses it.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY, n text UNIQUE NOT NULL)")
    await connection.execute("SELECT feed.watch('t', 't', 'n')")
    await connection.execute("ALTER TABLE t DROP CONSTRAINT t_n_key")
    with pytest.raises(asyncpg.InvalidParameterValueError, match="NOT NULL and UNIQUE"):
        await connection.execute("SELECT feed.watch('t', 't')")


async def test_destroys_that_may_mean_two_rows_are_reloads(connection: Connection) -> None:
    """The constraint of the column that destroys carry is dropped: clients load again, at once and
    for every deleted row, until it is there again.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY, n text UNIQUE NOT NULL)")
    await connection.execute("SELECT feed.watch('t', 't', 'n')")
    await connection.execute("ALTER TABLE t DROP CONSTRAINT t_n_key")
    problem = "the column that its destroys carry is not NOT NULL and UNIQUE any more"
    assert await look(connection) == [("t", problem)]
    assert await look(connection) == []
    assert await connection.fetchval("SELECT problem FROM feed.topic WHERE topic = 't'") == problem
    since = await current_offset(connection)
    await connection.execute("INSERT INTO t VALUES (1, 'Sam'), (2, 'Sam'), (3, 'Kim')")
    await connection.execute("DELETE FROM t WHERE id = 2")
    page = await log.read(connection, since)
    assert (page.changes[3].op, page.changes[3].body) == ("reload", None)
    await connection.execute("ALTER TABLE t ADD UNIQUE (n)")
    assert await look(connection) == [("t", None)]
    await connection.execute("DELETE FROM t WHERE id = 1")
    changes = (await log.read(connection, page.until)).changes
    assert [(change.op, change.body) for change in changes] == [
        ("reload", None), ("destroy", '"Sam"'),
    ]  # fmt: skip


async def test_another_column_for_destroys_is_a_reload(connection: Connection) -> None:
    """Whoever has kept rows by their key, or by another column, begins again."""
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY, n text UNIQUE NOT NULL)")
    await connection.execute("SELECT feed.watch('t', 't'); TRUNCATE feed.change")
    await connection.execute("SELECT feed.watch('t', 't', 'n')")
    assert await ops(connection) == [("t", "reload")]
    await connection.execute("SELECT feed.watch('t', 't', 'n')")
    assert await ops(connection) == [("t", "reload")]


@pytest.mark.parametrize(
    ("act", "topic"), [("unwatch('b')", None), ("watch('b', 'moved')", "moved")]
)
async def test_a_check_leaves_alone_what_was_changed_meanwhile(
    connection: Connection, database_url: str, act: str, topic: str | None
) -> None:
    """A check of the tables waits for one of them, and meanwhile another is unwatched, or moved to
    another topic: so it stays.
    """
    await connection.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY);"
        "SELECT feed.watch('a', 'a'), feed.watch('b', 'b');"
        "ALTER TABLE a ADD n int; ALTER TABLE b ADD n int"
    )
    checker, other = await connect(database_url), await connect(database_url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE a IN ACCESS SHARE MODE")
        checking = asyncio.create_task(look(checker))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = $1"
        async with asyncio.timeout(10):
            while not await connection.fetchval(waits, checker.get_server_pid()):
                await asyncio.sleep(0.001)
        await other.execute(f"SELECT feed.{act}")
        await checking
    await connection.execute("TRUNCATE feed.change; INSERT INTO b VALUES (1)")
    assert await ops(connection) == ([(topic, "create")] if topic else [])
    assert await connection.fetchval("SELECT topic FROM feed.topic WHERE relation = 'b'::regclass"
        ) == topic  # fmt: skip
    for each in (checker, other):
        await each.close()


async def test_a_watch_that_is_not_committed_keeps_no_other_table_unchecked(
    connection: Connection, database_url: str
) -> None:
    """Somebody watches a table and leaves the transaction open; another one is altered."""
    await connection.execute(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY);"
        "SELECT feed.watch('a', 'a'), feed.watch('b', 'b');"
        "ALTER TABLE a ADD n int; ALTER TABLE b ADD n int"
    )
    other = await connect(database_url)
    async with connection.transaction():
        await connection.execute("SELECT feed.watch('a', 'a')")
        assert await look(other) == [("b", None)]
    assert await look(other) == []
    await other.close()


async def test_two_at_once_know_of_each_other(connection: Connection, database_url: str) -> None:
    """A table is moved to a second topic and, before that is committed, to a third: the clients of
    all three load again.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
    await connection.execute("SELECT feed.watch('t', 'first'); TRUNCATE feed.change")
    other = await connect(database_url)
    async with connection.transaction():
        await connection.execute("SELECT feed.watch('t', 'second')")
        moving = asyncio.create_task(other.execute("SELECT feed.watch('t', 'third')"))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = $1"
        async with asyncio.timeout(10):
            while not await connection.fetchval(waits, other.get_server_pid()):
                await asyncio.sleep(0.01)
    await moving
    told = await ops(connection)
    assert [topic for topic, _ in told] == ["first", "second", "second", "third"]
    await other.close()


async def test_a_missing_right_is_a_sentence(connection: Connection, database_url: str) -> None:
    """A role that does not own the table, or has nothing to do with the feed, watches or unwatches
    it; the capture that a superuser makes belongs to the feed's owner.
    """
    suffix = database_url.rpartition("/")[2].partition("?")[0]
    alice, bob = f'"Alice {suffix}"', f"bob_{suffix}"
    await connection.execute(
        f"CREATE ROLE {alice}; CREATE ROLE {bob};"
        f"CREATE TABLE hers (id int PRIMARY KEY); ALTER TABLE hers OWNER TO {alice};"
        f"GRANT USAGE, CREATE ON SCHEMA feed TO {bob};"
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA feed TO {bob};"
        f"GRANT SELECT ON ALL TABLES IN SCHEMA feed TO {bob}"
    )
    owner = await connection.fetchval("SELECT current_user")
    try:
        await connection.execute(f"ALTER TABLE hers OWNER TO {bob}; SET ROLE {bob}")
        for act in ("watch('hers', 'hers')", "unwatch('hers')"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match=f"connect as {owner}.$"):
                await connection.execute(f"SELECT feed.{act}")
        await connection.execute(
            f"RESET ROLE; ALTER TABLE hers OWNER TO {alice}; ALTER SCHEMA feed OWNER TO {bob};"
            f"SET ROLE {bob}"
        )
        for act in ("watch('hers', 'hers')", "unwatch('hers')"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError) as refused:
                await connection.execute(f"SELECT feed.{act}")
            done = act.partition("(")[0] + "ed"
            assert refused.value.args[0] == (
                f"public.hers cannot be {done} by the role {bob}: triggers that must always run"
                f" need its owner; GRANT {alice} TO {bob}."
            )
        await connection.execute(f"RESET ROLE; ALTER TABLE hers OWNER TO {owner}; SET ROLE {bob}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=f"hers OWNER TO {bob}.$"):
            await connection.execute("SELECT feed.watch('hers', 'hers')")
        await connection.execute("RESET ROLE; SELECT feed.watch('hers', 'hers')")
        owned = "SELECT proowner::regrole::text FROM pg_proc WHERE proname = $1"
        capture = await connection.fetchval("SELECT 'capture_' || 'hers'::regclass::oid")
        assert await connection.fetchval(owned, capture) == bob
    finally:
        await connection.execute(
            f"RESET ROLE; ALTER SCHEMA feed OWNER TO {owner}; DROP TABLE hers CASCADE;"
            f"SELECT feed.forget_dropped(); DROP OWNED BY {bob}; DROP ROLE {alice}, {bob}"
        )
