"""What capture must not cost: time that grows with the square of what is written."""

import pytest

from app.database import Connection

pytestmark = pytest.mark.database

# Either takes well below a second on an idle machine, and minutes where each row is compared with
# every other.
LIMIT = "SET statement_timeout = '30s'"


async def test_a_large_update_after_small_ones(connection: Connection) -> None:
    """After updates of single rows, which had the capture planned, one of 20,000 rows is quick."""
    await connection.execute(LIMIT)
    await connection.execute("INSERT INTO things (name) SELECT i FROM generate_series(1, 20000) i")
    for id in range(20):
        await connection.execute("UPDATE things SET info = 'x' WHERE id = $1", id)
    await connection.execute("UPDATE things SET info = 'y'")
    assert await connection.fetchval("SELECT count(*) FROM feed.change") == 20_000 + 19 + 20_000


async def test_many_statements_inside_one(connection: Connection) -> None:
    """An INSERT of 10,000 rows, each completed by a trigger's UPDATE, is quick, and each row is
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
