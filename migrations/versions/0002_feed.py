"""The log of changes, capture, and `things` watched as `thing`."""

from migrations.sql_files import run_file, run_text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    run_file("log.sql")
    run_file("capture.sql")
    run_text("SELECT feed.watch('things', 'thing')")


def downgrade() -> None:
    """Tables watched by hand lose their triggers too: they call functions of the schema."""
    run_text("DROP SCHEMA feed CASCADE")
