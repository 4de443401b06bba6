"""Watched tables as filters and lists need to know them: columns, their kinds, and the key."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from app.database.connections import Connection
from app.live.kinds import BUILT_IN, COLLATED, DOCUMENT, ENUM, OPAQUE, PADDED, TEXT, Kind
from app.live.refusal import RefusalCode, SubscriptionRefused, listing, shown

# The names that feed.watch accepts.
TOPIC = "[a-z][a-z0-9_-]{0,62}"
MOST_LISTED_COLUMNS = 20

# The columns of one topic's table, or of all (NULL), in order, with what decides their kinds. A
# domain counts as the type it is based on. `type` is without a length or precision: a value that a
# column is compared with may be longer. (For bpchar, -1 says so; NULL would give `character`, which
# has the length 1.) `may_differ`: an enum's own operators cannot be relied on; they could run
# somebody else's cast, or not be found (for a domain over an enum). Few rows of the catalog are
# read, by their primary keys.
COLUMNS = """
WITH RECURSIVE watched AS MATERIALIZED (
    SELECT topic, relation, key, destroy_with, format('%I.%I', nspname, relname) AS name,
           feed.rows_of(relation, 'matching') AS rows
    FROM feed.topic
    JOIN pg_class ON pg_class.oid = relation
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE $1::text IS NULL OR topic = $1
), attribute AS MATERIALIZED (
    SELECT attrelid, attnum, attname, atttypid, attcollation
    FROM watched JOIN pg_attribute ON attrelid = relation
    WHERE attnum > 0 AND NOT attisdropped
), typed AS (
    SELECT attrelid, attnum, atttypid AS type FROM attribute
    UNION ALL
    SELECT attrelid, attnum, typbasetype
    FROM typed JOIN pg_type ON pg_type.oid = type WHERE typtype = 'd'
)
SELECT topic, name, rows, key, destroy_with, attname AS column,
       format_type(pg_type.oid, -1) AS type,
       typname, typtype::text, type < 16384 AS is_built_in,
       coalesce(collisdeterministic, true) AS is_deterministic,
       type >= 16384 AND EXISTS (
           SELECT FROM pg_cast WHERE castsource = type AND casttarget = 'json'::regtype
       ) AS has_json_cast,
       type >= 16384 AND (NOT feed.trusts_type(type) OR type <> atttypid OR EXISTS (
           SELECT FROM pg_cast WHERE type IN (castsource, casttarget)
       )) AS may_differ,
       CASE typtype WHEN 'e' THEN ARRAY(
           SELECT enumlabel::text FROM pg_enum WHERE enumtypid = type ORDER BY enumsortorder
       ) END AS labels
FROM watched
JOIN attribute ON attrelid = relation
JOIN typed USING (attrelid, attnum)
JOIN pg_type ON pg_type.oid = type
LEFT JOIN pg_collation ON pg_collation.oid = attcollation
WHERE typtype <> 'd'
ORDER BY topic, attnum
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column. `type` is the type that constants are cast to; for a domain, its base type.

    `compared_as_text`: its values are compared and ordered as they are written, because operators
    and casts of its type may run a user's code, or not be found.
    """

    name: str
    type: str
    kind: Kind
    compared_as_text: bool = False


@dataclass(frozen=True)
class Table:
    """A watched table.

    `name` is as in SQL, with the schema and quoted. `rows`: an item of a FROM clause that yields
    the rows in `matching`, which are some of the table's, as the log has them. `destroy_with`: the
    column that a destroy carries (None: the key).
    """

    topic: str
    name: str
    rows: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    destroy_with: str | None
    by_name: dict[str, Column] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {column.name: column for column in self.columns})

    @property
    def identifying(self) -> tuple[str, ...]:
        """The columns of a row that is too large to be sent whole: those of the key, and the column
        that destroys carry, if there is one, because it is what clients know the row by.
        """
        if self.destroy_with in self.key or self.destroy_with not in self.by_name:
            return self.key
        return (*self.key, self.destroy_with)

    def column(self, name: str, field: str = "where") -> Column:
        """Return a column by its name; raise SubscriptionRefused, about this field, if there is
        none.
        """
        found = self.by_name.get(name)
        if found is None:
            names = [column.name for column in self.columns[:MOST_LISTED_COLUMNS]]
            more = len(self.columns) > len(names)
            raise SubscriptionRefused(
                RefusalCode.UNKNOWN_COLUMN,
                f"The topic {self.topic} has no column {shown(name)}; it has"
                f" {listing([*names, 'others'] if more else names, 'and')}.",
                field,
            )
        return found


async def describe(connection: Connection, topic: str) -> Table:
    """Return the table of a topic. Raises SubscriptionRefused if there is none."""
    found = []
    if re.fullmatch(TOPIC, topic):  # Postgres may not even be able to store any other name
        found = _tables(await connection.fetch(COLUMNS, topic))
    if not found:
        raise SubscriptionRefused(
            RefusalCode.UNKNOWN_TOPIC,
            f"There is no topic {shown(topic)}: name one under which a table is watched.",
            "topic",
        )
    return found[0]


async def describe_all(connection: Connection) -> list[Table]:
    """Return the tables of all topics, by topic."""
    return _tables(await connection.fetch(COLUMNS, None))


def _tables(rows: Iterable[Any]) -> list[Table]:
    tables = []
    for _, group in groupby(rows, lambda row: row["topic"]):
        columns = list(group)
        first = columns[0]
        tables.append(
            Table(
                first["topic"],
                first["name"],
                first["rows"],
                tuple(map(_column, columns)),
                tuple(first["key"] or ()),
                first["destroy_with"],
            )
        )
    return tables


def _column(row: Any) -> Column:
    kind = _kind(row)
    is_enum = row["typtype"] == "e"
    as_text = row["may_differ"] if is_enum else not row["is_built_in"]
    return Column(row["column"], row["type"], kind, as_text)


def _kind(row: Any) -> Kind:
    if row["typtype"] == "c" or row["has_json_cast"]:
        return DOCUMENT
    if row["typtype"] == "e":
        return replace(ENUM, labels=tuple(row["labels"]))
    if not row["is_built_in"]:
        return OPAQUE
    kind = BUILT_IN.get(row["typname"], OPAQUE)
    return COLLATED if kind in (TEXT, PADDED) and not row["is_deterministic"] else kind
