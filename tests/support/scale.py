"""How long open-ended tests run: briefly, or as long as the guarantees say."""

import os
from typing import TypeVar

T = TypeVar("T")

LONG = os.environ.get("TABLECAST_TEST_LONG") == "1"


def scaled(short: T, full: T) -> T:
    """Return `short`, or `full` with TABLECAST_TEST_LONG=1."""
    return full if LONG else short
