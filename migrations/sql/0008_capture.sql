-- What reviews of subscriptions have found in capture, as of revision 0008: the order of changes when
-- two rows hold one key, alterations that were not noticed, and settings and roles that made rows
-- look different.

-- The order of one key's changes that leads to what the table holds now (`final`, NULL: no row), as
-- places in the arrays; 0 stands for a change that is missing at the end, and -n for the end of the
-- row that the change at n has led to.
--
-- Each change begins in the state where the previous one ended, so the order is a trail through the
-- key's states that uses every change once (an Eulerian trail, found with Hierholzer's algorithm).
-- It is walked backwards from the end; if several changes lead to a state, the one with the highest
-- place came last.
--
-- If the table cannot be queried (`known` is false), the end is the state with more changes leading
-- to it than from it. If the changes form a circle, the end cannot be determined.
CREATE OR REPLACE FUNCTION feed.chain(befores text[], afters text[], final text, known boolean)
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
    here integer;
    before integer;
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
    INTO walk FROM generate_subscripts(ends, 1) AS place;
    IF ends[walk[cardinality(walk)]] <> last THEN
        IF final IS NULL THEN
            RAISE EXCEPTION 'changes lead to a row that is not there';
        END IF;
        walk := walk || 0;
    END IF;
    -- Where a change does not begin with the row that the one before has left, that row goes first:
    -- a filter may match it, and not the row that takes its place.
    chained := '{}';
    FOREACH here IN ARRAY walk LOOP
        IF afters[before] IS NOT NULL AND befores[here] IS DISTINCT FROM afters[before] THEN
            chained := chained || -before;
        END IF;
        chained := chained || here;
        before := here;
    END LOOP;
    RETURN chained;
END
$$;

-- Logs again, in the right order, what a statement and the statements inside it have changed in one
-- table: the changes after `since`, of which those from `mine` on were logged when it ended.
--
-- Only keys that changed several times can be in the wrong order, and the destroys and creates of
-- an update that changed a key. Changes of rows that existed before the statement go first.
CREATE OR REPLACE FUNCTION feed.reorder(relation regclass, changed text, since bigint, mine bigint)
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
        SELECT chained.key, chained.present, link.place, ordinal,
               max(entry.id) OVER so_far AS id,
               max((link.place = 0 OR entry.mine AND entry.old IS NULL)::integer) OVER so_far AS late
        FROM chained
        CROSS JOIN LATERAL unnest(chain) WITH ORDINALITY AS link (place, ordinal)
        LEFT JOIN placed AS entry ON entry.key = chained.key AND entry.place = abs(link.place)
        WHERE chain <> logged OR (SELECT any_rekey FROM rekeyed)
        WINDOW so_far AS (PARTITION BY chained.key ORDER BY ordinal)
    ),
    again AS MATERIALIZED (
        SELECT late, step.id, ordinal, part,
               CASE WHEN step.place < 0 THEN 'destroy' ELSE coalesce(op, 'create') END AS op,
               CASE WHEN step.place < 0 THEN new ELSE old END AS old,
               CASE WHEN step.place = 0 THEN step.present WHEN step.place > 0 THEN new END AS new,
               async, entry.id AS was
        FROM step
        LEFT JOIN placed AS entry ON entry.key = step.key AND entry.place = abs(step.place)
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

-- Everything about a table that makes its clients load it again when it changes: columns (`xmin`
-- shows every ALTER COLUMN, even one that rewrites the values), what values of their types look
-- like, however deep one type is in another, and who owns the types, triggers, children, the key.
-- Rewriting the table without changing it (VACUUM FULL) does not show.
CREATE OR REPLACE FUNCTION feed.shape(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    WITH RECURSIVE part (type) AS (
        SELECT atttypid FROM pg_attribute
        WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped AND atttypid >= 16384
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
        WHERE inside.type >= 16384
    )
    SELECT md5(concat_ws('/',
        (SELECT string_agg(concat_ws(',', attnum, attname, atttypid, atttypmod, pg_attribute.xmin,
                                     pg_attrdef.xmin), ';' ORDER BY attnum)
         FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
         WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped),
        -- Two labels can change places: `xmin` shows every RENAME VALUE.
        (SELECT string_agg(concat_ws(',', pg_type.oid, typowner, label.oid, label.xmin, enumlabel,
                                     member.attname), ';'
                           ORDER BY pg_type.oid, label.oid, member.attnum)
         FROM part
         JOIN pg_type ON pg_type.oid = part.type
         LEFT JOIN pg_enum AS label ON enumtypid = pg_type.oid
         LEFT JOIN pg_attribute AS member ON member.attrelid = typrelid AND member.attnum > 0),
        (SELECT string_agg(concat(tgname, tgenabled, pg_trigger.xmin), ',' ORDER BY tgname)
         FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
         WHERE tgrelid = relation AND pronamespace = 'feed'::regnamespace),
        (SELECT string_agg(concat(inhrelid, '<', inhparent), ',' ORDER BY inhrelid, inhparent)
         FROM pg_inherits WHERE relation IN (inhparent, inhrelid)),
        (SELECT relpersistence FROM pg_class WHERE oid = relation),
        feed.key_of(relation),
        feed.key_is_deferrable(relation)))
$$;

-- Puts the capture triggers on a table, in place of those it has.
CREATE OR REPLACE FUNCTION feed.install_capture(relation regclass, topic text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $install$
DECLARE
    feed_owner oid := (SELECT nspowner FROM pg_namespace WHERE nspname = 'feed');
    capture text := format('capture_%s', relation::oid);
    setting text;
BEGIN
    PERFORM feed.remove_capture(relation);
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
                   'SET enable_nestloop = off SET jit = off SET quote_all_identifiers = off AS %L',
                   capture, feed.capture_body(relation, topic, setting));
    EXECUTE format('REVOKE ALL ON FUNCTION feed.%I() FROM PUBLIC', capture);
    IF pg_get_userbyid(feed_owner) <> current_user THEN
        EXECUTE format('ALTER FUNCTION feed.%I() OWNER TO %s', capture, feed_owner::regrole);
    END IF;

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
END
$install$;
