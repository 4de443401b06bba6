"""What a test needs of the machine beyond Python."""

import os
import shutil
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip the test for want of something that CI is meant to have: there (CI=true) it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def require(*programs: str) -> str:
    """The path of the first of these programs that is installed.

    Without any the test is skipped, except in CI, where it fails.
    """
    for program in programs:
        found = shutil.which(program)
        if found is not None:
            return found
    missing(f"this test needs {' or '.join(programs)}")
