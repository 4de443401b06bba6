"""Watching a table makes no user's statement fail, and gives nobody additional privileges."""

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server, binary
from app.feed import log
from app.feed.offset import Offset
from tests.support.machine import missing
from tests.support.postgres import with_database
from tests.support.scale import scaled
from tests.support.writing import watch

pytestmark = pytest.mark.database


async def logged(connection: Connection, topic: str = "watched") -> list[tuple[str, Any, Any]]:
    """The log of a topic as (operation, old, new), in log order, without the reloads that watching
    its table has logged.
    """
    rows = await connection.fetch(
        "SELECT op, old::text, new::text FROM feed.change WHERE topic = $1 ORDER BY id", topic
    )
    while rows and rows[0]["op"] == "reload":
        del rows[0]
    return [(op, *(image and json.loads(image) for image in images)) for op, *images in rows]


# Unusual names and types


NAMES = [
    "old_rows", "new_rows", "x", "r", "o", "n", "place", "k1", "k2", "old", "new", "topic", "op",
    "row", "async", "id", "at", "xid", "image", "key", "part", "logged", "nesting", "spelled",
    "mine", "since", "changed", "tg_op", "entry", "suspect", "present",
    "$body$", "$$", "%s", "%I", "%1$s", "'", '"', "\\",
]  # fmt: skip


async def test_columns_of_any_name(connection: Connection) -> None:
    """Tables whose columns have the names that capture itself uses, or contain quotes or the end of
    a function body, are written and captured like any other.
    """
    quoted = ['"' + name.replace('"', '""') + '"' for name in NAMES]
    values = ", ".join("1" for _ in NAMES)
    for key in range(len(NAMES)):
        async with connection.transaction():
            await connection.execute("TRUNCATE feed.change")
            columns = ", ".join(f"{name} int" for name in quoted)
            await watch(connection, f"{columns}, PRIMARY KEY ({quoted[key]})")
            other = quoted[key - 1]
            await connection.execute(f"INSERT INTO watched VALUES ({values})")
            await connection.execute(f"UPDATE watched SET {other} = 2")
            await connection.execute(f"UPDATE watched SET {quoted[key]} = 3")
            await connection.execute("DELETE FROM watched")
            ops = [(op, (new or old)[NAMES[key]]) for op, old, new in await logged(connection)]
            assert ops == [
                ("create", 1),
                ("update", 1),
                ("destroy", 1),
                ("create", 3),
                ("destroy", 3),
            ]
            await connection.execute("DROP TABLE watched")


KEYS = {
    "float8": ("'-0'", "'NaN'"),
    "numeric": ("1.0", "1e400"),
    "mood": ("'sad'", "'glad'"),
    "int4range": ("'[1,5)'", "'empty'"),
    "pair": ("row(1, 'x')", "row(1, NULL)"),
    "pair[]": ("ARRAY[row(1, 'x')::pair]", "'{}'"),
    "positive": ("1", "2"),
    "bytea": (r"'\x00'", r"'\xff'"),
    "timestamptz": ("'infinity'", "'-infinity'"),
    "jsonb": ("'{}'", "'[1]'"),
    "text COLLATE blind": ("'a'", "'b'"),
    "tsvector": ("'a'", "'b'"),
    "interval": ("'1 mon'", "'2 mon'"),
    "odd.vector(2)": ("'[1,2]'", "'[3,4]'"),
}


@pytest.mark.parametrize("kind", KEYS)
async def test_keys_of_any_type(connection: Connection, kind: str) -> None:
    """A key of any type that has an equality, even an extension's in another schema, can be
    inserted, kept, changed and deleted.
    """
    if "vector(" in kind:
        available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'"
        if not await connection.fetchval(available):
            missing("this Postgres lacks the extension vector, which the embedded one has")
        await connection.execute("CREATE SCHEMA odd; CREATE EXTENSION vector SCHEMA odd")
    await connection.execute(
        """
        CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (n int, s text);
        CREATE DOMAIN positive AS int CHECK (VALUE > 0)
        """
    )
    if "blind" in kind:
        try:
            await connection.execute(
                "CREATE COLLATION blind"
                " (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
            )
        except asyncpg.FeatureNotSupportedError:
            pytest.skip(
                "this Postgres was built without ICU, like the embedded one (see make matrix)"
            )
    await watch(connection, f"id {kind} PRIMARY KEY, v int")
    first, second = KEYS[kind]
    await connection.execute(f"INSERT INTO watched VALUES ({first}, 1)")
    await connection.execute("UPDATE watched SET v = 2")
    await connection.execute(f"UPDATE watched SET id = {second}, v = 3")
    await connection.execute("UPDATE watched SET v = 4")
    await connection.execute("DELETE FROM watched")
    ops = [(op, (new or old)["v"]) for op, old, new in await logged(connection)]
    assert ops == [
        ("create", 1), ("update", 2), ("destroy", 2), ("create", 3), ("update", 4), ("destroy", 4),
    ]  # fmt: skip


async def test_a_key_equal_but_written_otherwise(connection: Connection) -> None:
    """A key that stays equal but is written differently is another key to a client, which reads
    JSON.
    """
    await watch(connection, "id numeric PRIMARY KEY, v int")
    await connection.execute("INSERT INTO watched VALUES (1.0, 1)")
    await connection.execute("UPDATE watched SET id = 1.00")
    assert [op for op, _, _ in await logged(connection)] == ["create", "destroy", "create"]


# Unusual rows


async def test_rows_longer_than_the_log_takes(connection: Connection) -> None:
    """A row whose JSON is longer than the log accepts (or, in the long run, than Postgres can
    build) is inserted, updated and deleted; the log records this without the row.
    """
    await connection.execute("CREATE TABLE watched (id int PRIMARY KEY, n int, b bytea)")
    await connection.execute("ALTER TABLE watched ALTER b SET STORAGE EXTERNAL")
    await connection.execute("SELECT feed.watch('watched', 'watched')")
    half = f"decode(repeat('00', {scaled(70_000_000, 270_000_000)}), 'hex')"
    since = Offset(await log.current_position(connection))
    await connection.execute(f"INSERT INTO watched SELECT 1, 1, {half} || {half}")
    await connection.execute("UPDATE watched SET n = 2")
    await connection.execute("UPDATE watched SET n = 3, b = 'x'")
    await connection.execute("DELETE FROM watched")
    ops = [(op, old and old["n"], new and new["n"]) for op, old, new in await logged(connection)]
    assert ops == [
        ("create", None, None), ("update", None, None), ("update", None, 3), ("destroy", 3, None),
    ]  # fmt: skip
    page = await log.read(connection, since)
    assert [change.op for change in page.changes] == ["reload", "reload", "update", "destroy"]


async def test_rows_of_any_depth(connection: Connection) -> None:
    """Documents nested as deep as Postgres accepts, with U+0000 or half a surrogate pair, are
    logged as they are.
    """
    await watch(connection, "id int PRIMARY KEY, doc json, n int")
    for doc in ("[" * 6000 + "]" * 6000, '"\\u0000"', '"\\ud83d"'):
        await connection.execute("INSERT INTO watched VALUES (1, $1::json, 1)", doc)
        await connection.execute("UPDATE watched SET n = 2")
        await connection.execute("DELETE FROM watched")
    rows = await connection.fetch(
        "SELECT op, coalesce(new, old)::text FROM feed.change WHERE op <> 'reload' ORDER BY id"
    )
    assert [row["op"] for row in rows] == ["create", "update", "destroy"] * 3
    assert rows[0][1].count("[") == 6000


async def test_changes_that_cannot_be_put_into_order_are_reported(connection: Connection) -> None:
    """If nested changes cannot be ordered because of a document that cannot be parsed, the
    statement succeeds and the topic must be loaded again.
    """
    await watch(connection, "id int PRIMARY KEY, doc json, n int")
    await connection.execute(
        """
        CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN UPDATE watched SET n = 2 WHERE id = NEW.id; RETURN NULL; END $$;
        CREATE TRIGGER again AFTER INSERT ON watched FOR EACH ROW EXECUTE FUNCTION again();
        """
    )
    await connection.execute("INSERT INTO watched VALUES (1, $1::json, 1)", '"\\u0000"')
    assert [op for op, _, _ in await logged(connection)][-1] == "reload"
    await connection.execute("INSERT INTO watched VALUES (2, '{}', 1)")
    assert [op for op, _, _ in await logged(connection)][-2:] == ["create", "update"]


# Unusual functions and types


@pytest.fixture
async def bob(connection: Connection, database_url: str) -> AsyncIterator[Connection]:
    """A connection with a role that owns a schema and nothing else."""
    role = f"bob_{await connection.fetchval('SELECT current_database()')}"
    await connection.execute(
        f'CREATE ROLE "{role}"; CREATE SCHEMA bob AUTHORIZATION "{role}";'
        f'GRANT CONNECT, TEMPORARY ON DATABASE "{role[4:]}" TO "{role}"'
    )
    opened = await connect(database_url)
    await opened.execute(f'SET ROLE "{role}"; SET search_path = bob')
    yield opened
    await opened.close()
    await connection.execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"')


EVIL = """
    CREATE TYPE e AS ENUM ('x', 'y,"z');
    CREATE TABLE evidence (who text);
    CREATE FUNCTION evil(e) RETURNS json LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO bob.evidence VALUES (current_user);
        RETURN '"evil"';
    END $$;
    CREATE TYPE pair AS (e e, n int);
    CREATE DOMAIN tame AS e;
"""
CAST = "CREATE CAST (e AS json) WITH FUNCTION evil(e)"
COLUMNS = "id int PRIMARY KEY, e e, list e[], pair pair, tame tame, n int"
ROWS = """
    INSERT INTO t VALUES (1, 'x', '{x,"y,\\"z",NULL}', ROW('x', 2), 'x', 3);
    INSERT INTO t (id) VALUES (2);
"""
TEXTS: list[dict[str, Any]] = [
    {"id": 1, "e": "x", "list": ["x", 'y,"z', None], "pair": "(x,2)", "tame": "x", "n": 3},
    {"id": 2, "e": None, "list": None, "pair": None, "tame": None, "n": None},
]


@pytest.mark.parametrize("when", ["before the watch", "after the watch", "with a planned capture"])
async def test_a_types_cast_never_runs_with_the_feeds_rights(
    connection: Connection, bob: Connection, when: str
) -> None:
    """The owner of a watched table creates a cast to json for a type of its columns, at any time:
    it is never called, and the columns are logged as text.
    """
    await bob.execute(EVIL)
    if when == "before the watch":
        await bob.execute(f"{CAST}; CREATE TABLE t ({COLUMNS})")
        await connection.execute("SELECT feed.watch('bob.t', 'watched')")
    else:
        await bob.execute("CREATE TABLE t (id int PRIMARY KEY)")
        await connection.execute("SELECT feed.watch('bob.t', 'watched')")
        if when == "with a planned capture":
            for id in range(10, 20):
                await bob.execute(f"INSERT INTO t VALUES ({id})")
                await bob.execute("DELETE FROM t")
        for column in COLUMNS.split(", ")[1:]:
            await bob.execute(f"ALTER TABLE t ADD {column}")
        await bob.execute(CAST)
        await connection.execute("TRUNCATE feed.change")
    await bob.execute(ROWS)
    await bob.execute("SET array_nulls = off; UPDATE t SET n = 4 WHERE id = 1")
    await bob.execute("DELETE FROM t WHERE id = 1")
    assert await logged(connection) == [
        ("create", None, TEXTS[0]), ("create", None, TEXTS[1]),
        ("update", TEXTS[0], TEXTS[0] | {"n": 4}), ("destroy", TEXTS[0] | {"n": 4}, None),
    ]  # fmt: skip
    assert await connection.fetchval("SELECT count(*) FROM bob.evidence") == 0


async def test_ranges_are_only_as_trusted_as_what_they_consist_of(
    connection: Connection, bob: Connection
) -> None:
    """The feed's owner has a range type over a domain of another role, whose check would run."""
    await bob.execute("CREATE DOMAIN tame AS int CHECK (value > 0)")
    await connection.execute("CREATE TYPE spans AS RANGE (SUBTYPE = bob.tame)")
    trusts = "SELECT feed.trusts_type($1::text::regtype, from_text => true)"
    found = [await connection.fetchval(trusts, name) for name in ("spans", "spans[]", "int4range")]
    assert found == [False, False, True]


async def test_types_of_roles_that_can_act_as_the_feed_are_rendered_whole(
    connection: Connection,
) -> None:
    """An enum and a composite of the feed's owner are logged as row_to_json renders them."""
    await connection.execute("CREATE TYPE e AS ENUM ('x'); CREATE TYPE pair AS (e e, n int)")
    await watch(connection, "id int PRIMARY KEY, list e[], pair pair")
    await connection.execute("INSERT INTO watched VALUES (1, '{x}', ROW('x', 2))")
    assert await logged(connection) == [
        ("create", None, {"id": 1, "list": ["x"], "pair": {"e": "x", "n": 2}})
    ]


async def test_a_capture_function_that_is_there_already(connection: Connection) -> None:
    """A function with the name of a new table's capture, as a restored dump leaves them, is
    replaced if it is unused, and kept if another table uses it.
    """
    await watch(connection, "id int PRIMARY KEY")
    used = await connection.fetchval("SELECT 'capture_' || 'watched'::regclass::oid")
    await connection.execute("CREATE TABLE other (id int PRIMARY KEY)")
    wanted = await connection.fetchval("SELECT 'capture_' || 'other'::regclass::oid")
    await connection.execute(f"ALTER FUNCTION feed.{used}() RENAME TO {wanted}")
    await connection.execute("SELECT feed.watch('other', 'other')")
    await connection.execute("INSERT INTO watched VALUES (1); INSERT INTO other VALUES (2)")
    rows = await connection.fetch(
        "SELECT topic, new ->> 'id' AS id FROM feed.change WHERE op = 'create' ORDER BY id"
    )
    assert [tuple(row) for row in rows] == [("watched", "1"), ("other", "2")]
    await connection.execute("SELECT feed.unwatch('other'), feed.unwatch('watched')")
    assert not await connection.fetchval(
        "SELECT count(*) FROM pg_proc WHERE proname ~ '^capture_[0-9]' AND prosrc !~ 'thing'"
    )


async def test_columns_changed_under_a_planned_capture(connection: Connection) -> None:
    """In a session that has captured before, columns and the key are added, renamed, retyped and
    dropped: each later write succeeds and is logged with the table's columns at that time.
    """
    await watch(connection, "id int PRIMARY KEY, v int")
    for _ in range(10):
        await connection.execute("INSERT INTO watched VALUES (1, 1)")
        await connection.execute("UPDATE watched SET v = 2")
        await connection.execute("DELETE FROM watched")
    await connection.execute("INSERT INTO watched VALUES (1, 1), (2, 1)")
    for alter, update in (
        ("ADD w int DEFAULT 5", "w = 6"),
        ("RENAME id TO number", "w = 7"),
        ("ALTER number TYPE text", "w = 8"),
        ("DROP v", "w = 9"),
        ("DROP CONSTRAINT watched_pkey", "w = 10"),
        ("ADD PRIMARY KEY (w, number)", "w = 11"),
    ):
        await connection.execute(f"ALTER TABLE watched {alter}")
        await connection.execute("TRUNCATE feed.change")
        await connection.execute(f"UPDATE watched SET {update}")
        last = (await logged(connection))[-1]
        assert json.dumps(last[2]) == await connection.fetchval(
            "SELECT json_strip_nulls(row_to_json(watched))::text FROM watched"
            " WHERE ctid = (SELECT max(ctid) FROM watched)"
        ) or last[2]["w"] == int(update[4:])
    await connection.execute("DELETE FROM watched")


async def test_what_may_be_lost_is_marked(connection: Connection) -> None:
    """Changes written without waiting for the disk are marked; others are not."""
    for setting in ("off", "on", "local"):
        await connection.execute(f"SET synchronous_commit = {setting}")
        await connection.execute("INSERT INTO things (name) VALUES ($1)", setting)
        await connection.execute(
            "UPDATE things SET info = 'x'; DELETE FROM things; TRUNCATE things"
        )
    rows = await connection.fetch("SELECT async FROM feed.change ORDER BY id")
    assert [row["async"] for row in rows] == [True] * 4 + [None] * 8


# Where the history begins


async def test_a_copy_of_the_database_is_another_history(
    connection: Connection, database_url: str, server_url: str
) -> None:
    """A copy of a database on the same cluster has another epoch, and so has a dump that is
    restored over the database it came from.
    """
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    epoch = await connection.fetchval("SELECT feed.epoch()")
    name = await connection.fetchval("SELECT current_database()")
    dumped = await asyncio.to_thread(
        subprocess.run, [binary("pg_dump"), "--clean", "--if-exists", database_url],
        check=True, capture_output=True,
    )  # fmt: skip
    await connection.close()
    admin = await connect(server_url)
    await admin.execute(f'CREATE DATABASE "{name}_copy" TEMPLATE "{name}"')
    copy = await connect(with_database(server_url, f"{name}_copy"))
    assert await copy.fetchval("SELECT feed.epoch()") != epoch
    await copy.close()
    await admin.execute(f'DROP DATABASE "{name}_copy"')
    await admin.close()
    # Servers before 17 do not know the setting that a newer pg_dump resets.
    script = dumped.stdout.replace(b"SET transaction_timeout = 0;", b"")
    await asyncio.to_thread(
        subprocess.run, [binary("psql"), "-q", "-v", "ON_ERROR_STOP=1", database_url],
        input=script, check=True, capture_output=True,
    )  # fmt: skip
    restored = await connect(database_url)
    assert await restored.fetchval("SELECT feed.epoch()") != epoch
    await restored.execute("INSERT INTO things (name) VALUES ('b')")
    await restored.execute("SELECT feed.check_topics()")
    await restored.execute("UPDATE things SET info = 'x'")
    ops = await restored.fetch("SELECT op FROM feed.change WHERE topic = 'thing' ORDER BY xid, id")
    assert [row["op"] for row in ops] == ["create", "create", "reload", "update", "update"]
    await restored.close()


async def test_a_log_from_a_cluster_that_was_further_is_emptied(
    private_postgres: Callable[..., Server],
) -> None:
    """A log whose history began with the very next transaction id comes from another cluster."""
    connection = await connect(private_postgres(fsync="off").url)
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    await connection.execute(
        "UPDATE feed.state SET redrawn = (pg_current_xact_id()::text::bigint + 1)::text::xid8"
    )
    await connection.execute("SELECT feed.adopt()")
    assert await connection.fetchval("SELECT count(*) FROM feed.change") == 0
    await connection.close()


async def test_a_change_from_the_future_holds_back_nothing(
    private_postgres: Callable[..., Server],
) -> None:
    """Changes written while the clock was a year ahead are pruned together with later ones."""
    connection = await connect(private_postgres(fsync="off").url)
    await connection.execute("INSERT INTO things (name) SELECT i FROM generate_series(1, 30) AS i")
    await connection.execute(
        """
        ALTER TABLE feed.change DISABLE TRIGGER rewrite_history;
        UPDATE feed.change SET at = at + interval '1 year' WHERE id BETWEEN 5 AND 20;
        UPDATE feed.change SET at = at - interval '1 day' WHERE id > 20 OR id < 5;
        ALTER TABLE feed.change ENABLE TRIGGER rewrite_history;
        """
    )
    await connection.execute("INSERT INTO things (name) VALUES ('young')")
    while await log.prune(connection, 3600, 10**9, 7):
        pass
    assert await connection.fetchval("SELECT count(*) FROM feed.change") == 1
    await connection.close()


async def test_many_changes_from_the_future_take_no_longer(
    private_postgres: Callable[..., Server],
) -> None:
    """The clock was ahead while a hundred thousand changes were written, in one transaction and in
    many: each step of pruning looks at few of them.
    """
    connection = await connect(private_postgres(fsync="off", max_wal_size="4GB").url)
    await connection.execute(
        "INSERT INTO feed.change (topic, op, at)"
        " SELECT 'thing', 'truncate', now() + '1 day' FROM generate_series(1, 60000)"
    )
    await connection.execute(
        "DO $$ BEGIN FOR n IN 1 .. 40000 LOOP INSERT INTO feed.change (topic, op, at)"
        " VALUES ('thing', 'truncate', now() + '1 day'); COMMIT; END LOOP; END $$"
    )
    await connection.execute(
        "INSERT INTO feed.change (topic, op, at)"
        " VALUES ('thing', 'truncate', now() - interval '2 hours')"
    )
    steps, began = 0, time.monotonic()
    while await log.prune(connection, 3600, 10**9, 2000):
        steps += 1
    assert await connection.fetchval("SELECT count(*) FROM feed.change") == 0
    assert steps == 51
    assert time.monotonic() - began < 25
    await connection.close()


async def test_ids_are_stepped_over_in_sql_as_in_python(connection: Connection) -> None:
    """feed.xid_after and feed.xid_before skip the ids that Postgres skips."""
    for xid in (3, 2**32 - 2, 2**32 - 1, 2**32 + 3, 9 * 2**32 - 1, 2**40 + 7):
        after = await connection.fetchval("SELECT feed.xid_after($1::text::xid8)::text", str(xid))
        assert int(after) == log_after(xid)
        before = await connection.fetchval("SELECT feed.xid_before($1::text::xid8)::text", after)
        assert int(before) == xid


def log_after(xid: int) -> int:
    """The next id whose lower half is at least 3."""
    return next(number for number in range(xid + 1, xid + 6) if number % 2**32 >= 3)


async def test_settings_that_a_trigger_resets(connection: Connection) -> None:
    """A trigger resets what capture has recorded for the statement: the log is correct all the
    same.
    """
    await watch(connection, "id int PRIMARY KEY, n int NOT NULL DEFAULT 0")
    await connection.execute("""
        CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RESET ALL;
            UPDATE watched SET n = n + 1 WHERE id = new.id AND n < 3;
            RETURN NULL;
        END $$;
        CREATE TRIGGER again AFTER INSERT OR UPDATE ON watched
            FOR EACH ROW EXECUTE FUNCTION again()
    """)
    async with connection.transaction():
        await connection.execute("INSERT INTO watched VALUES (1)")
        await connection.execute("INSERT INTO watched VALUES (2)")
    assert [(op, new["id"], new["n"]) for op, _, new in await logged(connection)] == [
        *[("create" if n == 0 else "update", 1, n) for n in range(4)],
        *[("create" if n == 0 else "update", 2, n) for n in range(4)],
    ]


async def test_a_hostile_setting(connection: Connection) -> None:
    """A session that overwrites capture's settings breaks its own statements and no others."""
    await connection.execute("INSERT INTO things (name) VALUES ('a')")
    setting = await connection.fetchval("SELECT 'feed.nesting_' || 'things'::regclass::oid")
    await connection.execute("SELECT set_config($1, 'nonsense', false)", setting)
    with pytest.raises(asyncpg.DataError):
        await connection.execute("INSERT INTO things (name) VALUES ('b')")
    await connection.execute("SELECT set_config($1, '', false)", setting)
    await connection.execute("INSERT INTO things (name) VALUES ('b')")
