"""A topic belongs to one table, and says what a destroy carries."""

from migrations.sql_files import definition, run_file, run_text

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    run_file("0004_topics.sql")


def downgrade() -> None:
    run_text(
        """
        DROP FUNCTION feed.watch, feed.log_reload, feed.identifies, feed.problem_of,
            feed.forget_dropped, feed.require_owner, feed.require_watchable, feed.remove_capture,
            feed.install_capture, feed.excerpt;
        ALTER TABLE feed.topic DROP CONSTRAINT topic_topic_key, DROP COLUMN key,
            DROP COLUMN destroy_with;
        """
    )
    for name in ("watch", "unwatch", "check_topics"):
        run_text(definition("0003_topics.sql", name))
    run_text("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC")
