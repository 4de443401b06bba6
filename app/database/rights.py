"""Which privileges a role lacks to migrate a database or to serve it, and the grants that help."""

from collections.abc import Awaitable, Callable

from app.database.connections import Connection, Refusal

Rights = Callable[[Connection], Awaitable[None]]  # raises Refusal if the role lacks any

# Revisions create temporary tables. Whoever owns the schema `feed` owns what is in it.
MIGRATING = """
    SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
           pg_is_in_recovery() AS is_standby,
           ARRAY(SELECT needed FROM unnest(ARRAY['CREATE', 'TEMPORARY']) AS needed
                 WHERE NOT has_database_privilege(current_database(), needed)
                       AND (needed <> 'CREATE' OR nspowner IS NULL)) AS missing,
           quote_ident(pg_get_userbyid(nspowner)) AS owner,
           pg_has_role(nspowner, 'USAGE') AS is_owner,
           (SELECT rolsuper FROM pg_roles WHERE pg_roles.oid = nspowner) AS owner_is_superuser
    FROM (SELECT) AS one LEFT JOIN pg_namespace ON nspname = 'feed'
"""

# A row if the role may not use the schema, or one of the objects in it.
SERVING = """
    SELECT quote_ident(current_user) AS role, quote_ident(pg_get_userbyid(nspowner)) AS owner
    FROM pg_namespace
    WHERE nspname = 'feed'
      AND (NOT has_schema_privilege(pg_namespace.oid, 'USAGE')
           OR EXISTS (SELECT FROM pg_class
                      WHERE relnamespace = pg_namespace.oid AND relkind = 'r'
                            AND NOT has_table_privilege(pg_class.oid, 'SELECT'))
           OR EXISTS (SELECT FROM pg_proc
                      WHERE pronamespace = pg_namespace.oid AND prorettype <> 'trigger'::regtype
                            AND NOT has_function_privilege(pg_proc.oid, 'EXECUTE')))
"""

MAKING_THE_SAMPLE = """
    SELECT quote_ident(current_user) AS role, pg_namespace.oid IS NOT NULL AS has_schema
    FROM (SELECT) AS one LEFT JOIN pg_namespace ON nspname = 'public'
    WHERE (has_schema_privilege(pg_namespace.oid, 'USAGE')
           AND has_schema_privilege(pg_namespace.oid, 'CREATE')) IS NOT TRUE
"""
READING_THE_SAMPLE = """
    SELECT quote_ident(current_user) AS role
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = 'public' AND relname = 'things'
          AND NOT (has_schema_privilege(pg_namespace.oid, 'USAGE')
                   AND has_table_privilege(pg_class.oid, 'SELECT'))
"""


async def refuse_migrating(connection: Connection) -> None:
    """Raise Refusal if the role cannot run revisions."""
    found = await connection.fetchrow(MIGRATING)
    role, database, owner = found["role"], found["database"], found["owner"]
    if found["is_standby"]:
        raise Refusal("The database is a read-only standby: migrate the primary instead.")
    if found["missing"]:
        raise Refusal(
            f"The role {role} may not migrate this database: its owner must run"
            f" GRANT {', '.join(found['missing'])} ON DATABASE {database} TO {role}."
        )
    if found["is_owner"] is False:
        raise Refusal(
            f"The role {role} may not migrate this database: the schema feed belongs to {owner},"
            " so connect as that role or as a member of it."
        )


async def refuse_watching(connection: Connection) -> None:
    """Raise Refusal if the role may neither watch nor unwatch any table."""
    found = await connection.fetchrow(MIGRATING)
    role, owner = found["role"], found["owner"]
    if found["is_owner"] is False:
        grant = "" if found["owner_is_superuser"] else f", or run GRANT {owner} TO {role}"
        raise Refusal(
            f"The role {role} may not watch or unwatch tables: only the role that installed"
            f" Tablecast may. Connect as {owner}{grant}."
        )


async def refuse_making_the_sample(connection: Connection) -> None:
    """Raise Refusal if the role cannot create the sample table."""
    found = await connection.fetchrow(MAKING_THE_SAMPLE)
    if found is not None and not found["has_schema"]:
        raise Refusal(
            "There is no schema public for the sample table: create it, or set THINGS=no to do"
            " without the sample."
        )
    if found is not None:
        raise Refusal(
            f"The role {found['role']} may not create the sample table public.things: run"
            f" GRANT USAGE, CREATE ON SCHEMA public TO {found['role']}, or set THINGS=no to do"
            " without it."
        )


async def refuse_reading_the_sample(connection: Connection) -> None:
    """Raise Refusal if the role may not read the sample table."""
    found = await connection.fetchrow(READING_THE_SAMPLE)
    if found is not None:
        role = found["role"]
        raise Refusal(
            f"The role {role} may not read the sample table public.things: run GRANT USAGE ON"
            f" SCHEMA public TO {role}; GRANT SELECT, INSERT, UPDATE, DELETE ON public.things TO"
            f" {role}; or set THINGS=no to do without it."
        )


async def refuse_serving(connection: Connection) -> None:
    """Raise Refusal if the role may not use the feed that is installed."""
    found = await connection.fetchrow(SERVING)
    if found is not None:
        role = found["role"]
        raise Refusal(
            f"The role {role} may not use everything in the schema feed: the role"
            f" {found['owner']} must run GRANT USAGE ON SCHEMA feed TO {role};"
            f" GRANT SELECT ON ALL TABLES IN SCHEMA feed TO {role};"
            f" GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA feed TO {role};"
        )
