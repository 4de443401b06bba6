"""Runs SQL files, so that migrations are SQL that a DBA can read."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from alembic import context

SQL = Path(__file__).parent / "sql"

# Only a superuser may put a setting that Postgres does not know into a function's definition.
# Revisions 0002 and 0003 do; where an ordinary role installs, they leave it out. Nothing runs
# between them and revision 0005, from which on feed.prune does without.
CUSTOM_SETTING = " SET feed.pruning = 'on'"
MAY_DEFINE_IT = "SELECT has_parameter_privilege('feed.pruning', 'SET')"

EACH_CAPTURE = """
    DO $$
    DECLARE
        capture regprocedure;
    BEGIN
        FOR capture IN
            SELECT oid FROM pg_proc
            WHERE pronamespace = 'feed'::regnamespace AND proname ~ '^capture_[0-9]+_*$'
        LOOP
            EXECUTE format('ALTER FUNCTION %s {change}', capture);
        END LOOP;
    END
    $$;
"""


def read(name: str) -> str:
    """The text of `sql/<name>`."""
    return (SQL / name).read_text(encoding="utf-8")


def definition(file: str, function: str) -> str:
    """The statement in `sql/<file>` that makes a function of the schema `feed`, as one that may
    replace what is there.
    """
    found = re.search(
        rf"^CREATE (?:OR REPLACE )?(FUNCTION feed\.{function}\(.*?AS (\$\w*\$)\n.*?^\2;$)",
        read(file),
        re.MULTILINE | re.DOTALL,
    )
    assert found, f"{file} does not make the function {function}"
    return f"CREATE OR REPLACE {found[1]}"


def run_file(name: str) -> None:
    """Run `sql/<name>`."""
    run_text(read(name))


def run_text(sql: str) -> None:
    """Run SQL as one simple query, which may hold many statements; neither SQLAlchemy nor a
    parameter syntax interprets any character of it.
    """

    async def run(connection: Any) -> None:
        allowed = CUSTOM_SETTING not in sql or await connection.fetchval(MAY_DEFINE_IT)
        await connection.execute(sql if allowed else sql.replace(CUSTOM_SETTING, ""))

    on_connection(run)


def alter_captures(change: str) -> None:
    """Alter the functions that feed.install_capture has made so far: `SET jit = off`, say."""
    run_text(EACH_CAPTURE.replace("{change}", change))


def on_connection(work: Callable[[Any], Awaitable[Any]]) -> Any:
    """Call a coroutine function with the asyncpg connection that alembic migrates."""
    return context.get_bind().connection.dbapi_connection.run_async(work)  # type: ignore[union-attr]
