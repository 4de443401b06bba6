"""A filter bound to a table: judges rows in Python exactly as Postgres's WHERE does in SQL."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from operator import ge, gt, le, lt
from typing import TypeAlias

import asyncpg
import msgspec

from app.database.connections import Connection, reason
from app.feed.log import SHORT_MEMBER_BYTES
from app.feed.row import members
from app.live.filter import OPERATORS, Comparison, Filter, Junction, canonical, comparisons
from app.live.kinds import BOOLEAN, RELATIVE, Kind, Value, read_text
from app.live.refusal import RefusalCode, SubscriptionRefused, listing, shown
from app.live.table import Column, Table

# A short numeric may have 147,456 digits.
LONGEST_CONSTANTS_CHARS = 150_000
MOST_LISTED_LABELS = 20

NEGATIONS = {"eq": "neq", "neq": "eq", "lt": "gte", "gte": "lt", "gt": "lte", "lte": "gt"}
ORDERINGS: dict[str, Callable[[Value, Value], bool]] = {"lt": lt, "lte": le, "gt": gt, "gte": ge}
IN_SQL = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}

# The values that constants of one type stand for, as JSON. `type` is one of Postgres's own, so only
# Postgres's code is run; and Postgres has written its name.
CANONICAL = """
(SELECT array_agg(to_json(constant::{type})::text ORDER BY place)
 FROM unnest(${number}::text[]) WITH ORDINALITY AS given (constant, place))
"""

# Constants that are their own canonical text, by type: Postgres need not read them, which would
# take a round trip for every client that returns with a filter for an id, all at the same time.
PLAIN_TEXT = re.compile(r"[ !#-\[\]-~]*")
PLAIN = {
    "smallint": re.compile(r"0|-?[1-9][0-9]{0,3}"),
    "integer": re.compile(r"0|-?[1-9][0-9]{0,8}"),
    "bigint": re.compile(r"0|-?[1-9][0-9]{0,17}"),
    "uuid": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "text": PLAIN_TEXT,
    "character varying": PLAIN_TEXT,
}
QUOTED = ("uuid", "text", "character varying")

Constant: TypeAlias = tuple[Column, str]
"""What a column is compared with, as the client wrote it."""

Texts: TypeAlias = dict[tuple[str, str], str]
"""The canonical JSON texts of constants, by the constants' types and what clients wrote."""


LONG: Value = object()
"""A value that is not NULL and takes more than SHORT_MEMBER_BYTES, so no filter can name it."""


class Unjudgeable(Exception):
    """A row cannot be judged: it lacks a column, or has a value of another type in it.

    It was written before an ALTER, or is the outline of one that is too large.
    """


class RowValues(dict[str, Value]):
    """The values of a row, given as JSON text, by column; each is read when first asked for.

    In an outline, values that are left out because they are long are LONG. Raises Unjudgeable for
    any other missing value, and for one that is not of its column's kind.
    """

    __slots__ = ("_is_outline", "_table", "_text")

    def __init__(self, text: str, table: Table, is_outline: bool = False) -> None:
        super().__init__()
        self._text = text
        self._table = table
        self._is_outline = is_outline

    def __missing__(self, name: str) -> Value:
        column, found = self._table.by_name.get(name), members(self._text, (name,))
        if column is not None and found is not None:
            value = self[name] = read(column.kind, found[0])
        elif column is not None and self._is_outline and column.kind.can_be_long:
            value = self[name] = LONG
        else:
            raise Unjudgeable(f"the row has no column {shown(name)}")
        return value


def read(kind: Kind, text: str) -> Value:
    """Return a value from its JSON text. Raises Unjudgeable."""
    if text == "null":
        return None
    try:
        return kind.read(text)
    except (ValueError, ArithmeticError, RecursionError, msgspec.MsgspecError) as error:
        raise Unjudgeable(f"{shown(text)} is no {kind.name}") from error


Test: TypeAlias = Callable[[RowValues], bool]


class Condition:
    """A filter bound to a table. Conditions on one table are equal if they judge by the same
    comparisons.

    `text` names the condition. `columns` are those it reads. `equality` is a column and all values
    of it that matching rows may have, for an index; None if the filter demands no such thing.
    `matches` returns whether a row, as RowValues, matches, or raises Unjudgeable.
    """

    __slots__ = ("_filter", "_table", "columns", "equality", "matches", "text")

    def __init__(self, table: Table, filter: Filter) -> None:
        """`filter` has canonical JSON texts in place of constants."""
        self._table = table
        self._filter = filter
        self.text = canonical(filter)
        self.columns = frozenset(comparison.column for comparison in comparisons(filter))
        self.equality = _best_equality(table, filter)
        self.matches = _test(table, filter, True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Condition):
            return NotImplemented
        return self.text == other.text and self._table == other._table

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"<Condition on {self._table.topic}: {self.text}>"

    def sql(self, parameters: list[str]) -> str:
        """Return the condition as a boolean expression over a row `x`.

        The constants are appended to `parameters`, which become the statement's.
        """
        return _sql(self._table, self._filter, parameters)


async def bind(connection: Connection, table: Table, filter: Filter) -> Condition:
    """Bind a filter to a table; have Postgres read the constants. Raises SubscriptionRefused."""
    condition = bind_at_once(table, filter)
    if condition is None:
        texts = await _canonical_texts(connection, _constants(table, filter))
        _require_short(table, filter, texts)
        condition = Condition(table, _resolved(table, filter, texts))
    return condition


def bind_at_once(table: Table, filter: Filter) -> Condition | None:
    """Bind a filter without Postgres; return None if it has a constant that only Postgres can read.

    Raises SubscriptionRefused.
    """
    texts: Texts = {}
    for column, value in _constants(table, filter):
        plain = PLAIN.get(column.type)
        if plain is None or not plain.fullmatch(value):
            return None
        texts[column.type, value] = f'"{value}"' if column.type in QUOTED else value
    _require_short(table, filter, texts)
    return Condition(table, _resolved(table, filter, texts))


def _constants(table: Table, filter: Filter) -> Iterable[Constant]:
    """Return the constants that need to be read, each once. Raises SubscriptionRefused."""
    constants: dict[Constant, None] = {}
    for comparison in comparisons(filter):
        column = table.column(comparison.column)
        _require_supported(column, comparison)
        if comparison.operator != "is":
            for value in comparison.values:
                _require_absolute(column, value)
                constants[column, value] = None
    return constants


def _require_supported(column: Column, comparison: Comparison) -> None:
    kind, operator = column.kind, comparison.operator
    named = f"{shown(column.name)} ({column.type})"
    if not kind.operators:
        sentence = f"The column {named} cannot be filtered: {kind.limitation}; leave it out."
    elif operator not in kind.operators:
        available = [each for each in OPERATORS if each in kind.operators]
        sentence = (
            f"The column {named} does not have the operator {operator}: {kind.limitation}; use"
            f" {listing(available)}."
        )
    elif operator == "is" and kind is not BOOLEAN and not _is_about_null(comparison):
        sentence = (
            f"The column {named} is no boolean, so is.{comparison.values[0]} means nothing for it:"
            " use is.null or is.not_null."
        )
    else:
        return
    raise SubscriptionRefused(RefusalCode.UNSUPPORTED, sentence, "where")


def _is_about_null(comparison: Comparison) -> bool:
    return comparison.values[0] in ("null", "not_null")


def _require_absolute(column: Column, value: str) -> None:
    relative = RELATIVE.search(value) if column.kind.has_relative_words else None
    if relative:
        raise _bad_value(
            f"The column {shown(column.name)} cannot be compared with {shown(value)}:"
            f" {relative[0]} would mean another time whenever the client reconnects; write out the"
            " date or the time."
        )


async def _canonical_texts(connection: Connection, constants: Iterable[Constant]) -> Texts:
    """Have Postgres read constants, in one round trip."""
    texts: Texts = {}
    by_type: dict[str, dict[str, None]] = {}
    given = list(constants)
    for column, value in given:
        if column.kind.labels is not None:
            texts[column.type, value] = _label(column, value)
        else:
            by_type.setdefault(column.type, {})[value] = None
    if by_type:
        try:
            read = await _read_by_postgres(
                connection, {type: list(values) for type, values in by_type.items()}
            )
        except asyncpg.DataError as error:
            raise _misread(given, reason(error)) from error
        for type, values in by_type.items():
            texts |= {(type, value): text for value, text in zip(values, read[type], strict=True)}
    return texts


def _require_short(table: Table, filter: Filter, texts: Texts) -> None:
    """Raise SubscriptionRefused for constants that are too long, each or together."""
    if any(text[0] == '"' and len(text.encode()) > SHORT_MEMBER_BYTES for text in texts.values()):
        raise SubscriptionRefused(
            RefusalCode.TOO_MANY,
            f"A value in the filter takes more than {SHORT_MEMBER_BYTES} bytes: filter by another"
            " column.",
            "where",
        )
    length = sum(
        len(texts[table.column(comparison.column).type, value])
        for comparison in comparisons(filter)
        if comparison.operator != "is"
        for value in comparison.values
    )
    if length > LONGEST_CONSTANTS_CHARS:
        raise SubscriptionRefused(
            RefusalCode.TOO_MANY,
            f"The filter's values have {length} digits and other characters when written out, and"
            f" {LONGEST_CONSTANTS_CHARS} are allowed: use fewer or shorter ones.",
            "where",
        )


async def _read_by_postgres(
    connection: Connection, by_type: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Return the canonical JSON texts of values, by type, in the same order. Raises DataError."""
    statement = "SELECT " + ", ".join(
        CANONICAL.format(type=type, number=number) for number, type in enumerate(by_type, 1)
    )
    found = await connection.fetchrow(statement, *by_type.values())
    return dict(zip(by_type, found, strict=True))


def _label(column: Column, value: str) -> str:
    """Return an enum's value as JSON.

    Postgres is not asked: a cast to the enum could be its owner's own function.
    """
    labels = column.kind.labels or ()
    if value not in labels:
        known = listing([shown(label) for label in labels[:MOST_LISTED_LABELS]])
        more = ", among others" if len(labels) > MOST_LISTED_LABELS else ""
        sentence = (
            f'invalid input value for enum {column.type}: "{value}" (it may be {known}{more})'
        )
        raise _misread([(column, value)], sentence)
    return msgspec.json.encode(value).decode()


def _misread(constants: Iterable[Constant], sentence: str) -> SubscriptionRefused:
    """Return the refusal of a constant that Postgres cannot read: the one that its sentence quotes,
    if it quotes one.
    """
    for column, value in constants:
        if f'"{value}"' in sentence:
            hint = "; a plus sign is written %2B" if " " in value else ""
            return _bad_value(
                f"The column {shown(column.name)} cannot be compared with {shown(value)}:"
                f" {sentence}{hint}."
            )
    return _bad_value(f"A value in the filter is not one of its column's type: {sentence}.")


def _bad_value(sentence: str) -> SubscriptionRefused:
    return SubscriptionRefused(RefusalCode.BAD_VALUE, sentence, "where")


def _resolved(table: Table, filter: Filter, texts: Texts) -> Filter:
    """Return a filter with canonical constants, in a canonical form: clients that write the same
    filter differently share what is made for them.
    """
    if isinstance(filter, Junction):
        parts = sorted({_resolved(table, part, texts) for part in filter.parts}, key=canonical)
        if len(parts) != 1:
            return replace(filter, parts=tuple(parts))
        return _simplified(replace(parts[0], negated=parts[0].negated != filter.negated))
    if filter.operator == "is":
        return filter
    type = table.column(filter.column).type
    values = {texts[type, value] for value in filter.values}
    return _simplified(replace(filter, values=tuple(sorted(values))))


def _simplified(filter: Filter) -> Filter:
    """Return a comparison without `not` if another operator can say it, and `in` one value as `eq`.

    For NULL, either form is NULL.
    """
    if isinstance(filter, Junction):
        return filter
    if filter.operator == "in" and len(filter.values) == 1:
        filter = replace(filter, operator="eq")
    if filter.negated and filter.operator in NEGATIONS:
        return replace(filter, operator=NEGATIONS[filter.operator], negated=False)
    return filter


def _values(table: Table, comparison: Comparison) -> tuple[Value, ...]:
    """Return the constants of a comparison as values of its column."""
    kind = table.column(comparison.column).kind
    return tuple(dict.fromkeys(kind.read(text) for text in comparison.values))


def _best_equality(table: Table, filter: Filter) -> tuple[str, tuple[Value, ...]] | None:
    """Return the equality that the fewest rows are expected to satisfy."""
    found = [(table.column(column).kind.is_coarse, len(values), column, values)
             for column, values in _equalities(table, filter)]  # fmt: skip
    if not found:
        return None
    _, _, column, values = min(found, key=lambda equality: equality[:3])
    return column, values


def _equalities(table: Table, filter: Filter) -> Iterator[tuple[str, tuple[Value, ...]]]:
    """Iterate over the columns that must have certain values for a row to match, with these."""
    if isinstance(filter, Junction):
        if filter.connective == "and" and not filter.negated:
            for part in filter.parts:
                yield from _equalities(table, part)
    elif filter.negated:
        return
    elif filter.operator in ("eq", "in"):
        yield filter.column, _values(table, filter)
    elif filter.operator == "is" and filter.values[0] in ("true", "false"):
        yield filter.column, (filter.values[0] == "true",)


def _test(table: Table, filter: Filter, outcome: bool) -> Test:
    """Return a function that returns whether a filter is true for a row (with `outcome` False:
    whether it is false). For NULL it is neither, and `not` does not change that.
    """
    wanted = outcome != filter.negated
    if isinstance(filter, Comparison):
        return _comparison_test(filter, _values_or_words(table, filter), wanted)
    tests = tuple(_test(table, part, wanted) for part in filter.parts)
    if (filter.connective == "and") == wanted:
        return _all_of(tests)
    return _any_of(tests)


def _all_of(tests: tuple[Test, ...]) -> Test:
    if len(tests) == 1:
        return tests[0]
    if len(tests) == 2:
        first, second = tests
        return lambda row: first(row) and second(row)
    return lambda row: all(test(row) for test in tests)


def _any_of(tests: tuple[Test, ...]) -> Test:
    if len(tests) == 1:
        return tests[0]
    if len(tests) == 2:
        first, second = tests
        return lambda row: first(row) or second(row)
    return lambda row: any(test(row) for test in tests)


def _values_or_words(table: Table, comparison: Comparison) -> tuple[Value, ...]:
    return comparison.values if comparison.operator == "is" else _values(table, comparison)


def _comparison_test(comparison: Comparison, values: tuple[Value, ...], outcome: bool) -> Test:
    """Return a function that returns whether a comparison has this outcome for a row."""
    column, operator = comparison.column, comparison.operator
    if operator == "is":
        return _is_test(column, values[0], outcome)
    if operator == "in":
        return _in_test(column, frozenset(values), outcome)
    if not outcome:
        operator = NEGATIONS[operator]
    (constant,) = values
    if operator == "eq":  # no constant is NULL
        return lambda row: bool(row[column] == constant)
    if operator == "neq":
        return lambda row: (value := row[column]) is not None and bool(value != constant)
    compare = ORDERINGS[operator]
    return lambda row: (value := row[column]) is not None and compare(value, constant)


def _in_test(column: str, values: frozenset[Value], outcome: bool) -> Test:
    if not values:  # false, even for NULL
        return lambda _: not outcome
    if outcome:
        return lambda row: row[column] in values
    return lambda row: (value := row[column]) is not None and value not in values


def _is_test(column: str, word: str, outcome: bool) -> Test:
    if word == "not_null":
        word, outcome = "null", not outcome
    is_value = {"null": None, "unknown": None, "true": True, "false": False}[word]
    if outcome:
        return lambda row: row[column] is is_value
    return lambda row: row[column] is not is_value


def _sql(table: Table, filter: Filter, parameters: list[str]) -> str:
    if isinstance(filter, Junction):
        parts = [_sql(table, part, parameters) for part in filter.parts]
        joined = f" {filter.connective.upper()} ".join(parts) or "true"
        expression = f"({joined})"
    else:
        expression = _comparison_sql(table.column(filter.column), filter, parameters)
    return f"(NOT {expression})" if filter.negated else expression


def _comparison_sql(column: Column, comparison: Comparison, parameters: list[str]) -> str:
    operand = "x." + '"{}"'.format(column.name.replace('"', '""'))
    if comparison.operator == "is":
        return f"({operand} IS {comparison.values[0].replace('_', ' ').upper()})"
    if not comparison.values:
        return "false"
    if column.compared_as_text:
        operand = f"CASE num_nulls({operand}) WHEN 0 THEN format('%s', {operand}) END"
    constants = [_constant_sql(column, text, parameters) for text in comparison.values]
    if comparison.operator == "in":
        return f"({operand} IN ({', '.join(constants)}))"
    return f"({operand} {IN_SQL[comparison.operator]} {constants[0]})"


def _constant_sql(column: Column, text: str, parameters: list[str]) -> str:
    parameters.append(read_text(text) if text[0] == '"' else text)
    type = "text" if column.compared_as_text else column.type
    return f"${len(parameters)}::text::{type}"
