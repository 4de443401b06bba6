"""Migrations: up and down lead where they should, also for two nodes at once."""

import asyncio

import pytest
from alembic import command

from app.database import connect
from app.migration import configuration, migrate

pytestmark = pytest.mark.database

# Whatever a user could notice of a schema, as lines of text. (No attoptions: a Postgres was seen
# that writes a number of its own there, another one for each table made.)
CATALOG = """
    SELECT format('%s %s %s', 'table', c.oid::regclass, c.reloptions)
    FROM pg_class AS c WHERE relkind IN ('r', 'v', 'S') AND relnamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT format('%s %s', attrelid::regclass, to_jsonb(a)
                  - '{attrelid,atttypid,attoptions}'::text[]
                  || jsonb_build_object('type', atttypid::regtype))
    FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = attrelid
    WHERE relkind IN ('r', 'v') AND relnamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT format('%s DEFAULT %s', adrelid::regclass, pg_get_expr(adbin, adrelid)) FROM pg_attrdef
    UNION ALL
    SELECT format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE connamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT indexdef FROM pg_indexes WHERE schemaname::regnamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT pg_get_triggerdef(oid) || tgenabled::text FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT pg_get_functiondef(p.oid) || coalesce(proacl::text, '')
    FROM pg_proc AS p WHERE pronamespace = ANY ($1::regnamespace[])
    ORDER BY 1
"""
SCHEMAS = "SELECT array_agg(nspname) FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema$'"


async def catalog(url: str) -> list[str]:
    """Everything in a database that somebody made, as sorted lines."""
    connection = await connect(url)
    try:
        schemas = await connection.fetchval(SCHEMAS)
        rows = await connection.fetch(CATALOG, schemas)
        # The name of the function that captures updates holds its table's number.
        table = await connection.fetchval("SELECT to_regclass('things')::oid::text")
        return [row[0].replace(table or "-", "TABLE") for row in rows] + sorted(schemas)
    finally:
        await connection.close()


async def test_up_down_up(empty_database_url: str) -> None:
    """Who migrates up, all the way down and up again has the schema of the first time, and after
    the way down nothing is left.
    """
    url = empty_database_url
    before = await catalog(url)
    await asyncio.to_thread(migrate, url)
    first = await catalog(url)
    await asyncio.to_thread(command.downgrade, configuration(url), "base")
    left = [line for line in await catalog(url) if "alembic_version" not in line]
    assert left == before
    await asyncio.to_thread(migrate, url)
    assert await catalog(url) == first
    assert any("feed.change" in line for line in first)


async def test_each_step_down_and_up(empty_database_url: str) -> None:
    """Who goes one step down and up again, from each version, has the same schema."""
    url = empty_database_url
    await asyncio.to_thread(migrate, url)
    full = await catalog(url)
    await asyncio.to_thread(command.downgrade, configuration(url), "-1")
    assert not any("feed." in line for line in await catalog(url))
    await asyncio.to_thread(migrate, url)
    assert await catalog(url) == full


async def test_tables_are_what_was_migrated(database_url: str) -> None:
    """The tables in app/schema.py differ in nothing from a migrated database."""
    await asyncio.to_thread(command.check, configuration(database_url))


async def test_two_at_once(empty_database_url: str) -> None:
    """Of two nodes that start together one migrates, and the other finds it done."""
    await asyncio.gather(*(asyncio.to_thread(migrate, empty_database_url) for _ in range(2)))
    connection = await connect(empty_database_url)
    try:
        assert await connection.fetchval("SELECT count(*) FROM alembic_version") == 1
        await connection.execute("INSERT INTO things (name) VALUES ('a')")
        assert await connection.fetchval("SELECT count(*) FROM feed.change") == 1
    finally:
        await connection.close()


async def test_migrating_again_changes_nothing(database_url: str) -> None:
    """Who migrates a migrated database keeps data and history."""
    connection = await connect(database_url)
    try:
        await connection.execute("INSERT INTO things (name) VALUES ('a')")
        before = await connection.fetchval("SELECT feed.epoch()")
        await asyncio.to_thread(migrate, database_url)
        assert await connection.fetchval("SELECT feed.epoch()") == before
        assert await connection.fetchval("SELECT count(*) FROM things") == 1
    finally:
        await connection.close()
