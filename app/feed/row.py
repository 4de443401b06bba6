"""A row as JSON text: one member of it, without parsing the rest.

Rows are passed on as Postgres wrote them and may hold what parsers refuse: documents nested very
deep, `\\u0000`, surrogates without their other half.
"""

import re

import msgspec

# Strings whole, since brackets in them mean nothing; then what gives a document its structure.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]')


class Named(msgspec.Struct):
    """The member asked for nearly always."""

    name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


named = msgspec.json.Decoder(Named)


def member(row: str, key: str) -> str | None:
    """The JSON text of a top-level member of an object; None where there is none."""
    if key == "name":
        try:
            found = named.decode(row).name
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return scan(row, key)
        return None if found is msgspec.UNSET else bytes(found).decode()
    return scan(row, key)


def scan(row: str, key: str) -> str | None:
    """The same in time proportional to the row, at any depth of nesting."""
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
