-- The watched tables: adds capture to them, removes it, and notices when they were altered.

-- The topics: the table whose changes each carries, and what the table looked like when it was last
-- checked (feed.shape). feed.check_topics notices when it changes.
CREATE TABLE feed.topic (
    relation regclass PRIMARY KEY,
    topic    text     NOT NULL,
    shape    text     NOT NULL
);

-- Puts the capture triggers on a table; its events are named `topic:create` and so on. Idempotent:
-- calling it again picks up a changed key or topic.
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

-- Removes the capture triggers from a table; changes already logged stay. Not an error if there are
-- none.
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

-- Drops capture functions that no trigger calls: their tables were unwatched or dropped.
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

-- Everything about a table that makes its clients load it again when it changes: columns (`xmin`
-- shows every ALTER COLUMN, even one that rewrites the values), what values of their types look
-- like and who owns the types, triggers, children. Rewriting the table without changing it (VACUUM
-- FULL) does not show.
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

-- Checks all watched tables. For each that has changed, logs that its topic must be loaded again,
-- updates its capture if possible, and returns the topic and what is wrong (NULL if nothing is any
-- more). A lock held by another session only delays the update; until then capture is slower, but
-- correct.
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
