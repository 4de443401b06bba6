"""What capture must never cost: time quadratic in the number of rows written."""

import pytest

from app.database.connections import Connection

pytestmark = pytest.mark.database

# Each takes well under a second on an idle machine, and minutes if every row is compared with every
# other.
LIMIT = "SET statement_timeout = '30s'"


async def test_a_large_update_after_small_ones(connection: Connection) -> None:
    """After updates of single rows, for which capture was planned, an update of 20,000 rows is
    fast.
    """
    await connection.execute(LIMIT)
    await connection.execute("INSERT INTO things (name) SELECT i FROM generate_series(1, 20000) i")
    for id in range(20):
        await connection.execute("UPDATE things SET info = 'x' WHERE id = $1", id)
    await connection.execute("UPDATE things SET info = 'y'")
    assert await connection.fetchval("SELECT count(*) FROM feed.change") == 20_000 + 19 + 20_000


async def test_many_statements_inside_one(connection: Connection) -> None:
    """An INSERT of 10,000 rows, each completed by a trigger's UPDATE, is fast, and each row is
    created before it is updated.
    """
    await connection.execute(LIMIT)
    await connection.execute(
        """
        CREATE FUNCTION complete() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN UPDATE things SET info = 'done' WHERE id = NEW.id; RETURN NULL; END $$;
        CREATE TRIGGER complete AFTER INSERT ON things
        FOR EACH ROW EXECUTE FUNCTION complete();
        INSERT INTO things (name) SELECT i FROM generate_series(1, 10000) i
        """
    )
    ops = await connection.fetch(
        "SELECT array_agg(op ORDER BY id) AS ops, count(*) FROM feed.change GROUP BY new ->> 'id'"
    )
    assert len(ops) == 10_000 and all(row["ops"] == ["create", "update"] for row in ops)


async def called_by(connection: Connection, statements: list[str]) -> dict[str, int]:
    """Return which functions of the feed some statements call, and how often, once planned."""
    for statement in statements:
        await connection.execute(statement)
    await connection.execute("SET track_functions = 'all'")
    async with connection.transaction():
        for statement in statements:
            await connection.execute(statement)
        called = await connection.fetch(
            "SELECT funcname, calls FROM pg_stat_xact_user_functions WHERE schemaname = 'feed'"
        )
    return dict(called)


async def test_usual_statements_call_nothing_but_capture(connection: Connection) -> None:
    """Ordinary statements, including those that match or change no row, take no slow path."""
    statements = [
        "INSERT INTO things (name) VALUES ('a'), ('b')",
        "UPDATE things SET info = 'x' WHERE name = 'a'",
        "UPDATE things SET info = 'x'",
        "UPDATE things SET info = info",
        "UPDATE things SET info = 'y' WHERE false",
        "DELETE FROM things WHERE false",
        "DELETE FROM things",
    ]
    capture = await connection.fetchval("SELECT 'capture_' || 'things'::regclass::oid")
    assert await called_by(connection, statements) == {
        "begin_statement": len(statements), capture: len(statements),
    }  # fmt: skip


async def test_what_is_in_order_is_not_put_into_order(connection: Connection) -> None:
    """An upsert is two statements to its triggers but changes no row twice, so it is left as
    logged, and so are a trigger's changes to other rows.
    """
    await connection.execute(
        """
        INSERT INTO things (name) VALUES ('counter');
        CREATE FUNCTION count_one() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN UPDATE things SET info = info || 'x' WHERE name = 'counter'; RETURN NULL; END $$;
        CREATE TRIGGER count AFTER INSERT ON things
        FOR EACH ROW WHEN (new.name <> 'a') EXECUTE FUNCTION count_one()
        """
    )
    called = await called_by(
        connection,
        [
            "INSERT INTO things (name) VALUES ('a') ON CONFLICT (name) DO UPDATE SET info = 'x'",
            "INSERT INTO things (name, info) VALUES ('a', random()::text), ('b', '')"
            " ON CONFLICT (name) DO UPDATE SET info = excluded.info",
            "DELETE FROM things WHERE name = 'b'",
        ],
    )
    assert called["is_in_order"] and "reorder" not in called


async def test_capture_is_never_compiled(connection: Connection) -> None:
    """Just-in-time compilation takes seconds for what capture does in a millisecond. Not every
    Postgres has it, so this checks the settings.
    """
    pinned = await connection.fetch(
        """
        SELECT proname, proconfig FROM pg_proc
        WHERE pronamespace = 'feed'::regnamespace AND proname ~ '^(settle$|capture_[0-9])'
        """
    )
    assert len(pinned) == 2 and all("jit=off" in row["proconfig"] for row in pinned)
