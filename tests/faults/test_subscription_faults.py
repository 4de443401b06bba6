"""The oracle for subscriptions, for some seconds; `make soak` runs it for longer."""

import os
from pathlib import Path

from tests.faults.oracle import NAMESPACES, SUBSCRIBERS, Plan, private_oracle

SEED = int(os.environ.get("SEED") or 5)
SECONDS = float(os.environ.get("TABLECAST_LONG") or 20)
LEAST_CHANGES = 2_000


async def test_subscribers_hold_their_rows_while_faults_strike(tmp_path: Path) -> None:
    """Rows move in and out of random filters while servers, databases, networks and clients fail;
    each subscription gets exactly its events, and at the end holds what `SELECT ... WHERE` says.
    """
    plan = Plan(SEED, SECONDS, rate=400, pause=1.0, clients=(), subscribers=SUBSCRIBERS)
    async with private_oracle(plan, tmp_path) as oracle:
        await oracle.run()
        report = await oracle.verdict()
    assert not report.failures(), report
    assert report.changes > LEAST_CHANGES, report
    for findings in report.clients.values():  # each has returned, and there was something to see
        assert findings.sessions > NAMESPACES and findings.events, report
    assert report.total.loads > NAMESPACES * len(SUBSCRIBERS) and report.total.quiet, report
