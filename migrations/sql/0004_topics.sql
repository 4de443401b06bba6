-- The watched tables as of revision 0004: a topic belongs to one table, and is registered with what
-- a destroy carries.

-- `key`: the columns of the table's primary key, NULL while it has none. `destroy_with`: the column
-- whose value a destroy carries, NULL for the key. `ambiguous`: this value need not be one row's any
-- more, so clients have to load the topic again instead. `problem`: what the last check could not
-- repair.
ALTER TABLE feed.topic
    ADD COLUMN key text[],
    ADD COLUMN destroy_with text,
    ADD COLUMN ambiguous boolean NOT NULL DEFAULT false,
    ADD COLUMN problem text;

-- Dropped tables hold no topic.
WITH gone AS (
    DELETE FROM feed.topic
    WHERE NOT EXISTS (SELECT FROM pg_class WHERE pg_class.oid = relation) RETURNING topic
)
INSERT INTO feed.change (topic, op) SELECT topic, 'reload' FROM gone;

DO $$
DECLARE
    shared record;
BEGIN
    SELECT topic, string_agg(relation::text, ' and ') AS tables INTO shared
    FROM feed.topic GROUP BY topic HAVING count(*) > 1 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the topic % is used by the tables %, and from now on a topic belongs to one table: watch one of them under another topic, or unwatch it, and migrate again',
            shared.topic, shared.tables;
    END IF;
END
$$;
ALTER TABLE feed.topic ADD CONSTRAINT topic_topic_key UNIQUE (topic);

DROP FUNCTION feed.watch(regclass, text);

-- In a transaction that writes, the statement sees what it has written so far, but not what is still
-- to come: all of it counts as unseen. What it wrote before comes again after the offset, and changes
-- nothing then.
CREATE OR REPLACE FUNCTION feed.position() RETURNS pg_snapshot
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT feed.position_of(CASE WHEN pg_current_xact_id_if_assigned() IS NULL
                                 THEN pg_current_snapshot() ELSE feed.seen_by_others() END)
$$;

-- Logs that clients must load a topic again.
CREATE FUNCTION feed.log_reload(topic text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO feed.change (topic, op) VALUES (log_reload.topic, 'reload');
    IF feed.must_ring() THEN
        PERFORM feed.ring();
    END IF;
END
$$;

-- Whether a column's value is one row's: only then can clients find a destroyed row by it. (A value
-- that is rendered as an object could be taken for a key.)
CREATE FUNCTION feed.identifies(relation regclass, column_name text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    WITH RECURSIVE found AS (
        SELECT attnum, atttypid FROM pg_attribute
        WHERE attrelid = relation AND attname = column_name AND attnotnull
    ), types AS (
        SELECT atttypid AS type FROM found
        UNION
        SELECT typbasetype FROM types JOIN pg_type ON pg_type.oid = type WHERE typtype = 'd'
    )
    SELECT EXISTS (SELECT FROM found JOIN pg_index ON indkey::text = attnum::text
                   WHERE indrelid = relation AND indisunique AND indimmediate AND indisvalid
                         AND indpred IS NULL)
           AND NOT EXISTS (SELECT FROM found JOIN pg_constraint ON conkey = ARRAY[attnum]
                           WHERE conrelid = relation AND contype = 'n' AND NOT convalidated)
           AND NOT EXISTS (SELECT FROM types JOIN pg_type ON pg_type.oid = type
                           LEFT JOIN pg_cast ON castsource = type AND casttarget = 'json'::regtype
                           WHERE type IN ('json'::regtype, 'jsonb'::regtype) OR typtype = 'c'
                                 OR pg_cast.oid IS NOT NULL)
$$;

UPDATE feed.topic
SET key = feed.key_of(relation)::text[],
    destroy_with = CASE WHEN topic = 'thing' AND relation = to_regclass('public.things')
                             AND feed.identifies(relation, 'name') THEN 'name' END;

-- Why changes of a watched table are not captured, or not all of them; NULL if they are.
CREATE FUNCTION feed.problem_of(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN NOT EXISTS (SELECT FROM pg_class WHERE oid = relation)
            THEN 'its table was dropped'
        WHEN EXISTS (SELECT FROM pg_inherits WHERE inhparent = relation)
            THEN 'its table has children, whose rows are not captured'
        WHEN EXISTS (SELECT FROM pg_inherits WHERE inhrelid = relation)
            THEN 'its table has a parent: what is written through that is not captured'
        WHEN feed.key_of(relation) IS NULL
            THEN 'its table has no primary key any more'
        WHEN (SELECT count(*) FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
              WHERE tgrelid = relation AND pronamespace = 'feed'::regnamespace
                    AND tgenabled <> 'D') < 5
            THEN 'triggers are disabled or missing: what is written now is not captured'
    END
$$;

-- Forgets the topics of dropped tables; their clients are told.
CREATE FUNCTION feed.forget_dropped() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    forgotten text;
BEGIN
    FOR forgotten IN
        DELETE FROM feed.topic
        WHERE NOT EXISTS (SELECT FROM pg_class WHERE pg_class.oid = feed.topic.relation)
        RETURNING topic
    LOOP
        PERFORM feed.log_reload(forgotten);
    END LOOP;
    PERFORM feed.drop_unused_captures();
END
$$;

-- A role that can be given to another one, as in SQL: NULL for a superuser, whose rights nobody else
-- should have.
CREATE FUNCTION feed.grantable(role oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT quote_ident(rolname) FROM pg_roles WHERE oid = role AND NOT rolsuper
$$;

-- Raises unless the current role may change the triggers of a table. `what` it would have done.
CREATE FUNCTION feed.require_owner(relation regclass, what text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    feed_owner oid := (SELECT nspowner FROM pg_namespace WHERE nspname = 'feed');
    table_owner oid := (SELECT relowner FROM pg_class WHERE oid = relation);
    me text := quote_ident(current_user);
BEGIN
    IF NOT pg_has_role(feed_owner, 'USAGE') THEN
        RAISE EXCEPTION '% cannot be % by the role %: only the role that installed Tablecast may; connect as %.',
            relation, what, me,
            feed_owner::regrole || coalesce(', or GRANT ' || feed.grantable(feed_owner) || ' TO ' || me, '')
            USING ERRCODE = 'insufficient_privilege';
    ELSIF NOT pg_has_role(table_owner, 'USAGE') THEN
        RAISE EXCEPTION '% cannot be % by the role %: triggers that must always run need its owner; %.',
            relation, what, me,
            coalesce('GRANT ' || feed.grantable(table_owner) || ' TO ' || me,
                     format('ALTER TABLE %s OWNER TO %s', relation, me))
            USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;

-- Raises, with a sentence, unless a table can be watched under a topic.
CREATE FUNCTION feed.require_watchable(relation regclass, topic text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind record;
    taken_by text;
BEGIN
    SELECT relkind, relpersistence, relnamespace, relispartition,
           EXISTS (SELECT FROM pg_inherits
                   WHERE require_watchable.relation IN (inhrelid, inhparent)) AS inherits
    INTO kind FROM pg_class WHERE oid = relation;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'The table % does not exist.', coalesce(relation::text, 'NULL')
            USING ERRCODE = 'undefined_table';
    ELSIF topic IS NULL OR topic !~ '^[a-z][a-z0-9_-]{0,62}$' OR topic = 'feed' THEN
        RAISE EXCEPTION 'The topic % cannot be used: take a lower-case letter, then at most 62 lower-case letters, digits, _ or -, but not feed.',
            quote_nullable(topic) USING ERRCODE = 'invalid_parameter_value';
    ELSIF kind.relkind <> 'r' OR kind.relpersistence <> 'p' THEN
        RAISE EXCEPTION '% cannot be watched: only ordinary, permanent tables can.', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF kind.relnamespace = 'feed'::regnamespace THEN
        RAISE EXCEPTION '% cannot be watched: it is the feed''s own.', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF relation::oid < 16384 THEN
        RAISE EXCEPTION '% cannot be watched: it is Postgres''s own.', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF kind.relispartition OR kind.inherits THEN
        RAISE EXCEPTION '% cannot be watched: it shares its rows with another table (partition or inheritance).', relation
            USING ERRCODE = 'wrong_object_type';
    ELSIF feed.key_of(relation) IS NULL THEN
        RAISE EXCEPTION '% cannot be watched: it has no primary key, and without one an update cannot be told from a delete and an insert.', relation
            USING ERRCODE = 'invalid_table_definition', HINT = 'Add a primary key first.';
    END IF;
    PERFORM feed.require_owner(relation, 'watched');
    SELECT watched.relation INTO taken_by
    FROM feed.topic AS watched JOIN pg_class ON pg_class.oid = watched.relation
    WHERE watched.topic = require_watchable.topic
          AND watched.relation <> require_watchable.relation;
    IF FOUND THEN
        RAISE EXCEPTION 'The topic % is taken by the table %: choose another.', topic, taken_by
            USING ERRCODE = 'unique_violation';
    END IF;
END
$$;

-- Removes the capture triggers from a table.
CREATE FUNCTION feed.remove_capture(relation regclass) RETURNS void
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
    PERFORM feed.drop_unused_captures();
END
$$;

-- Puts the capture triggers on a table, in place of those it has.
CREATE FUNCTION feed.install_capture(relation regclass, topic text) RETURNS void
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
                   'SET enable_nestloop = off SET jit = off AS %L',
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

-- Watches a table; its events are named `topic:create` and so on. A destroy carries the key as an
-- object, or the value of the column `destroy_with`, which must be NOT NULL and UNIQUE.
--
-- Calling it again picks up a changed key, a new topic or another `destroy_with`; without one, a
-- table that stays with its topic keeps what it had. Clients load the topic again if changes may
-- have been missed: always, unless the table was watched under it already and is as it was.
CREATE FUNCTION feed.watch(relation regclass, topic text, destroy_with text DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before feed.topic;
    continues boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(1413563213, 5);  -- one at a time: what was before must be known
    PERFORM feed.require_watchable(relation, topic);
    SELECT * INTO before FROM feed.topic AS watched WHERE watched.relation = watch.relation
    FOR UPDATE;  -- a check of the tables passes over this one
    IF before.topic = watch.topic THEN
        destroy_with := coalesce(destroy_with, before.destroy_with);
    END IF;
    IF destroy_with IS NOT NULL AND NOT feed.identifies(relation, destroy_with) THEN
        RAISE EXCEPTION '% cannot be watched with the column %: there must be such a column, NOT NULL and UNIQUE, and not of documents, because clients find the destroyed row by it.', relation, quote_ident(destroy_with)
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM feed.forget_dropped();
    continues := before.topic = watch.topic AND before.shape = feed.shape(watch.relation)
                 AND before.destroy_with IS NOT DISTINCT FROM watch.destroy_with
                 AND NOT before.ambiguous AND feed.problem_of(watch.relation) IS NULL;
    PERFORM feed.install_capture(watch.relation, watch.topic);
    INSERT INTO feed.topic AS watched (relation, topic, key, destroy_with, shape)
    VALUES (watch.relation, watch.topic, feed.key_of(watch.relation)::text[],
            watch.destroy_with, feed.shape(watch.relation))
    ON CONFLICT ON CONSTRAINT topic_pkey DO UPDATE
    SET topic = excluded.topic, key = excluded.key, shape = excluded.shape,
        destroy_with = excluded.destroy_with, ambiguous = false, problem = NULL;
    IF before.topic <> watch.topic THEN
        PERFORM feed.log_reload(before.topic);
    END IF;
    IF continues IS NOT TRUE THEN
        PERFORM feed.log_reload(watch.topic);
    END IF;
END
$$;

-- Stops watching a table; changes already logged stay. Clients of the topic load again, so that
-- nobody takes for current what is not followed any more. Not an error if it is not watched.
CREATE OR REPLACE FUNCTION feed.unwatch(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = 'warning'
AS $$
DECLARE
    forgotten text;
BEGIN
    PERFORM pg_advisory_xact_lock(1413563213, 5);  -- as in feed.watch
    PERFORM feed.require_owner(relation, 'unwatched');
    PERFORM FROM feed.topic AS watched WHERE watched.relation = unwatch.relation FOR UPDATE;
    PERFORM feed.forget_dropped();
    PERFORM feed.remove_capture(relation);
    DELETE FROM feed.topic AS watched WHERE watched.relation = unwatch.relation
    RETURNING topic INTO forgotten;
    IF FOUND THEN
        PERFORM feed.log_reload(forgotten);
    END IF;
END
$$;

-- Checks all watched tables. For each that has changed, logs that its topic must be loaded again,
-- updates its capture if possible, and returns the topic and what is wrong (NULL if nothing is any
-- more). A table that is just being watched or unwatched is passed over. A lock held by another
-- session only delays the update; until then capture is slower, but correct.
CREATE OR REPLACE FUNCTION feed.check_topics() RETURNS TABLE (topic text, problem text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms'
AS $$
#variable_conflict use_column
DECLARE
    suspect regclass;
    seen record;
    told boolean;
BEGIN
    FOR suspect IN
        SELECT relation FROM feed.topic AS watched
        WHERE shape IS DISTINCT FROM feed.shape(relation)
              OR NOT EXISTS (SELECT FROM pg_class WHERE pg_class.oid = relation)
              OR destroy_with IS NOT NULL AND ambiguous = feed.identifies(relation, destroy_with)
    LOOP
        -- Others may have changed what is watched since the statement above began.
        PERFORM FROM feed.topic WHERE relation = suspect FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        SELECT watched.*, feed.shape(relation) AS now, pg_class.oid IS NULL AS gone,
               destroy_with IS NOT NULL
               AND NOT feed.identifies(relation, destroy_with) AS is_ambiguous
        INTO seen
        FROM feed.topic AS watched LEFT JOIN pg_class ON pg_class.oid = relation
        WHERE relation = suspect;
        CONTINUE WHEN seen.now = seen.shape AND seen.is_ambiguous = seen.ambiguous
                      AND NOT seen.gone;
        told := seen.now || ' told' = seen.shape AND seen.is_ambiguous = seen.ambiguous
                AND NOT seen.gone;
        check_topics.topic := seen.topic;
        check_topics.problem := feed.problem_of(suspect);
        seen.shape := NULL;
        IF seen.gone THEN
            DELETE FROM feed.topic WHERE relation = suspect;
            PERFORM feed.drop_unused_captures();
        ELSIF check_topics.problem IS NULL THEN
            BEGIN
                PERFORM feed.require_watchable(suspect, seen.topic);
                PERFORM feed.install_capture(suspect, seen.topic);
            EXCEPTION
                WHEN lock_not_available THEN
                    seen.shape := seen.now || ' told';
                WHEN OTHERS THEN
                    check_topics.problem := SQLERRM;
            END;
        END IF;
        IF seen.is_ambiguous AND check_topics.problem IS NULL THEN
            check_topics.problem := 'the column that its destroys carry is not NOT NULL and UNIQUE any more';
        END IF;
        UPDATE feed.topic
        SET shape = coalesce(seen.shape, feed.shape(suspect)),
            key = feed.key_of(suspect)::text[],
            ambiguous = seen.is_ambiguous,
            problem = check_topics.problem
        WHERE relation = suspect;
        CONTINUE WHEN told;
        PERFORM feed.log_reload(seen.topic);
        RETURN NEXT;
    END LOOP;
END
$$;

-- The members of a row that identify it, for an event that cannot carry all of it. NULL if they
-- cannot be found: Postgres's parser refuses some of what it renders, such as a document in a `json`
-- column that is nested too deeply.
CREATE FUNCTION feed.excerpt(body json, columns text[]) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        -- One pass over the row, however many members are wanted.
        SELECT CASE WHEN bool_and(value IS NOT NULL)
                    THEN json_object_agg(part, value ORDER BY place) END
        FROM (
            SELECT part, min(place) AS place
            FROM unnest(columns) WITH ORDINALITY AS given (part, place)
            WHERE part IS NOT NULL GROUP BY part
        ) AS wanted LEFT JOIN json_each(body) ON key = part
    );
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC;
