"""Ordinary roles: one that owns the feed, and a weaker one that serves."""

from migrations.sql_files import definition, run_file, run_text

revision = "0005"
down_revision = "0004"

# The role that serves has altered tables checked and repaired with the rights of the feed's owner.
AS_OWNER = "ALTER FUNCTION feed.check_topics() SECURITY DEFINER"
AS_CALLER = "ALTER FUNCTION feed.check_topics() SECURITY INVOKER"


def upgrade() -> None:
    run_file("0005_prune.sql")
    run_text(AS_OWNER)


def downgrade() -> None:
    run_text(AS_CALLER)
    run_text(definition("0003_log.sql", "prune"))
