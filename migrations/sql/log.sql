-- The log of changes, and where a reader of it is.
--
-- A position is a pg_snapshot: everything it could see has been read. Why a position is not a
-- number: numbers become visible out of order, and a reader of "up to 2" never sees a late 1.

CREATE SCHEMA feed;

-- `op` is create, update, destroy or truncate. A CHECK would be parsed and planned anew by every
-- statement that writes a change, a sixth of what capture costs.
CREATE TABLE feed.change (
    xid   xid8        NOT NULL DEFAULT pg_current_xact_id(),
    id    bigint      GENERATED ALWAYS AS IDENTITY,
    at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    topic text        NOT NULL,
    op    text        NOT NULL,
    row   json,
    PRIMARY KEY (xid, id)          -- the only index; it serves every read
) WITH (
    -- Rows only come and, once old, go: vacuum by number, not by share, so that the table stays
    -- as long as what it holds.
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.1,
    autovacuum_analyze_scale_factor = 0.1
);

-- One row. `history` is redrawn whenever the log loses rows other than by feed.prune, lastly by the
-- transaction `redrawn`; `secret` signs offsets, so that a forged one is known without a look at
-- the log; every change whose xid is below `horizon` has been pruned.
CREATE TABLE feed.state (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    history   uuid    NOT NULL DEFAULT gen_random_uuid(),
    redrawn   xid8    NOT NULL DEFAULT pg_current_xact_id(),
    secret    uuid    NOT NULL DEFAULT gen_random_uuid(),
    horizon   xid8    NOT NULL DEFAULT pg_snapshot_xmin(pg_current_snapshot())
);
INSERT INTO feed.state DEFAULT VALUES;

-- The epoch names one unbroken history of the log: this log, on this cluster, on this timeline.
-- A backup restored elsewhere has another system identifier, a promotion another timeline (the
-- first eight digits of a WAL file's name).
CREATE FUNCTION feed.epoch() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT substr(md5(concat_ws('/', history, system_identifier,
                                left(pg_walfile_name(pg_current_wal_lsn()), 8))), 1, 8)
    FROM feed.state, pg_control_system()
$$;

-- The position of the calling statement's snapshot.
--
-- It is the snapshot cut back to just behind the newest change it sees. What lies above has left
-- no change, so asking for it again costs nothing; and it must be asked for again: after a crash
-- Postgres gives the ids of transactions that left no trace on disk (aborted ones) to new ones,
-- and a position that claimed to have seen those would skip the new changes. The id of a change
-- that is visible is never given out again, because its commit was flushed first.
--
-- The newest visible change is looked for gap by gap between the running transactions: a backward
-- walk from the end of the index would step over every row of a bulk load still under way.
CREATE FUNCTION feed.position() RETURNS pg_snapshot
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    WITH now AS MATERIALIZED (SELECT pg_current_snapshot() AS snapshot),
    gap AS (
        SELECT edge AS below, lead(edge) OVER (ORDER BY edge DESC) AS above
        FROM (SELECT pg_snapshot_xmax(snapshot) FROM now
              UNION ALL
              SELECT pg_snapshot_xip(snapshot) FROM now) AS edges (edge)
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
        SELECT greatest(horizon::text::bigint, redrawn::text::bigint + 1,
                        (SELECT xid::text::bigint + 1 FROM newest))::text::xid8 AS xmax
        FROM feed.state
    ),
    running AS (
        SELECT xid FROM now, bound, pg_snapshot_xip(snapshot) AS xid WHERE xid < xmax
    )
    SELECT concat_ws(':', coalesce((SELECT min(xid::text::bigint)::text FROM running), xmax::text),
                     xmax,
                     coalesce((SELECT string_agg(xid::text, ',' ORDER BY xid) FROM running), '')
           )::pg_snapshot
    FROM bound
$$;

-- Whether the log still holds everything after a position, and the history the position comes
-- from: it has seen the history drawn, nothing after it is pruned, and the newest change it has
-- seen is there (or just pruned).
CREATE FUNCTION feed.continues(since pg_snapshot) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT pg_visible_in_snapshot(redrawn, since) AND horizon <= pg_snapshot_xmin(since)
           AND (pg_snapshot_xmax(since)::text::bigint - 1 = redrawn::text::bigint
                OR horizon = pg_snapshot_xmax(since) OR EXISTS (
               SELECT FROM feed.change
               WHERE xid = (pg_snapshot_xmax(since)::text::bigint - 1)::text::xid8))
    FROM feed.state
$$;

-- Draws another history if the newest change a position has seen is gone without having been
-- pruned: Postgres lost commits it had shown, and no offset from before can be trusted. Once is
-- enough for all nodes: a position from before the last drawing is not asked.
CREATE FUNCTION feed.disown(since pg_snapshot) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    UPDATE feed.state SET history = gen_random_uuid(), redrawn = pg_current_xact_id()
    WHERE pg_visible_in_snapshot(redrawn, since) AND horizon <= pg_snapshot_xmin(since)
          AND NOT feed.continues(since)
$$;

-- Empties a log that came with a dump from a cluster whose transaction ids were further: new
-- changes would lie before what it says has been read.
CREATE FUNCTION feed.adopt() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM feed.state
               WHERE greatest(horizon, redrawn) > pg_snapshot_xmax(pg_current_snapshot()))
       OR EXISTS (SELECT FROM feed.change WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()))
    THEN
        TRUNCATE feed.change;
        UPDATE feed.state SET horizon = pg_snapshot_xmin(pg_current_snapshot());
    END IF;
END
$$;

-- The offset of the calling statement's snapshot, as app/feed/offset.py reads it.
CREATE FUNCTION feed.offset() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT concat_ws('.', body, translate(encode(substr(
               sha256(convert_to(concat(secret, body), 'UTF8')), 1, 6), 'base64'), '+/', '-_'))
    FROM feed.state, LATERAL (SELECT concat_ws('.', feed.epoch(), feed.position())) AS text (body)
$$;

-- Deletes old changes, at most `step` rows, and returns how many. Old is what was written longer
-- than `retention` ago or lies more than `keep` changes back. Only whole beginnings of the log go
-- (up to the first row that is to stay), and only below every running transaction, so `horizon`
-- says exactly what is gone.
CREATE FUNCTION feed.prune(retention interval, keep bigint, step integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET feed.pruning = 'on'
AS $$
DECLARE
    deleted integer;
    reached xid8;
BEGIN
    WITH oldest AS (
        SELECT xid, id,
               bool_and(at < clock_timestamp() - retention
                        OR id <= pg_sequence_last_value('feed.change_id_seq') - keep)
                   OVER (ORDER BY xid, id) AS old
        FROM (
            SELECT xid, id, at FROM feed.change
            WHERE xid >= (SELECT (horizon::text::bigint - 1)::text::xid8 FROM feed.state)
              AND xid < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY xid, id LIMIT step
        ) AS first
    ), gone AS (
        DELETE FROM feed.change USING oldest
        WHERE old AND change.xid = oldest.xid AND change.id = oldest.id
        RETURNING change.xid
    )
    SELECT count(*), max(xid::text::bigint + 1)::text::xid8 INTO deleted, reached FROM gone;
    UPDATE feed.state SET horizon = reached WHERE reached > horizon;
    RETURN deleted;
END
$$;

-- A log emptied by hand is another history.
CREATE FUNCTION feed.rewrite_history() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('feed.pruning', true) IS DISTINCT FROM 'on' THEN
        UPDATE feed.state SET history = gen_random_uuid(), redrawn = pg_current_xact_id();
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER rewrite_history AFTER DELETE OR UPDATE OR TRUNCATE ON feed.change
FOR EACH STATEMENT EXECUTE FUNCTION feed.rewrite_history();
