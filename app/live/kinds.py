"""The kinds of columns: how filters compare their values exactly as Postgres does.

A kind reads the JSON text of a value, as `row_to_json` writes it under the settings in
`app.database.connections`, into a value that Python compares, hashes and sorts as Postgres does.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, TypeAlias

import msgspec

Value: TypeAlias = Any
"""Hashable, and comparable with other values of its kind. None is NULL."""

EQUALITY = frozenset({"eq", "neq", "in"})
ORDER = frozenset({"lt", "lte", "gt", "gte"})
NULLNESS = frozenset({"is"})

# Read later, these would mean another time; a client that returns must get the same filter.
RELATIVE = re.compile(r"(?ia)(?<![a-z])(now|today|tomorrow|yesterday)(?![a-z])")

YEAR_TO_DAY = r"(\d{4,})-(\d\d)-(\d\d)"
CLOCK = r"(\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?"
DATE_TEXT = re.compile(rf'"{YEAR_TO_DAY}( BC)?"')
TIME_TEXT = re.compile(rf'"{CLOCK}"')
TIMESTAMP_TEXT = re.compile(rf'"{YEAR_TO_DAY}T{CLOCK}( BC)?"')
TIMESTAMPTZ_TEXT = re.compile(rf'"{YEAR_TO_DAY}T{CLOCK}\+00:00( BC)?"')
UUID_TEXT = re.compile(r'"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"')

# Values of these kinds begin with a rank, which is 0 for ordinary ones.
INFINITE_TIMES = {'"-infinity"': (-1,), '"infinity"': (1,)}
SPECIAL_NUMERICS = {'"-Infinity"': (-1,), '"Infinity"': (1,), '"NaN"': (2,)}
SPECIAL_FLOATS = {
    '"-Infinity"': (0, float("-inf")),
    '"Infinity"': (0, float("inf")),
    '"NaN"': (1, 0.0),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What filters can do with a column of some types.

    `read` returns the value of a JSON text other than `null`, or raises ValueError. `limitation`
    says why there are no other operators. `is_coarse`: all rows share a few different values.
    `labels`: the values of an enum (None: not an enum). `can_be_long`: a value may be too long for
    the outline of a row, and then differs from all that are not. (A long number may equal a short
    one, if it ends with nothing but zeros.)
    """

    name: str
    operators: frozenset[str]
    read: Callable[[str], Value]
    limitation: str = ""
    has_relative_words: bool = False
    is_coarse: bool = False
    can_be_long: bool = False
    labels: tuple[str, ...] | None = None


def read_integer(text: str) -> int:
    """Read an integer of any size."""
    return int(text)


def read_numeric(text: str) -> Value:
    """Read a number of any size and precision; infinities and NaN are ordered as in Postgres."""
    if text[0] == '"':
        return _known(SPECIAL_NUMERICS, text)
    if text[0] not in "-0123456789":
        raise _unreadable(text)
    return (0, Decimal(text))


def read_float(text: str) -> Value:
    """Read a floating-point number; NaN equals itself and is greater than all others."""
    return _known(SPECIAL_FLOATS, text) if text[0] == '"' else (0, float(text))


def read_boolean(text: str) -> bool:
    """Read a boolean."""
    if text not in ("true", "false"):
        raise _unreadable(text)
    return text == "true"


def read_text(text: str) -> str:
    """Read a string."""
    return msgspec.json.decode(text, type=str)


def read_padded(text: str) -> str:
    """Read a `character(n)`, in which trailing blanks mean nothing."""
    return read_text(text).rstrip(" ")


def read_uuid(text: str) -> str:
    """Read a UUID; its text sorts as its bytes do."""
    _match(UUID_TEXT, text)
    return text


def read_date(text: str) -> Value:
    """Read a date."""
    if text in INFINITE_TIMES:
        return INFINITE_TIMES[text]
    year, month, day, era = _match(DATE_TEXT, text)
    return (0, _year(year, era), int(month), int(day))


def read_time(text: str) -> Value:
    """Read a time of day."""
    return _clock(*_match(TIME_TEXT, text))


def read_timestamp(text: str) -> Value:
    """Read a timestamp without time zone."""
    return _timestamp(TIMESTAMP_TEXT, text)


def read_timestamptz(text: str) -> Value:
    """Read a timestamp with time zone; all are written in UTC."""
    return _timestamp(TIMESTAMPTZ_TEXT, text)


def read_presence(_: str) -> bool:
    """Read any value as True: it is only known not to be NULL."""
    return True


def refuse_reading(text: str) -> Value:
    """Refuse any text: what it means is not known."""
    raise _unreadable(text)


def _timestamp(pattern: re.Pattern[str], text: str) -> Value:
    if text in INFINITE_TIMES:
        return INFINITE_TIMES[text]
    year, month, day, hour, minute, second, fraction, era = _match(pattern, text)
    clock = _clock(hour, minute, second, fraction)
    return (0, _year(year, era), int(month), int(day), *clock)


def _clock(hour: str, minute: str, second: str, fraction: str | None) -> tuple[int, int, int, int]:
    microseconds = int(fraction.ljust(6, "0")) if fraction else 0
    return (int(hour), int(minute), int(second), microseconds)


def _year(year: str, era: str | None) -> int:
    """Return a year as a number; 1 BC is the year 0."""
    return 1 - int(year) if era else int(year)


def _match(pattern: re.Pattern[str], text: str) -> tuple[Any, ...]:
    found = pattern.fullmatch(text)
    if not found:
        raise _unreadable(text)
    return found.groups()


def _known(values: dict[str, Value], text: str) -> Value:
    if text not in values:
        raise _unreadable(text)
    return values[text]


def _unreadable(text: str) -> ValueError:
    return ValueError(f"not a value of this kind: {text[:40]}")


ALL = EQUALITY | ORDER | NULLNESS

INTEGER = Kind("integer", ALL, read_integer)
NUMERIC = Kind("numeric", ALL, read_numeric)
FLOAT = Kind("float", ALL, read_float)
UUID = Kind("uuid", ALL, read_uuid)
DATE = Kind("date", ALL, read_date, has_relative_words=True)
TIME = Kind("time", ALL, read_time, has_relative_words=True)
TIMESTAMP = Kind("timestamp", ALL, read_timestamp, has_relative_words=True)
TIMESTAMPTZ = Kind("timestamptz", ALL, read_timestamptz, has_relative_words=True)
BOOLEAN = Kind(
    "boolean",
    EQUALITY | NULLNESS,
    read_boolean,
    "booleans have no order here",
    is_coarse=True,
)
TEXT = Kind(
    "text",
    EQUALITY | NULLNESS,
    read_text,
    "the order of texts depends on a collation of the database",
    can_be_long=True,
)
PADDED = replace(TEXT, name="padded", read=read_padded, can_be_long=False)
ENUM = Kind(
    "enum",
    EQUALITY | NULLNESS,
    read_text,
    "the order of an enum's values may change",
    is_coarse=True,
)
COLLATED = Kind(
    "collated",
    NULLNESS,
    read_presence,
    "its collation takes different texts for equal",
    can_be_long=True,
)
OPAQUE = Kind(
    "opaque",
    NULLNESS,
    read_presence,
    "only Postgres can compare its values",
    can_be_long=True,
)
DOCUMENT = Kind(
    "document",
    frozenset(),
    refuse_reading,
    "in JSON, a null within the value and no value look the same",
)

BUILT_IN = {
    "int2": INTEGER,
    "int4": INTEGER,
    "int8": INTEGER,
    "numeric": NUMERIC,
    "float4": FLOAT,
    "float8": FLOAT,
    "bool": BOOLEAN,
    "text": TEXT,
    "varchar": TEXT,
    "bpchar": PADDED,
    "name": TEXT,
    "uuid": UUID,
    "date": DATE,
    "time": TIME,
    "timestamp": TIMESTAMP,
    "timestamptz": TIMESTAMPTZ,
    "json": DOCUMENT,
    "jsonb": DOCUMENT,
}
"""The kinds of Postgres's own types; all others of these are opaque."""
