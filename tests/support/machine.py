"""What a test needs on the machine besides Python."""

import os
import shutil
from typing import NoReturn

import pytest

# On Debian, servers such as nginx are where an ordinary user's PATH does not lead.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])


def missing(reason: str) -> NoReturn:
    """Skip the test because something is missing; fail it in CI (CI=true), which must have it."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def require(*programs: str) -> str:
    """Return the path of the first of these programs that is installed.

    If none is, the test is skipped; in CI it fails.
    """
    for program in programs:
        found = shutil.which(program, path=PATH)
        if found is not None:
            return found
    missing(f"this test needs {' or '.join(programs)}")
