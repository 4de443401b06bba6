"""Filters miss no row when two hold one key; more alterations are noticed; one spelling of rows."""

from migrations.sql_files import alter_captures, definition, run_file, run_text

revision = "0008"
down_revision = "0007"

# Tables that are as they were when they were last checked: no client has to load again because the
# shape is written otherwise now. But the capture of a table may be older than its deferrable key.
NOTE_UNCHANGED = """
    CREATE TEMPORARY TABLE unchanged AS
    SELECT relation FROM feed.topic
    WHERE shape = feed.shape(relation) AND NOT feed.key_is_deferrable(relation);
"""
KEEP_UNCHANGED = """
    UPDATE feed.topic SET shape = feed.shape(topic.relation)
    FROM unchanged WHERE unchanged.relation = topic.relation;
    DROP TABLE unchanged;
"""
# Which types are trusted to be rendered must not depend on who asks: a server with a role of its
# own has to read rows as the log has them.
AS_OWNER = "ALTER FUNCTION feed.rows_of(regclass, text) SECURITY DEFINER"
AS_CALLER = "ALTER FUNCTION feed.rows_of(regclass, text) SECURITY INVOKER"


def upgrade() -> None:
    run_text(NOTE_UNCHANGED)
    run_file("0008_capture.sql")
    run_text(AS_OWNER)
    alter_captures("SET quote_all_identifiers = off")
    run_text(KEEP_UNCHANGED)


def downgrade() -> None:
    run_text(NOTE_UNCHANGED)
    for name in ("chain", "reorder"):
        run_text(definition("0003_order.sql", name))
    run_text(AS_CALLER)
    run_text(definition("0003_topics.sql", "shape"))
    run_text(definition("0004_topics.sql", "install_capture"))
    alter_captures("RESET quote_all_identifiers")
    run_text(KEEP_UNCHANGED)
