-- What revision 0002 made when 0.1.0 was announced (5b83f5d). The files under that revision were
-- edited since, so this is kept for the test that upgrades such an installation. Without its comments.

CREATE TABLE things (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text        NOT NULL UNIQUE CHECK (char_length(name) BETWEEN 1 AND 200),
    info       text        NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE SCHEMA feed;

CREATE TABLE feed.change (
    xid   xid8        NOT NULL DEFAULT pg_current_xact_id(),
    id    bigint      GENERATED ALWAYS AS IDENTITY,
    at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    topic text        NOT NULL,
    op    text        NOT NULL CHECK (op IN ('create', 'update', 'destroy', 'truncate')),
    row   json,
    PRIMARY KEY (xid, id)          -- the only index; it serves every read
) WITH (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.1,
    autovacuum_analyze_scale_factor = 0.1
);

CREATE TABLE feed.state (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    history   uuid    NOT NULL DEFAULT gen_random_uuid(),
    redrawn   xid8    NOT NULL DEFAULT pg_current_xact_id(),
    secret    uuid    NOT NULL DEFAULT gen_random_uuid(),
    horizon   xid8    NOT NULL DEFAULT pg_snapshot_xmin(pg_current_snapshot())
);
INSERT INTO feed.state DEFAULT VALUES;

CREATE FUNCTION feed.epoch() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT substr(md5(concat_ws('/', history, system_identifier,
                                left(pg_walfile_name(pg_current_wal_lsn()), 8))), 1, 8)
    FROM feed.state, pg_control_system()
$$;

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

CREATE FUNCTION feed.disown(since pg_snapshot) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    UPDATE feed.state SET history = gen_random_uuid(), redrawn = pg_current_xact_id()
    WHERE pg_visible_in_snapshot(redrawn, since) AND horizon <= pg_snapshot_xmin(since)
          AND NOT feed.continues(since)
$$;

CREATE FUNCTION feed.offset() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT concat_ws('.', body, translate(encode(substr(
               sha256(convert_to(concat(secret, body), 'UTF8')), 1, 6), 'base64'), '+/', '-_'))
    FROM feed.state, LATERAL (SELECT concat_ws('.', feed.epoch(), feed.position())) AS text (body)
$$;

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

CREATE FUNCTION feed.ring() RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(1413563213, 1)
       AND current_setting('max_prepared_transactions') = '0'
    THEN
        NOTIFY feed;
    END IF;
END
$$;

CREATE FUNCTION feed.whole_rows(relation regclass, rows name) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('(SELECT %s FROM %I)',
                  string_agg(CASE attgenerated
                      WHEN 'v' THEN format('(%s) AS %I', pg_get_expr(adbin, adrelid), attname)
                      ELSE quote_ident(attname) END, ', ' ORDER BY attnum), rows)
    FROM pg_attribute
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
$$;

CREATE FUNCTION feed.capture_insert() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
SET intervalstyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = '1'
AS $$
DECLARE
    logged bigint;
BEGIN
    IF TG_NARGS > 1 THEN
        EXECUTE format('INSERT INTO feed.change (topic, op, row) '
                       'SELECT $1, ''create'', row_to_json(whole.*) FROM %s AS whole',
                       feed.whole_rows(TG_RELID, 'new_rows')) USING TG_ARGV[0];
    ELSE
        INSERT INTO feed.change (topic, op, row)
        SELECT TG_ARGV[0], 'create', row_to_json(new_rows.*) FROM new_rows;
    END IF;
    GET DIAGNOSTICS logged = ROW_COUNT;
    IF logged > 0 THEN
        PERFORM feed.ring();
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION feed.capture_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
SET intervalstyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = '1'
AS $$
DECLARE
    logged bigint;
BEGIN
    IF TG_NARGS > 1 THEN
        EXECUTE format('INSERT INTO feed.change (topic, op, row) '
                       'SELECT $1, ''destroy'', row_to_json(whole.*) FROM %s AS whole',
                       feed.whole_rows(TG_RELID, 'old_rows')) USING TG_ARGV[0];
    ELSE
        INSERT INTO feed.change (topic, op, row)
        SELECT TG_ARGV[0], 'destroy', row_to_json(old_rows.*) FROM old_rows;
    END IF;
    GET DIAGNOSTICS logged = ROW_COUNT;
    IF logged > 0 THEN
        PERFORM feed.ring();
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION feed.capture_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO feed.change (topic, op) VALUES (TG_ARGV[0], 'truncate');
    PERFORM feed.ring();
    RETURN NULL;
END
$$;

CREATE FUNCTION feed.key_of(relation regclass) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(attname ORDER BY place)
    FROM pg_index
    CROSS JOIN LATERAL unnest(indkey::int2[]) WITH ORDINALITY AS key (attnum, place)
    JOIN pg_attribute ON attrelid = indrelid AND pg_attribute.attnum = key.attnum
    WHERE indrelid = relation AND indisprimary AND place <= indnkeyatts
$$;

CREATE FUNCTION feed.update_statement(
    key name[], old_rows text DEFAULT 'old_rows', new_rows text DEFAULT 'new_rows'
) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format($sql$
        INSERT INTO feed.change (topic, op, row)
        SELECT $1,
               CASE WHEN after IS NULL THEN 'destroy' WHEN before IS NULL THEN 'create'
                    ELSE 'update' END,
               coalesce(after, before)
        FROM (
            SELECT CASE WHEN o.here THEN row_to_json(o.old) END AS before,
                   CASE WHEN n.here THEN row_to_json(n.new) END AS after,
                   o.here AND n.here AND o.old *= n.new AS same
            FROM (SELECT old_rows AS old, true AS here, %1$s FROM %4$s AS old_rows) AS o
            FULL JOIN (SELECT new_rows AS new, true AS here, %2$s FROM %5$s AS new_rows) AS n
                ON %3$s
        ) AS pair
        WHERE same IS NOT TRUE
        ORDER BY after IS NOT NULL
    $sql$,
    coalesce(string_agg(format('old_rows.%I AS k%s', part, place), ', '), 'true AS k'),
    coalesce(string_agg(format('new_rows.%I AS k%s', part, place), ', '), 'false AS k'),
    coalesce(string_agg(format('o.k%1$s = n.k%1$s', place), ' AND '), 'o.k = n.k'),
    old_rows, new_rows)
    FROM unnest(key) WITH ORDINALITY AS parts (part, place)
$$;

CREATE FUNCTION feed.watch(relation regclass, topic text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $watch$
DECLARE
    key name[] := feed.key_of(relation);
    kind record;
    on_update text := format('capture_update_%s', relation::oid);
    arguments text := quote_nullable(topic);
BEGIN
    SELECT relkind, relpersistence, relhassubclass, relispartition,
           EXISTS (SELECT FROM pg_inherits WHERE inhrelid = relation) AS inherits
    INTO STRICT kind FROM pg_class WHERE oid = relation;
    IF topic IS NULL OR topic !~ '^[a-z][a-z0-9_-]{0,62}$' OR topic = 'feed' THEN
        RAISE EXCEPTION 'The topic % cannot be used: take a lower-case word of letters, digits, _ and -, other than feed.',
            quote_nullable(topic) USING ERRCODE = 'invalid_parameter_value';
    ELSIF kind.relkind <> 'r' OR kind.relpersistence <> 'p' THEN
        RAISE EXCEPTION '% cannot be watched: only ordinary, permanent tables can.', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF kind.relispartition OR kind.inherits OR kind.relhassubclass THEN
        RAISE EXCEPTION '% cannot be watched: it shares its rows with another table (partition or inheritance).', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF key IS NULL THEN
        RAISE EXCEPTION '% cannot be watched: it has no primary key, and without one an update cannot be told from a delete and an insert.', relation
            USING ERRCODE = 'invalid_table_definition', HINT = 'Add a primary key first.';
    END IF;
    PERFORM feed.unwatch(relation);
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = relation AND attgenerated = 'v') THEN
        arguments := arguments || ', ''virtual''';
    END IF;

    EXECUTE format($create$
        CREATE FUNCTION feed.%1$I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
        SET intervalstyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = '1'
        AS $body$
        DECLARE
            logged bigint;
        BEGIN
            IF TG_NARGS > 1 THEN
                EXECUTE feed.update_statement(
                    feed.key_of(TG_RELID), feed.whole_rows(TG_RELID, 'old_rows'),
                    feed.whole_rows(TG_RELID, 'new_rows')) USING TG_ARGV[0];
            ELSIF feed.key_of(TG_RELID) = %2$L::name[] THEN
                %3$s;
            ELSE
                EXECUTE feed.update_statement(feed.key_of(TG_RELID)) USING TG_ARGV[0];
            END IF;
            GET DIAGNOSTICS logged = ROW_COUNT;
            IF logged > 0 THEN
                PERFORM feed.ring();
            END IF;
            RETURN NULL;
        END
        $body$
    $create$, on_update, key, replace(feed.update_statement(key), '$1', 'TG_ARGV[0]'));
    EXECUTE format('REVOKE ALL ON FUNCTION feed.%I() FROM PUBLIC', on_update);

    EXECUTE format('CREATE TRIGGER feed_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.capture_insert(%s)', relation, arguments);
    EXECUTE format('CREATE TRIGGER feed_update AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows '
                   'NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION feed.%I(%s)',
                   relation, on_update, arguments);
    EXECUTE format('CREATE TRIGGER feed_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.capture_delete(%s)', relation, arguments);
    EXECUTE format('CREATE TRIGGER feed_truncate AFTER TRUNCATE ON %s '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.capture_truncate(%L)', relation, topic);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER feed_insert, '
                   'ENABLE ALWAYS TRIGGER feed_update, ENABLE ALWAYS TRIGGER feed_delete, '
                   'ENABLE ALWAYS TRIGGER feed_truncate', relation);
END
$watch$;

CREATE FUNCTION feed.unwatch(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $$
DECLARE
    trigger record;
BEGIN
    FOR trigger IN
        SELECT tgname, proname, proname LIKE 'capture\_update\_%' AS generated
        FROM pg_trigger
        JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = relation AND pronamespace = 'feed'::regnamespace AND NOT tgisinternal
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger.tgname, relation);
        IF trigger.generated THEN
            EXECUTE format('DROP FUNCTION feed.%I()', trigger.proname);
        END IF;
    END LOOP;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC;

SELECT feed.watch('things', 'thing');
