"""The oracle, for half a minute; `make soak` runs it for longer."""

from pathlib import Path

from tests.faults.oracle import WEBSOCKET, Oracle, Plan, private_oracle

SEED = 3
LEAST_CHANGES = 4_000


async def test_clients_of_every_kind_miss_nothing_while_faults_strike(tmp_path: Path) -> None:
    """Servers, databases, networks and clients fail under load; all events arrive."""
    plan = Plan(SEED, seconds=25, pause=1.0, backlog=20_000)
    async with private_oracle(plan, tmp_path) as oracle:
        await oracle.run()
        report = await oracle.verdict()
    assert not report.failures(), report
    assert report.changes > LEAST_CHANGES, report
    assert all(findings.sessions > 1 for findings in report.clients.values()), report


async def kill_under_load(oracle: Oracle) -> None:
    """Kill the server once it has sent enough, and wait until all clients are back."""
    enough = oracle.events() + 1_000
    await oracle.until(lambda: min(oracle.sessions()) > 0 and oracle.events() > enough)
    before = oracle.sessions()
    oracle.nodes[0].kill()
    await oracle.nodes[0].start()
    await oracle.until(lambda: all(map(int.__gt__, oracle.sessions(), before)))


async def test_four_kills_leave_unmodified_clients_complete(tmp_path: Path) -> None:
    """The server is killed (-9) four times at 800 changes a second; all clients recover."""
    clients = [("official", WEBSOCKET), ("bare", WEBSOCKET)]
    plan = Plan(SEED, seconds=0, rate=800, nodes=1, clients=clients)
    async with private_oracle(plan, tmp_path) as oracle:
        oracle.start_writers()
        for _ in range(4):
            await kill_under_load(oracle)
        report = await oracle.verdict()
    assert not report.failures(), report  # fails if `socket.recovered` was ever false
    assert [findings.sessions for findings in report.clients.values()] == [5, 5], report
