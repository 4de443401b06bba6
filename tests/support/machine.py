"""What a test needs of the machine beyond Python."""

import os
import shutil

import pytest


def require(*programs: str) -> str:
    """The path of the first of these programs that is installed.

    Without any the test is skipped, except in CI (CI=true), where it fails.
    """
    for program in programs:
        found = shutil.which(program)
        if found is not None:
            return found
    reason = f"this test needs {' or '.join(programs)}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
