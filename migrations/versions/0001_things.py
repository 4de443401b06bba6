"""The sample table, unless THINGS=no."""

from alembic import op

from migrations.sample import found_sample, make_sample, wants_sample

revision = "0001"
down_revision = None


def upgrade() -> None:
    if wants_sample():
        make_sample()


def downgrade() -> None:
    if wants_sample() and found_sample() is not None:
        op.drop_table("things")
