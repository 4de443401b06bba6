"""Runs psql on a database. The password is passed in the environment: anybody can see arguments."""

import os
import re
import subprocess
from collections.abc import Sequence
from urllib.parse import unquote

from app.database.embedded import binary

USER_PASSWORD = re.compile(r"(?P<before>^\w+://[^/?#@]*?):(?P<password>[^/?#]*)(?P<after>@)")
QUERY_PASSWORD = re.compile(r"(?P<before>[?&])password=(?P<password>[^&#]*)(?P<after>&|$)")


def without_password(url: str) -> tuple[str, str | None]:
    """Split a database's URL into one without a password, and the password if there was one.

    Of several, the last one in the query counts, as for libpq.
    """
    password = None
    while found := USER_PASSWORD.search(url) or QUERY_PASSWORD.search(url):
        password = unquote(found["password"])
        ends = found["before"] + found["after"]
        if found["before"] in ("?", "&"):
            ends = found["before"] if found["after"] else ""
        url = url[: found.start()] + ends + url[found.end() :]
    return url, password


def run_psql(url: str, arguments: Sequence[str]) -> int:
    """Run psql with these arguments until it exits; return its exit code. Raises Refusal."""
    shown, password = without_password(url)
    environ = os.environ | ({"PGPASSWORD": password} if password is not None else {})
    return subprocess.run([binary("psql"), shown, *arguments], env=environ).returncode
