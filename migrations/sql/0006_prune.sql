-- Pruning that no reader notices. Deleting a change invalidates every position older than it, to be
-- safe, also that of a reader that has read it but last looked while an older transaction was
-- running. So the reader says how far it is.
--
-- And pruning that takes as long after the clock was ahead for a day as ever: the old one looked at
-- all later changes for each one from the future.

-- Deletes old changes, at most `step` rows, and returns how many were deleted. A change is old if
-- it was written more than `retention` ago or is more than `keep` changes back. Only a contiguous
-- beginning of the log is deleted (up to the first row to keep), and only below every running
-- transaction, so `horizon` says exactly what is gone. The position `reader`, if given, can be
-- continued afterwards.
--
-- A change dated in the future (the clock was set back since) counts as old as the next one that is
-- not. If there is none in the step, a later one will do, which is no older: it is looked for at
-- growing distances, and at the end.
CREATE FUNCTION feed.prune(
    retention interval, keep bigint, step integer, reader pg_snapshot DEFAULT NULL
)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    now timestamptz := clock_timestamp();
    deleted integer;
    reached xid8;
BEGIN
    PERFORM set_config('feed.pruning', 'on', true);  -- for feed.rewrite_history
    WITH first AS MATERIALIZED (
        SELECT xid, id, at FROM feed.change
        WHERE xid >= (SELECT feed.xid_before(horizon) FROM feed.state)
          AND xid < least(pg_snapshot_xmin(pg_current_snapshot()), pg_snapshot_xmin(reader))
        ORDER BY xid, id LIMIT step
    ), later AS (
        SELECT min(at) AS at
        FROM (
            SELECT ahead.at
            FROM (SELECT xid, id FROM first WHERE at > now
                  ORDER BY xid DESC, id DESC LIMIT 1) AS last,
                 (SELECT 1::bigint << power FROM generate_series(0, 40) AS power) AS far (distance),
                 LATERAL (
                     (SELECT at FROM feed.change
                      WHERE (xid, id) > (last.xid, last.id + distance) ORDER BY xid, id LIMIT 1)
                     UNION ALL
                     (SELECT at FROM feed.change
                      WHERE xid > (last.xid::text::bigint + distance)::text::xid8
                      ORDER BY xid, id LIMIT 1)
                 ) AS ahead
            UNION ALL
            (SELECT at FROM feed.change ORDER BY xid DESC, id DESC LIMIT 1)
        ) AS looked_at
        WHERE at <= now
    ), followed AS (
        SELECT *, count(*) FILTER (WHERE at <= now) OVER (ORDER BY xid DESC, id DESC) AS place
        FROM first
    ), dated AS (
        SELECT xid, id,
               CASE WHEN followed.at <= now THEN followed.at
                    WHEN place > 0 THEN min(followed.at) OVER (PARTITION BY place)
                    ELSE later.at END AS at
        FROM followed, later
    ), oldest AS (
        SELECT xid, id,
               bool_and(coalesce(at < now - retention, false)
                        OR id <= pg_sequence_last_value('feed.change_id_seq') - keep)
                   OVER (ORDER BY xid, id) AS old
        FROM dated
    ), gone AS (
        DELETE FROM feed.change USING oldest
        WHERE oldest.old AND change.xid = oldest.xid AND change.id = oldest.id
        RETURNING change.xid
    )
    SELECT count(*), feed.xid_after(max(xid::text::bigint)::text::xid8) INTO deleted, reached
    FROM gone;
    PERFORM set_config('feed.pruning', '', true);
    UPDATE feed.state SET horizon = reached WHERE reached > horizon;
    DELETE FROM feed.checkpoint WHERE until <= (SELECT horizon FROM feed.state);
    RETURN deleted;
END
$$;
