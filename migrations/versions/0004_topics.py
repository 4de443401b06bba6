"""A topic belongs to one table, and says what a destroy carries."""

from migrations.sql_files import definition, run_file, run_text

revision = "0004"
down_revision = "0003"


# Older revisions watch every table again, and fail if one cannot be watched any more.
FORGET_UNWATCHABLE = """
    DO $$
    DECLARE
        lost regclass;
    BEGIN
        PERFORM feed.forget_dropped();
        FOR lost IN
            SELECT relation FROM feed.topic
            WHERE feed.key_of(relation) IS NULL
                  OR EXISTS (SELECT FROM pg_inherits WHERE relation IN (inhrelid, inhparent))
        LOOP
            PERFORM feed.unwatch(lost);
        END LOOP;
    END
    $$
"""


def upgrade() -> None:
    run_file("0004_topics.sql")


def downgrade() -> None:
    run_text(FORGET_UNWATCHABLE)
    run_text(
        """
        DROP FUNCTION feed.watch, feed.log_reload, feed.identifies, feed.problem_of,
            feed.forget_dropped, feed.grantable, feed.require_owner, feed.require_watchable,
            feed.remove_capture, feed.install_capture, feed.excerpt;
        ALTER TABLE feed.topic DROP CONSTRAINT topic_topic_key, DROP COLUMN key,
            DROP COLUMN destroy_with, DROP COLUMN ambiguous, DROP COLUMN problem;
        """
    )
    run_text(definition("0003_log.sql", "position"))
    for name in ("watch", "unwatch", "check_topics"):
        run_text(definition("0003_topics.sql", name))
    run_text("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC")
