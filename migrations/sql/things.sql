CREATE TABLE things (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text        NOT NULL UNIQUE CHECK (char_length(name) BETWEEN 1 AND 200),
    info       text        NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
);
