-- The log and its positions as of 0.2: old and new rows, checkpoints, and an epoch that knows in
-- which database it began.

ALTER TABLE feed.change RENAME COLUMN row TO new;
-- An update has the row before and after, a create only `new`, a destroy only `old` (a destroy from
-- before 0.2 has it in `new`). If a row is missing, it was too long for the log.
--
-- `op` may also be reload: something has happened to the topic's table that no change can express,
-- so clients must load the topic again.
ALTER TABLE feed.change ADD COLUMN old json;
-- Written under synchronous_commit = off: shown only after a flush, because a crash could undo it.
ALTER TABLE feed.change ADD COLUMN async boolean;
ALTER TABLE feed.change ALTER COLUMN async
    SET DEFAULT CASE current_setting('synchronous_commit') WHEN 'off' THEN true END;

-- In which database and table the history began. A copy of the database, or a dump restored over
-- it, is another history.
ALTER TABLE feed.state ADD COLUMN birthplace text;
CREATE FUNCTION feed.place() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT concat_ws('/', pg_database.oid, 'feed.change'::regclass::oid)
    FROM pg_database WHERE datname = current_database()
$$;
UPDATE feed.state SET birthplace = feed.place();
ALTER TABLE feed.state ALTER COLUMN birthplace SET DEFAULT feed.place();
ALTER TABLE feed.state ALTER COLUMN birthplace SET NOT NULL;

-- A snapshot as another session would take it now. A snapshot does not list the transaction it
-- belongs to, so the calling transaction is added to those still running.
CREATE FUNCTION feed.seen_by_others() RETURNS pg_snapshot
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT concat_ws(':', least(pg_snapshot_xmin(now), own), pg_snapshot_xmax(now), (
               SELECT coalesce(string_agg(xid::text, ',' ORDER BY xid), '')
               FROM (SELECT pg_snapshot_xip(now) UNION SELECT own) AS running (xid)
               WHERE xid < pg_snapshot_xmax(now)))::pg_snapshot
    FROM (SELECT pg_current_snapshot() AS now, pg_current_xact_id() AS own) AS moment
$$;

-- Snapshots, about one every 4096 changes, written by the transaction that logs the change with
-- that number. Any snapshot taken after a position splits the changes since then into two complete
-- batches; so a long backlog is read checkpoint by checkpoint, and a page costs no more than it
-- holds.
CREATE TABLE feed.checkpoint (
    until    xid8        NOT NULL DEFAULT pg_snapshot_xmax(pg_current_snapshot()),
    id       bigint      NOT NULL DEFAULT currval('feed.change_id_seq'),
    snapshot pg_snapshot NOT NULL DEFAULT feed.seen_by_others(),
    PRIMARY KEY (until, id)
);

-- The next and the previous transaction id. Postgres skips ids whose lower 32 bits are 0, 1 or 2,
-- and rejects snapshots that contain them.
--
-- Plain expressions without settings of their own, so that they are inlined: every read uses them.
CREATE FUNCTION feed.xid_after(xid xid8) RETURNS xid8
LANGUAGE sql IMMUTABLE
AS $$
    SELECT (xid::text::bigint + 1 + greatest(0, 3 - ((xid::text::bigint + 1) & 4294967295))
           )::text::xid8
$$;
CREATE FUNCTION feed.xid_before(xid xid8) RETURNS xid8
LANGUAGE sql IMMUTABLE
AS $$
    SELECT (xid::text::bigint - CASE WHEN xid::text::bigint > 4294967296
                                          AND (xid::text::bigint & 4294967295) = 3
                                     THEN 4 ELSE 1 END)::text::xid8
$$;

-- The epoch names one unbroken history of the log: this log, in this database, on this cluster, on
-- this timeline. A backup restored elsewhere has another system identifier, a promoted standby
-- another timeline (the first eight digits of a WAL file's name).
CREATE OR REPLACE FUNCTION feed.epoch() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT substr(md5(concat_ws('/', history, system_identifier,
                                left(pg_walfile_name(pg_current_wal_lsn()), 8),
                                nullif(feed.place(), birthplace))), 1, 8)
    FROM feed.state, pg_control_system()
$$;

-- The position of a snapshot.
--
-- It is the snapshot cut back to just after the newest change it sees. Higher transactions have
-- left no change, so asking for them again costs nothing. And they must be asked for again: after a
-- crash Postgres reuses the ids of transactions that left no trace on disk (aborted ones), and a
-- position that claimed to have seen them would skip the new changes. The id of a visible change is
-- never reused, because its commit was flushed first.
--
-- The newest visible change is searched gap by gap between the running transactions: a backward
-- scan from the end of the index would step over every row of a bulk load that is still open.
CREATE FUNCTION feed.position_of(seen pg_snapshot) RETURNS pg_snapshot
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    WITH gap AS (
        SELECT edge AS below, lead(edge) OVER (ORDER BY edge DESC) AS above
        FROM (SELECT pg_snapshot_xmax(seen) UNION ALL SELECT pg_snapshot_xip(seen)) AS edges (edge)
    ),
    newest AS (
        SELECT change.xid
        FROM gap, LATERAL (
            SELECT xid FROM feed.change
            WHERE xid < gap.below AND xid > coalesce(gap.above, '0')
            ORDER BY xid DESC LIMIT 1
        ) AS change
        ORDER BY gap.below DESC LIMIT 1
    ),
    bound AS (
        SELECT greatest(horizon, feed.xid_after(redrawn),
                        (SELECT feed.xid_after(xid) FROM newest)) AS xmax
        FROM feed.state
    ),
    running AS (
        SELECT xid FROM bound, pg_snapshot_xip(seen) AS xid WHERE xid < xmax
    )
    SELECT concat_ws(':', coalesce((SELECT xid FROM running ORDER BY xid LIMIT 1), xmax), xmax,
                     coalesce((SELECT string_agg(xid::text, ',' ORDER BY xid) FROM running), '')
           )::pg_snapshot
    FROM bound
$$;

-- The position of the calling statement's snapshot.
CREATE OR REPLACE FUNCTION feed.position() RETURNS pg_snapshot
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT feed.position_of(pg_current_snapshot())
$$;

-- Whether the log still holds everything after a position, in the history that the position comes
-- from: the position has seen the history begin (`redrawn`), nothing after it was pruned, and the
-- newest change it has seen is there (or has just been pruned).
CREATE OR REPLACE FUNCTION feed.continues(since pg_snapshot) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT pg_visible_in_snapshot(redrawn, since) AND horizon <= pg_snapshot_xmin(since)
           AND (feed.xid_before(pg_snapshot_xmax(since)) = redrawn
                OR horizon = pg_snapshot_xmax(since) OR EXISTS (
               SELECT FROM feed.change WHERE xid = feed.xid_before(pg_snapshot_xmax(since))))
    FROM feed.state
$$;

-- Empties a log that came in a dump from a cluster with higher transaction ids: otherwise new
-- changes would sort before those it already holds, as if they had been read.
CREATE OR REPLACE FUNCTION feed.adopt() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM feed.state
               WHERE redrawn >= pg_snapshot_xmax(pg_current_snapshot())
                     OR horizon > pg_snapshot_xmax(pg_current_snapshot()))
       OR EXISTS (SELECT FROM feed.change WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()))
    THEN
        TRUNCATE feed.change, feed.checkpoint;
        UPDATE feed.state SET horizon = pg_snapshot_xmin(pg_current_snapshot());
    END IF;
END
$$;

-- Deletes old changes, at most `step` rows, and returns how many were deleted. A change is old if
-- it was written more than `retention` ago or is more than `keep` changes back. Only a contiguous
-- beginning of the log is deleted (up to the first row to keep), and only below every running
-- transaction, so `horizon` says exactly what is gone.
--
-- A change dated in the future (the clock was set back since) counts as old as the next one that is
-- not.
CREATE OR REPLACE FUNCTION feed.prune(retention interval, keep bigint, step integer)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET feed.pruning = 'on'
AS $$
DECLARE
    deleted integer;
    reached xid8;
BEGIN
    WITH first AS MATERIALIZED (
        SELECT xid, id, at FROM feed.change
        WHERE xid >= (SELECT feed.xid_before(horizon) FROM feed.state)
          AND xid < pg_snapshot_xmin(pg_current_snapshot())
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
    UPDATE feed.state SET horizon = reached WHERE reached > horizon;
    DELETE FROM feed.checkpoint WHERE until <= (SELECT horizon FROM feed.state);
    RETURN deleted;
END
$$;

-- Emptying the log by hand begins another history. Capture may rewrite the log to put changes into
-- order.
DROP TRIGGER rewrite_history ON feed.change;
CREATE TRIGGER rewrite_history AFTER DELETE OR UPDATE OR TRUNCATE ON feed.change
FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION feed.rewrite_history();
