"""Filters: their syntax, what they mean for a table, and how they are refused."""

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.database.connections import OWN_NAMES, Connection, connect
from app.database.migration import migrate
from app.live import kinds
from app.live.condition import Condition, RowValues, Unjudgeable, bind, bind_at_once
from app.live.filter import (
    EVERYTHING,
    Comparison,
    Filter,
    Junction,
    canonical,
    filter_of,
    format_list,
    parse_filter,
    parse_list,
    parse_names,
)
from app.live.kinds import Kind
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.table import Column, Table, describe, describe_all
from tests.support.postgres import in_thread
from tests.support.roles import somebodys_database

A1, B2 = Comparison("a", "eq", ("1",)), Comparison("b", "gt", ("2",))

PARSED: dict[str, tuple[Filter, ...]] = {
    "": (),
    "&": (),
    "a=eq.1": (A1,),
    "a=eq.1&b=gt.2": (A1, B2),
    "&a=eq.1&&": (A1,),
    "a=not.eq.1": (Comparison("a", "eq", ("1",), True),),
    "a=eq.": (Comparison("a", "eq", ("",)),),
    'a=eq."1",(2)=.': (Comparison("a", "eq", ('"1",(2)=.',)),),
    "a=eq.x+y%2Bz%20%C3%A4ä": (Comparison("a", "eq", ("x y+z ää",)),),
    "%61=eq%2E1": (A1,),
    "a=in.(1,2)": (Comparison("a", "in", ("1", "2")),),
    "a=in.()": (Comparison("a", "in", ()),),
    "a=in.(,)": (Comparison("a", "in", ("", "")),),
    'a=not.in.("","x,y","\\"\\\\",1 , 2)': (
        Comparison("a", "in", ("", "x,y", '"\\', "1 ", " 2"), True),
    ),
    'a=in.( 1 , 2 ) ': (Comparison("a", "in", ("1 ", " 2 ")),),
    'a=in.( " 1"," 2")': (Comparison("a", "in", (" 1", " 2")),),
    'a=in.("\\a")': (Comparison("a", "in", ("a",)),),
    "a=in.(a\"b,x(y,{1)": (Comparison("a", "in", ('a"b', "x(y", "{1")),),
    "a=is.null&b=not.is.TRUE": (
        Comparison("a", "is", ("null",)), Comparison("b", "is", ("true",), True),
    ),
    "a=is.Not_Null": (Comparison("a", "is", ("not_null",)),),
    "a b-c$_é=eq.1": (Comparison("a b-c$_é", "eq", ("1",)),),
    '"a.b"=eq.1': (Comparison("a.b", "eq", ("1",)),),
    '"and"=eq.1': (Comparison("and", "eq", ("1",)),),
    '"\\"\\\\"=eq.1': (Comparison('"\\', "eq", ("1",)),),
    "not=eq.1": (Comparison("not", "eq", ("1",)),),
    "and=(a.eq.1,b.gt.2)": (Junction("and", (A1, B2)),),
    "or=(a.eq.1,b.gt.2)": (Junction("or", (A1, B2)),),
    "not.and=(a.eq.1)": (Junction("and", (A1,), True),),
    "not.or=(a.eq.1)": (Junction("or", (A1,), True),),
    "or=( a.eq.1, not.and( b.gt.2, or (a.not.eq.1) ) )": (
        Junction("or", (
            A1, Junction("and", (
                B2, Junction("or", (Comparison("a", "eq", ("1",), True),)),
            ), True),
        )),
    ),
    "or=(and.eq.1,not.eq.1,or.is.null )": (
        Junction("or", (
            Comparison("and", "eq", ("1",)), Comparison("not", "eq", ("1",)),
            Comparison("or", "is", ("null",)),
        )),
    ),
    'or=("a.b".eq."x)\\",",c.eq.{1,2},d.in.(1,"2"),e.eq. x y ,f.eq.)': (
        Junction("or", (
            Comparison("a.b", "eq", ('x)",',)), Comparison("c", "eq", ("{1,2}",)),
            Comparison("d", "in", ("1", "2")), Comparison("e", "eq", (" x y ",)),
            Comparison("f", "eq", ("",)),
        )),
    ),
}  # fmt: skip

BAD, MANY = RefusalCode.BAD_FILTER, RefusalCode.TOO_MANY

REFUSED: dict[str, tuple[RefusalCode, str]] = {
    "a": (BAD, "'a' has no value; it is written column=operator.value"),
    "a=1": (BAD, "an operator and a value are expected, as in id=eq.1, not '1'"),
    "order=a.desc": (BAD, "each also with not. before it; rows come in the order of their key."),
    "a=eq": (BAD, "an operator and a value are expected"),
    "a=like.x": (BAD, "the operators are eq, neq, lt, lte, gt, gte, in and is"),
    "a=EQ.1": (BAD, "the operators are"),
    "a=not.not.eq.1": (BAD, "not 'not.not.eq.1'"),
    "a=eq(any).{1}": (BAD, "the operators are"),
    "=eq.1": (BAD, "the name of a column is expected"),
    "a.b=eq.1": (BAD, "written in quotes"),
    "a->b=eq.1": (BAD, "written in quotes"),
    '"a=eq.1': (BAD, "is never closed"),
    '""=eq.1': (BAD, "the name of a column is expected"),
    "a=in.1,2": (BAD, "'(' is expected after 'a' and in., as in in.(1,2), not '1,2'"),
    "a=in.(1": (BAD, "')' is expected after the values of 'a', where the text ends"),
    "a=in.(1)2": (BAD, "'2' follows it"),
    'a=in.("x"y)': (BAD, "to write a quote within quotes, put a backslash before it"),
    'a=in.("x", "y")': (BAD, "a space before the quoted value"),
    'or=(a.eq. "x")': (BAD, "a space before the quoted value"),
    'a=in.("x" ,"y")': (BAD, "put a backslash before it"),
    'a=in.("x)': (BAD, "is never closed"),
    "a=is.nul": (BAD, "takes null, not_null, true, false or unknown, not 'nul'"),
    "and=a.eq.1": (BAD, "in parentheses"),
    "and=()": (BAD, "the name of a column is expected"),
    "and=(a.eq.1": (BAD, "')' is expected"),
    "and=(a.eq.1)x": (BAD, "'x' follows it"),
    "and=(a)": (BAD, "'.' is expected after the column 'a'"),
    "and=(a.eq.1,)": (BAD, "the name of a column is expected"),
    'and=(a.eq."x"y)': (BAD, "put a backslash before it"),
    "a=eq.%": (BAD, "write %25 for a percent sign"),
    "a=eq.%4": (BAD, "write %25 for a percent sign"),
    "a=eq.%zz": (BAD, "write %25 for a percent sign"),
    "a=eq.%ff": (BAD, "not UTF-8"),
    "a=eq.%00": (BAD, "U+0000"),
    "a=eq.\0": (BAD, "U+0000"),
    "%00=eq.1": (BAD, "U+0000"),
    "a=eq.\ud800": (BAD, "surrogate"),
    "a=eq.%ED%A0%80": (BAD, "surrogate"),
    "a=eq." + 4000 * "x": (RefusalCode.TOO_MANY, "4005 characters, and 4000 are allowed"),
    f"a=in.({200 * '1,'}1)": (MANY, "201 values, and 200 are allowed"),
    "&".join(101 * ["a=eq.1"]): (MANY, "101 comparisons, and 100 are allowed"),
    f"and=({10 * 'and('}a.eq.1{11 * ')'}": (MANY, "nested more than 10 deep"),
    f"and=({500 * 'and('}": (MANY, "nested more than 10 deep"),
}


@pytest.mark.parametrize("where", PARSED)
def test_filters_are_read_as_postgrest_reads_them(where: str) -> None:
    """Clients write filters of every form."""
    assert parse_filter(where) == Junction("and", PARSED[where])


@pytest.mark.parametrize("where", REFUSED, ids=lambda where: ascii(where[:40]))
def test_malformed_filters_are_refused(where: str) -> None:
    """Clients make mistakes, and are told what to change."""
    code, sentence = REFUSED[where]
    with pytest.raises(SubscriptionRefused) as refused:
        parse_filter(where)
    assert (refused.value.code, refused.value.field) == (code, "where")
    assert sentence in refused.value.detail
    assert refused.value.detail.endswith(".")
    assert len(refused.value.detail) < 500


def test_limits_may_be_reached() -> None:
    """Clients use filters that are just small enough."""
    parse_filter("a=eq." + 3995 * "x")
    parse_filter(f"a=in.({199 * '1,'}1)")
    parse_filter("&".join(100 * ["a=eq.1"]))
    parse_filter(f"and=({9 * 'and('}a.eq.1{10 * ')'}")


def test_parameters_of_a_url_mean_the_same() -> None:
    """A REST request has its parameters decoded already."""
    assert filter_of([("a", "eq.1"), ("or", "(b.gt.2)")]) == parse_filter("a=eq.1&or=(b.gt.2)")
    assert filter_of([]) == EVERYTHING
    with pytest.raises(SubscriptionRefused, match="U\\+0000"):
        filter_of([("a", "eq.\0")])
    with pytest.raises(SubscriptionRefused, match="4004 characters"):
        filter_of([("a", f"eq.{4000 * 'x'}")])


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Somebody sends anything at all."""
    for field, parse in (("where", parse_filter), ("columns", parse_names), ("after", parse_list)):
        try:
            parse(text)
        except SubscriptionRefused as refused:
            assert refused.field == field
            refused.detail.encode()


def test_names_of_columns() -> None:
    """Clients choose columns."""
    assert parse_names('id, status ,"odd, name","\\""') == ("id", "status", "odd, name", '"')
    assert parse_names(",".join(["id", "status"] * 1_000)) == ("id", "status")
    with pytest.raises(SubscriptionRefused) as refused:
        parse_names(",".join(["id"] * 10_000))
    assert (refused.value.code, refused.value.field) == (RefusalCode.TOO_MANY, "columns")
    for text in ("", "id,", "a.b", "id status,'x'", '"id', "a\0"):
        with pytest.raises(SubscriptionRefused) as refused:
            parse_names(text)
        assert (refused.value.code, refused.value.field) == (RefusalCode.BAD_OPTION, "columns")


def test_lists_of_values() -> None:
    """Clients continue a list after a composite key."""
    assert parse_list('7,"a,b", x,') == ("7", "a,b", " x", "")
    assert parse_list("") == ("",)
    assert format_list(("7", "a,b", "")) == '7,"a,b",""'


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1)
)
def test_lists_are_read_as_they_are_written(values: list[str]) -> None:
    """A list of any values is written and read."""
    assert parse_list(format_list(values)) == tuple(values)


short_texts = st.text('a."\\,()', max_size=3)
comparisons = st.builds(
    Comparison, short_texts, st.sampled_from(["eq", "in"]),
    st.lists(short_texts, max_size=2).map(tuple), st.booleans(),
)  # fmt: skip
filters: st.SearchStrategy[Filter] = st.recursive(
    comparisons,
    lambda parts: st.builds(
        Junction, st.sampled_from(["and", "or"]), st.lists(parts, max_size=2).map(tuple),
        st.booleans(),
    ),
    max_leaves=3,
)  # fmt: skip


@given(filters, filters)
def test_different_filters_have_different_texts(one: Filter, other: Filter) -> None:
    """Filters are told apart by their canonical texts."""
    assert (canonical(one) == canonical(other)) == (one == other)


SORTED: dict[str, tuple[Kind, list[str]]] = {
    "integer": (kinds.INTEGER, ["-9223372036854775808", "-1", "0", "9223372036854775807"]),
    "numeric": (kinds.NUMERIC, [
        '"-Infinity"', "-1" + "0" * 131071, "-1.5", "0." + "0" * 16382 + "1", "9007199254740992",
        "9007199254740992." + "0" * 50 + "1", "9007199254740993", "1" + "0" * 131071,
        '"Infinity"', '"NaN"',
    ]),
    "float": (kinds.FLOAT, [
        '"-Infinity"', "-1e+30", "-0", "1e-30", "1e+30", '"Infinity"', '"NaN"',
    ]),
    "uuid": (kinds.UUID, [
        '"00000000-0000-0000-0000-000000000001"', '"0a000000-0000-0000-0000-000000000000"',
        '"a0000000-0000-0000-0000-000000000000"', '"ffffffff-ffff-ffff-ffff-ffffffffffff"',
    ]),
    "date": (kinds.DATE, [
        '"-infinity"', '"4713-01-01 BC"', '"0001-12-31 BC"', '"0001-01-01"', '"9999-12-31"',
        '"10000-01-01"', '"infinity"',
    ]),
    "time": (kinds.TIME, ['"00:00:00"', '"09:00:00"', '"09:00:00.000001"', '"09:00:00.1"',
                          '"24:00:00"']),
    "timestamp": (kinds.TIMESTAMP, [
        '"-infinity"', '"0044-03-15T12:00:00.5 BC"', '"2020-01-01T00:00:00"',
        '"2020-01-01T00:00:00.05"', '"2020-01-01T00:00:00.5"', '"294276-01-01T00:00:00"',
        '"infinity"',
    ]),
    "timestamptz": (kinds.TIMESTAMPTZ, [
        '"-infinity"', '"0044-03-15T12:00:00.5+00:00 BC"', '"2020-01-01T00:00:00+00:00"',
        '"2020-01-01T00:00:00.5+00:00"', '"infinity"',
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", SORTED)
def test_values_sort_as_in_postgres(name: str) -> None:
    """Values of every kind that has an order are compared."""
    kind, texts = SORTED[name]
    values = [kind.read(text) for text in texts]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert all(low < high for low, high in pairwise(values))


def test_values_that_postgres_takes_for_equal_are_equal() -> None:
    """Equal values that are written differently are found in a hash table."""
    for kind, one, other in (
        (kinds.NUMERIC, "1.0", "1.000"),
        (kinds.NUMERIC, "1" + "0" * 131071, "1" + "0" * 131071 + ".0"),
        (kinds.FLOAT, "-0", "0"), (kinds.FLOAT, '"NaN"', '"NaN"'), (kinds.PADDED, '"a  "', '"a"'),
        (kinds.TEXT, '"\\u00e4"', '"ä"'),
    ):  # fmt: skip
        assert {kind.read(one): True}[kind.read(other)]
    assert kinds.TEXT.read('"a  "') != kinds.TEXT.read('"a"')
    assert kinds.PADDED.read('"a\\t"') != kinds.PADDED.read('"a"')


UNREADABLE: list[tuple[Kind, list[str]]] = [
    (kinds.INTEGER, ['"1"', "1.5", "true", "[1]", "{}", "9" * 5000]),
    (kinds.NUMERIC, ['"1"', '"nan"', "true", "[1]", "{}", "-"]),
    (kinds.FLOAT, ['"1"', '"nan"', "true", "[1]"]),
    (kinds.BOOLEAN, ['"true"', "1", "[]"]),
    (kinds.TEXT, ["1", "true", "[]", "{}", '"\\ud800"']),
    (kinds.UUID, ['"a0000000"', "1", '"A0000000-0000-0000-0000-000000000000"']),
    (kinds.DATE, ['"2020-01-01T00:00:00"', '"x"', "1", '"12:00:00"']),
    (kinds.TIME, ['"12:00"', "1", '"12:00:00+00"', '"infinity"']),
    (kinds.TIMESTAMP, ['"2020-01-01"', '"2020-01-01T00:00:00+00:00"', "1"]),
    (kinds.TIMESTAMPTZ, ['"2020-01-01T00:00:00"', '"2020-01-01T00:00:00+02:00"', "1"]),
    (kinds.DOCUMENT, ["1", "{}"]),
]


@pytest.mark.parametrize(
    ("kind", "texts"), UNREADABLE, ids=lambda value: getattr(value, "name", "")
)
def test_rows_from_before_an_alter_are_not_judged(kind: Kind, texts: list[str]) -> None:
    """A row was logged before its column got another type, or before there was the column."""
    table = Table("t", "public.t", "", (Column("c", "", kind), Column("d", "", kind)), (), None)
    for text in texts:
        row = RowValues(f'{{"c":{text},"d":null}}', table)
        assert row["d"] is None
        with pytest.raises(Unjudgeable):
            row["c"]
    with pytest.raises(Unjudgeable):
        RowValues('{"d":1}', table)["c"]
    with pytest.raises(Unjudgeable):
        RowValues('{"x":1}', table)["x"]


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[Connection]:
    """A connection as the server reads with, to a database with a watched table `order`."""
    opened = await connect(database_url, session=OWN_NAMES)
    await opened.execute("""
        CREATE TYPE public.mood AS ENUM ('sad', 'ok');
        CREATE TABLE public."order" (
            region text, id integer, total numeric(10,2), status text, mood public.mood,
            paid boolean, code character(4), doc jsonb, tags text[], due date, "a ""b" text,
            PRIMARY KEY (region, id)
        );
        SELECT feed.watch('public."order"', 'order');
    """)
    try:
        yield opened
    finally:
        await opened.close()


async def bound(connection: Connection, where: str) -> Condition:
    return await bind(connection, await describe(connection, "order"), parse_filter(where))


async def refusal(connection: Connection, where: str) -> SubscriptionRefused:
    with pytest.raises(SubscriptionRefused) as refused:
        await bound(connection, where)
    return refused.value


@pytest.mark.parametrize(
    ("plain", "other"),
    [("id=eq.-7", "id=eq.-007"), ("id=in.(0,7)", "id=in.(7,00)"), ("status=eq.a b", None)],
)
async def test_plain_constants_are_read_without_postgres(
    reader: Connection, plain: str, other: str | None
) -> None:
    """A filter by an id is bound without a round trip, to what Postgres would have read."""
    table = await describe(reader, "order")
    at_once = bind_at_once(table, parse_filter(plain))
    assert at_once is not None
    if other is not None:
        assert bind_at_once(table, parse_filter(other)) is None
        assert await bound(reader, other) == at_once
    assert at_once.text in (await bound(reader, f"{plain}&total=gt.1.50")).text


@pytest.mark.parametrize(
    "where",
    [
        *(
            f"id=eq.{constant}"
            for constant in ("2147483647", "%2B1", "-0", "1 ", "\u0661", "01", "")
        ),
        *(f"status=eq.{constant}" for constant in ("\\", '"', "é", "\t")),
        "code=eq.a",
        "due=eq.2026-01-01",
        "total=eq.1",
    ],
)
async def test_other_constants_are_left_to_postgres(reader: Connection, where: str) -> None:
    """What Postgres might write in another way, or refuse, is not guessed."""
    assert bind_at_once(await describe(reader, "order"), parse_filter(where)) is None


async def test_a_table_is_described(reader: Connection) -> None:
    """Somebody asks for topics."""
    table = await describe(reader, "order")
    assert (table.topic, table.name, table.key) == ("order", 'public."order"', ("region", "id"))
    assert table.destroy_with is None
    assert [(column.name, column.type, column.kind.name) for column in table.columns] == [
        ("region", "text", "text"), ("id", "integer", "integer"), ("total", "numeric", "numeric"),
        ("status", "text", "text"), ("mood", "public.mood", "enum"), ("paid", "boolean", "boolean"),
        ("code", "bpchar", "padded"), ("doc", "jsonb", "document"), ("tags", "text[]", "opaque"),
        ("due", "date", "date"), ('a "b', "text", "text"),
    ]  # fmt: skip
    assert table in await describe_all(reader)
    assert [each.topic for each in await describe_all(reader)] == sorted(
        each.topic for each in await describe_all(reader)
    )


@pytest.mark.parametrize("topic", ["orders", "", "a\0", "x" * 1000])
async def test_unknown_topics_are_refused(reader: Connection, topic: str) -> None:
    """Somebody asks for a topic that there is not."""
    with pytest.raises(SubscriptionRefused) as refused:
        await describe(reader, topic)
    assert (refused.value.code, refused.value.field) == (RefusalCode.UNKNOWN_TOPIC, "topic")


@pytest.mark.parametrize(
    ("where", "code", "sentence"),
    [
        ("nothing=eq.1", RefusalCode.UNKNOWN_COLUMN, "no column 'nothing'; it has region, id, tot"),
        ("status=gt.a", RefusalCode.UNSUPPORTED, "use eq, neq, in or is"),
        ("mood=lt.ok", RefusalCode.UNSUPPORTED, "use eq, neq, in or is"),
        ("paid=gt.true", RefusalCode.UNSUPPORTED, "use eq, neq, in or is"),
        ("tags=eq.{}", RefusalCode.UNSUPPORTED, "use is."),
        ("doc=is.null", RefusalCode.UNSUPPORTED, "cannot be filtered"),
        ("id=is.true", RefusalCode.UNSUPPORTED, "use is.null or is.not_null"),
        (
            "total=gt.1&id=eq.x",
            RefusalCode.BAD_VALUE,
            "The column 'id' cannot be compared with 'x': invalid input syntax for type integer:"
            ' "x".',
        ),
        ("due=gte.2026-01-01T10:00:00+01:0", RefusalCode.BAD_VALUE, "a plus sign is written %2B."),
        ("id=in.(1,99999999999)", RefusalCode.BAD_VALUE, "out of range for type integer"),
        ("total=eq.1e200000", RefusalCode.BAD_VALUE, "value overflows numeric format"),
        ("due=eq.2020-02-30", RefusalCode.BAD_VALUE, "date/time field value out of range"),
        ("due=gt.TODAY", RefusalCode.BAD_VALUE, "another time whenever the client reconnects"),
        ("mood=eq.Sad", RefusalCode.BAD_VALUE, "(it may be 'sad' or 'ok')"),
        ("total=in.(1e131071,2e131071,3e131071)", RefusalCode.TOO_MANY, "use fewer or shorter"),
        ("total=eq.1e131071&total=gt.1e131071", RefusalCode.TOO_MANY, "use fewer or shorter"),
    ],
)
async def test_filters_that_a_table_does_not_allow_are_refused(
    reader: Connection, where: str, code: RefusalCode, sentence: str
) -> None:
    """Clients ask a column for more than it can tell exactly."""
    refused = await refusal(reader, where)
    assert (refused.code, refused.field) == (code, "where")
    assert sentence in refused.detail
    assert refused.detail.endswith(".")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("id=eq.7&paid=is.true", "paid=is.TRUE&id=eq.+07"),
        ("id=eq.7", "and=(id.eq.7,id.in.(7,7))"),
        ("id=not.lt.7", "id=gte.7"),
        ("id=in.(2,1)", "or=(id.in.(1,2))"),
        ("not.or=(id.eq.7)", "id=neq.7"),
        ("due=eq.2020-01-02", "due=eq.Jan 2, 2020"),
        ("", "and=(and(not.or(id.in.())),id.not.in.())&id=not.in.()"),
    ],
)
async def test_equal_conditions_are_shared(reader: Connection, one: str, other: str) -> None:
    """Two clients write the same in different ways."""
    first, second = await bound(reader, one), await bound(reader, other)
    if one:
        assert first == second
        assert hash(first) == hash(second)
        assert first.text == second.text
    else:  # not found out, but both match everything
        row = RowValues('{"id":null}', await describe(reader, "order"))
        assert first.matches(row) and second.matches(row)
    assert first != await bound(reader, "id=eq.8")


@pytest.mark.parametrize(
    ("where", "equality"),
    [
        ("", None),
        ("id=gt.1", None),
        ("id=neq.1", None),
        ("id=is.null", None),
        ("id=not.in.(1,2)", None),
        ("or=(id.eq.1,id.eq.2)", None),
        ("id=eq.1", ("id", (1,))),
        ("id=not.neq.1", ("id", (1,))),
        ("id=in.(2,1)&status=neq.x", ("id", (1, 2))),
        ("id=in.()", ("id", ())),
        ("paid=is.true", ("paid", (True,))),
        ("paid=eq.false", ("paid", (False,))),
        ("code=in.(a,a+,b)", ("code", ("a", "b"))),
        ("and=(paid.is.true,and(mood.eq.ok,id.in.(1,2)))", ("id", (1, 2))),
        ("paid=is.true&mood=eq.ok&id=in.(1,2)&region=eq.x", ("region", ("x",))),
    ],
)
async def test_the_most_selective_equality_is_found(
    reader: Connection, where: str, equality: Any
) -> None:
    """A filter is put into an index."""
    assert (await bound(reader, where)).equality == equality


async def test_a_condition_in_sql_follows_other_parameters(reader: Connection) -> None:
    """A statement has parameters of its own before those of the filter."""
    condition = await bound(reader, '"a \\"b"=eq.x\'&id=in.(1,2)&code=not.is.null')
    parameters = ["first"]
    assert condition.sql(parameters) == (
        '((x."a ""b" = $2::text::text) AND (NOT (x."code" IS NULL)) AND'
        ' (x."id" IN ($3::text::integer, $4::text::integer)))'
    )
    assert parameters == ["first", "x'", "1", "2"]
    assert condition.columns == {'a "b', "code", "id"}
    assert (await bound(reader, "")).sql([]) == "(true)"


async def test_types_of_others_run_no_code_of_theirs(server_url: str) -> None:
    """The owner of a table gives its types casts that raise, and the server's role, which may only
    read, filters by them.
    """
    raising = """
        CREATE FUNCTION public.{0}(text) RETURNS public.{0} LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'run'; END $$;
        CREATE FUNCTION public.{0}_text(public.{0}) RETURNS text LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'run'; END $$;
        CREATE CAST (text AS public.{0}) WITH FUNCTION public.{0}(text) AS IMPLICIT;
        CREATE CAST (public.{0} AS text) WITH FUNCTION public.{0}_text AS IMPLICIT;
    """
    with somebodys_database(server_url) as home:
        in_thread(migrate, home.as_owner)
        owner = await connect(home.as_owner)
        await owner.execute("CREATE TYPE public.mood AS ENUM ('sad', 'ok')")
        await owner.execute(raising.format("mood"))
        await owner.execute("""
            CREATE TYPE public.shown AS ENUM ('a');
            CREATE FUNCTION public.shown_json(public.shown) RETURNS json LANGUAGE sql
                AS 'SELECT ''null''::json';
            CREATE CAST (public.shown AS json) WITH FUNCTION public.shown_json;
            CREATE DOMAIN public.feeling AS public.mood;
            CREATE TABLE public.t (id int PRIMARY KEY, m public.mood, s public.shown,
                                   f public.feeling, ms public.mood[]);
            SELECT feed.watch('public.t', 't');
            ALTER TABLE public.t DISABLE TRIGGER USER;
        """)
        await owner.execute(
            "INSERT INTO public.t (id, m, f) VALUES (1, 'sad', 'ok'), (2, NULL, NULL)"
        )
        await owner.execute(f"""
            GRANT USAGE ON SCHEMA feed, public TO {home.guest};
            GRANT SELECT ON ALL TABLES IN SCHEMA feed TO {home.guest};
            GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA feed TO {home.guest};
            GRANT SELECT ON public.t TO {home.guest};
        """)
        await owner.close()
        for url in (home.as_guest, home.as_owner):
            connection = await connect(url, session=OWN_NAMES)
            try:
                table = await describe(connection, "t")
                for where, ids in (
                    ("m=eq.sad", [1]), ("m=neq.ok", [1]), ("m=not.in.(ok,sad)", []),
                    ("m=is.null", [2]), ("f=eq.ok", [1]), ("f=neq.ok", []), ("ms=is.null", [1, 2]),
                ):  # fmt: skip
                    parameters: list[str] = []
                    condition = await bind(connection, table, parse_filter(where))
                    found = await connection.fetch(
                        f"SELECT id FROM {table.name} AS x WHERE {condition.sql(parameters)}"
                        " ORDER BY id", *parameters,
                    )  # fmt: skip
                    assert [row["id"] for row in found] == ids, where
                with pytest.raises(SubscriptionRefused, match="cannot be filtered"):
                    await bind(connection, table, parse_filter("s=is.null"))
            finally:
                await connection.close()
