"""Why a subscription or a list is refused for good: a code for programs, a sentence for people."""

from enum import StrEnum

LONGEST_SHOWN_CHARS = 60


class RefusalCode(StrEnum):
    """How a client can tell refusals apart."""

    UNKNOWN_TOPIC = "unknown_topic"
    BAD_FILTER = "bad_filter"  # its syntax
    UNKNOWN_COLUMN = "unknown_column"
    UNSUPPORTED = "unsupported"  # the column's type does not have this operator
    BAD_VALUE = "bad_value"  # Postgres cannot read it as the column's type
    BAD_OPTION = "bad_option"  # an option other than the filter is malformed
    NO_RIGHT = "no_right"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"
    UNREADABLE = "unreadable"  # Postgres cannot read the rows


class SubscriptionRefused(Exception):
    """What was asked for is refused, and asking again does not help.

    `detail` is a sentence that says what to change; `field` is the option it is about.
    """

    def __init__(self, code: RefusalCode, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field


def shown(text: str) -> str:
    """Return what a client sent as a quotation for a sentence: on one line, and shortened."""
    short = text if len(text) <= LONGEST_SHOWN_CHARS else f"{text[:LONGEST_SHOWN_CHARS]}…"
    return "'" + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short) + "'"


def listing(words: list[str], last: str = "or") -> str:
    """Return words as a list in a sentence: `a, b or c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
