"""Filters as clients write them: text in PostgREST's syntax goes in, a syntax tree comes out.

Nothing here knows the columns of any table; `app.live.condition` gives a filter its meaning.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from app.live.refusal import RefusalCode, SubscriptionRefused, listing, shown

# A node may have to evaluate every filter on a topic for each of its changes.
LONGEST_WHERE_CHARS = 4_000
LONGEST_COLUMNS_CHARS = 20_000
MOST_IN_VALUES = 200
MOST_COMPARISONS = 100
DEEPEST_NESTING = 10

OPERATORS = ("eq", "neq", "lt", "lte", "gt", "gte", "in", "is")
# What to use instead of parameters that PostgREST has and filters here do not.
INSTEAD = {
    "select": "; the option columns chooses columns",
    "order": "; rows come in the order of their key",
    "offset": "; the option after asks for the next page",
}
IS_VALUES = ("null", "not_null", "true", "false", "unknown")

QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
ESCAPED = re.compile(r"\\(.)", re.DOTALL)
PLAIN_NAME = re.compile(r"[\w $-]+")
SPACES = re.compile(r"[ \t]*")
OPERATOR = re.compile(r"(not\.)?([a-z]+)\.")
JUNCTION = re.compile(r"[ \t]*(not\.)?(and|or)[ \t]*\(")
# Inside parentheses, `{a,b}` is one value, as in PostgREST.
NESTED_VALUE = re.compile(r"\{[^{}]*\}(?=[,)])|[^,)]*")
LISTED_VALUE = re.compile(r"[^,)]*")
UP_TO_COMMA = re.compile(r"[^,]*")
PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})?")

Connective: TypeAlias = Literal["and", "or"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A column compared with one value; with any number of them if the operator is `in`."""

    column: str
    operator: str
    values: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Junction:
    """Filters joined by `and` or `or`. An `and` of nothing is true."""

    connective: Connective
    parts: "tuple[Filter, ...]"
    negated: bool = False


Filter: TypeAlias = Comparison | Junction

EVERYTHING = Junction("and", ())
"""The filter that every row matches."""


def parse_filter(where: str) -> Junction:
    """Parse a filter written as the query string of a URL. Raises SubscriptionRefused."""
    if len(where) > LONGEST_WHERE_CHARS:
        raise _too_long(len(where))
    return filter_of(parse_parameter(part) for part in where.split("&") if part)


def filter_of(parameters: Iterable[tuple[str, str]]) -> Junction:
    """Parse a filter given as the decoded parameters of a URL. Raises SubscriptionRefused."""
    given = list(parameters)
    length = sum(len(name) + len(value) for name, value in given)
    if length > LONGEST_WHERE_CHARS:
        raise _too_long(length)
    parsed = Junction("and", tuple(_parse_parameter(name, value) for name, value in given))
    count = sum(1 for _ in comparisons(parsed))
    if count > MOST_COMPARISONS:
        raise SubscriptionRefused(
            RefusalCode.TOO_MANY,
            f"The filter has {count} comparisons, and {MOST_COMPARISONS} are allowed: leave some"
            " out, or replace several eq of one column by in.(...).",
            "where",
        )
    return parsed


def comparisons(filter: Filter) -> Iterator[Comparison]:
    """Iterate over the comparisons in a filter."""
    if isinstance(filter, Comparison):
        yield filter
    else:
        for part in filter.parts:
            yield from comparisons(part)


def parse_names(text: str) -> tuple[str, ...]:
    """Parse names of columns, separated by commas: `id,status,"odd, name"`; drop duplicates.

    Raises SubscriptionRefused.
    """
    if len(text) > LONGEST_COLUMNS_CHARS:
        raise SubscriptionRefused(
            RefusalCode.TOO_MANY,
            f"The columns take {len(text)} characters, and {LONGEST_COLUMNS_CHARS} are allowed: ask"
            " for fewer, or for all.",
            "columns",
        )
    _require_storable(text, "columns", RefusalCode.BAD_OPTION)
    reader = Reader(text, "columns", RefusalCode.BAD_OPTION)
    names = [reader.name()]
    while not reader.at_end():
        reader.require(",", "between names of columns")
        names.append(reader.name())
    return tuple(dict.fromkeys(names))


def parse_list(text: str) -> tuple[str, ...]:
    """Parse values separated by commas: `7,"a,b"`. Raises SubscriptionRefused."""
    _require_storable(text, "after", RefusalCode.BAD_OPTION)
    reader = Reader(text, "after", RefusalCode.BAD_OPTION)
    values = [reader.value(UP_TO_COMMA, ",")]
    while not reader.at_end():
        reader.require(",", "between values", spaces=False)
        values.append(reader.value(UP_TO_COMMA, ","))
    return tuple(values)


def format_list(values: Sequence[str]) -> str:
    """Return values as `parse_list` reads them, quoted where needed."""
    return ",".join(
        value if re.fullmatch(r"[^,\"\\\s]+", value) else quoted(value) for value in values
    )


def parse_key(text: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Parse the values of key columns: one as it is, several as a list.

    Raises SubscriptionRefused.
    """
    _require_storable(text, "after", RefusalCode.BAD_OPTION)
    values = (text,) if len(columns) == 1 else parse_list(text)
    if len(values) != len(columns):
        raise SubscriptionRefused(
            RefusalCode.BAD_OPTION,
            f"after is the key of a row, the values of {listing(list(columns), 'and')} separated by"
            f" commas: {len(columns)}, and {shown(text)} has {len(values)}.",
            "after",
        )
    return values


def format_key(values: Sequence[str]) -> str:
    """Return the values of key columns as `parse_key` reads them."""
    return values[0] if len(values) == 1 else format_list(values)


def quoted(text: str) -> str:
    """Return a name or a value in quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def canonical(filter: Filter) -> str:
    """Return a filter as text that is the same for equal filters, and for no others."""
    sign = "not." if filter.negated else ""
    if isinstance(filter, Junction):
        return f"{sign}{filter.connective}({','.join(map(canonical, filter.parts))})"
    values = ",".join(map(quoted, filter.values))
    return f"{quoted(filter.column)}.{sign}{filter.operator}.({values})"


def _parse_parameter(name: str, value: str) -> Filter:
    for text in (name, value):
        _require_storable(text, "where", RefusalCode.BAD_FILTER)
    if name in ("and", "or", "not.and", "not.or"):
        if not value.lstrip(" \t").startswith("("):
            raise _malformed(
                f"after {name}=, comparisons in parentheses are expected, as in"
                f" {name}=(a.eq.1,b.eq.2), not {shown(value)}; a column of this name is written in"
                f' quotes: "{name}"=...'
            )
        reader = Reader(name + value)
        parsed = reader.junction(1)
        reader.require_end()
        return parsed
    reader = Reader(name)
    column = reader.name()
    reader.require_end()
    return Reader(value).comparison(column, nested=False)


class Reader:
    """Reads one text from left to right. All methods raise SubscriptionRefused."""

    def __init__(
        self, text: str, field: str = "where", code: RefusalCode = RefusalCode.BAD_FILTER
    ) -> None:
        self._text = text
        self._at = 0
        self._field = field
        self._code = code

    def junction(self, depth: int) -> Filter:
        """Read `and(...)`, or one of the comparisons and junctions within it."""
        if depth > DEEPEST_NESTING + 1:
            raise SubscriptionRefused(
                RefusalCode.TOO_MANY,
                f"The filter is nested more than {DEEPEST_NESTING} deep: simplify it.",
                self._field,
            )
        begins = self._take(JUNCTION)
        if begins is None:
            return self.comparison(self.name(), nested=True)
        parts = [self.junction(depth + 1)]
        while self._skip(","):
            parts.append(self.junction(depth + 1))
        self.require(")", "after the last comparison")
        return Junction(cast(Connective, begins[2]), tuple(parts), begins[1] is not None)

    def comparison(self, column: str, *, nested: bool) -> Comparison:
        """Read an operator and its value. Within parentheses (`nested`) the operator follows a dot,
        and the value ends at a comma or at the closing parenthesis.
        """
        if nested:
            self.require(".", f"after the column {shown(column)}", spaces=False)
        begins = self._take(OPERATOR)
        if begins is None or begins[2] not in OPERATORS:
            at = begins.start() if begins else self._at
            raise self._wrong(
                f"after the column {shown(column)}, an operator and a value are expected, as in"
                f" {'id.eq.1' if nested else 'id=eq.1'}, not {shown(self._text[at:])}; the"
                f" operators are {listing(list(OPERATORS), 'and')}, each also with not. before it"
                + INSTEAD.get(column, "")
            )
        operator = begins[2]
        if operator == "in":
            values = self._values(column)
        elif nested:
            values = (self.value(NESTED_VALUE, ",)"),)
        else:
            values = (self._text[self._at :],)
            self._at = len(self._text)
        if operator == "is":
            values = (self._is_value(column, values[0].rstrip(" \t") if nested else values[0]),)
        if not nested:
            self.require_end()
        return Comparison(column, operator, values, begins[1] is not None)

    def name(self) -> str:
        """Read the name of a column, and the spaces around it."""
        self._take(SPACES)
        found = self._quoted() if self._text.startswith('"', self._at) else None
        if found is None:
            plain = self._take(PLAIN_NAME)
            found = plain[0].strip(" ") if plain else None
        if not found:
            raise self._wrong(
                f"the name of a column is expected, not {shown(self._text[self._at :])}; names with"
                ' anything but letters, digits, _, -, $ and spaces are written in quotes: "a.b"'
            )
        self._take(SPACES)
        return found

    def value(self, plain: re.Pattern[str], ends: str) -> str:
        """Read a value in quotes, or as `plain`; one of the characters `ends`, or the end of the
        text, must follow.
        """
        if not self._text.startswith('"', self._at):
            found = self._take(plain)
            value = found[0] if found else ""
            if value.lstrip().startswith('"'):  # PostgREST takes the quotes as part of the value
                raise self._wrong(
                    f"there is a space before the quoted value {shown(value)}: remove it"
                )
            return value
        value = self._quoted()
        if not self.at_end() and self._text[self._at] not in ends:
            raise self._wrong(
                f"the quoted value {shown(value)} is followed by {shown(self._text[self._at :])};"
                " to write a quote within quotes, put a backslash before it"
            )
        return value

    def at_end(self) -> bool:
        """Return whether everything has been read."""
        return self._at == len(self._text)

    def require(self, char: str, where: str, *, spaces: bool = True) -> None:
        """Read this character, and the spaces around it unless they would be part of a value."""
        if self._skip(char) if spaces else self._skip_exactly(char):
            return
        rest = self._text[self._at :]
        found = f", not {shown(rest)}" if rest else ", where the text ends"
        raise self._wrong(f"{shown(char)} is expected {where}{found}")

    def require_end(self) -> None:
        """Refuse whatever is left, except spaces."""
        rest = self._text[self._at :]
        if rest.strip(" \t"):
            raise self._wrong(
                f"{shown(self._text[: self._at])} is complete, but {shown(rest)} follows it; names"
                " and values with such characters are written in quotes"
            )

    def _values(self, column: str) -> tuple[str, ...]:
        self.require("(", f"after {shown(column)} and in., as in in.(1,2)")
        if self._skip(")"):
            return ()
        values = [self.value(LISTED_VALUE, ",)")]
        while self._skip_exactly(","):
            values.append(self.value(LISTED_VALUE, ",)"))
        self.require(")", f"after the values of {shown(column)}")
        if len(values) > MOST_IN_VALUES:
            raise SubscriptionRefused(
                RefusalCode.TOO_MANY,
                f"The list for {shown(column)} has {len(values)} values, and {MOST_IN_VALUES} are"
                " allowed: leave some out, or use several subscriptions.",
                self._field,
            )
        return tuple(values)

    def _is_value(self, column: str, value: str) -> str:
        """Return a value of `is` in lower case."""
        if value.lower() not in IS_VALUES:
            raise self._wrong(
                f"{shown(column)} is compared by is., which takes {listing(list(IS_VALUES))}, not"
                f" {shown(value)}; use eq. for other values"
            )
        return value.lower()

    def _quoted(self) -> str:
        found = self._take(QUOTED)
        if found is None:
            raise self._wrong(
                f"the quote that begins {shown(self._text[self._at :])} is never closed; within"
                " quotes, a backslash is written before a quote and before a backslash"
            )
        return ESCAPED.sub(r"\1", found[1])

    def _skip(self, char: str) -> bool:
        """Read a character with the spaces around it; return whether it was there."""
        found = self._take(re.compile(rf"[ \t]*{re.escape(char)}[ \t]*"))
        return found is not None

    def _skip_exactly(self, char: str) -> bool:
        """Read a character; return whether it was there."""
        found = self._text.startswith(char, self._at)
        self._at += found
        return found

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found:
            self._at = found.end()
        return found

    def _wrong(self, sentence: str) -> SubscriptionRefused:
        what = "filter" if self._field == "where" else f"option {self._field}"
        return SubscriptionRefused(self._code, f"The {what} is malformed: {sentence}.", self._field)


def parse_parameter(part: str) -> tuple[str, str]:
    """Return the decoded name and value of a part of a query string. Raises SubscriptionRefused."""
    name, equals, value = part.partition("=")
    if not equals:
        raise _malformed(
            f"{shown(part)} has no value; it is written column=operator.value, as in id=eq.1"
        )
    return _decoded(name), _decoded(value)


def _decoded(text: str) -> str:
    """Undo the escapes of a query string."""
    encoded = text.replace("+", " ").encode("utf-8", "surrogatepass")  # refused later
    for escape in PERCENT.finditer(encoded):
        if escape[1] is None:
            raise _malformed(
                f"in {shown(text)}, a percent sign is not followed by two hexadecimal digits; write"
                " %25 for a percent sign"
            )
    decoded = PERCENT.sub(lambda escape: bytes.fromhex(escape[1].decode()), encoded)
    try:
        return decoded.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise _malformed(
            f"the escapes in {shown(text)} are not UTF-8; write %25 for a percent sign, and the"
            " bytes of other characters as UTF-8"
        ) from None


def _require_storable(text: str, field: str, code: RefusalCode) -> None:
    """Refuse characters that no text in Postgres contains."""
    if re.search("[\0\ud800-\udfff]", text):
        raise SubscriptionRefused(
            code,
            f"{shown(text)} contains the character U+0000 or half of a surrogate pair, which no"
            " text in Postgres contains: leave it out.",
            field,
        )


def _malformed(sentence: str) -> SubscriptionRefused:
    return SubscriptionRefused(
        RefusalCode.BAD_FILTER, f"The filter is malformed: {sentence}.", "where"
    )


def _too_long(length: int) -> SubscriptionRefused:
    return SubscriptionRefused(
        RefusalCode.TOO_MANY,
        f"The filter has {length} characters, and {LONGEST_WHERE_CHARS} are allowed: shorten it.",
        "where",
    )
