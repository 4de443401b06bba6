"""Filters against Postgres: random rows and random filters, judged in Python and in SQL."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from urllib.parse import quote, quote_plus

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.database.connections import OWN_NAMES, Connection, connect
from app.live import condition, kinds
from app.live.condition import LONGEST_CONSTANTS_CHARS, Condition, RowValues, bind
from app.live.filter import parse_filter
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.table import Table, describe

# As a soak, the test runs for this many seconds.
DIGITS = 131_072  # of the longest number in the samples
LONG_S = float(os.environ.get("TABLECAST_LONG", "0"))
EXAMPLES = 150

RELATIVE_WORDS = ("now", "today", "tomorrow", "yesterday")

TYPES = """
    CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'Größe', 'a "b"', 'x,y');
    CREATE TYPE public.pair AS (a integer, b text);
    CREATE TYPE public.span AS RANGE (subtype = integer);
    CREATE DOMAIN public.positive AS integer CHECK (value > 0);
    CREATE DOMAIN public.short AS public.positive CHECK (value < 100);
    CREATE DOMAIN public.code AS character(3);
    CREATE DOMAIN public.note AS text CHECK (value <> 'forbidden');
    CREATE DOMAIN public.feeling AS public.mood;
    CREATE DOMAIN public.document AS jsonb;
"""

Strategy: TypeAlias = st.SearchStrategy[str]

# What the rules allow; nothing of it is taken from the product.
SORTABLE = frozenset({"eq", "neq", "lt", "lte", "gt", "gte", "in", "is"})
EQUATABLE = frozenset({"eq", "neq", "in", "is"})
NULLABLE = frozenset({"is"})
NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sample:
    """A column: its type, the operators that it should have, its values, and other constants."""

    name: str
    type: str
    operators: frozenset[str]
    values: Strategy = field(repr=False)
    constants: Strategy = field(repr=False)


def sample(
    name: str, type: str, operators: frozenset[str], values: Strategy, *constants: str
) -> Sample:
    return Sample(
        name, type, operators, values, st.sampled_from(constants) if constants else values
    )


def some(*values: str) -> Strategy:
    return st.sampled_from(values)


def numbers(low: int, high: int) -> Strategy:
    return some(str(low), str(high), "0", "1", "-1", "7") | st.integers(low, high).map(str)


TEXTS = some("", " ", "a", "A", "ä", "ä", "null", "true", "a,b", '"', "\\", "(x)", "a ", "{a}") | (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
)
PLAIN_TEXTS = some("", " ", "a", "A", "ä", "a  ", "a ", " a", "a\t", "ab\n", "ß", "😀", "a\u00a0")
NUMERICS = (
    some(
        "NaN", "Infinity", "-Infinity", "0", "-0", "0.0", "1", "1.0", "1.000", "1e3", "1000", "-1",
        "1e131071", "-1e131071", "1e-16383", "9007199254740993", "9007199254740992", "0.1",
        "0.10000000000000000555111512312578270211815834045410156250", "1.50", "1.5",
    )
    | st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str)
)  # fmt: skip
CENTS = some("NaN", "0", "1.5", "1.50", "-99999999.99", "99999999.99", "0.01", "2.675")
SPECIAL_FLOATS = some(
    "NaN", "Infinity", "-Infinity", "0", "-0", "1", "0.1", "1e-30", "1e30", "16777217", "-1.5"
)
DOUBLES = SPECIAL_FLOATS | st.floats(allow_nan=False, allow_infinity=False).map(repr)
SINGLES = SPECIAL_FLOATS | st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr)
UUIDS = st.uuids().map(str) | some(
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
    "a0eebc999c0b4ef8bb6d6bb9bd380a11",
)
DATES = some(
    "infinity", "-infinity", "4713-01-01 BC", "0044-03-15 BC", "0001-12-31 BC", "0001-01-01",
    "2020-02-29", "2020-03-01", "9999-12-31", "10000-01-01", "5874897-12-31", "1970-01-01",
) | st.dates().map(str)  # fmt: skip
CLOCKS = some(
    "00:00", "24:00", "23:59:59.999999", "12:00", "12:00:00.5", "12:00:00.50", "12:00:00.000001"
) | st.times().map(str)
STAMPS = some(
    "infinity", "-infinity", "4713-01-01 00:00:00 BC", "0044-03-15 12:00:00.5 BC", "epoch",
    "0001-12-31 23:59:59.999999 BC", "0001-01-01 00:00", "2020-02-29 12:00", "9999-12-31 23:59:59",
    "10000-01-01 00:00", "294276-12-31 23:59:59.999999", "2020-02-29 12:00:00.1", "1970-01-01",
) | st.datetimes().map(str)  # fmt: skip
ZONED = STAMPS | some(
    "2020-02-29 12:00+02", "2020-02-29 10:00Z", "2020-07-01 12:00 Europe/Berlin", "0044-03-15 BC"
)
BOOLEANS = some("true", "false", "t", "0", "yes", "off")
MOODS = some("sad", "ok", "Größe", 'a "b"', "x,y")

COUNTS = st.integers(1, 9).map(str)

COLUMNS = (
    sample("int2", "smallint", SORTABLE, numbers(-(2**15), 2**15 - 1), "32768", "x", "1.5", ""),
    sample("and", "integer", SORTABLE, numbers(-(2**31), 2**31 - 1), "2147483648", " 7 ", "0x10"),
    sample("int8", "bigint", SORTABLE, numbers(-(2**63), 2**63 - 1), "9223372036854775808", "1e3"),
    sample("numeric", "numeric", SORTABLE, NUMERICS, "1e200000", "nan", "inf", "0x10", "one"),
    sample("a.b", "numeric(10,2)", SORTABLE, CENTS, "1.005", "1e20", "Infinity", "2.675", "1.5"),
    sample("float4", "real", SORTABLE, SINGLES, "1e39", "16777216.5", "inf", "0.10000000149"),
    sample("float8", "double precision", SORTABLE, DOUBLES, "1e400", "1e-400", "nan", "1,5"),
    sample("text", "text", EQUATABLE, TEXTS),
    sample('odd "\\, näme%&+=', "text", EQUATABLE, TEXTS),
    sample("char", "character(4)", EQUATABLE, PLAIN_TEXTS, "abcdefgh", "a      ", "ab\n  "),
    sample("varchar", "varchar(6)", EQUATABLE, PLAIN_TEXTS, "much too long for it", "a "),
    sample("c_text", 'text COLLATE "C"', EQUATABLE, TEXTS),
    sample("name", "name", EQUATABLE, PLAIN_TEXTS, "n" * 63, "n" * 64, "ö" * 32),
    sample("boolean", "boolean", EQUATABLE, BOOLEANS, "maybe", "TRUE", "1", "null"),
    sample("uuid", "uuid", SORTABLE, UUIDS, "{a0eebc999c0b4ef8bb6d6bb9bd380a11}", "nil"),
    sample("date", "date", SORTABLE, DATES, "Today", "20200229"),
    sample("time", "time", SORTABLE, CLOCKS, "NOW", "allballs", "11 PM", "23:59:60"),
    sample("time0", "time(0)", SORTABLE, CLOCKS, "12:00:00.5", "12:00:01"),
    sample("stamp", "timestamp", SORTABLE, STAMPS, "tomorrow", "yesterday 12:00"),
    sample("zoned", "timestamptz", SORTABLE, ZONED, "now", "2020-01-01 12:00 Nowhere/City"),
    sample("zoned0", "timestamptz(0)", SORTABLE, ZONED, "2020-02-29 12:00:00.5"),
    sample("enum", "public.mood", EQUATABLE, MOODS, "Sad", "", "x"),
    sample("array", "integer[]", NULLABLE, some("{}", "{1,NULL}", "{1,2}")),
    sample("json", "json", NOTHING, some("null", "1", '{"a":null}')),
    sample("jsonb", "jsonb", NOTHING, some("null", "1", '{"a":null}')),
    sample("composite", "public.pair", NOTHING, some("(,)", "(1,x)")),
    sample("positive", "public.positive", SORTABLE, COUNTS, "-5", "0", "x"),
    sample("short", "public.short", SORTABLE, COUNTS, "-5", "500"),
    sample("code", "public.code", EQUATABLE, some("a", "abc", ""), "abcd", "a     "),
    sample("note", "public.note", EQUATABLE, PLAIN_TEXTS, "forbidden"),
    sample("feeling", "public.feeling", EQUATABLE, MOODS, "furious"),
    sample("document", "public.document", NOTHING, some("null", "[]")),
    sample("timetz", "timetz", NULLABLE, some("12:00+02", "10:00Z")),
    sample("interval", "interval", NULLABLE, some("1 day", "24:00")),
    sample("money", "money", NULLABLE, some("1")),
    sample("bytea", "bytea", NULLABLE, some("\\x00ff")),
    sample("inet", "inet", NULLABLE, some("127.0.0.1")),
    sample("range", "int4range", NULLABLE, some("[1,3)", "empty")),
    sample("span", "public.span", NULLABLE, some("[1,3)", "empty")),
    sample("moods", "public.mood[]", NULLABLE, some("{sad}")),
    sample("xid", "xid8", NULLABLE, some("5")),
)
LOOSE = sample("loose", "text COLLATE public.loose", NULLABLE, TEXTS)
LOOSE_CHAR = sample("loose_char", "character(3) COLLATE public.loose", NULLABLE, some("a", "A"))
CITEXT = sample("citext", "public.citext", NULLABLE, some("a", "A"))


@dataclass(frozen=True)
class Leaf:
    """A comparison, as the oracle has it."""

    column: Sample
    operator: str
    values: tuple[str, ...]
    negated: bool


@dataclass(frozen=True)
class Node:
    """Filters joined, as the oracle has them."""

    connective: str
    parts: "tuple[Tree, ...]"
    negated: bool


Tree: TypeAlias = Leaf | Node
Row: TypeAlias = dict[str, str | None]


@st.composite
def leaves(draw: st.DrawFn, columns: Sequence[Sample]) -> Leaf:
    """A comparison, mostly one that its column has."""
    column = draw(st.sampled_from(columns))
    is_usual = draw(st.integers(0, 15)) > 0  # most of the others are refused
    operator = draw(st.sampled_from(sorted((is_usual and column.operators) or SORTABLE)))
    constants = column.values if draw(st.integers(0, 7)) else column.constants
    if operator == "is":
        words = ["null", "not_null", "NULL"]
        if column.type == "boolean" or not is_usual:
            words += ["true", "false", "unknown", "True"]
        values: tuple[str, ...] = (draw(st.sampled_from(words)),)
    elif operator == "in":
        values = tuple(draw(st.lists(constants, max_size=4)))
    else:
        values = (draw(constants),)
    return Leaf(column, operator, values, draw(st.booleans()))


def trees(columns: Sequence[Sample]) -> st.SearchStrategy[Tree]:
    def nodes(parts: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        several = st.lists(parts, min_size=1, max_size=3).map(tuple)
        return st.builds(Node, st.sampled_from(["and", "or"]), several, st.booleans())

    return st.recursive(leaves(columns), nodes, max_leaves=5)


@st.composite
def examples(
    draw: st.DrawFn, columns: Sequence[Sample]
) -> tuple[list[Row], list[list[Tree]], bool]:
    """Rows with values in a few columns, filters on these columns, and a style to write them in."""
    few = draw(st.lists(st.sampled_from(columns), min_size=1, max_size=3, unique=True))
    row = st.fixed_dictionaries({column.name: st.none() | column.values for column in few})
    rows = draw(st.lists(row, min_size=3, max_size=8))
    filters = draw(st.lists(st.lists(trees(few), max_size=2), min_size=2, max_size=6))
    return rows, filters, draw(st.booleans())


def in_sql(tree: Tree) -> str:
    """Return the oracle's SQL for a filter."""
    if isinstance(tree, Node):
        joined = f" {tree.connective} ".join(f"({in_sql(part)})" for part in tree.parts)
    else:
        column = '"' + tree.column.name.replace('"', '""') + '"'
        if tree.column.type == "public.feeling":  # a domain of an enum has no operators of its own
            column += "::public.mood"
        literals = ["'" + value.replace("'", "''") + "'" for value in tree.values]
        if tree.operator == "is":
            joined = f"{column} IS {tree.values[0].replace('_', ' ')}"
        elif tree.operator == "in":
            joined = (
                f"{column} IN ({', '.join(literals)})" if literals else f"{column} = ANY ('{{}}')"
            )
        else:
            signs = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
            joined = f"{column} {signs[tree.operator]} {literals[0]}"
    return f"not ({joined})" if tree.negated else f"({joined})"


def as_where(trees: Sequence[Tree], escape_all: bool) -> str:
    """Return filters as a client writes them."""
    encode = quote if escape_all else quote_plus
    parts = []
    for tree in trees:
        if isinstance(tree, Leaf):
            value = tree.values[0] if tree.operator != "in" else listed(tree)
            sign = "not." if tree.negated else ""
            parts.append((named(tree.column), f"{sign}{tree.operator}.{value}"))
        else:
            written = nested(tree, escape_all)
            at = written.index("(")
            parts.append((written[:at], written[at:]))
    return "&".join(f"{encode(name)}={encode(value)}" for name, value in parts)


def nested(tree: Tree, always_quoted: bool) -> str:
    sign = "not." if tree.negated else ""
    if isinstance(tree, Node):
        space = "" if always_quoted else " "
        inner = f",{space}".join(nested(part, always_quoted) for part in tree.parts)
        return f"{sign}{tree.connective}({space}{inner})"
    if tree.operator == "in":
        value = listed(tree)
    elif tree.operator == "is":
        value = tree.values[0]
    else:
        value = in_quotes(tree.values[0], always_quoted)
    return f"{named(tree.column)}.{sign}{tree.operator}.{value}"


def listed(leaf: Leaf) -> str:
    alone = len(leaf.values) == 1
    return f"({','.join(in_quotes(each, alone) for each in leaf.values)})"


def named(column: Sample) -> str:
    return in_quotes(column.name, column.name == "and" or "." in column.name)


def in_quotes(text: str, always: bool) -> str:
    # Spaces after a parenthesis are not part of a value.
    if not always and not text.startswith((" ", "\t")) and not set(text) & set(',()"\\{}%&+='):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def refused_by_rules(trees: Sequence[Tree]) -> set[RefusalCode]:
    """Return why the rules refuse filters, other than for values that Postgres cannot read."""
    found = set()
    for tree in trees:
        if isinstance(tree, Node):
            found |= refused_by_rules(tree.parts)
            continue
        word = tree.operator == "is" and tree.values[0].lower()
        if tree.operator not in tree.column.operators or (
            word in ("true", "false", "unknown") and tree.column.type != "boolean"
        ):
            found.add(RefusalCode.UNSUPPORTED)
        if tree.column.type.split("(")[0] in ("date", "time", "timestamp", "timestamptz") and any(
            relative in value.lower() for value in tree.values for relative in RELATIVE_WORDS
        ):
            found.add(RefusalCode.BAD_VALUE)
    if sum(map(digits, trees)) > LONGEST_CONSTANTS_CHARS:
        found.add(RefusalCode.TOO_MANY)
    return found


def digits(tree: Tree) -> int:
    """Return how many digits the constants of a filter have that are very long."""
    if isinstance(tree, Node):
        return sum(map(digits, tree.parts))
    return sum(DIGITS for value in tree.values if value.endswith("1e131071"))


class Lab:
    """A watched table with a column of every type, and the three ways to judge its rows."""

    def __init__(self, connection: Connection, columns: Sequence[Sample], table: Table) -> None:
        self._connection = connection
        self.columns = columns
        self.table = table
        self.compared = 0

    async def check(self, rows: list[Row], filters: list[list[Tree]], style: bool) -> None:
        """Assert that filters find the same rows in each way."""
        await self._fill(rows)
        texts = {
            row["id"]: row["text"]
            for row in await self._connection.fetch(
                f"WITH matching AS (SELECT * FROM {self.table.name})"
                f" SELECT id, row_to_json(x)::text AS text FROM {self.table.rows} AS x"
            )
        }
        for trees in filters:
            wanted = await self._wanted(trees)
            where = as_where(trees, style)
            try:
                bound = await bind(self._connection, self.table, parse_filter(where))
            except SubscriptionRefused as refused:
                allowed = refused_by_rules(trees)
                if wanted is None:
                    allowed.add(RefusalCode.BAD_VALUE)
                assert refused.code in allowed, (where, refused.detail)
                continue
            assert wanted is not None, f"Postgres refuses {where}"
            assert not refused_by_rules(trees), f"{where} should be refused"
            await self._compare(where, bound, texts, wanted)

    async def _compare(
        self, where: str, bound: Condition, texts: dict[int, str], wanted: set[int]
    ) -> None:
        parameters: list[str] = []
        found = await self._connection.fetch(
            f"SELECT id FROM ONLY {self.table.name} AS x WHERE {bound.sql(parameters)}", *parameters
        )
        assert {row["id"] for row in found} == wanted, f"SQL for {where}"
        rows = {id: RowValues(text, self.table) for id, text in texts.items()}
        matching = {id for id, row in rows.items() if bound.matches(row)}
        assert matching == wanted, f"Python for {where} of {texts}"
        if bound.equality:
            column, values = bound.equality
            assert all(rows[id][column] in dict.fromkeys(values) for id in wanted), where
        self.compared += len(rows)

    async def _wanted(self, trees: Sequence[Tree]) -> set[int] | None:
        """Return the rows that match, as Postgres sees it; None if it refuses a constant."""
        condition = " AND ".join(map(in_sql, trees)) or "true"
        try:
            rows = await self._connection.fetch(
                f"SELECT id FROM {self.table.name} WHERE {condition}"
            )
        except asyncpg.DataError:
            return None
        except asyncpg.PostgresError:
            # No such operator for this type, so the rules must refuse it.
            assert refused_by_rules(trees), condition
            return None
        return {row["id"] for row in rows}

    async def _fill(self, rows: list[Row]) -> None:
        names = list(rows[0])
        types = {column.name: column.type.split(" COLLATE")[0] for column in self.columns}
        columns = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
        values = ", ".join(f"${place}::text::{types[name]}" for place, name in enumerate(names, 2))
        await self._connection.execute(f"DELETE FROM {self.table.name}")
        await self._connection.executemany(
            f"INSERT INTO {self.table.name} (id, {columns}) VALUES ($1, {values})",
            [(id, *(row[name] for name in names)) for id, row in enumerate(rows)],
        )


async def open_lab(url: str) -> tuple[Connection, Lab]:
    """Make the table, with columns of types that not every Postgres has where this one has them."""
    connection = await connect(url, session=OWN_NAMES)
    await connection.execute(TYPES)
    columns = [*COLUMNS]
    with suppress(asyncpg.FeatureNotSupportedError):  # built without ICU
        await connection.execute(
            "CREATE COLLATION public.loose (provider = icu, locale = 'und-u-ks-level2',"
            " deterministic = false)"
        )
        columns += [LOOSE, LOOSE_CHAR]
    if await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'citext')"
    ):
        await connection.execute("CREATE EXTENSION citext SCHEMA public")
        columns.append(CITEXT)
    definitions = ", ".join(
        '"{}" {}'.format(column.name.replace('"', '""'), column.type) for column in columns
    )
    await connection.execute(
        f"CREATE TABLE public.lab (id integer PRIMARY KEY, {definitions});"
        " SELECT feed.watch('public.lab', 'lab');"
        " ALTER TABLE public.lab DISABLE TRIGGER USER"
    )
    return connection, Lab(connection, columns, await describe(connection, "lab"))


@contextmanager
def lab(url: str) -> Iterator[Callable[..., None]]:
    """Yield a function that runs examples against the database."""
    with asyncio.Runner() as runner:
        connection, opened = runner.run(open_lab(url))

        def run(count: int, only: Sequence[str] = (), **options: Any) -> None:
            columns = [each for each in opened.columns if not only or each.name in only]

            @settings(
                max_examples=count,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                **options,
            )
            @given(examples(columns))
            def check(example: tuple[list[Row], list[list[Tree]], bool]) -> None:
                runner.run(opened.check(*example))

            check()

        try:
            yield run
        finally:
            print(f"{opened.compared} judgements compared")
            runner.run(connection.close())


def test_python_and_sql_judge_as_postgres_does(database_url: str) -> None:
    """Clients filter rows of every type by everything that is allowed, and by what is not."""
    ends = time.monotonic() + LONG_S
    with lab(database_url) as run:
        run(EXAMPLES)
        while time.monotonic() < ends:
            run(EXAMPLES * 5, database=None)


def as_float(text: str) -> Any:
    return float(text.strip('"'))


def two_valued(comparison: Any, values: Any, outcome: bool) -> Any:
    test = comparison_test(comparison, values, True)
    return lambda row: test(row) == outcome


comparison_test = condition._comparison_test

SABOTAGES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "numerics are compared as floats": ("numeric", lambda patch: patch.setitem(
        kinds.BUILT_IN, "numeric", replace(kinds.NUMERIC, read=as_float))),
    "NaN differs from itself": ("float8", lambda patch: patch.setitem(
        kinds.BUILT_IN, "float8", replace(kinds.FLOAT, read=as_float))),
    "floats are compared as texts": ("float8", lambda patch: patch.setitem(
        kinds.BUILT_IN, "float8", replace(kinds.FLOAT, read=str))),
    "trailing blanks of char(n) count": ("char", lambda patch: patch.setitem(
        kinds.BUILT_IN, "bpchar", kinds.TEXT)),
    "trailing blanks of text do not count": ("text", lambda patch: patch.setitem(
        kinds.BUILT_IN, "text", kinds.PADDED)),
    "dates are compared as texts": ("date", lambda patch: patch.setitem(
        kinds.BUILT_IN, "date", replace(kinds.DATE, read=str))),
    "timestamps are compared as texts": ("zoned", lambda patch: patch.setitem(
        kinds.BUILT_IN, "timestamptz", replace(kinds.TIMESTAMPTZ, read=str))),
    "relative dates are read": ("date", lambda patch: patch.setitem(
        kinds.BUILT_IN, "date", replace(kinds.DATE, has_relative_words=False))),
    "json may be compared with null": ("json", lambda patch: patch.setitem(
        kinds.BUILT_IN, "json", kinds.OPAQUE)),
    "texts have an order": ("text", lambda patch: patch.setitem(
        kinds.BUILT_IN, "text", replace(kinds.TEXT, operators=kinds.ALL))),
    "what is not true is false": ("and", lambda patch: patch.setattr(
        condition, "_comparison_test", two_valued)),
    "not is forgotten in SQL": ("boolean", lambda patch: patch.setitem(
        condition.IN_SQL, "neq", "=")),
}  # fmt: skip


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_the_comparison_notices_sabotage(
    sabotage: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody breaks one rule of how values are compared."""
    column, break_rule = SABOTAGES[sabotage]
    break_rule(monkeypatch)
    with lab(database_url) as run, pytest.raises(AssertionError):
        run(500, [column], database=None, derandomize=True, phases=[Phase.generate])
