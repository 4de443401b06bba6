"""How long tests that could go on for ever do: short, or as the guarantee says."""

import os
from typing import TypeVar

T = TypeVar("T")

LONG = os.environ.get("TABLECAST_TEST_LONG") == "1"


def scaled(short: T, full: T) -> T:
    """The short one; the full one with TABLECAST_TEST_LONG=1."""
    return full if LONG else short
