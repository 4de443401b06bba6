"""The table of things."""

from alembic import op

from migrations.sql_files import run_file

revision = "0001"
down_revision = None


def upgrade() -> None:
    run_file("things.sql")


def downgrade() -> None:
    op.drop_table("things")
