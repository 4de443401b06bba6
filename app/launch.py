"""Starts the command `tablecast`, after making `app` and `migrations` importable by these names.

An installed Tablecast is one directory, `tablecast`, which holds both. They are importable only in
its own processes, so they shadow no other packages, and no others shadow them.
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
