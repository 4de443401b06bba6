"""Formats the log: one line for each message, whatever clients put into it."""

import logging
import textwrap
from types import TracebackType

# Control characters, and Unicode's line breaks: they could end a line and forge another one, or
# command the terminal that shows it.
UNPRINTABLE = {
    code: rf"\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))
} | {0x2028: r"\u2028", 0x2029: r"\u2029"}  # fmt: skip
UNPRINTABLE |= {ord("\n"): r"\n", ord("\r"): r"\r", ord("\t"): r"\t"}
IN_TRACEBACKS = {code: shown for code, shown in UNPRINTABLE.items() if chr(code) not in "\n\t"}

ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


class OneLine(logging.Formatter):
    """Escapes what could break a line; indents tracebacks, whose last line may quote a client."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.translate(UNPRINTABLE)
        return super().formatMessage(record)

    def formatException(self, ei: ExceptionInfo) -> str:
        text = super().formatException(ei).translate(IN_TRACEBACKS)
        return textwrap.indent(text, "  ", lambda _: True)


def log_to_stderr(level: str) -> None:
    """Log our own messages from this level up, and warnings from libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(
        level=max(level, "WARNING", key=logging.getLevelNamesMapping().__getitem__),
        handlers=[handler],
    )
    logging.getLogger("tablecast").setLevel(level)
