"""A row as JSON text: extracts one member without parsing the rest.

Rows are passed on as Postgres wrote them and may contain what parsers reject: very deeply nested
documents, `\\u0000`, unpaired surrogates.
"""

import re

import msgspec

# Whole strings, because brackets inside them mean nothing, and the structural characters.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]')


class Named(msgspec.Struct):
    """The member that is nearly always asked for."""

    name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


named = msgspec.json.Decoder(Named)


def member(row: str, key: str) -> str | None:
    """Return the JSON text of a top-level member of an object, or None if there is none."""
    if key == "name":
        try:
            found = named.decode(row).name
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return scan(row, key)
        return None if found is msgspec.UNSET else bytes(found).decode()
    return scan(row, key)


def scan(row: str, key: str) -> str | None:
    """Do the same for any row: in time proportional to its length, at any depth of nesting."""
    wanted = msgspec.json.encode(key).decode()
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
