"""The cost of an idle WebSocket client: memory, and CPU for its heartbeats."""

import asyncio
import resource
import time
from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, at_most, ready_mark, stage

FEW = 200
MANY = 5_000
SPARE_FILES = 300
SETTLE_SECONDS = 2.0
# Two whole heartbeats of 25 seconds: with any other length, the peer whose clients happen to be due
# at both ends of the window would pay for them twice.
IDLE_SECONDS = 50.0
MOST_OF_NODE = 0.25
MOST_KB = 2.5
MOST_CPU_OF_NODE = 0.4


async def run(lab: Lab) -> list[Figure]:
    """Growth of the server's memory per client, and its CPU while nothing happens."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(MANY, files - SPARE_FILES)
    memory: dict[str, float] = {}
    cpu: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(stage(lab, peer, FEW)) for peer in lab.peers]
        await asyncio.sleep(SETTLE_SECONDS)
        before = {each.peer.name: each.server.memory_bytes() for each in stages}
        for each in stages:
            await each.crowd.connect(each.server.port, many - FEW, ready_mark(each.peer))
        await asyncio.sleep(SETTLE_SECONDS)
        used = {each.peer.name: (time.monotonic(), each.server.cpu_seconds()) for each in stages}
        await asyncio.sleep(IDLE_SECONDS)
        for each in stages:
            name = each.peer.name
            begin, cpu_before = used[name]
            seconds, cpu_used = time.monotonic() - begin, each.server.cpu_seconds() - cpu_before
            cpu[name] = cpu_used / seconds * 100
        for each in stages:
            name = each.peer.name
            memory[name] = (each.server.memory_bytes() - before[name]) / (many - FEW) / 1e3
            if lost := await each.crowd.lost():
                raise RuntimeError(f"{name} lost {lost} idle clients")
    per_client = Figure(
        "memory",
        "memory per idle client",
        "kB",
        memory,
        target=f"≤ {MOST_OF_NODE} × Node, ≤ {MOST_KB:g} kB",
    )
    if per_client.ratio is not None:
        per_client.reached = per_client.ratio <= MOST_OF_NODE and memory["ours"] <= MOST_KB
    idle = Figure(
        "memory",
        f"CPU with {many:,} idle clients",
        "% of a core",
        cpu,
        target=f"≤ {MOST_CPU_OF_NODE} × Node",
    )
    idle.reached = at_most(idle.ratio, MOST_CPU_OF_NODE)
    return [per_client, idle]
