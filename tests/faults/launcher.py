"""Runs `tablecast` with its arguments; on SIGUSR1 it writes the number of its tasks to a file.

In the environment, SABOTAGE names a safeguard to disable first (tests/faults/sabotage.py), and
QUIET_S says how long a subscription to which nothing is sent stays without an offset.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import app.application
import app.cli
import app.serving
from app.settings import Settings
from tests.faults import sabotage

TASKS_FILE = Path(os.environ["TASKS_FILE"])
serve = app.serving.serve


async def watched(settings: Settings, started: Callable[[str], None]) -> None:
    def count() -> None:
        new = TASKS_FILE.with_suffix(".new")
        new.write_text(str(len(asyncio.all_tasks())))
        new.rename(TASKS_FILE)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, count)
    await serve(settings, started)


if __name__ == "__main__":
    app.serving.serve = watched
    if name := os.environ.get("SABOTAGE"):
        sabotage.KINDS[name]()
    if seconds := os.environ.get("QUIET_S"):
        app.application.QUIET_S = float(seconds)
    app.cli.main()
