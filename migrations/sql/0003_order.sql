-- Puts the changes of nested statements into order: a statement is logged when it ends, so an inner
-- statement is logged before the outer one that it ran inside.

-- Whether it is safe for the owner of the feed to query a table. Planning a query runs functions
-- that the table's owner has put into indexes, constraints or statistics.
CREATE FUNCTION feed.may_read(relation regclass) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT pg_has_role(relowner, current_user, 'MEMBER') AND NOT EXISTS (
        SELECT FROM unnest(feed.key_of(relation)) AS parts (part)
        JOIN pg_attribute ON attrelid = relation AND attname = part
        WHERE NOT feed.trusts_type(atttypid, from_text => true))
    FROM pg_class WHERE oid = relation
$$;

-- The order of one key's changes that leads to what the table holds now (`final`, NULL: no row), as
-- places in the arrays; 0 stands for a change that is missing at the end.
--
-- Each change begins in the state where the previous one ended, so the order is a trail through the
-- key's states that uses every change once (an Eulerian trail, found with Hierholzer's algorithm).
-- It is walked backwards from the end; if several changes lead to a state, the one with the highest
-- place came last.
--
-- If the table cannot be queried (`known` is false), the end is the state with more changes leading
-- to it than from it. If the changes form a circle, the end cannot be determined.
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

-- The rows a table holds now for some keys, as JSON; NULL if there is no row. A key is given as the
-- text of an array of its JSON values; `images` has, for each key, some row that has or had it.
--
-- Rows are looked up with the equality of the table's index, but 1.0 and 1.00 are two keys.
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

-- Logs again, in the right order, what a statement and the statements inside it have changed in one
-- table: the changes after `since`, of which those from `mine` on were logged when it ended.
--
-- Only keys that changed several times can be in the wrong order, and the destroys and creates of
-- an update that changed a key. Changes of rows that existed before the statement go first.
CREATE FUNCTION feed.reorder(relation regclass, changed text, since bigint, mine bigint)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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

-- Whether the changes after `since` are in order already: no key changed, and no row changed twice.
-- They are if one statement both inserts and updates (ON CONFLICT, MERGE), or if nested statements
-- have changed other rows.
CREATE FUNCTION feed.is_in_order(relation regclass, changed text, since bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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

-- Ends a statement that had others inside it, that ran inside another, or that changed keys.
-- `nesting` is the record of the table's open statements (feed.begin_statement); returns the new
-- record. `logged`: how many changes the statement itself has just logged.
--
-- The outermost statement puts the changes of all of them into order. Before that, the table holds
-- changes not logged yet, so the order cannot be determined. If somebody has reset the setting,
-- everything the transaction has logged may have to be put into order.
--
-- Changes that cannot be put into order are not ignored: clients must load the topic again.
--
-- JIT is off for everything called here: compiling takes longer than running. (Before Postgres 18,
-- if a setting disables the only possible plan, that plan counts as extremely expensive and would
-- be compiled.) Sequential scans are off because statistics of the log are always out of date.
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
