"""Compares a database with what app/database/schema.py declares, both as Postgres tells it.

Nothing is parsed: the declaration is carried out in a database of its own, and two catalogs are
compared. So what is declared must exist, and what exists must be declared.
"""

import hashlib
import json
import re
from difflib import ndiff
from typing import TypeAlias

from sqlalchemy import create_mock_engine
from sqlalchemy.engine.mock import MockConnection

from app.database import schema
from app.database.connections import connect
from migrations.sql_files import SQL

# Names of objects, and what Postgres says of each.
Catalog: TypeAlias = dict[str, str]

# Whatever a user could notice of a schema, the same on every version of Postgres. (No attoptions: a
# Postgres was seen that writes a number of its own there, another one for each table made.)
OBJECTS = """
    SELECT format('schema %s', oid::regnamespace) AS name, nspacl::text AS definition
    FROM pg_namespace WHERE oid = ANY ($1::regnamespace[])
    UNION ALL
    SELECT format('relation %s', oid::regclass),
           concat_ws(' ', relkind, relpersistence, relreplident, relrowsecurity,
                     relforcerowsecurity, reloptions, relacl)
    FROM pg_class WHERE relkind NOT IN ('i', 'I', 't') AND relnamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT format('column %s.%s', attrelid::regclass, attname),
           concat_ws(' ', format_type(atttypid, atttypmod),
                     'COLLATE ' || nullif(attcollation, typcollation)::regcollation::text,
                     CASE WHEN attnotnull THEN 'NOT NULL' END,
                     'IDENTITY ' || nullif(attidentity::text, ''),
                     'GENERATED ' || nullif(attgenerated::text, ''),
                     'DEFAULT ' || pg_get_expr(adbin, adrelid),
                     attstorage, nullif(attcompression::text, ''), attacl)
    FROM pg_attribute
    JOIN pg_class ON pg_class.oid = attrelid
    JOIN pg_type ON pg_type.oid = atttypid
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE relkind IN ('r', 'v') AND relnamespace = ANY ($1::regnamespace[]) AND NOT attisdropped
    UNION ALL
    SELECT format('sequence %s', seqrelid::regclass),
           (to_jsonb(pg_sequence) - 'seqrelid' - 'seqtypid')::text
    FROM pg_sequence
    UNION ALL
    -- NOT NULL (n) is a constraint from Postgres 18 on; before that it only says so in its column.
    SELECT format('constraint %s of %s', conname, conrelid::regclass), pg_get_constraintdef(oid)
    FROM pg_constraint WHERE contype <> 'n' AND connamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT format('index %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relnamespace = ANY ($1::regnamespace[])
    UNION ALL
    SELECT format('trigger %s of %s', tgname, tgrelid::regclass),
           concat_ws(' ', pg_get_triggerdef(oid), 'ENABLED', tgenabled)
    FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT format('function %s', oid::regprocedure),
           concat(CASE WHEN prokind <> 'a' THEN pg_get_functiondef(oid) END, (
               SELECT string_agg(CASE grantee WHEN 0 THEN 'PUBLIC'
                                              WHEN proowner THEN 'owner'
                                              ELSE grantee::regrole::text END, ' ')
               FROM aclexplode(coalesce(proacl, acldefault('f', proowner)))))
    FROM pg_proc WHERE pronamespace = ANY ($1::regnamespace[])
"""
SCHEMAS = "SELECT array_agg(nspname) FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema$'"

# The function that captures changes has its table's number in its name, and its key's in its text.
NUMBERS = "SELECT to_regclass('things')::oid AS things, to_regclass('things_pkey')::oid AS key"


async def catalog(url: str) -> Catalog:
    """Everything in a database that somebody made, except alembic's own table, and the schema where
    it is alone.
    """
    connection = await connect(url)
    try:
        rows = await connection.fetch(OBJECTS, await connection.fetchval(SCHEMAS))
        numbers = await connection.fetchrow(NUMBERS)
    finally:
        await connection.close()

    def without_numbers(text: str) -> str:
        for name, number in numbers.items():
            text = re.sub(rf"(?<!\d){number}(?!\d)", name, text)
        return text

    found = {
        without_numbers(row["name"]): without_numbers(row["definition"] or "")
        for row in rows
        if "alembic_version" not in row["name"]
    }
    if not any(" feed." in name for name in found):
        found.pop("schema feed", None)
    return found


def declaration() -> list[str]:
    """The statements that make in an empty database what app/database/schema.py declares."""
    tables: list[str] = []
    engine: MockConnection = create_mock_engine(
        "postgresql+asyncpg://",
        lambda statement, *_, **__: tables.append(str(statement.compile(dialect=engine.dialect))),
    )
    schema.metadata.create_all(engine, checkfirst=False)
    functions = [
        text for file, names in schema.FUNCTIONS.items() for text in function_texts(file, names)
    ]
    # Defaults call functions, and functions use tables.
    return [
        "CREATE SCHEMA feed",
        "SET check_function_bodies = off",
        *functions,
        *tables,
        schema.TRIGGERS,
        schema.RIGHTS,
    ]


def function_texts(file: str, names: tuple[str, ...]) -> list[str]:
    """The statements in a file of migrations/sql that make these functions."""
    sql = (SQL / file).read_text(encoding="utf-8")
    texts = []
    for name in names:
        begin = rf"^CREATE (?:OR REPLACE )?FUNCTION feed\.{name}\("
        found = re.findall(rf"{begin}.*?^AS \$\w*\$$.*?^\$\w*\$;$", sql, re.MULTILINE | re.DOTALL)
        assert found, f"app/database/schema.py says that {file} makes feed.{name}"
        texts += found
    return texts


def differences(declared: Catalog, found: Catalog) -> list[str]:
    """What is not as declared, each a message that begins with the object."""
    missing = [f"{name} is declared but not there" for name in declared.keys() - found.keys()]
    unknown = [f"{name} is there but not declared" for name in found.keys() - declared.keys()]
    changed = [
        f"{name} differs from what is declared:\n"
        + "\n".join(ndiff(declared[name].splitlines(), found[name].splitlines()))
        for name in declared.keys() & found.keys()
        if declared[name] != found[name]
    ]
    return sorted(missing + unknown + changed)


def digest(found: Catalog) -> str:
    """A short text that differs where catalogs differ."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]
