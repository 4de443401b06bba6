-- The triggers that write the log and ring the bell, and the functions that put them on a table.
--
-- Capture is by statement, with transition tables: a bulk statement costs one INSERT ... SELECT.
-- The functions pin every setting a row's text depends on, so a row looks the same whoever wrote
-- it. They run as the owner of the feed: writers need no rights on it. So they must run no code of
-- anybody else's (feed.trusts), and nothing that a user may do to a table may make them fail.

-- The topics: which table's changes they carry, and what the table was like when somebody last
-- looked (feed.shape). What differs later is noticed by feed.check_topics.
CREATE TABLE feed.topic (
    relation regclass PRIMARY KEY,
    topic    text     NOT NULL,
    shape    text     NOT NULL
);

-- Whether a writer must ring: somebody sleeps.
--
-- A sleeping feed holds this lock exclusively (app/feed/listener.py): then NOTIFY wakes it. If
-- the lock can be had, the feed is awake and reading every few milliseconds; holding it until the
-- commit is visible keeps the feed from falling asleep over this change. So a busy feed costs
-- writers no NOTIFY, and with it not the cluster-wide lock a notifying commit takes.
--
-- Only the capture functions call this, with the search path they have pinned. Without settings of
-- its own it is inlined there, which a writer notices.
CREATE OR REPLACE FUNCTION feed.must_ring() RETURNS boolean
LANGUAGE sql
AS $$
    SELECT NOT pg_try_advisory_xact_lock_shared(1413563213, 1)
$$;

-- Rings the bell.
--
-- PREPARE TRANSACTION refuses transactions that used NOTIFY. Where two-phase commit is enabled the
-- bell stays silent, and the feed never sleeps.
CREATE FUNCTION feed.ring() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('max_prepared_transactions') = '0' THEN
        NOTIFY feed;
    END IF;
END
$$;

-- Begins a statement on a watched table: before it, so that its capture can tell whether other
-- statements on this table ran inside it (in triggers, or in functions that it calls).
--
-- The argument names the setting in which the table's open statements are noted: a `+` for each,
-- then the last change logged before the first of them logged anything, if one has, and `!` if what
-- was logged last has changed keys. So `+` alone is one statement that no other ran inside. The
-- setting is local to the transaction: what fails takes its part of it along.
--
-- It runs as the writer and pins no search path, which would cost more than all it does; so every
-- name in it is qualified. And it is one expression, because in each transaction PL/pgSQL prepares
-- every expression anew, which takes longer than to evaluate it.
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

-- Notes that a statement has changed keys; returns the operation that is logged for that.
CREATE FUNCTION feed.rekey(setting text) RETURNS text
LANGUAGE sql SET search_path = pg_catalog, pg_temp
AS $$
    SELECT set_config(setting, concat(rtrim(current_setting(setting, true), '!'), '!'), true);
    SELECT 'rekey'
$$;

-- Whether values of a type can be rendered as JSON without running code of somebody who could not
-- act as the owner of the feed anyway: row_to_json calls a cast to json where a type has one. (The
-- first object of a user has the number 16384. A domain is rendered as its base type.) With
-- `from_text`, whether they can be read from text, too, which runs the checks of a domain.
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
-- Declared immutable, which it is not, so that it is evaluated when a capture statement is planned
-- and not when it runs; any change of the table's columns has the statement planned again.
CREATE FUNCTION feed.trusts(relation oid) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(bool_and(feed.trusts_type(atttypid)), true) FROM pg_attribute
    WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
$$;

-- Whether a table's rows must be spelled out column by column: it has columns that may not be
-- rendered by their types, or virtual generated ones (Postgres 18), which are computed when a row is
-- read and are NULL in a transition table.
CREATE FUNCTION feed.needs_spelling(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT NOT feed.trusts(relation::oid) OR EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = relation AND attgenerated = 'v')
$$;

-- The rows of a table, or of a transition table with its columns, as an item of a FROM clause. What
-- may not be rendered by its type is given as text, or as an array of texts.
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

-- Whether the owner of the feed may query a table. Planning a query runs functions that whoever owns
-- the table has put into indexes, constraints or statistics.
CREATE FUNCTION feed.may_read(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT pg_has_role(relowner, current_user, 'MEMBER') AND NOT EXISTS (
        SELECT FROM unnest(feed.key_of(relation)) AS parts (part)
        JOIN pg_attribute ON attrelid = relation AND attname = part
        WHERE NOT feed.trusts_type(atttypid, from_text => true))
    FROM pg_class WHERE oid = relation
$$;

-- A row as JSON; NULL if that would be longer than the log takes: whoever shows the table must load
-- it again. Only rows of some size are given to this function (feed.json_expression).
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

-- The expression that renders one row as JSON. Up to 32 KiB no row can become so long that
-- rendering fails: the worst, a numeric of 8 bytes, is 150,000 digits.
CREATE FUNCTION feed.json_expression(rows text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('CASE WHEN pg_column_size(%1$s) <= 32768 THEN row_to_json(%1$s) '
                  'ELSE feed.large_json(%1$s) END', rows)
$$;

-- The statement that logs what an INSERT, UPDATE or DELETE has changed; NULL without a primary key
-- it cannot do without.
--
-- Columns are written `alias.column` and whole rows `alias.*`, so that no column's name can be taken
-- for something else. Of an UPDATE the old and the new rows come in the same order; pairing them by
-- place needs no key and no equality, and holds where foreign keys update one row several times. A
-- row that did not change is no change. One whose key changed is logged as `rekey`, which
-- feed.settle makes a destroy and a create.
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

-- The order of one key's changes that leads to what the table holds now (`final`, NULL: no row), as
-- places in the arrays; 0 stands for a change that is missing at the end.
--
-- Each change begins where the one before it ended, so the order is a trail through the key's states
-- that takes every change once (an Eulerian trail, found by Hierholzer's algorithm). It is walked from
-- the end backwards; where several changes lead to a state, the one with the highest place was last.
--
-- Without a look at the table (`known` is false) the end is the state that more changes lead to than
-- from. If they go round in a circle there is no telling.
CREATE FUNCTION feed.chain(befores text[], afters text[], final text, known boolean)
RETURNS integer[]
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- The states are numbered; NULL, too, is one.
    starts integer[];
    ends integer[];
    last integer;
    state integer;
    newest integer[] := '{}';  -- for each state, the last change not yet taken that leads to it
    older integer[] := '{}';   -- for each change, the one before it that leads to the same state
    walk integer[] := '{}';
    depth integer := 0;
    chained integer[] := '{}';
    unbroken boolean := true;
BEGIN
    SELECT array_agg(number ORDER BY place) FILTER (WHERE side = 1),
           array_agg(number ORDER BY place) FILTER (WHERE side = 2),
           max(number) FILTER (WHERE side = 3)
    INTO starts, ends, last
    FROM (
        SELECT side, place, dense_rank() OVER (ORDER BY image COLLATE "C") AS number
        FROM (SELECT 1, * FROM unnest(befores) WITH ORDINALITY
              UNION ALL SELECT 2, * FROM unnest(afters) WITH ORDINALITY
              UNION ALL SELECT 3, final, 0) AS images (side, image, place)
    ) AS numbered;
    IF NOT known THEN
        SELECT number INTO STRICT last
        FROM (SELECT unnest(ends), 1 UNION ALL SELECT unnest(starts), -1) AS side (number, surplus)
        GROUP BY number HAVING sum(surplus) > 0;
    END IF;
    FOR place IN 1 .. cardinality(ends) LOOP
        older[place] := newest[ends[place]];
        newest[ends[place]] := place;
    END LOOP;
    LOOP
        state := CASE depth WHEN 0 THEN last ELSE starts[walk[depth]] END;
        IF newest[state] IS NOT NULL THEN
            depth := depth + 1;
            walk[depth] := newest[state];
            newest[state] := older[walk[depth]];
        ELSE
            EXIT WHEN depth = 0;
            unbroken := unbroken AND coalesce(ends[chained[cardinality(chained)]]
                                              = starts[walk[depth]], true);
            chained := chained || walk[depth];
            depth := depth - 1;
        END IF;
    END LOOP;
    IF unbroken AND cardinality(chained) = cardinality(ends) THEN
        RETURN chained;
    ELSIF NOT known THEN
        RAISE EXCEPTION 'changes do not follow from each other';
    END IF;
    -- There is none, as where a deferred key was held by two rows. Then only the end counts.
    SELECT array_agg(place ORDER BY ends[place] = last, befores[place] IS NULL, place)
    INTO chained FROM generate_subscripts(ends, 1) AS place;
    IF ends[chained[cardinality(chained)]] = last THEN
        RETURN chained;
    ELSIF final IS NULL THEN
        RAISE EXCEPTION 'changes lead to a row that is not there';
    END IF;
    RETURN chained || 0;
END
$$;

-- The rows a table holds now for some keys, as JSON; NULL where there is none. Of each key, written
-- as the text of an array of its JSON values, `images` has some row that has or had it.
--
-- They are found by the equality of the table's index; but 1.0 and 1.00 are two keys.
CREATE FUNCTION feed.present_rows(relation regclass, keys text[], images json[])
RETURNS TABLE (key text, present json)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
AS $$
DECLARE
    key_expression text;
    key_join text;
BEGIN
    SELECT string_agg(format('(image -> %L)::text', attname), ', ' ORDER BY place),
           string_agg(format('x.%1$I OPERATOR(%2$I.%3$s) (suspect.image ->> %1$L)::%4$s', attname,
                             nspname, oprname, format_type(atttypid, atttypmod)), ' AND ')
    INTO key_expression, key_join
    FROM unnest(feed.key_of(relation)) WITH ORDINALITY AS parts (part, place)
    JOIN pg_attribute ON attrelid = relation AND attname = part
    JOIN pg_index ON indrelid = relation AND indisprimary
    JOIN pg_opclass ON pg_opclass.oid = indclass[place - 1]
    JOIN pg_amop ON amopfamily = opcfamily AND amopstrategy = 3
         AND amoplefttype = opcintype AND amoprighttype = opcintype
    JOIN pg_operator ON pg_operator.oid = amopopr
    JOIN pg_namespace ON pg_namespace.oid = oprnamespace;
    RETURN QUERY EXECUTE format(
        'SELECT key, (SELECT image FROM (SELECT %s AS image FROM %s AS x WHERE %s) AS equal '
        '             WHERE suspect.key = ARRAY[%s]::text LIMIT 1) '
        'FROM unnest($1, $2) AS suspect (key, image)',
        feed.json_expression('x.*'), feed.rows_of(relation, format('ONLY %s', relation)),
        key_join, key_expression)
    USING keys, images;
END
$$;

-- Logs again, in the right order, what a statement and the statements inside it have changed on one
-- table: changes after `since`, of which `mine` and later were logged when it ended.
--
-- Only keys that were changed several times can be in the wrong order, and destroys and creates that
-- an update has made of a changed key. What existed before the statement goes first.
CREATE FUNCTION feed.reorder(relation regclass, changed text, since bigint, mine bigint)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
SET enable_nestloop = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    key_columns name[] := feed.key_of(relation);
    may_read boolean := key_columns IS NOT NULL AND feed.may_read(relation);
    key_is_deferrable boolean := feed.key_is_deferrable(relation);
BEGIN
    WITH entry AS MATERIALIZED (
        SELECT *, ARRAY(SELECT (image -> part)::text FROM unnest(key_columns) AS parts (part))::text
                      AS key
        FROM (
            SELECT id, part.*, id >= reorder.mine AS mine, async
            FROM feed.change CROSS JOIN LATERAL (
                SELECT 1 AS part, op, old, new, coalesce(new, old) AS image WHERE op <> 'rekey'
                UNION ALL
                SELECT 1, 'destroy', old, NULL, old WHERE op = 'rekey'
                UNION ALL
                SELECT 2, 'create', NULL, new, new WHERE op = 'rekey'
            ) AS part
            WHERE xid = pg_current_xact_id() AND id > since AND topic = changed
        ) AS logged
    ),
    rekeyed AS MATERIALIZED (
        SELECT EXISTS (SELECT FROM entry WHERE part = 2) AS any_rekey
    ),
    several AS MATERIALIZED (
        SELECT key, (array_agg(image))[1] AS image FROM entry
        WHERE image IS NOT NULL AND key_columns IS NOT NULL
        GROUP BY key HAVING count(*) > 1 OR key_is_deferrable
    ),
    suspect AS MATERIALIZED (
        SELECT key, NULL::json AS present FROM several WHERE NOT may_read
        UNION ALL
        SELECT present_rows.*
        FROM (SELECT array_agg(key) AS keys, array_agg(image) AS images FROM several WHERE may_read
              HAVING count(*) > 0) AS looked_for,
             feed.present_rows(relation, keys, images)
    ),
    placed AS MATERIALIZED (
        SELECT entry.*, present, row_number() OVER (
                   PARTITION BY entry.key ORDER BY mine DESC, id, part) AS place
        FROM entry JOIN suspect ON suspect.key = entry.key
    ),
    chained AS MATERIALIZED (
        SELECT *, feed.chain(befores, afters, present::text, may_read) AS chain
        FROM (
            SELECT key, (array_agg(present))[1] AS present,
                   array_agg(old::text ORDER BY place) AS befores,
                   array_agg(new::text ORDER BY place) AS afters,
                   array_agg(place ORDER BY id, part)::integer[] AS logged
            FROM placed GROUP BY key
        ) AS run
    ),
    step AS (
        SELECT chained.key, chained.present, place, ordinal,
               max(entry.id) OVER so_far AS id,
               max((place = 0 OR entry.mine AND entry.old IS NULL)::integer) OVER so_far AS late
        FROM chained
        CROSS JOIN LATERAL unnest(chain) WITH ORDINALITY AS link (place, ordinal)
        LEFT JOIN placed AS entry USING (key, place)
        WHERE chain <> logged OR (SELECT any_rekey FROM rekeyed)
        WINDOW so_far AS (PARTITION BY chained.key ORDER BY ordinal)
    ),
    again AS MATERIALIZED (
        SELECT late, step.id, ordinal, part, coalesce(op, 'create') AS op,
               old, CASE place WHEN 0 THEN step.present ELSE new END AS new, async, entry.id AS was
        FROM step LEFT JOIN placed AS entry USING (key, place)
        UNION ALL
        SELECT (old IS NULL)::integer, id, 0, part, op, old, new, async, id
        FROM entry
        WHERE (SELECT any_rekey FROM rekeyed)
              AND NOT EXISTS (SELECT FROM suspect WHERE suspect.key = entry.key)
    ),
    gone AS (
        DELETE FROM feed.change USING (SELECT DISTINCT was FROM again) AS old_place
        WHERE xid = pg_current_xact_id() AND change.id = was
    )
    INSERT INTO feed.change (topic, op, old, new, async)
    SELECT changed, op, old, new, async FROM again ORDER BY late, id, ordinal, part;
END
$$;

-- Whether two rows may hold one key until the transaction ends.
CREATE FUNCTION feed.key_is_deferrable(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM pg_index
                   WHERE indrelid = relation AND indisprimary AND NOT indimmediate)
$$;

-- Whether what was logged after `since` is in order anyway: no key has changed or was changed twice.
-- So it is where one statement both inserts and updates (ON CONFLICT, MERGE), and where those inside
-- another changed other rows.
CREATE FUNCTION feed.is_in_order(relation regclass, changed text, since bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS $$
DECLARE
    key name[] := feed.key_of(relation);
BEGIN
    RETURN NOT feed.key_is_deferrable(relation) AND NOT EXISTS (
        SELECT FROM (
            SELECT op, ARRAY(SELECT (coalesce(new, old) -> part)::text
                             FROM unnest(key) AS parts (part)) AS key
            FROM feed.change
            WHERE xid = pg_current_xact_id() AND id > since AND topic = changed
        ) AS logged
        GROUP BY logged.key HAVING count(*) > 1 OR bool_or(op = 'rekey'));
END
$$;

-- Ends a statement that others ran inside, that ran inside another, or that changed keys. `nesting`
-- is what is noted of the table's open statements (feed.begin_statement); returns what is to be noted
-- from now on. `logged`: how many changes the statement itself has just logged.
--
-- The outermost brings the changes of all into order. Before that the table holds what is not
-- logged yet, so there is no telling. Where somebody has reset the setting, everything the transaction
-- has logged may have to be.
--
-- What cannot be brought into order is not passed over: the topic must be loaded again.
--
-- Nothing here is compiled: it would take longer than to run it. (Before Postgres 18 a plan forbidden
-- by a setting, but the only one, seems expensive enough for that.)
CREATE FUNCTION feed.settle(relation regclass, changed text, nesting text, logged bigint)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    depth integer := length(nesting) - length(ltrim(nesting, '+'));
    since bigint := CASE WHEN depth > 0 THEN nullif(btrim(nesting, '+!'), '') ELSE '0' END;
    nested boolean := since IS NOT NULL;
    rekeyed boolean := nesting LIKE '%!';
    mine bigint;
BEGIN
    IF logged > 0 THEN
        SELECT min(id) INTO mine FROM (
            SELECT id FROM feed.change WHERE xid = pg_current_xact_id()
            ORDER BY xid DESC, id DESC LIMIT logged
        ) AS own;
        since := coalesce(since, mine - 1);
    END IF;
    IF depth > 1 THEN
        RETURN concat(repeat('+', depth - 1), since);
    ELSIF NOT nested AND logged = 1 AND NOT feed.key_is_deferrable(relation) THEN
        -- One row with a changed key: nothing can be in the wrong order.
        WITH rekeyed AS (
            DELETE FROM feed.change WHERE xid = pg_current_xact_id() AND id = mine AND op = 'rekey'
            RETURNING old, new, async
        )
        INSERT INTO feed.change (topic, op, old, new, async)
        SELECT changed, half.op, half.old, half.new, async
        FROM rekeyed, LATERAL (VALUES (1, 'destroy', rekeyed.old, NULL),
                                      (2, 'create', NULL, rekeyed.new)) AS half (part, op, old, new)
        ORDER BY part;
    ELSIF nested OR logged > 0 AND (rekeyed OR feed.key_is_deferrable(relation)) THEN
        BEGIN
            IF NOT feed.is_in_order(relation, changed, since) THEN
                PERFORM feed.reorder(relation, changed, since, coalesce(mine, 9223372036854775807));
            END IF;
        EXCEPTION WHEN OTHERS THEN
            RAISE LOG 'The changes of % cannot be brought into order (%): it must be loaded again.',
                relation, SQLERRM;
            INSERT INTO feed.change (topic, op) VALUES (changed, 'reload');
        END;
    END IF;
    RETURN '';
END
$$;

-- The body of the function that captures the changes of one table. Its statements have no
-- parameters, so that they are planned once and not at every write. Where a table is not what it
-- was when the body was written, or must be spelled out, they are made at each write: slower, but
-- right.
--
-- Expressions are few and short, for the reason that feed.begin_statement gives.
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

-- Puts the capture triggers on a table, its events named `topic:create` and so on. Idempotent:
-- called again it takes a changed key or topic over.
CREATE FUNCTION feed.watch(relation regclass, topic text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $watch$
DECLARE
    kind record;
    capture text := format('capture_%s', relation::oid);
    setting text;
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
    ELSIF kind.relispartition OR kind.inherits
          OR EXISTS (SELECT FROM pg_inherits WHERE inhparent = relation)
    THEN
        RAISE EXCEPTION '% cannot be watched: it shares its rows with another table (partition or inheritance).', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF feed.key_of(relation) IS NULL THEN
        RAISE EXCEPTION '% cannot be watched: it has no primary key, and without one an update cannot be told from a delete and an insert.', relation
            USING ERRCODE = 'invalid_table_definition', HINT = 'Add a primary key first.';
    END IF;
    PERFORM feed.unwatch(relation);
    -- A dump restored elsewhere brings functions named after other tables' numbers.
    WHILE EXISTS (SELECT FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
                  WHERE proname = capture AND pronamespace = 'feed'::regnamespace)
    LOOP
        capture := capture || '_';
    END LOOP;
    setting := replace(capture, 'capture', 'feed.nesting');

    EXECUTE format('CREATE OR REPLACE FUNCTION feed.%I() RETURNS trigger LANGUAGE plpgsql '
                   'SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = ''UTC'' '
                   'SET datestyle = ''ISO'' SET intervalstyle = ''postgres'' '
                   'SET bytea_output = ''hex'' SET extra_float_digits = ''1'' '
                   -- Planned when one row is updated, and used when a million are; and the
                   -- other way round.
                   'SET enable_nestloop = off SET jit = off AS %L',
                   capture, feed.capture_body(relation, topic, setting));
    EXECUTE format('REVOKE ALL ON FUNCTION feed.%I() FROM PUBLIC', capture);

    EXECUTE format('CREATE TRIGGER feed_begin BEFORE INSERT OR UPDATE OR DELETE ON %s '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.begin_statement(%L)', relation, setting);
    EXECUTE format('CREATE TRIGGER feed_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.%I()', relation, capture);
    EXECUTE format('CREATE TRIGGER feed_update AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows '
                   'NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION feed.%I()',
                   relation, capture);
    EXECUTE format('CREATE TRIGGER feed_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.%I()', relation, capture);
    EXECUTE format('CREATE TRIGGER feed_truncate AFTER TRUNCATE ON %s '
                   'FOR EACH STATEMENT EXECUTE FUNCTION feed.%I()', relation, capture);
    -- ALWAYS: also for sessions that have set session_replication_role to replica.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER feed_begin, '
                   'ENABLE ALWAYS TRIGGER feed_insert, ENABLE ALWAYS TRIGGER feed_update, '
                   'ENABLE ALWAYS TRIGGER feed_delete, ENABLE ALWAYS TRIGGER feed_truncate', relation);
    INSERT INTO feed.topic (relation, topic, shape)
    VALUES (watch.relation, watch.topic, feed.shape(watch.relation));
END
$watch$;

-- Takes the capture triggers off a table; changes already logged stay. Not an error where there
-- are none.
CREATE FUNCTION feed.unwatch(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $$
DECLARE
    trigger record;
BEGIN
    FOR trigger IN
        SELECT tgname FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = relation AND pronamespace = 'feed'::regnamespace
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', trigger.tgname, relation);
    END LOOP;
    DELETE FROM feed.topic WHERE feed.topic.relation = unwatch.relation;
    PERFORM feed.drop_unused_captures();
END
$$;

-- Drops capture functions that no trigger calls: their tables are unwatched, or gone.
CREATE FUNCTION feed.drop_unused_captures() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    capture name;
BEGIN
    FOR capture IN
        SELECT proname FROM pg_proc
        WHERE pronamespace = 'feed'::regnamespace AND proname ~ '^capture_[0-9]+_*$'
              AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgfoid = pg_proc.oid)
    LOOP
        -- Another session may be doing the same.
        EXECUTE format('DROP FUNCTION IF EXISTS feed.%I()', capture);
    END LOOP;
END
$$;

-- What a table is like, as far as its clients must load it again where that has changed: columns
-- (`xmin` tells of each ALTER COLUMN, also one that rewrites the values) and what their types'
-- values look like and who owns them, the triggers, children. Rewriting the table without changing
-- it (VACUUM FULL) does not show.
CREATE FUNCTION feed.shape(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT md5(concat_ws('/',
        (SELECT string_agg(concat_ws(',', attnum, attname, atttypid, atttypmod, pg_attribute.xmin,
                                     pg_attrdef.xmin), ';' ORDER BY attnum)
         FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
         WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped),
        (SELECT string_agg(concat_ws(',', pg_type.oid, pg_type.typowner, enumlabel, part.attname), ';'
                           ORDER BY pg_type.oid, enumlabel, part.attnum)
         FROM pg_attribute AS whole
         JOIN pg_type AS declared ON declared.oid = whole.atttypid
         JOIN pg_type ON pg_type.oid IN (declared.oid, declared.typelem, declared.typbasetype)
         LEFT JOIN pg_enum ON enumtypid = pg_type.oid
         LEFT JOIN pg_attribute AS part ON part.attrelid = pg_type.typrelid AND part.attnum > 0
         WHERE whole.attrelid = relation AND whole.attnum > 0 AND pg_type.oid >= 16384),
        (SELECT string_agg(concat(tgname, tgenabled, pg_trigger.xmin), ',' ORDER BY tgname)
         FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
         WHERE tgrelid = relation AND pronamespace = 'feed'::regnamespace),
        (SELECT string_agg(concat(inhrelid, '<', inhparent), ',' ORDER BY inhrelid, inhparent)
         FROM pg_inherits WHERE relation IN (inhparent, inhrelid)),
        (SELECT relpersistence FROM pg_class WHERE oid = relation),
        feed.key_of(relation)))
$$;

-- Looks at all watched tables. Of each that is not what it was: logs that its topic must be loaded
-- again, has its capture follow where it can, and returns the topic and what is wrong, NULL if all
-- is well again. Somebody's lock only delays the capture, which until then is slower, but right.
CREATE FUNCTION feed.check_topics() RETURNS TABLE (topic text, problem text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms'
AS $$
#variable_conflict use_column
DECLARE
    seen record;
    told boolean;
    any_told boolean := false;
BEGIN
    FOR seen IN
        SELECT watched.*, feed.shape(watched.relation) AS now, pg_class.oid IS NULL AS gone,
               EXISTS (SELECT FROM pg_inherits WHERE inhparent = watched.relation) AS has_children,
               (SELECT count(*) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
                WHERE tgrelid = watched.relation AND pronamespace = 'feed'::regnamespace
                      AND tgenabled <> 'D') AS triggers
        FROM feed.topic AS watched LEFT JOIN pg_class ON pg_class.oid = watched.relation
    LOOP
        CONTINUE WHEN seen.now = seen.shape AND NOT seen.gone;
        told := seen.now || ' told' = seen.shape AND NOT seen.gone;
        check_topics.topic := seen.topic;
        check_topics.problem := NULL;
        seen.shape := NULL;
        IF seen.gone THEN
            check_topics.problem := 'its table was dropped';
            DELETE FROM feed.topic WHERE relation = seen.relation;
            PERFORM feed.drop_unused_captures();
        ELSIF seen.has_children THEN
            check_topics.problem := 'its table has children, whose rows are not captured';
        ELSIF feed.key_of(seen.relation) IS NULL THEN
            check_topics.problem := 'its table has no primary key any more';
        ELSIF seen.triggers < 5 THEN
            check_topics.problem := 'triggers are disabled or missing: what is written now is not captured';
        ELSE
            BEGIN
                PERFORM feed.watch(seen.relation, seen.topic);
            EXCEPTION
                WHEN lock_not_available THEN
                    seen.shape := seen.now || ' told';
                WHEN OTHERS THEN
                    check_topics.problem := SQLERRM;
            END;
        END IF;
        UPDATE feed.topic SET shape = coalesce(seen.shape, feed.shape(seen.relation))
        WHERE relation = seen.relation;
        CONTINUE WHEN told;
        INSERT INTO feed.change (topic, op) VALUES (seen.topic, 'reload');
        any_told := true;
        RETURN NEXT;
    END LOOP;
    IF any_told AND feed.must_ring() THEN
        PERFORM feed.ring();
    END IF;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC;
