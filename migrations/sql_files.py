"""Runs SQL files, so that migrations are SQL that a DBA can read."""

from pathlib import Path

from alembic import op

SQL = Path(__file__).parent / "sql"


def run_file(name: str) -> None:
    """Run `sql/<name>` as one simple query, which may hold many statements; neither SQLAlchemy nor
    a parameter syntax interprets any character of it.
    """
    run_text((SQL / name).read_text(encoding="utf-8"))


def run_text(sql: str) -> None:
    op.get_bind().connection.dbapi_connection.run_async(lambda asyncpg: asyncpg.execute(sql))  # type: ignore[union-attr]
