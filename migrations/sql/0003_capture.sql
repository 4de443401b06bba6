-- The triggers of a watched table: they write the log and ring the bell.
--
-- Capture is by statement, with transition tables: a bulk statement costs one INSERT ... SELECT.
-- The functions pin every setting a row's text depends on, so a row looks the same whatever session
-- wrote it. They run as the owner of the feed, so writers need no privileges on it. Therefore they
-- must never run anybody else's code (feed.trusts), and nothing a user may do to a table may make
-- them fail.

-- Whether a writer must ring, because a feed is asleep.
--
-- A sleeping feed holds this lock exclusively (app/feed/listener.py), and NOTIFY wakes it. If the
-- lock is available, the feed is awake and reading every few milliseconds; holding it until the
-- commit is visible keeps the feed from falling asleep without seeing this change. So while the
-- feed is busy, writers do not NOTIFY, and do not take the cluster-wide lock of a notifying commit.
--
-- Only the capture functions call this, with the search path they have pinned. It has no settings
-- of its own, so that it is inlined there; writers would notice the call.
CREATE OR REPLACE FUNCTION feed.must_ring() RETURNS boolean
LANGUAGE sql
AS $$
    SELECT NOT pg_try_advisory_xact_lock_shared(1413563213, 1)
$$;

-- Rings the bell.
--
-- PREPARE TRANSACTION refuses transactions that used NOTIFY. So if two-phase commit is enabled, the
-- bell stays silent and the feed never sleeps.
CREATE FUNCTION feed.ring() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('max_prepared_transactions') = '0' THEN
        NOTIFY feed;
    END IF;
END
$$;

-- Runs before each statement on a watched table, so that capture can tell whether other statements
-- on this table ran inside it (in triggers, or in functions that it calls).
--
-- The argument names the setting that records the table's open statements: a `+` for each; then, if
-- one of them has logged anything, the last change logged before that; and `!` if the last
-- statement logged has changed keys. So `+` alone is one statement with no other inside it. The
-- setting is local to the transaction, so a failed statement is rolled back out of it.
--
-- It runs as the writer and does not pin the search path, which would cost more than everything
-- else it does, so every name in it is qualified. It is a single expression because PL/pgSQL
-- prepares every expression again in each transaction, which takes longer than evaluating it.
CREATE FUNCTION feed.begin_statement() RETURNS trigger
LANGUAGE plpgsql
AS $$
DECLARE
    nesting pg_catalog.text;
BEGIN
    nesting := pg_catalog.set_config(TG_ARGV[0],
        pg_catalog.concat('+', pg_catalog.current_setting(TG_ARGV[0], true)), true);
    RETURN NULL;
END
$$;

-- Records that a statement has changed keys; returns the operation that is logged for that.
CREATE FUNCTION feed.rekey(setting text) RETURNS text
LANGUAGE sql SET search_path = pg_catalog, pg_temp
AS $$
    SELECT set_config(setting, concat(rtrim(current_setting(setting, true), '!'), '!'), true);
    SELECT 'rekey'
$$;

-- Whether values of a type can be rendered as JSON without running the code of a role that could
-- not act as the owner of the feed anyway: row_to_json calls a type's cast to json if there is one.
-- (OIDs of user objects begin at 16384. A domain is rendered as its base type.) With `from_text`,
-- also whether they can be parsed from text, which runs the checks of a domain.
CREATE FUNCTION feed.trusts_type(type oid, from_text boolean DEFAULT false) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT type < 16384 OR (
        WITH RECURSIVE part (type) AS (
            SELECT trusts_type.type
            UNION
            SELECT inside.type
            FROM part
            JOIN pg_type ON pg_type.oid = part.type
            CROSS JOIN LATERAL (
                SELECT unnest(ARRAY[typelem, typbasetype])
                UNION ALL
                SELECT atttypid FROM pg_attribute
                WHERE typrelid <> 0 AND attrelid = typrelid AND attnum > 0 AND NOT attisdropped
            ) AS inside (type)
            WHERE inside.type <> 0
        )
        SELECT bool_and(oid < 16384 OR typtype = 'd' AND NOT from_text
                        OR pg_has_role(typowner, current_user, 'MEMBER'))
        FROM part JOIN pg_type ON oid = part.type
    )
$$;

-- Whether that holds for every column of a table.
--
-- Declared immutable, although it is not, so that it is evaluated when a capture statement is
-- planned, not when it runs; any change to the table's columns causes the statement to be
-- replanned.
CREATE FUNCTION feed.trusts(relation oid) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(bool_and(feed.trusts_type(atttypid)), true) FROM pg_attribute
    WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
$$;

-- Whether a table's rows must be spelled out column by column: because it has columns whose types
-- are not trusted to render them, or virtual generated columns (Postgres 18), which are computed
-- when a row is read and are NULL in a transition table.
CREATE FUNCTION feed.needs_spelling(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT NOT feed.trusts(relation::oid) OR EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = relation AND attgenerated = 'v')
$$;

-- The rows of a table, or of a transition table with its columns, as an item of a FROM clause.
-- Columns whose types are not trusted are given as text, or as an array of texts.
CREATE FUNCTION feed.rows_of(relation regclass, source text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN NOT feed.needs_spelling(relation) THEN source ELSE (
        SELECT format('(SELECT %s FROM %s)', string_agg(format(CASE
                   WHEN attgenerated = 'v' THEN '(%2$s) AS %1$I'
                   WHEN feed.trusts_type(atttypid) THEN '%1$I'
                   WHEN typcategory = 'A'
                       THEN 'CASE num_nulls(%1$I) WHEN 0 THEN format(''%%s'', %1$I)::text[] END AS %1$I'
                   ELSE 'CASE num_nulls(%1$I) WHEN 0 THEN format(''%%s'', %1$I) END AS %1$I'
               END, attname, pg_get_expr(adbin, adrelid)), ', ' ORDER BY attnum), source)
        FROM pg_attribute
        JOIN pg_type ON pg_type.oid = atttypid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
    ) END
$$;

-- The columns of a table's primary key, in order; NULL if it has none.
CREATE FUNCTION feed.key_of(relation regclass) RETURNS name[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT array_agg(attname ORDER BY place)
    FROM pg_index
    CROSS JOIN LATERAL unnest(indkey::int2[]) WITH ORDINALITY AS key (attnum, place)
    JOIN pg_attribute ON attrelid = indrelid AND pg_attribute.attnum = key.attnum
    WHERE indrelid = relation AND indisprimary AND place <= indnkeyatts
$$;

-- Whether two rows may hold one key until the transaction ends.
CREATE FUNCTION feed.key_is_deferrable(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM pg_index
                   WHERE indrelid = relation AND indisprimary AND NOT indimmediate)
$$;

-- A row as JSON; NULL if that would be longer than the log accepts, in which case clients must load
-- the topic again. Only called for rows above a certain size (feed.json_expression).
CREATE FUNCTION feed.large_json(changed record) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    rendered json;
BEGIN
    rendered := row_to_json(changed);
    RETURN CASE WHEN octet_length(rendered::text) <= 268435456 THEN rendered END;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$$;

-- The expression that renders one row as JSON. Rendering a row of up to 32 KiB never exceeds
-- Postgres's limits: in the worst case, a numeric of 8 bytes becomes 150,000 digits.
CREATE FUNCTION feed.json_expression(rows text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('CASE WHEN pg_column_size(%1$s) <= 32768 THEN row_to_json(%1$s) '
                  'ELSE feed.large_json(%1$s) END', rows)
$$;

-- The statement that logs what an INSERT, UPDATE or DELETE has changed.
--
-- Columns are written `alias.column` and whole rows `alias.*`, so that no column name can be
-- mistaken for anything else. The old and new rows of an UPDATE come in the same order; pairing
-- them by place needs no key and no equality, and works even when foreign keys update one row
-- several times. A row that stayed the same is not logged. A row whose key changed (or that has
-- none) is logged as `rekey`, which feed.settle turns into a destroy and a create.
CREATE FUNCTION feed.capture_statement(relation regclass, topic text, op text, setting text)
RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE op
        WHEN 'INSERT' THEN format($sql$
            INSERT INTO feed.change (topic, op, new)
            SELECT %L, 'create', %s FROM %s AS x
        $sql$, topic, feed.json_expression('x.*'), feed.rows_of(relation, 'new_rows'))
        WHEN 'DELETE' THEN format($sql$
            INSERT INTO feed.change (topic, op, old)
            SELECT %L, 'destroy', %s FROM %s AS x
        $sql$, topic, feed.json_expression('x.*'), feed.rows_of(relation, 'old_rows'))
        ELSE format($sql$
            INSERT INTO feed.change (topic, op, old, new)
            SELECT %L,
                   CASE WHEN record_image_eq(ROW(%s), ROW(%s)) THEN 'update'
                        ELSE feed.rekey(%L) END,
                   %s, %s
            FROM (SELECT row_number() OVER () AS place, x.*::record AS r%s FROM %s AS x) AS o
            JOIN (SELECT row_number() OVER () AS place, x.*::record AS r%s FROM %s AS x) AS n
                ON n.place = o.place
            WHERE record_image_ne(o.r, n.r)
            ORDER BY o.place
        $sql$, topic, coalesce(key.of_old, 'false'), coalesce(key.of_new, 'true'), setting,
        feed.json_expression('o.r'), feed.json_expression('n.r'),
        key.named, feed.rows_of(relation, 'old_rows'), key.named, feed.rows_of(relation, 'new_rows'))
    END
    FROM (
        SELECT string_agg(format('o.k%s', place), ', ') AS of_old,
               string_agg(format('n.k%s', place), ', ') AS of_new,
               string_agg(format(', x.%I AS k%s', part, place), '' ORDER BY place) AS named
        FROM unnest(feed.key_of(relation)) WITH ORDINALITY AS parts (part, place)
    ) AS key
$$;

-- The body of the function that captures the changes of one table. Its statements have no
-- parameters, so that they are planned once and not on every write. If the table has been altered
-- since the body was written, or must be spelled out, they are built on every write: slower, but
-- correct.
--
-- Expressions are few and short, for the reason given at feed.begin_statement.
CREATE FUNCTION feed.capture_body(relation regclass, topic text, setting text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format($body$
DECLARE
    nesting text;
    logged bigint;
BEGIN
    IF TG_OP = 'INSERT' AND %1$s THEN
        %2$s WHERE %8$s;
    ELSIF TG_OP = 'UPDATE' AND %1$s AND %5$s THEN
        %3$s;
    ELSIF TG_OP = 'DELETE' AND %1$s THEN
        %4$s WHERE %8$s;
    ELSIF TG_OP = 'TRUNCATE' THEN
        INSERT INTO feed.change (topic, op) VALUES (%6$L, 'truncate');
    ELSE
        EXECUTE feed.capture_statement(TG_RELID, %6$L, TG_OP, %7$L);
    END IF;
    GET DIAGNOSTICS logged = ROW_COUNT;
    IF logged = 0 THEN
        -- Nothing has changed, or a type is not to be trusted any more.
        IF TG_OP = 'DELETE' THEN
            PERFORM FROM old_rows WHERE NOT %8$s LIMIT 1;
        ELSE
            PERFORM FROM new_rows WHERE NOT %8$s LIMIT 1;
        END IF;
        IF FOUND AND %1$s THEN
            EXECUTE feed.capture_statement(TG_RELID, %6$L, TG_OP, %7$L);
            GET DIAGNOSTICS logged = ROW_COUNT;
        END IF;
    END IF;
    IF %9$s THEN
        nesting := set_config(%7$L, '', true);
    ELSIF TG_OP <> 'TRUNCATE' THEN
        nesting := current_setting(%7$L, true);
        nesting := set_config(%7$L, feed.settle(TG_RELID, %6$L, nesting, logged), true);
    END IF;
    IF logged > 0 THEN
        -- Now and then a snapshot: what it can see a reader can take as one batch.
        IF currval('feed.change_id_seq') %% 4096 < logged THEN
            INSERT INTO feed.checkpoint DEFAULT VALUES;
        END IF;
        IF feed.must_ring() THEN
            PERFORM feed.ring();
        END IF;
    END IF;
    RETURN NULL;
END
    $body$,
    CASE WHEN feed.needs_spelling(relation) THEN 'false'
         ELSE format('TG_RELID = %s', relation::oid) END,
    feed.capture_statement(relation, topic, 'INSERT', setting),
    regexp_replace(feed.capture_statement(relation, topic, 'UPDATE', setting),
                   '(?=ORDER BY o.place)', format('AND feed.trusts(%s) ', relation::oid)),
    feed.capture_statement(relation, topic, 'DELETE', setting),
    (SELECT string_agg(format('pg_get_indexdef(%s, %s, false) = %L', indexrelid, place,
                              quote_ident(part)), ' AND ')
     FROM pg_index, unnest(feed.key_of(relation)) WITH ORDINALITY AS parts (part, place)
     WHERE indrelid = relation AND indisprimary),
    topic, setting, format('feed.trusts(%s)', relation::oid),
    format($leaf$current_setting(%L, true) = '+'$leaf$, setting)
    || CASE WHEN feed.key_is_deferrable(relation) THEN $leaf$ AND TG_OP = 'INSERT'$leaf$ ELSE '' END)
$$;
