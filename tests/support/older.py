"""An installation of 0.1.0."""

from pathlib import Path

from tests.support.postgres import execute

SCHEMA = Path(__file__).parent / "installation_0_1_0.sql"
VERSION_TABLE = """
    CREATE TABLE public.alembic_version (
        version_num varchar(32) CONSTRAINT alembic_version_pkc PRIMARY KEY
    );
    INSERT INTO public.alembic_version VALUES ('0002');
"""


async def install_0_1_0(url: str) -> None:
    """Make in an empty database what 0.1.0 made."""
    await execute(url, SCHEMA.read_text(encoding="utf-8"), VERSION_TABLE)
