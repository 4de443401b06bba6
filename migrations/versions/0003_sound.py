"""Old and new rows, changes in the order the rows took them, checkpoints, topics."""

from migrations.sql_files import read, run_file, run_text

revision = "0003"
down_revision = "0002"

# The topic of a watched table is an argument of its triggers or, in databases created later, part
# of the text of its capture function.
WATCHED = """
    CREATE TEMPORARY TABLE watched AS
    SELECT DISTINCT tgrelid::regclass AS relation,
           CASE WHEN prosrc LIKE '%TG_ARGV[0]%'
                THEN split_part(encode(tgargs, 'escape'), $$\\000$$, 1)
                ELSE substring(prosrc FROM $$VALUES \\('([a-z][a-z0-9_-]*)', 'truncate'$$)
           END AS topic
    FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
    WHERE pronamespace = 'feed'::regnamespace AND proname LIKE 'capture\\_%';
    SELECT feed.unwatch(relation) FROM watched;
"""
# Different versions of 0.1.0 created different objects under revision 0002.
DROP_REPLACED = """
    SET LOCAL client_min_messages = warning;
    DROP FUNCTION IF EXISTS feed.watch, feed.unwatch, feed.update_statement, feed.rows_statement,
        feed.key_of, feed.whole_rows, feed.ring, feed.capture_insert, feed.capture_delete,
        feed.capture_rows, feed.capture_truncate;
    ALTER TABLE feed.change DROP CONSTRAINT IF EXISTS change_op_check;
"""
WATCH_AGAIN = """
    SELECT feed.watch(relation, topic) FROM watched;
    DROP TABLE watched;
"""
"""Watches the same tables again, with the capture just installed; both directions run this."""


# 0.1.0 cannot tell clients to load one topic again: if the log says so, they load everything.
FORGET_RELOADS = """
    DO $$
    DECLARE
        reloads bigint[];
    BEGIN
        SELECT array_agg(id) INTO reloads FROM feed.change
        WHERE CASE op WHEN 'truncate' THEN false
                      WHEN 'create' THEN new IS NULL
                      WHEN 'update' THEN new IS NULL
                      WHEN 'destroy' THEN coalesce(old, new) IS NULL
                      ELSE true END;
        IF reloads IS NOT NULL THEN
            DELETE FROM feed.change WHERE id = ANY (reloads);  -- which begins another history
        END IF;
    END
    $$;
"""


def upgrade() -> None:
    run_text(WATCHED)
    run_text(DROP_REPLACED)
    run_file("0003_log.sql")
    run_file("0003_capture.sql")
    run_file("0003_order.sql")
    run_file("0003_topics.sql")
    run_text(WATCH_AGAIN)


def downgrade() -> None:
    run_text(FORGET_RELOADS)
    run_text(
        """
        CREATE TEMPORARY TABLE watched AS SELECT relation, topic FROM feed.topic;
        SELECT feed.unwatch(relation) FROM watched;
        DROP FUNCTION feed.begin_statement, feed.rekey, feed.trusts_type, feed.trusts,
            feed.needs_spelling, feed.rows_of, feed.key_of, feed.may_read,
            feed.large_json, feed.json_expression, feed.capture_statement,
            feed.chain, feed.present_rows, feed.reorder, feed.is_in_order,
            feed.key_is_deferrable, feed.settle, feed.capture_body, feed.watch,
            feed.unwatch, feed.drop_unused_captures, feed.shape, feed.check_topics,
            feed.epoch, feed.position, feed.position_of, feed.continues, feed.adopt,
            feed.offset, feed.prune, feed.disown, feed.must_ring, feed.ring,
            feed.xid_after, feed.xid_before;
        DROP TRIGGER rewrite_history ON feed.change;
        DROP FUNCTION feed.rewrite_history;
        DROP TABLE feed.topic, feed.checkpoint;
        DROP FUNCTION feed.seen_by_others;
        ALTER TABLE feed.state DROP COLUMN birthplace;
        DROP FUNCTION feed.place;
        UPDATE feed.change SET new = old WHERE op = 'destroy' AND new IS NULL;
        ALTER TABLE feed.change DROP COLUMN old, DROP COLUMN async;
        ALTER TABLE feed.change RENAME COLUMN new TO row;
        """
    )
    log = read("log.sql")
    run_text(log[log.index("-- The epoch names") :])  # the tables come before this
    run_file("capture.sql")
    run_text(WATCH_AGAIN)
