"""The oracle, for a minute; `make soak` runs it for longer."""

from pathlib import Path

from tests.faults.oracle import WEBSOCKET, Oracle, Plan, private_oracle

SEED = 3
LEAST_CHANGES = 5_000


async def test_clients_of_every_kind_miss_nothing_while_faults_strike(tmp_path: Path) -> None:
    """Servers, databases, networks and clients break under load; every list of events is whole."""
    plan = Plan(SEED, seconds=35, pause=1.0, backlog=20_000)
    async with private_oracle(plan, tmp_path) as oracle:
        await oracle.run()
        report = await oracle.verdict()
    assert not report.red(), report
    assert report.changes > LEAST_CHANGES, report
    assert all(findings.sessions > 1 for findings in report.clients.values()), report


async def kill_under_load(oracle: Oracle) -> None:
    """Kill the server when it has sent a good deal, and wait until all clients are back."""
    enough = oracle.events() + 1_000
    await oracle.until(lambda: min(oracle.sessions()) > 0 and oracle.events() > enough)
    before = oracle.sessions()
    oracle.nodes[0].kill()
    await oracle.nodes[0].start()
    await oracle.until(lambda: all(map(int.__gt__, oracle.sessions(), before)))


async def test_four_kills_leave_unmodified_clients_complete(tmp_path: Path) -> None:
    """The server is killed (-9) four times under 800 changes a second; each time all recover."""
    clients = [("official", WEBSOCKET), ("bare", WEBSOCKET)]
    plan = Plan(SEED, seconds=0, rate=800, nodes=1, clients=clients)
    async with private_oracle(plan, tmp_path) as oracle:
        oracle.start_writers()
        for _ in range(4):
            await kill_under_load(oracle)
        report = await oracle.verdict()
    assert not report.red(), report  # also red if `socket.recovered` was false once
    assert [findings.sessions for findings in report.clients.values()] == [5, 5], report
