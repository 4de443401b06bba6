-- The triggers that write the log and ring the bell, and the functions that put them on a table.
--
-- Capture is by statement, with transition tables: a bulk statement costs one INSERT ... SELECT.
-- The functions pin every setting a row's text depends on, so a row looks the same whoever wrote
-- it. They run as the owner of the feed: writers need no rights on it.

-- Whether a writer must ring: somebody sleeps.
--
-- A sleeping feed holds this lock exclusively (app/feed/listener.py): then NOTIFY wakes it. If
-- the lock can be had, the feed is awake and reading every few milliseconds; holding it until the
-- commit is visible keeps the feed from falling asleep over this change. So a busy feed costs
-- writers no NOTIFY, and with it not the cluster-wide lock a notifying commit takes.
--
-- PREPARE TRANSACTION refuses transactions that used NOTIFY. Where two-phase commit is enabled the
-- bell stays silent, and the feed never sleeps.
--
-- Only the capture functions call this, with the search path they have pinned. Without settings of
-- its own it is inlined there, which a writer notices.
CREATE FUNCTION feed.must_ring() RETURNS boolean
LANGUAGE sql
AS $$
    SELECT NOT pg_try_advisory_xact_lock_shared(1413563213, 1)
           AND current_setting('max_prepared_transactions') = '0'
$$;

-- A transition table with its virtual generated columns (Postgres 18), for a FROM clause: those are
-- computed when a row is read, and a transition table has NULL in their place. The triggers have an
-- argument where feed.watch saw such columns; one added later shows only after another feed.watch
-- (to look at every statement would make every write pay for it).
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

-- The columns of a table's primary key, in order; NULL where it has none.
CREATE FUNCTION feed.key_of(relation regclass) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(attname ORDER BY place)
    FROM pg_index
    CROSS JOIN LATERAL unnest(indkey::int2[]) WITH ORDINALITY AS key (attnum, place)
    JOIN pg_attribute ON attrelid = indrelid AND pg_attribute.attnum = key.attnum
    WHERE indrelid = relation AND indisprimary AND place <= indnkeyatts
$$;

-- The statement that logs an INSERT (as create) or a DELETE (as destroy).
CREATE FUNCTION feed.rows_statement(topic text, op text, rows text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('INSERT INTO feed.change (topic, op, row) '
                  'SELECT %L, %L, row_to_json(changed.*) FROM %s AS changed', topic, op, rows)
$$;

-- The statement that logs an UPDATE of rows with this key. Old and new rows are paired by key: a key
-- that changed is a destroy and a create, destroys first; a row that did not change is no change.
-- Without a key nothing can be paired: all old rows go, all new ones come.
CREATE FUNCTION feed.update_statement(
    topic text, key name[], old_rows text DEFAULT 'old_rows', new_rows text DEFAULT 'new_rows'
) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format($sql$
        INSERT INTO feed.change (topic, op, row)
        SELECT %6$L,
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
    old_rows, new_rows, topic)
    FROM unnest(key) WITH ORDINALITY AS parts (part, place)
$$;

-- Puts the capture triggers on a table, its events named `topic:create` and so on. Idempotent:
-- called again it takes a changed key or topic over.
CREATE FUNCTION feed.watch(relation regclass, topic text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $watch$
DECLARE
    key name[] := feed.key_of(relation);
    kind record;
    capture text := format('capture_%s', relation::oid);
    virtual text := '';
BEGIN
    SELECT relkind, relpersistence, relnamespace, relhassubclass, relispartition,
           EXISTS (SELECT FROM pg_inherits WHERE inhrelid = relation) AS inherits
    INTO STRICT kind FROM pg_class WHERE oid = relation;
    IF topic IS NULL OR topic !~ '^[a-z][a-z0-9_-]{0,62}$' OR topic = 'feed' THEN
        RAISE EXCEPTION 'The topic % cannot be used: take a lower-case word of letters, digits, _ and -, other than feed.',
            quote_nullable(topic) USING ERRCODE = 'invalid_parameter_value';
    ELSIF kind.relkind <> 'r' OR kind.relpersistence <> 'p' THEN
        RAISE EXCEPTION '% cannot be watched: only ordinary, permanent tables can.', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF kind.relnamespace = 'feed'::regnamespace THEN
        RAISE EXCEPTION '% cannot be watched: it is the feed''s own.', relation
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
        virtual := 'virtual';
    END IF;

    -- One function a table, its statements without parameters, so that they are planned once and not
    -- at every write. If the key has changed since, or columns are virtual, they are made anew:
    -- slower, but right.
    EXECUTE format($create$
        CREATE FUNCTION feed.%1$I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET datestyle = 'ISO'
        SET intervalstyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = '1'
        AS $body$
        DECLARE
            logged bigint;
        BEGIN
            IF TG_OP = 'TRUNCATE' THEN
                INSERT INTO feed.change (topic, op) VALUES (%2$L, 'truncate');
            ELSIF TG_OP = 'UPDATE' AND TG_NARGS > 0 THEN
                EXECUTE feed.update_statement(
                    %2$L, feed.key_of(TG_RELID), feed.whole_rows(TG_RELID, 'old_rows'),
                    feed.whole_rows(TG_RELID, 'new_rows'));
            ELSIF TG_OP = 'UPDATE' AND feed.key_of(TG_RELID) = %3$L::name[] THEN
                %4$s;
            ELSIF TG_OP = 'UPDATE' THEN
                EXECUTE feed.update_statement(%2$L, feed.key_of(TG_RELID));
            ELSIF TG_OP = 'INSERT' AND TG_NARGS > 0 THEN
                EXECUTE feed.rows_statement(
                    %2$L, 'create', feed.whole_rows(TG_RELID, 'new_rows'));
            ELSIF TG_OP = 'INSERT' THEN
                %5$s;
            ELSIF TG_NARGS > 0 THEN
                EXECUTE feed.rows_statement(
                    %2$L, 'destroy', feed.whole_rows(TG_RELID, 'old_rows'));
            ELSE
                %6$s;
            END IF;
            GET DIAGNOSTICS logged = ROW_COUNT;
            IF logged > 0 AND feed.must_ring() THEN
                NOTIFY feed;
            END IF;
            RETURN NULL;
        END
        $body$
    $create$, capture, topic, key, feed.update_statement(topic, key),
    feed.rows_statement(topic, 'create', 'new_rows'),
    feed.rows_statement(topic, 'destroy', 'old_rows'));
    EXECUTE format('REVOKE ALL ON FUNCTION feed.%I() FROM PUBLIC', capture);

    EXECUTE format('CREATE TRIGGER feed_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.%I(%s)', relation, capture, virtual);
    EXECUTE format('CREATE TRIGGER feed_update AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows '
                   'NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION feed.%I(%s)',
                   relation, capture, virtual);
    EXECUTE format('CREATE TRIGGER feed_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.%I(%s)', relation, capture, virtual);
    EXECUTE format('CREATE TRIGGER feed_truncate AFTER TRUNCATE ON %s '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.%I()', relation, capture);
    -- ALWAYS: also for sessions that have set session_replication_role to replica.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER feed_insert, '
                   'ENABLE ALWAYS TRIGGER feed_update, ENABLE ALWAYS TRIGGER feed_delete, '
                   'ENABLE ALWAYS TRIGGER feed_truncate', relation);
END
$watch$;

-- Takes the capture triggers off a table; changes already logged stay. Not an error where there
-- are none.
CREATE FUNCTION feed.unwatch(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $$
DECLARE
    trigger record;
    capture name;
BEGIN
    FOR trigger IN
        SELECT tgname, proname
        FROM pg_trigger
        JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = relation AND pronamespace = 'feed'::regnamespace
              AND proname LIKE 'capture\_%'
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger.tgname, relation);
        capture := trigger.proname;
    END LOOP;
    IF capture IS NOT NULL THEN
        EXECUTE format('DROP FUNCTION feed.%I()', capture);
    END IF;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC;
