"""Pruning that no reader notices."""

from migrations.sql_files import definition, run_file, run_text

revision = "0006"
down_revision = "0005"

REVOKE = "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC"


def upgrade() -> None:
    run_text("DROP FUNCTION feed.prune")
    run_file("0006_prune.sql")
    run_text(REVOKE)


def downgrade() -> None:
    run_text("DROP FUNCTION feed.prune")
    run_text(definition("0005_prune.sql", "prune"))
    run_text(REVOKE)
