"""Rows that are too large can still be judged by filters."""

from migrations.sql_files import run_file, run_text

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    run_file("0007_outline.sql")


def downgrade() -> None:
    run_text("DROP FUNCTION feed.outline")
