"""Starts the command `tablecast`: makes the files importable under the names they have here.

An installed Tablecast is one directory, `tablecast`, which holds `app` and `migrations`. They are
importable only in its own processes, so they hide nobody else's packages, and nobody else's hide
them.
"""

import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent


def main() -> NoReturn:
    """Run the command."""
    sys.path.insert(0, str(ROOT))
    from app.cli import main as run

    run()
