"""The oracle, for a minute; `make soak` runs it for longer."""

from pathlib import Path

from tests.faults.oracle import Plan, private_oracle

SEED = 3
LEAST_CHANGES = 5_000


async def test_clients_of_every_kind_miss_nothing_while_faults_strike(tmp_path: Path) -> None:
    """Servers, databases, networks and clients break under load; every list of events is whole."""
    async with private_oracle(Plan(SEED, seconds=35, pause=1.0), tmp_path) as oracle:
        await oracle.run()
        report = await oracle.verdict()
    assert not report.red(), report
    assert report.changes > LEAST_CHANGES, report
    assert all(findings.sessions > 1 for findings in report.clients.values()), report
