"""A server starting: time and CPU from its execution to its first HTTP answer."""

import asyncio
import socket
import time
from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, at_most, least
from bench.postgres import Postgres
from bench.servers import START_SECONDS, Peer, Server, spawn

ROUNDS = 7
PAUSE_SECONDS = 0.001
REQUEST = b"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
MOST_OF_NODE = 1.2


async def run(lab: Lab) -> list[Figure]:
    """Time and CPU of a start, on a database that has been migrated."""
    took: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    cpu: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    async with AsyncExitStack() as stack:
        databases = {
            peer.name: await stack.enter_async_context(
                lab.postgres.clone(peer.template, f"stage_{peer.name}")
            )
            for peer in lab.peers
        }
        for _ in range(ROUNDS):
            for peer in lab.peers:
                seconds, used = await asyncio.to_thread(
                    start_once, peer, lab.postgres, databases[peer.name]
                )
                took[peer.name].append(seconds * 1e3)
                cpu[peer.name].append(used * 1e3)
    wall = Figure(
        "start",
        "from exec to the first HTTP answer",
        "ms",
        least(took),
        target=f"≤ {MOST_OF_NODE} × Node",
    )
    wall.reached = at_most(wall.ratio, MOST_OF_NODE)
    return [wall, Figure("start", "from exec to the first HTTP answer, CPU", "ms", least(cpu))]


def start_once(peer: Peer, postgres: Postgres, database: str) -> tuple[float, float]:
    """Start a server and stop it; return the seconds to its first answer, and its CPU by then."""
    begin = time.monotonic()
    # Modules count as compiled, as in any installation, even where this environment forbids it.
    server = spawn(peer, postgres, database, PYTHONDONTWRITEBYTECODE="")
    try:
        wait_for_answer(server, begin + START_SECONDS)
        return time.monotonic() - begin, server.cpu_seconds()
    finally:
        server.stop()


def wait_for_answer(server: Server, deadline: float) -> None:
    """Return once the server has answered a request, whatever the status.

    RuntimeError if it exits, TimeoutError if it does not answer by the deadline.
    """
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", server.port), START_SECONDS) as connection:
                connection.sendall(REQUEST)
                if connection.recv(4096).startswith(b"HTTP/1.1 "):
                    return
        except ConnectionError:
            server.check_alive()
        time.sleep(PAUSE_SECONDS)
    raise TimeoutError(f"{server.peer.name} has not answered within {START_SECONDS} s")
