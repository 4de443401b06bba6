"""Lines of the log."""

import logging

from app.logs import OneLine


def line_of(message: str, *arguments: object, error: BaseException | None = None) -> str:
    """What is logged."""
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("tablecast", logging.INFO, "", 0, message, arguments, info)
    return OneLine("%(levelname)s %(message)s").format(record)


def test_a_message_is_one_line() -> None:
    """A message quotes a client that sends line breaks and terminal commands."""
    assert line_of("%s: %s", "a\nb\r\x1b[2K", "ü\u2028🟣") == r"INFO a\nb\r\x1b[2K: ü\u2028🟣"


def test_a_traceback_is_indented() -> None:
    """An exception quotes a client: none of its lines begins as a line of the log does."""
    try:
        raise ValueError("x\nINFO forged\rINFO forged")
    except ValueError as error:
        first, *others = line_of("failed", error=error).split("\n")
    assert first == "INFO failed"
    assert others[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and "\r" not in line for line in others)
