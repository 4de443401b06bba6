INSERT INTO things (name) VALUES (gen_random_uuid()::text);
