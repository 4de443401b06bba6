"""app/database/schema.py declares exactly what a migrated database holds."""

import asyncio

import pytest
from alembic import command
from sqlalchemy import CheckConstraint

from app.database import schema
from app.database.migration import configuration
from tests.support.catalog import Catalog, catalog, declaration, differences
from tests.support.postgres import clone, execute, run

pytestmark = pytest.mark.database


def what_is_declared(server_url: str) -> Catalog:
    """What a database holds that was made from app/database/schema.py alone."""
    with clone(server_url, "template0") as url:
        run(execute(url, *declaration()))
        return run(catalog(url))


@pytest.fixture(scope="module")
def declared(server_url: str) -> Catalog:
    """What app/database/schema.py declares."""
    return what_is_declared(server_url)


async def test_alembic_sees_the_declared_tables_in_a_migrated_database(database_url: str) -> None:
    """Somebody lets alembic propose a revision, and it has nothing to propose."""
    await asyncio.to_thread(command.check, configuration(database_url))


async def test_a_migrated_database_holds_what_is_declared_and_nothing_else(
    database_url: str, declared: Catalog
) -> None:
    """Somebody reads in app/database/schema.py which tables, constraints, functions and triggers
    there are, and the database has those and no others.
    """
    assert differences(declared, await catalog(database_url)) == []


# What somebody does to a migrated database, and the beginning of what is said of it.
CHANGE_CAPTURE = """
    DO $$ BEGIN
        EXECUTE (SELECT replace(pg_get_functiondef(oid), '''create''', '''made''')
                 FROM pg_proc WHERE proname LIKE 'capture\\_%' AND prorettype = 'trigger'::regtype);
    END $$
"""
SABOTAGE = {
    "a CHECK dropped": (
        "ALTER TABLE things DROP CONSTRAINT things_name_check",
        "constraint things_name_check of things is declared but not there",
    ),
    "a CHECK added": (
        "ALTER TABLE feed.change ADD CONSTRAINT change_op_check CHECK (op <> '')",
        "constraint change_op_check of feed.change is there but not declared",
    ),
    "a CHECK changed": (
        """
        ALTER TABLE things DROP CONSTRAINT things_name_check,
            ADD CONSTRAINT things_name_check CHECK (char_length(name) BETWEEN 1 AND 300)
        """,
        "constraint things_name_check of things differs",
    ),
    "a primary key dropped": (
        "ALTER TABLE feed.checkpoint DROP CONSTRAINT checkpoint_pkey",
        "constraint checkpoint_pkey of feed.checkpoint is declared but not there",
    ),
    "an index added": (
        "CREATE INDEX change_at ON feed.change (at)",
        "index feed.change_at is there but not declared",
    ),
    "a default changed": (
        "ALTER TABLE feed.change ALTER at SET DEFAULT now()",
        "column feed.change.at differs",
    ),
    "a table's storage changed": (
        "ALTER TABLE feed.change RESET (autovacuum_vacuum_threshold)",
        "relation feed.change differs",
    ),
    "a function's text changed": (
        """
        CREATE OR REPLACE FUNCTION feed.place() RETURNS text
        LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$SELECT 'here'$$
        """,
        "function feed.place() differs",
    ),
    "a function's settings changed": (
        "ALTER FUNCTION feed.adopt() SECURITY INVOKER",
        "function feed.adopt() differs",
    ),
    "a function's rights changed": (
        "GRANT EXECUTE ON FUNCTION feed.adopt() TO PUBLIC",
        "function feed.adopt() differs",
    ),
    "a function dropped": (
        "DROP FUNCTION feed.disown",
        "function feed.disown(pg_snapshot) is declared but not there",
    ),
    "an unknown function added": (
        "CREATE FUNCTION feed.unknown() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "function feed.unknown() is there but not declared",
    ),
    "a known function with other arguments added": (
        "CREATE FUNCTION feed.place(text) RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "function feed.place(text) is there but not declared",
    ),
    "a capture function's text changed": (CHANGE_CAPTURE, "function feed.capture_things() differs"),
    "a trigger dropped": (
        "DROP TRIGGER rewrite_history ON feed.change",
        "trigger rewrite_history of feed.change is declared but not there",
    ),
    "a trigger disabled": (
        "ALTER TABLE things DISABLE TRIGGER feed_truncate",
        "trigger feed_truncate of things differs",
    ),
    "a trigger changed": (
        """
        CREATE OR REPLACE TRIGGER rewrite_history AFTER DELETE ON feed.change
        FOR EACH STATEMENT EXECUTE FUNCTION feed.rewrite_history()
        """,
        "trigger rewrite_history of feed.change differs",
    ),
    "a trigger added": (
        """
        CREATE TRIGGER unknown BEFORE UPDATE ON things
        FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()
        """,
        "trigger unknown of things is there but not declared",
    ),
}


@pytest.mark.parametrize(("sabotage", "message"), SABOTAGE.values(), ids=SABOTAGE)
async def test_what_is_not_as_declared_is_named(
    database_url: str, declared: Catalog, sabotage: str, message: str
) -> None:
    """Somebody changes one object of a migrated database, and the comparison names it."""
    await execute(database_url, sabotage)
    found = differences(declared, await catalog(database_url))
    assert any(difference.startswith(message) for difference in found), found


async def test_a_declared_check_that_no_revision_makes_is_named(
    server_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody declares a CHECK and writes no revision."""
    monkeypatch.setattr(schema.change, "constraints", set(schema.change.constraints))
    schema.change.append_constraint(CheckConstraint("op <> ''", name="change_op_check"))
    assert differences(what_is_declared(server_url), await catalog(database_url)) == [
        "constraint change_op_check of feed.change is declared but not there"
    ]


async def test_a_function_whose_newest_text_is_in_another_file_is_named(
    server_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody replaces a function in a new file, and schema.py still names the old one."""
    older = (*schema.FUNCTIONS["0003_topics.sql"], "unwatch")
    newer = tuple(name for name in schema.FUNCTIONS["0004_topics.sql"] if name != "unwatch")
    monkeypatch.setitem(schema.FUNCTIONS, "0003_topics.sql", older)
    monkeypatch.setitem(schema.FUNCTIONS, "0004_topics.sql", newer)
    (difference,) = differences(what_is_declared(server_url), await catalog(database_url))
    assert difference.startswith("function feed.unwatch(regclass) differs")
