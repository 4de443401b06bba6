"""The log of changes, capture, and `things` watched as `thing`, unless THINGS=no."""

from migrations.sample import wants_sample
from migrations.sql_files import read, run_file, run_text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # The schema is there already, with alembic's own table in it.
    run_text(read("log.sql").replace("CREATE SCHEMA feed;", ""))
    run_file("capture.sql")
    if wants_sample():
        run_text("SELECT feed.watch('public.things', 'thing')")


def downgrade() -> None:
    """Tables watched by hand lose their triggers too: they call functions of the schema."""
    run_text(
        """
        CREATE SCHEMA feed_kept;
        ALTER TABLE feed.alembic_version SET SCHEMA feed_kept;
        DROP SCHEMA feed CASCADE;
        ALTER SCHEMA feed_kept RENAME TO feed;
        """
    )
