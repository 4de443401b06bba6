"""`make soak`: runs the oracle for as long as asked.

MINUTES (30), RATE (changes a second, 700), SEED (random) and BACKLOG (how many changes some clients
miss before they return: 2,000,000 from ten minutes on) are environment variables. Every minute it
prints the findings so far, and at the end how much the first server, which is never killed, has
grown. Exits with 1 if anything was lost, doubled, out of order or otherwise wrong.
"""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.nodes import Sample, slopes
from tests.faults.oracle import CLIENTS, SUBSCRIBERS, Oracle, Plan, end, private_oracle
from tests.faults.writers import EXPECTED

CHECKS = 10
CHECK_S, REPORT_S = 10, 60
LONG_MINUTES, LONG_BACKLOG, SHORT_BACKLOG = 10, 2_000_000, 20_000
LEAST_SPAN_S = 300
# Of the clients that miss the backlog, the last has subscriptions.
AWAY = 2, 6, len(CLIENTS) + 1
WARM_UP = 1 / 3  # share of the samples: caches fill


def progress(oracle: Oracle, started: float) -> str:
    """Return the state of the run in one line."""
    total = oracle.report.total
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return (
        f"{minutes:3}:{seconds:02} {oracle.report.changes:9,} changes"
        f" {total.events:10,} events {oracle.report.faults.total():5} faults"
        f" {total.sessions:6} sessions, lost {total.lost}, doubled {total.doubled},"
        f" out of order {total.disordered}, refused {total.refused}, phantom {total.phantom}"
    )


def growth(samples: list[Sample]) -> str:
    """Return how much a process held at the end, and how much it gains per hour."""
    settled = samples[int(len(samples) * WARM_UP) :]
    if not settled or settled[-1].at - settled[0].at < LEAST_SPAN_S:
        return "too short to tell"
    last, gain = settled[-1], slopes(settled)
    units = {"memory": 2**20}
    return ", ".join(
        f"{name} {getattr(last, name) / units.get(name, 1):.0f}"
        f" ({gain[name] / units.get(name, 1):+.1f} an hour)"
        for name in gain
    )


async def report_each_minute(oracle: Oracle, started: float) -> None:
    for second in itertools.count(CHECK_S, CHECK_S):
        await asyncio.sleep(CHECK_S)
        for _ in range(CHECKS):
            with contextlib.suppress(*EXPECTED):  # Postgres is down at the moment
                await oracle.check()
                break
            await asyncio.sleep(1)
        if second % REPORT_S == 0:
            print(progress(oracle, started), flush=True)


async def soak(seed: int, minutes: float, rate: float, backlog: int) -> int:
    directory = Path(tempfile.mkdtemp(prefix="tablecast-soak-"))
    print(
        f"SEED={seed} MINUTES={minutes:g} RATE={rate:g} BACKLOG={backlog};"
        f" what the clients saw is in {directory}",
        flush=True,
    )
    started = time.monotonic()
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    plan = Plan(
        seed, minutes * 60, rate, spared=1, subscribers=SUBSCRIBERS, backlog=backlog, away=AWAY
    )
    async with private_oracle(plan, directory) as oracle:
        reporting = asyncio.create_task(report_each_minute(oracle, started), name="report")
        try:
            await oracle.run()
        finally:
            await end([reporting])
        report = await oracle.verdict()
    print(progress(oracle, started))
    print(report)
    for node in oracle.nodes:
        life = max(node.lives, key=len)
        print(
            f"{node.name}, {len(node.lives)} processes; the longest-lived, memory in MiB:"
            f" {growth(life)}"
        )
    if report.failures():
        print("FAILED")
        return 1
    print("PASSED")
    shutil.rmtree(directory)
    return 0


def main() -> int:
    minutes = float(os.environ.get("MINUTES") or 30)
    usual = LONG_BACKLOG if minutes >= LONG_MINUTES else SHORT_BACKLOG
    return asyncio.run(
        soak(
            int(os.environ.get("SEED") or random.randrange(10**6)),
            minutes,
            float(os.environ.get("RATE") or 700),
            int(os.environ.get("BACKLOG") or usual),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
