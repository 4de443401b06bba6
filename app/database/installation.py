"""Which parts of Tablecast a database holds, read from the catalogs, which every role may read.

Everything is in the schema `feed`, including the version table; only the sample table
`public.things` is not.
"""

from dataclasses import dataclass

import asyncpg

from app.database.connections import Connection, Refusal
from app.database.locking import lock_watched_tables
from app.database.rights import refuse_making_the_sample, refuse_migrating

SCHEMA = "feed"

VERSION = "SELECT version_num FROM feed.alembic_version"
VERSION_TABLES = """
    SELECT array_agg(nspname::text)
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname = 'alembic_version' AND relkind = 'r' AND nspname IN ('feed', 'public')
"""

# Before 0.2.0 the version table was in public. Returns the revisions that can have made the log
# found; none if a later revision has made it, or if there is no log.
KEPT_IN_PUBLIC = """
    SELECT CASE attname WHEN 'row' THEN '{0002}' ELSE '{0003,0004}' END::text[]
    FROM pg_namespace
    JOIN pg_proc ON pronamespace = pg_namespace.oid
    JOIN pg_class ON relnamespace = pg_namespace.oid
    JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE nspname = 'feed' AND proname = 'prune' AND prosrc NOT LIKE '%feed.pruning%'
          AND relname = 'change' AND attname IN ('row', 'old')
"""
VERSION_IN_PUBLIC = "SELECT version_num FROM public.alembic_version WHERE version_num = ANY ($1)"

MAKE_VERSION_TABLE = """
    CREATE TABLE feed.alembic_version (
        version_num varchar(32) CONSTRAINT alembic_version_pkc PRIMARY KEY
    )
"""
TAKE_OVER = """
    WITH ours AS (
        DELETE FROM public.alembic_version WHERE version_num = $1 RETURNING version_num
    )
    INSERT INTO feed.alembic_version SELECT version_num FROM ours
"""
DROP_IF_EMPTY = """
    DO $$ BEGIN
        IF NOT EXISTS (SELECT FROM public.alembic_version) THEN
            DROP TABLE public.alembic_version;
        END IF;
    END $$
"""

IS_FREE_IN_PUBLIC = """
    SELECT has_schema_privilege(oid, 'CREATE')
           AND NOT EXISTS (SELECT FROM pg_class
                           WHERE relname = 'alembic_version' AND relnamespace = pg_namespace.oid)
    FROM pg_namespace WHERE nspname = 'public'
"""

# Everything in the schema except alembic's own.
CONTENTS = """
    SELECT relname AS name
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = 'feed' AND relname NOT LIKE 'alembic\\_version%'
    UNION ALL
    SELECT proname
    FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
    WHERE nspname = 'feed'
    ORDER BY name
"""
# The schema stays if the role could not create it again.
DROP_SCHEMA = """
    DO $$ BEGIN
        DROP TABLE IF EXISTS feed.alembic_version;
        IF has_database_privilege(current_database(), 'CREATE') THEN
            DROP SCHEMA feed;
        END IF;
    END $$
"""

# A superuser, or a member of the owning role, may have made some of it.
GIVE_TO_OWNER = """
    DO $$
    DECLARE
        change text;
    BEGIN
        FOR change IN
            SELECT format('ALTER %s OWNER TO %I', object.name, pg_get_userbyid(nspowner))
            FROM pg_namespace, LATERAL (
                SELECT format('TABLE %s', oid::regclass), relowner
                FROM pg_class WHERE relnamespace = pg_namespace.oid AND relkind = 'r'
                UNION ALL
                SELECT format('FUNCTION %s', oid::regprocedure), proowner
                FROM pg_proc WHERE pronamespace = pg_namespace.oid
            ) AS object (name, owner)
            WHERE nspname = 'feed' AND object.owner <> nspowner
                  AND pg_has_role(object.owner, 'USAGE') AND pg_has_role(nspowner, 'USAGE')
        LOOP
            EXECUTE change;
        END LOOP;
    END
    $$
"""

SAMPLE = """
    SELECT relkind = 'r' AS is_table,
           ARRAY(SELECT concat_ws(' ', attname, format_type(atttypid, atttypmod))
                 FROM pg_attribute
                 WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped) AS columns,
           ARRAY(SELECT pg_get_constraintdef(oid)
                 FROM pg_constraint WHERE conrelid = pg_class.oid) AS constraints,
           EXISTS (SELECT FROM pg_trigger
                   JOIN pg_proc ON pg_proc.oid = tgfoid
                   JOIN pg_namespace AS schema ON schema.oid = pronamespace
                   WHERE tgrelid = pg_class.oid AND schema.nspname = 'feed') AS is_watched
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = 'public' AND relname = 'things'
"""
SAMPLE_COLUMNS = {"id bigint", "name text", "info text", "created_at timestamp with time zone"}
SAMPLE_KEYS = {"PRIMARY KEY (id)", "UNIQUE (name)"}


@dataclass(frozen=True, slots=True)
class SampleTable:
    """What is called `public.things`. `is_ours`: it is the sample, not a table of the user's."""

    is_ours: bool
    is_watched: bool

    def refuse_foreign(self) -> None:
        """Raise Refusal if it is not the sample."""
        if not self.is_ours:
            raise Refusal(
                "There is a public.things that is not Tablecast's sample table: set THINGS=no to"
                " leave it alone and do without the sample."
            )


async def sample_table(connection: Connection) -> SampleTable | None:
    """Return what is called `public.things`; None if nothing is."""
    found = await connection.fetchrow(SAMPLE)
    if found is None:
        return None
    columns, keys = set(found["columns"]), set(found["constraints"])
    # Users may have added columns to a sample that is in use.
    fits = (
        columns >= SAMPLE_COLUMNS
        if found["is_watched"]
        else columns == SAMPLE_COLUMNS and keys >= SAMPLE_KEYS
    )
    return SampleTable(found["is_table"] and fits, found["is_watched"])


async def installed_revision(connection: Connection) -> str | None:
    """Return the revision that a database is at; None if Tablecast is not installed in it.

    A revision in `public` may belong to the user's own alembic and happen to have a name of ours.
    It is ours only if there is a log as that revision made it, and no version table next to the
    log.
    """
    try:
        return await _look_for_revision(connection)
    except asyncpg.UndefinedTableError:  # another node has just taken it over
        return await _look_for_revision(connection)


async def _look_for_revision(connection: Connection) -> str | None:
    tables = await connection.fetchval(VERSION_TABLES) or []
    found: str | None = None
    if SCHEMA in tables:
        found = await connection.fetchval(VERSION)
    elif "public" in tables:
        possible = await connection.fetchval(KEPT_IN_PUBLIC)
        if possible is not None:
            found = await connection.fetchval(VERSION_IN_PUBLIC, possible)
    return found


async def prepare(connection: Connection, newest: str, wants_sample: bool) -> None:
    """Begin the transaction that migrates: refuse what cannot succeed, and see that the version
    table is in `feed`.

    Raises Refusal.
    """
    # Whatever the role's or the database's own: everything is looked up and made in one place.
    await connection.execute("SET LOCAL search_path = public")
    found = await installed_revision(connection)
    await _refuse_foreign_schema(connection, found)
    if found != newest:
        await refuse_migrating(connection)
        await lock_watched_tables(connection)
    if wants_sample:
        sample = await sample_table(connection)
        if sample is None:
            await refuse_making_the_sample(connection)
        else:
            sample.refuse_foreign()
    await _keep_version_in_feed(connection, found)


async def _refuse_foreign_schema(connection: Connection, found: str | None) -> None:
    """Raise Refusal unless the schema is as the revision says: ours, or empty."""
    contents = [row["name"] for row in await connection.fetch(CONTENTS)]
    is_installed = found not in (None, "0001")
    has_log = {"change", "state"} <= set(contents)
    if is_installed and not has_log:
        raise Refusal(
            f"The schema feed is said to be at revision {found}, but it does not hold Tablecast's"
            " log: it was damaged, or belongs to something else."
        )
    if has_log and not is_installed:
        raise Refusal(
            "The schema feed holds a log, but nothing says which version of Tablecast has made it:"
            " restore the table feed.alembic_version, or run DROP SCHEMA feed CASCADE to install"
            " afresh."
        )
    if contents and not is_installed:
        raise Refusal(
            "The schema feed, which Tablecast needs for itself, holds something else already:"
            f" {contents[0]}."
        )


async def _keep_version_in_feed(connection: Connection, found: str | None) -> None:
    """Create the schema, or take over the revision of a version before 0.2.0."""
    if await connection.fetchval("SELECT to_regnamespace('feed')") is None:
        await connection.execute("CREATE SCHEMA feed")
    elif found is not None and SCHEMA not in await connection.fetchval(VERSION_TABLES):
        await connection.execute(MAKE_VERSION_TABLE)
        await connection.execute(TAKE_OVER, found)
        await connection.execute(DROP_IF_EMPTY)


async def finish(connection: Connection) -> None:
    """End the transaction that migrates: give everything in the schema to the schema's owner; after
    a downgrade to nothing, leave nothing; after a downgrade to 0.1.0, put the version table where
    0.1.0 looks for it.
    """
    await connection.execute(GIVE_TO_OWNER)
    found = await installed_revision(connection)
    if found is None:
        if not await connection.fetch(CONTENTS):
            await connection.execute(DROP_SCHEMA)
    elif found == "0002" and await connection.fetchval(IS_FREE_IN_PUBLIC):
        await connection.execute("ALTER TABLE feed.alembic_version SET SCHEMA public")
