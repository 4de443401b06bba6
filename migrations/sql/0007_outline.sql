-- What the log gives of a row that is too large, as of revision 0007. Until then it was
-- feed.excerpt, which nodes of earlier versions still call while a new one is being rolled out.

-- The members of a row that identify it, and those of at most `longest` bytes, by which subscriptions
-- can go on judging the row and show part of it. NULL if those that identify it cannot be found:
-- Postgres's parser refuses some of what it renders, such as a document in a `json` column that is
-- nested too deeply.
CREATE FUNCTION feed.outline(body json, identifying text[], longest integer) RETURNS json
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
        SELECT CASE WHEN array_agg(key) @> array_remove(identifying, NULL)
                    THEN json_object_agg(key, value ORDER BY place) END
        FROM json_each(body) WITH ORDINALITY AS member (key, value, place)
        WHERE key = ANY (identifying) OR octet_length(value::text) <= longest
    );
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC;
