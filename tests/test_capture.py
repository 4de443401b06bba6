"""From statement to log: what each kind of SQL leaves in `feed.change`."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.feed.listener import CHANNEL, LOCKS, SLEEPING
from tests.support.writing import watch

pytestmark = pytest.mark.database

Change = tuple[str, Any]


async def changes(connection: Connection, topic: str = "thing") -> list[Change]:
    """The log as (operation, row), in log order, without the reloads that watching logs."""
    rows = await connection.fetch(
        "SELECT op, coalesce(new, old)::text FROM feed.change WHERE topic = $1 AND op <> 'reload'"
        " ORDER BY id",
        topic,
    )
    return [(op, None if row is None else json.loads(row)) for op, row in rows]


async def names(connection: Connection) -> list[tuple[str, str | None]]:
    """The log of the things as (operation, name)."""
    return [(op, row and row["name"]) for op, row in await changes(connection)]


@pytest.fixture
async def two_things(connection: Connection) -> Connection:
    """A connection to a database with the things `a` and `b`, and an empty log."""
    await connection.execute("INSERT INTO things (name) VALUES ('a'), ('b')")
    await connection.execute("TRUNCATE feed.change")
    return connection


async def test_insert(connection: Connection) -> None:
    """An inserted row is logged as stored, in the order of the statement."""
    await connection.execute("INSERT INTO things (name, info) VALUES ('a', 'first'), ('b', '')")
    (op, row), (_, other) = await changes(connection)
    assert op == "create"
    assert row == json.loads(
        await connection.fetchval("SELECT row_to_json(things)::text FROM things WHERE name = 'a'")
    )
    assert other["name"] == "b"


async def test_insert_select(connection: Connection) -> None:
    """A bulk insert logs one change per row."""
    await connection.execute(
        "INSERT INTO things (name) SELECT 'n' || i FROM generate_series(1, 1000) AS i"
    )
    assert await names(connection) == [("create", f"n{i}") for i in range(1, 1001)]


async def test_copy(connection: Connection) -> None:
    """Rows inserted by COPY are logged."""
    await connection.copy_records_to_table("things", records=[("a",), ("b",)], columns=["name"])
    assert await names(connection) == [("create", "a"), ("create", "b")]


async def test_update(two_things: Connection) -> None:
    """An update logs the row before and after, and only changed rows."""
    await two_things.execute("UPDATE things SET info = CASE name WHEN 'a' THEN 'new' ELSE info END")
    [(op, row)] = await changes(two_things)
    assert (op, row["name"], row["info"]) == ("update", "a", "new")
    before = json.loads(await two_things.fetchval("SELECT old::text FROM feed.change"))
    assert before == row | {"info": ""}


async def test_update_that_changes_nothing(two_things: Connection) -> None:
    """Writing a row without changing it logs nothing."""
    await two_things.execute("UPDATE things SET info = info")
    assert await changes(two_things) == []


async def test_rename(two_things: Connection) -> None:
    """Renaming a thing keeps its id and logs an update."""
    id = await two_things.fetchval("UPDATE things SET name = 'z' WHERE name = 'a' RETURNING id")
    [(op, row)] = await changes(two_things)
    assert (op, row["id"], row["name"]) == ("update", id, "z")


async def test_update_of_the_key(connection: Connection) -> None:
    """A changed key is a destroy and a create; the destroys come first."""
    await watch(connection, "id int PRIMARY KEY DEFERRABLE, name text")
    await connection.execute("INSERT INTO watched VALUES (1, 'a'), (2, 'b')")
    await connection.execute("TRUNCATE feed.change")
    await connection.execute("UPDATE watched SET id = id + 1")
    logged = await changes(connection, "watched")
    assert logged[:2] == [("destroy", {"id": 1, "name": "a"}), ("destroy", {"id": 2, "name": "b"})]
    assert {op for op, _ in logged[2:]} == {"create"}
    assert sorted(row["id"] for _, row in logged[2:]) == [2, 3]


async def test_upsert(two_things: Connection) -> None:
    """An upsert logs what it did: an update of one row, a create of another."""
    await two_things.execute(
        "INSERT INTO things (name, info) VALUES ('a', 'new'), ('c', '')"
        " ON CONFLICT (name) DO UPDATE SET info = excluded.info"
    )
    assert sorted(await names(two_things)) == [("create", "c"), ("update", "a")]


async def test_upsert_that_does_nothing(two_things: Connection) -> None:
    """ON CONFLICT DO NOTHING logs nothing for the rows that already existed."""
    await two_things.execute("INSERT INTO things (name) VALUES ('a'), ('c') ON CONFLICT DO NOTHING")
    assert await names(two_things) == [("create", "c")]


async def test_merge(two_things: Connection) -> None:
    """A MERGE that updates, deletes and inserts logs all three."""
    await two_things.execute(
        """
        MERGE INTO things USING (VALUES ('a'), ('b'), ('c')) AS given (name)
        ON things.name = given.name
        WHEN MATCHED AND given.name = 'a' THEN UPDATE SET info = 'merged'
        WHEN MATCHED THEN DELETE
        WHEN NOT MATCHED THEN INSERT (name) VALUES (given.name)
        """
    )
    assert sorted(await names(two_things)) == [("create", "c"), ("destroy", "b"), ("update", "a")]


async def test_delete(two_things: Connection) -> None:
    """A destroy has the whole old row."""
    before = json.loads(
        await two_things.fetchval("SELECT row_to_json(things)::text FROM things WHERE name = 'a'")
    )
    await two_things.execute("DELETE FROM things WHERE name = 'a'")
    assert await changes(two_things) == [("destroy", before)]


async def test_truncate(two_things: Connection) -> None:
    """TRUNCATE is one change without a row."""
    await two_things.execute("TRUNCATE things")
    assert await changes(two_things) == [("truncate", None)]


async def test_statements_without_rows(connection: Connection) -> None:
    """Statements that match no row log nothing."""
    await connection.execute("INSERT INTO things (name) SELECT 'x' WHERE false")
    await connection.execute("UPDATE things SET info = 'x'")
    await connection.execute("DELETE FROM things")
    assert await changes(connection) == []


async def test_several_writes_in_one_statement(two_things: Connection) -> None:
    """A statement whose WITH parts insert, update and delete logs all of them."""
    await two_things.execute(
        """
        WITH made AS (INSERT INTO things (name) VALUES ('c'), ('d') RETURNING id),
             more AS (INSERT INTO things (name) VALUES ('e') RETURNING id),
             gone AS (DELETE FROM things WHERE name = 'b' RETURNING id)
        UPDATE things SET info = 'w' WHERE name = 'a'
        """
    )
    assert sorted(await names(two_things)) == [
        ("create", "c"), ("create", "d"), ("create", "e"), ("destroy", "b"), ("update", "a"),
    ]  # fmt: skip


async def test_one_row_changed_five_times(connection: Connection) -> None:
    """The steps of one row within a transaction are all logged, in order."""
    async with connection.transaction():
        await connection.execute("INSERT INTO things (name) VALUES ('a')")
        for info in "1234":
            await connection.execute("UPDATE things SET info = $1", info)
        await connection.execute("DELETE FROM things")
    logged = await changes(connection)
    assert [(op, row["info"]) for op, row in logged] == [
        ("create", ""), ("update", "1"), ("update", "2"), ("update", "3"), ("update", "4"),
        ("destroy", "4"),
    ]  # fmt: skip


async def test_rollbacks(connection: Connection) -> None:
    """Changes that were rolled back, to a savepoint or entirely, are not logged."""
    async with connection.transaction():
        await connection.execute("INSERT INTO things (name) VALUES ('kept')")
        for undone in ("undone", "undone too"):
            with pytest.raises(ZeroDivisionError):
                async with connection.transaction():
                    await connection.execute("INSERT INTO things (name) VALUES ($1)", undone)
                    raise ZeroDivisionError
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute("INSERT INTO things (name) VALUES ('x'), ('kept')")
    assert await names(connection) == [("create", "kept")]


async def test_foreign_key_cascades(connection: Connection) -> None:
    """Rows that a foreign key's action deletes, sets to NULL or updates are logged."""
    await watch(
        connection,
        "id int PRIMARY KEY, thing bigint REFERENCES things ON DELETE CASCADE,"
        " name text REFERENCES things (name) ON UPDATE CASCADE ON DELETE SET NULL",
    )
    await connection.execute("INSERT INTO things (name) VALUES ('a'), ('b')")
    await connection.execute("INSERT INTO watched SELECT 1, id, 'b' FROM things WHERE name = 'a'")
    await connection.execute("UPDATE things SET name = 'c' WHERE name = 'b'")
    await connection.execute("DELETE FROM things WHERE name = 'c'")
    await connection.execute("DELETE FROM things WHERE name = 'a'")
    assert [(op, row["name"]) for op, row in await changes(connection, "watched")] == [
        ("create", "b"), ("update", "c"), ("update", None), ("destroy", None),
    ]  # fmt: skip


@pytest.fixture
async def as_clerk(connection: Connection) -> AsyncIterator[Connection]:
    """A connection with a role that has privileges on `things` and nothing else."""
    role = f"clerk_{await connection.fetchval('SELECT current_database()')}"
    await connection.execute(
        f'CREATE ROLE "{role}"; GRANT ALL ON things TO "{role}"; SET ROLE "{role}"'
    )
    yield connection
    await connection.execute(f'RESET ROLE; DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def test_a_writer_needs_no_rights_on_the_feed(as_clerk: Connection) -> None:
    """A role with privileges only on things writes, and its changes are logged."""
    await as_clerk.execute("INSERT INTO things (name) VALUES ('a')")
    await as_clerk.execute("UPDATE things SET info = 'x'")
    await as_clerk.execute("DELETE FROM things")
    await as_clerk.execute("TRUNCATE things")
    for forbidden in (
        "SELECT * FROM feed.change", "DELETE FROM feed.change", "SELECT feed.must_ring()",
        "SELECT feed.offset()", "SELECT feed.prune('0', 0, 1)", "SELECT secret FROM feed.state",
    ):  # fmt: skip
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await as_clerk.execute(forbidden)
    await as_clerk.execute("RESET ROLE")
    assert [op for op, _ in await changes(as_clerk)] == ["create", "update", "destroy", "truncate"]


async def test_a_table_with_an_odd_name(connection: Connection) -> None:
    """A table in another schema, with quotes and capitals in its names, is watched as usual."""
    await connection.execute('CREATE SCHEMA "Odd ""Schema"')
    table = '"Odd ""Schema"."Töp\'s 100%"'
    await connection.execute(
        f'CREATE TABLE {table} ("The ""Key" int, "sec ond" text, v int,'
        ' PRIMARY KEY ("The ""Key", "sec ond"))'
    )
    await connection.execute("SELECT feed.watch($1::text::regclass, 'odd')", table)
    await connection.execute(f"INSERT INTO {table} VALUES (1, 'x', 1), (2, 'x', 1)")
    await connection.execute(f'UPDATE {table} SET v = 2 WHERE "The ""Key" = 1')
    await connection.execute(f'UPDATE {table} SET "sec ond" = \'y\' WHERE "The ""Key" = 2')
    await connection.execute(f"TRUNCATE {table}")
    keys = [
        (op, row and (row['The "Key'], row["sec ond"]))
        for op, row in await changes(connection, "odd")
    ]
    assert keys == [
        ("create", (1, "x")), ("create", (2, "x")), ("update", (1, "x")),
        ("destroy", (2, "x")), ("create", (2, "y")), ("truncate", None),
    ]  # fmt: skip


ODD_VALUES = """
    id int PRIMARY KEY,
    huge text DEFAULT repeat('häß🎈', 800_000),
    emoji text DEFAULT E'👩‍👩‍👧 é שלום \\u202e \\t "quoted" \\\\ <b>',
    nan numeric DEFAULT 'NaN', endless numeric DEFAULT 1e400, tiny float8 DEFAULT 0.1 + 0.2,
    floats float8[] DEFAULT '{NaN,Infinity,-Infinity,-0}',
    never date DEFAULT 'infinity', ever timestamptz DEFAULT '-infinity',
    moment timestamptz DEFAULT '2020-02-29 12:00:00.5+03', span interval DEFAULT '1 mon 2 days',
    bytes bytea DEFAULT '\\xdeadbeef00', cents money DEFAULT 12.5,
    list int[] DEFAULT '{{1,2},{3,NULL}}', texts text[] DEFAULT '{"a,b",NULL,""}',
    document jsonb DEFAULT '{"a": [1, null]}', plain json DEFAULT '{"b":  1}',
    ranged int4range DEFAULT '[1,5)', bits bit(3) DEFAULT '101', address inet DEFAULT '10.0.0.1/8',
    composed pair DEFAULT '(1,"x y")',
    kept int GENERATED ALWAYS AS (id * 2) STORED
"""


async def test_odd_values(connection: Connection, database_url: str) -> None:
    """Unusual values of every kind are logged exactly as the REST connection renders them."""
    await connection.execute("CREATE TYPE pair AS (n int, s text)")
    await watch(connection, ODD_VALUES.replace("800_000", "800000"))
    await connection.execute("INSERT INTO watched (id) VALUES (1)")
    rest = await connect(database_url)
    try:
        logged = await rest.fetchval("SELECT new::text FROM feed.change WHERE op = 'create'")
        assert logged == await rest.fetchval("SELECT row_to_json(watched)::text FROM watched")
    finally:
        await rest.close()
    row = json.loads(logged)
    assert len(row["huge"]) == 800_000 * 4 and row["composed"] == {"n": 1, "s": "x y"}
    assert row["nan"] == "NaN" and row["never"] == "infinity" and row["kept"] == 2
    await connection.execute("UPDATE watched SET id = id")  # equal, NaN and all
    await connection.execute("UPDATE watched SET huge = huge || '!'")
    assert [op for op, _ in await changes(connection, "watched")] == ["create", "update"]


async def test_virtual_generated_columns(connection: Connection) -> None:
    """A virtual generated column is logged with its value, not as null."""
    if connection.get_server_version().major < 18:
        pytest.skip("virtual generated columns came with Postgres 18")
    await watch(
        connection,
        'id int PRIMARY KEY, n int, gone int, "dou ble" int GENERATED ALWAYS AS (n * 2) VIRTUAL,'
        " after text DEFAULT 'x'",
    )
    await connection.execute("ALTER TABLE watched DROP COLUMN gone")
    await connection.execute("INSERT INTO watched VALUES (1, 5), (2, 6)")
    await connection.execute("UPDATE watched SET n = 7 WHERE id = 1")
    await connection.execute("UPDATE watched SET n = n")
    await connection.execute("UPDATE watched SET id = 3 WHERE id = 2")
    await connection.execute("DELETE FROM watched WHERE id = 1")
    assert [(op, list(row.values())) for op, row in await changes(connection, "watched")] == [
        ("create", [1, 5, 10, "x"]), ("create", [2, 6, 12, "x"]), ("update", [1, 7, 14, "x"]),
        ("destroy", [2, 6, 12, "x"]), ("create", [3, 6, 12, "x"]), ("destroy", [1, 7, 14, "x"]),
    ]  # fmt: skip
    await connection.execute("ALTER TABLE watched ADD later int GENERATED ALWAYS AS (-n) VIRTUAL")
    await connection.execute("SELECT feed.watch('watched', 'watched')")
    await connection.execute("INSERT INTO watched VALUES (4, 1)")
    assert (await changes(connection, "watched"))[-1][1]["later"] == -1


ODD_SETTINGS = [
    "search_path = evil, pg_temp", "timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'",
    "intervalstyle = 'sql_standard'", "bytea_output = 'escape'", "extra_float_digits = -15",
    "quote_all_identifiers = on", "lc_monetary = 'C'", "xmlbinary = 'hex'",
    "session_replication_role = replica",
    "default_transaction_isolation = serializable", "row_security = off",
    "transform_null_equals = on", "plpgsql.variable_conflict = use_variable",
    "check_function_bodies = off", "standard_conforming_strings = off",
]  # fmt: skip


async def test_settings_of_the_writer_do_not_show(connection: Connection) -> None:
    """A session with odd settings and a hostile schema leaves the same log as any other."""
    await watch(
        connection,
        "id int PRIMARY KEY, at timestamptz DEFAULT '2020-01-01Z', f float8 DEFAULT 0.1,"
        " span interval DEFAULT '1 day 2:03', b bytea DEFAULT '\\xdead',"
        " d date DEFAULT '2020-12-31', r regclass DEFAULT 'feed.change'::regclass",
        "public.watched",
    )
    await connection.execute(
        """
        CREATE SCHEMA evil;
        CREATE TABLE evil.change (LIKE feed.change);
        CREATE FUNCTION evil.row_to_json(anyelement) RETURNS json
        LANGUAGE sql AS 'SELECT ''0''::json';
        """
    )
    row = {"id": 1, "at": "2020-01-01T00:00:00+00:00", "f": 0.1, "span": "1 day 02:03:00",
           "b": "\\xdead", "d": "2020-12-31", "r": "feed.change"}  # fmt: skip
    changed = row | {"f": 0.7}
    for setting in ODD_SETTINGS:
        for statement in (
            "TRUNCATE feed.change",
            "INSERT INTO public.watched VALUES (1)",
            "UPDATE public.watched SET f = 0.7",
            "DELETE FROM public.watched",
        ):
            await connection.execute(f"SET {setting}")
            await connection.execute(statement)
            await connection.execute("RESET ALL")
        assert await changes(connection, "watched") == [
            ("create", row), ("update", changed), ("destroy", changed),
        ], setting  # fmt: skip


async def test_a_renamed_key_column(connection: Connection) -> None:
    """After the key column is renamed, writes succeed and rows are paired as before."""
    await watch(connection, "id int PRIMARY KEY, v int")
    await connection.execute("INSERT INTO watched VALUES (1, 1), (2, 1)")
    await connection.execute("ALTER TABLE watched RENAME id TO number")
    await connection.execute("UPDATE watched SET v = 2 WHERE number = 1")
    await connection.execute("SELECT feed.watch('watched', 'watched')")
    await connection.execute("UPDATE watched SET v = 3 WHERE number = 1")
    assert (await changes(connection, "watched"))[2:] == [
        ("update", {"number": 1, "v": 2}), ("update", {"number": 1, "v": 3}),
    ]  # fmt: skip


async def test_a_dropped_key(connection: Connection) -> None:
    """After the primary key is dropped, an update is logged as destroys and creates."""
    await watch(connection, "id int PRIMARY KEY, v int")
    await connection.execute("INSERT INTO watched VALUES (1, 1), (2, 1)")
    await connection.execute("ALTER TABLE watched DROP CONSTRAINT watched_pkey")
    await connection.execute("UPDATE watched SET v = 2 WHERE id = 1")
    assert (await changes(connection, "watched"))[2:] == [
        ("destroy", {"id": 1, "v": 1}), ("create", {"id": 1, "v": 2}),
    ]  # fmt: skip


async def test_changed_columns(connection: Connection) -> None:
    """Columns are added, dropped or retyped, or the table is renamed, after the watch: writes
    succeed.
    """
    await watch(connection, "id int PRIMARY KEY, v int")
    await connection.execute("INSERT INTO watched VALUES (1, 1)")
    await connection.execute("UPDATE watched SET v = 2")
    for change in ("ADD w text DEFAULT 'w'", "DROP v", "ALTER id TYPE bigint", "RENAME TO renamed"):
        await connection.execute(f"ALTER TABLE watched {change}")
    await connection.execute("ALTER TABLE renamed SET SCHEMA feed; SET search_path = feed")
    await connection.execute("UPDATE renamed SET w = 'x'")
    await connection.execute("DELETE FROM renamed")
    assert (await changes(connection, "watched"))[2:] == [
        ("update", {"id": 1, "w": "x"}), ("destroy", {"id": 1, "w": "x"}),
    ]  # fmt: skip


UNWATCHABLE = [
    ("CREATE TABLE t (id int UNIQUE)", "no primary key"),
    ("CREATE VIEW t AS SELECT 1 AS id", "only ordinary, permanent tables"),
    ("CREATE TEMPORARY TABLE t (id int PRIMARY KEY)", "only ordinary, permanent tables"),
    ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)", "only ordinary, permanent tables"),
    ("CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id)", "only ordinary"),
    ("CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE t (PRIMARY KEY (id)) INHERITS (p)",
     "shares its rows"),
    ("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE c () INHERITS (t)", "shares its rows"),
    ("CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id);"
     "CREATE TABLE t PARTITION OF p DEFAULT", "shares its rows"),
    ("SET search_path = feed; ALTER TABLE change RENAME TO t", "the feed's own"),
]  # fmt: skip


async def test_tables_that_cannot_be_watched(connection: Connection) -> None:
    """Watching a table that cannot be captured fails with a sentence that says why."""
    for definition, sentence in UNWATCHABLE:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(definition)
        with pytest.raises(asyncpg.PostgresError, match=sentence):
            await connection.execute("SELECT feed.watch('t', 'topic')")
        await transaction.rollback()


async def test_topics_that_cannot_be_used(connection: Connection) -> None:
    """Watching with a topic that cannot be used in event names fails."""
    for topic in ("", "Thing", "a:b", 'a"b', "feed", "1st", "a" * 64, None):
        with pytest.raises(asyncpg.InvalidParameterValueError, match="cannot be used"):
            await connection.execute("SELECT feed.watch('things', $1)", topic)


async def test_watch_and_unwatch_again(connection: Connection) -> None:
    """Watching twice changes the topic and logs nothing twice; unwatching stops capture and cleans
    up.
    """
    await connection.execute("SELECT feed.watch('things', 'another')")
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    await connection.execute("SELECT feed.unwatch('things'), feed.unwatch('things')")
    await connection.execute("INSERT INTO things (name) VALUES ('b')")
    assert await changes(connection) == []
    assert [row["name"] for _, row in await changes(connection, "another")] == ["a"]
    assert not await connection.fetchval(
        "SELECT count(*) FROM pg_proc WHERE proname LIKE 'capture\\_update\\_%'"
    )


# The bell


@pytest.fixture
async def bells(database_url: str) -> AsyncIterator[list[object]]:
    """The payloads of the notifications received on our channel."""
    heard: list[object] = []
    listener = await connect(database_url)
    await listener.add_listener(CHANNEL, lambda *heard_now: heard.append(heard_now[-1]))
    yield heard
    await listener.close()


@pytest.fixture
async def sleeper(database_url: str) -> AsyncIterator[None]:
    """Sleeps like a feed: holds the lock that makes writers ring."""
    feed = await connect(database_url)
    await feed.execute("SELECT pg_advisory_lock($1, $2)", LOCKS, SLEEPING)
    yield
    await feed.close()


async def settle(connection: Connection, heard: list[object]) -> list[object]:
    """Return what was heard before a mark that is sent now; notifications keep their order."""
    await connection.execute("SELECT pg_notify($1, 'mark')", CHANNEL)
    async with asyncio.timeout(5):
        while "mark" not in heard:
            await asyncio.sleep(0.005)
    return heard[: heard.index("mark")]


async def test_a_sleeper_is_rung_once_a_transaction(
    connection: Connection, bells: list[object], sleeper: None
) -> None:
    """However much a transaction writes, it rings once, and the bell carries nothing."""
    if await connection.fetchval("SHOW max_prepared_transactions") != "0":
        pytest.skip("with two-phase commit enabled the bell is silent")
    async with connection.transaction():
        for name in "abc":
            await connection.execute("INSERT INTO things (name) VALUES ($1)", name)
        await connection.execute("UPDATE things SET info = 'x'")
        await connection.execute("TRUNCATE things")
    assert await settle(connection, bells) == [""]


async def test_statements_that_change_nothing_do_not_ring(
    connection: Connection, bells: list[object], sleeper: None
) -> None:
    """Statements that changed nothing, or were rolled back, do not ring."""
    await connection.execute("UPDATE things SET info = 'x'")
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("INSERT INTO things (name) VALUES ('')")
    assert await settle(connection, bells) == []


async def test_an_awake_feed_is_not_rung(connection: Connection, bells: list[object]) -> None:
    """While no feed is asleep a writer does not ring, and keeps any feed from falling asleep."""
    async with connection.transaction():
        await connection.execute("INSERT INTO things (name) VALUES ('a')")
        assert await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
            " AND classid = $1 AND objid = $2 AND pid = pg_backend_pid()",
            LOCKS, SLEEPING,
        )  # fmt: skip
    assert await settle(connection, bells) == []


async def test_two_phase_commit(private_postgres: Callable[..., Server]) -> None:
    """With two-phase commit enabled, a transaction that wrote changes can be prepared even though a
    feed is asleep; it does not ring.
    """
    url = private_postgres(max_prepared_transactions=2, fsync="off").url
    writer, sleeper = await connect(url), await connect(url)
    heard: list[object] = []
    await sleeper.add_listener(CHANNEL, lambda *heard_now: heard.append(heard_now[-1]))
    await sleeper.execute("SELECT pg_advisory_lock($1, $2)", LOCKS, SLEEPING)
    await writer.execute("BEGIN; INSERT INTO things (name) VALUES ('a'); PREPARE TRANSACTION 'p'")
    assert await changes(writer) == []
    await writer.execute("COMMIT PREPARED 'p'")
    assert await names(writer) == [("create", "a")]
    assert await settle(writer, heard) == []
    await writer.close()
    await sleeper.close()
