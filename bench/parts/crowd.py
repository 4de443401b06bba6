"""The return of the crowd: the server is killed, the table changes, the server is started again.

Ours continues each client from where it was. The others have no such thing: their clients only
connect again, and have missed everything.
"""

import asyncio
import time

from bench.lab import Figure, Lab, Stage, stage
from bench.servers import start

CLIENTS = 2_000
CHANGES = 10_000
BEFORE = 5


async def run(lab: Lab) -> list[Figure]:
    """Time and CPU until all are back, and for ours caught up; how many queries that took."""
    took: dict[str, float] = {}
    cpu: dict[str, float] = {}
    queries: dict[str, float] = {}
    for peer in lab.peers:
        async with stage(lab, peer, CLIENTS) as on:
            for _ in range(BEFORE):
                await on.connection.execute(
                    "INSERT INTO things (name) VALUES (gen_random_uuid()::text)"
                )
                await on.delivered(1)
            on.server.kill()
            await on.crowd.expect_lost(CLIENTS)
            await on.connection.execute(
                "INSERT INTO things (name) SELECT gen_random_uuid() FROM generate_series(1, $1)",
                CHANGES,
            )
            await on.connection.execute(f"ALTER DATABASE {on.database} SET log_statement = 'all'")
            logged = on.postgres.log.stat().st_size
            begin = time.monotonic()
            on.server = await start(peer, on.postgres, on.database, on.server.port)
            try:
                await on.crowd.reconnect()
                if peer.name == "ours":
                    await on.delivered(CHANGES)
                took[peer.name] = time.monotonic() - begin
                cpu[peer.name] = on.server.cpu_seconds()
                queries[peer.name] = statements(on, logged)
                if peer.name == "ours":
                    await on.crowd.check(on.written)
            finally:
                await asyncio.to_thread(on.server.stop)
    only = "the others' clients only connect again, the changes are lost to them"
    done = f"{CLIENTS:,} clients back after kill -9"
    return [
        Figure("crowd", f"{done}, until they have {CHANGES:,} changes", "s", took, note=only),
        Figure("crowd", f"{done}, server CPU with its start", "s", cpu, note=only),
        Figure("crowd", f"{done}, statements sent to Postgres", "", queries, note=only),
    ]


def statements(on: Stage, since: int) -> int:
    """How many statements the servers' connections sent, by Postgres's log from there on."""
    with on.postgres.log.open("rb") as log:
        log.seek(since)
        return sum(b"LOG:  statement: " in line or b"LOG:  execute " in line for line in log)
