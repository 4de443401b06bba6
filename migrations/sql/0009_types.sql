-- These types and those that they consist of, however deep one is in another, apart from Postgres's
-- own. (OIDs of user objects begin at 16384.)
CREATE FUNCTION feed.types_within(types oid[]) RETURNS SETOF oid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    WITH RECURSIVE part (type) AS (
        SELECT unnest(types)
        UNION
        SELECT inside.type
        FROM part
        JOIN pg_type ON pg_type.oid = part.type
        CROSS JOIN LATERAL (
            SELECT unnest(ARRAY[typelem, typbasetype])
            UNION ALL
            SELECT rngsubtype FROM pg_range WHERE part.type IN (rngtypid, rngmultitypid)
            UNION ALL
            SELECT atttypid FROM pg_attribute
            WHERE typrelid <> 0 AND attrelid = typrelid AND attnum > 0 AND NOT attisdropped
        ) AS inside (type)
        WHERE inside.type >= 16384
    )
    SELECT type FROM part WHERE type >= 16384
$$;

-- Whether values of a type can be rendered as JSON without running the code of a role that could
-- not act as the owner of the feed anyway: row_to_json calls a type's cast to json if there is one.
-- (OIDs of user objects begin at 16384. A domain is rendered as its base type.) With `from_text`,
-- also whether they can be parsed from text, which runs the checks of a domain.
CREATE OR REPLACE FUNCTION feed.trusts_type(type oid, from_text boolean DEFAULT false) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT type < 16384 OR (
        SELECT bool_and(typtype = 'd' AND NOT from_text
                        OR pg_has_role(typowner, current_user, 'MEMBER'))
        FROM feed.types_within(ARRAY[type]) AS part
        JOIN pg_type ON oid = part
    )
$$;

-- Everything about a table that makes its clients load it again when it changes: columns (`xmin`
-- shows every ALTER COLUMN, even one that rewrites the values), what values of their types look
-- like (row_to_json uses a cast to json if there is one), and who owns the types, triggers,
-- children, the key.
-- Rewriting the table without changing it (VACUUM FULL) does not show.
CREATE OR REPLACE FUNCTION feed.shape(relation regclass) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    WITH part AS (
        SELECT type FROM feed.types_within(ARRAY(
            SELECT atttypid FROM pg_attribute
            WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped AND atttypid >= 16384
        )) AS type
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
        (SELECT string_agg(concat_ws(',', castsource, pg_cast.xmin, pg_proc.xmin), ';'
                           ORDER BY castsource)
         FROM part
         JOIN pg_cast ON castsource = part.type AND casttarget = 'json'::regtype
         LEFT JOIN pg_proc ON pg_proc.oid = castfunc),
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
                   'SET enable_nestloop = off SET jit = off SET quote_all_identifiers = off '
                   'SET array_nulls = on AS %L',
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
