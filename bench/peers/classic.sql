-- What people would build instead, for both peers: the same table, and a row trigger that sends
-- every row as the payload of a notification.
CREATE FUNCTION notify_thing() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('things', json_build_object(
        'op', TG_OP,
        'row', row_to_json(CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END)
    )::text);
    RETURN NULL;
END
$$;

CREATE TRIGGER notify_thing
    AFTER INSERT OR UPDATE OR DELETE ON things
    FOR EACH ROW EXECUTE FUNCTION notify_thing();
