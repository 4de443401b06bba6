"""The crowd's return: the server is killed, the table changes, the server is started again.

Ours continues each client from its last offset. The peers cannot do this: their clients only
connect again, and the missed changes are lost.
"""

import asyncio
import time
from dataclasses import dataclass

from bench.lab import Figure, Lab, Stage, least, stage
from bench.servers import Peer, start

CLIENTS = 2_000
CHANGES = 10_000
BEFORE = 5
ROUNDS = 2
START = "start until it accepts clients"
JOINED = "from then on until all have joined"
CAUGHT_UP = f"from then on until all have {CHANGES:,} changes"


@dataclass(frozen=True)
class Return:
    """One return: seconds and the server's CPU seconds of each step that the peer can take."""

    seconds: dict[str, float]
    cpu: dict[str, float]
    clients_cpu: float  # of the clients' process, from the server's start on
    statements: int


async def run(lab: Lab) -> list[Figure]:
    """Time and CPU of each step, and the number of statements sent to Postgres."""
    returns: dict[str, list[Return]] = {peer.name: [] for peer in lab.peers}
    for _ in range(ROUNDS):
        for peer in lab.peers:
            returns[peer.name].append(await kill_and_return(lab, peer))
    back = f"{CLIENTS:,} clients back after kill -9"
    note = "the clients' own CPU meanwhile: " + ", ".join(
        f"{name} {min(each.clients_cpu for each in rounds):.2f} s"
        for name, rounds in returns.items()
    )
    figures = []
    for step in (START, JOINED, CAUGHT_UP):
        can = {name: rounds for name, rounds in returns.items() if step in rounds[0].seconds}
        took = least({name: [each.seconds[step] for each in can[name]] for name in can})
        cpu = least({name: [each.cpu[step] for each in can[name]] for name in can})
        about = "" if step == START else note
        figures.append(Figure("crowd", f"{back}, {step}", "s", took, note=about))
        figures.append(Figure("crowd", f"{back}, {step}, server CPU", "s", cpu, note=about))
    statements = {
        name: [float(each.statements) for each in rounds] for name, rounds in returns.items()
    }
    figures.append(Figure("crowd", f"{back}, statements sent to Postgres", "", least(statements)))
    return figures


async def kill_and_return(lab: Lab, peer: Peer) -> Return:
    """Kill a server that has clients, write, start it again, and wait until they are back."""
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
            return await come_back(on, begin, logged)
        finally:
            await asyncio.to_thread(on.server.stop)


async def come_back(on: Stage, begin: float, logged: int) -> Return:
    """Connect the clients again, to the server whose start began at `begin`."""
    ready, cpu_ready = time.monotonic(), on.server.cpu_seconds()
    answer = await on.crowd.reconnect()
    seconds = {START: ready - begin, JOINED: answer["at"] - ready}
    cpu = {START: cpu_ready, JOINED: on.server.cpu_seconds() - cpu_ready}
    clients_cpu = answer["cpu"]
    if on.peer.name == "ours":
        answer = await on.delivered(CHANGES)
        seconds[CAUGHT_UP] = answer["at"] - ready
        cpu[CAUGHT_UP] = on.server.cpu_seconds() - cpu_ready
        clients_cpu += answer["cpu"]
        await on.crowd.check(on.written)
    return Return(seconds, cpu, clients_cpu, statements_since(on, logged))


def statements_since(on: Stage, logged: int) -> int:
    """Count the statements the server has sent, by Postgres's log from that byte on."""
    with on.postgres.log.open("rb") as log:
        log.seek(logged)
        return sum(b"LOG:  statement: " in line or b"LOG:  execute " in line for line in log)
