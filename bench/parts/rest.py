"""REST answers compared with Express and pg: rate, and server CPU per answer."""

import asyncio
import json
import subprocess
import sys
from contextlib import AsyncExitStack
from typing import Any
from urllib.request import urlopen

from bench.lab import Figure, Lab, Stage, at_least, least, most, stage

THINGS = 10_000
SECONDS = 3
ROUNDS = 3
LONGEST_SECONDS = 60
CONNECTIONS = {"one": 16, "list": 4, "post": 16}
WHAT = {"one": "GET of one thing", "list": f"GET of {THINGS:,} things", "post": "POST of a thing"}


async def run(lab: Lab) -> list[Figure]:
    """Answers per second and CPU per answer, for each request."""
    peers = [peer for peer in lab.peers if peer.name != "python"]  # it has no REST part
    rates: dict[str, dict[str, list[float]]] = {}
    costs: dict[str, dict[str, list[float]]] = {}
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(stage(lab, peer, 0)) for peer in peers]
        for each in stages:
            await each.connection.execute(
                "INSERT INTO things (name)"
                " SELECT 'thing-' || number FROM generate_series(1, $1) number",
                THINGS,
            )
            await each.connection.execute("ANALYZE things")
            await check_list(each)
        for request in ("one", "list", "post"):
            rates[request] = {peer.name: [] for peer in peers}
            costs[request] = {peer.name: [] for peer in peers}
            for _ in range(ROUNDS):
                for each in stages:
                    before = each.server.cpu_seconds()
                    reached = await ask(each, request)
                    used = each.server.cpu_seconds() - before
                    name = each.peer.name
                    rates[request][name].append(reached["answers"] / reached["seconds"])
                    costs[request][name].append(used / reached["answers"] * 1e6)
    figures = []
    for request, what in WHAT.items():
        figure = Figure("rest", what, "/s", most(rates[request]), target="≥ Node")
        figure.reached = at_least(figure.ratio, 1)
        figures.append(figure)
        figures.append(Figure("rest", f"{what}, server CPU", "µs", least(costs[request])))
    return figures


async def ask(on: Stage, request: str) -> dict[str, Any]:
    """Send requests for a while, from a separate process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.http_load",
        str(on.server.port),
        request,
        f"--connections={CONNECTIONS[request]}",
        f"--seconds={SECONDS}",
        f"--things={THINGS}",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), LONGEST_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{on.peer.name}, {request}: {errors.decode()}")
    answer: dict[str, Any] = json.loads(output)
    return answer


async def check_list(on: Stage) -> None:
    """Raise RuntimeError unless the list has all things."""

    def get() -> int:
        with urlopen(f"http://127.0.0.1:{on.server.port}/api/things", timeout=30) as response:
            return len(json.load(response))

    if (found := await asyncio.to_thread(get)) != THINGS:
        raise RuntimeError(f"{on.peer.name} lists {found} of {THINGS} things")
