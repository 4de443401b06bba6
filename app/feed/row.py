"""A row as JSON text: extracts members without parsing the rest.

Rows are passed on as Postgres wrote them and may contain what parsers reject: very deeply nested
documents, `\\u0000`, unpaired surrogates.
"""

import re
from functools import lru_cache
from typing import Any

import msgspec

# Whole strings, because brackets inside them mean nothing, and the structural characters.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]')


@lru_cache(maxsize=1000)
def decoder(columns: tuple[str, ...]) -> msgspec.json.Decoder[Any] | None:
    """Return a decoder that reads only these members; None if msgspec cannot name them."""
    fields = [(f"member{place}", msgspec.Raw) for place in range(len(columns))]
    names = {field: column for (field, _), column in zip(fields, columns, strict=True)}
    try:
        return msgspec.json.Decoder(msgspec.defstruct("Members", fields, rename=names))
    except ValueError:  # a quote or a backslash in a name
        return None


def members(row: str, columns: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the JSON texts of top-level members of an object, or None if one is missing."""
    read = decoder(columns)
    if read is not None:
        try:
            found = read.decode(row)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            pass  # something that parsers refuse; or a missing member
        else:
            return tuple(bytes(raw).decode() for raw in msgspec.structs.astuple(found))
    scanned = tuple(found for column in columns if (found := scan(row, column)) is not None)
    return scanned if len(scanned) == len(columns) else None


def excerpt(row: str, columns: tuple[str, ...]) -> str | None:
    """Return an object of those members, as JSON text, or None if one is missing."""
    found = members(row, columns)
    if found is None:
        return None
    pairs = zip(columns, found, strict=True)
    return f"{{{', '.join(f'{encoded(column)}: {value}' for column, value in pairs)}}}"


@lru_cache(maxsize=1000)
def encoded(name: str) -> str:
    """Return a name as a JSON string."""
    return msgspec.json.encode(name).decode()


def scan(row: str, key: str) -> str | None:
    """Return the JSON text of one member of any row, or None if it has none. This takes time
    proportional to the row's length, at any depth of nesting.
    """
    wanted = encoded(key)
    depth, last, begins = 0, "", None
    for token in TOKEN.finditer(row):
        text = token[0]
        if text in "{[":
            depth += 1
        elif depth == 1 and text in ",}" and begins is not None:
            return row[begins : token.start()].strip()
        elif text in "}]":
            depth -= 1
        elif text == ":" and depth == 1 and last == wanted:
            begins = token.end()
        last = text
    return None
