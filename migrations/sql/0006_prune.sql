-- Pruning that no reader notices. Deleting a change invalidates every position older than it, to be
-- safe, also that of a reader that has read it but last looked while an older transaction was
-- running. So the reader says how far it is.

-- Deletes old changes, at most `step` rows, and returns how many were deleted. A change is old if
-- it was written more than `retention` ago or is more than `keep` changes back. Only a contiguous
-- beginning of the log is deleted (up to the first row to keep), and only below every running
-- transaction, so `horizon` says exactly what is gone. The position `reader`, if given, can be
-- continued afterwards.
--
-- A change dated in the future (the clock was set back since) counts as old as the next one that is
-- not.
CREATE FUNCTION feed.prune(
    retention interval, keep bigint, step integer, reader pg_snapshot DEFAULT NULL
)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deleted integer;
    reached xid8;
BEGIN
    PERFORM set_config('feed.pruning', 'on', true);  -- for feed.rewrite_history
    WITH first AS MATERIALIZED (
        SELECT xid, id, at FROM feed.change
        WHERE xid >= (SELECT feed.xid_before(horizon) FROM feed.state)
          AND xid < least(pg_snapshot_xmin(pg_current_snapshot()), pg_snapshot_xmin(reader))
        ORDER BY xid, id LIMIT step
    ), dated AS (
        SELECT xid, id, CASE WHEN at <= clock_timestamp() THEN at ELSE (
                   SELECT at FROM feed.change AS later
                   WHERE (later.xid, later.id) > (first.xid, first.id) AND at <= clock_timestamp()
                   ORDER BY later.xid, later.id LIMIT 1) END AS at
        FROM first
    ), oldest AS (
        SELECT xid, id,
               bool_and(coalesce(at < clock_timestamp() - retention, false)
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
