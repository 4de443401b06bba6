"""What an idle WebSocket client costs: memory, and CPU for its heartbeats."""

import asyncio
import resource
from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, ready_mark, stage

FEW = 200
MANY = 5_000
SPARE_FILES = 300
SETTLE_SECONDS = 2.0
IDLE_SECONDS = 27.0  # longer than the heartbeat's interval of 25 seconds
MOST_KB = 30.0


async def run(lab: Lab) -> list[Figure]:
    """Growth of the server's memory per client, and CPU while nothing happens."""
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
        used = {each.peer.name: each.server.cpu_seconds() for each in stages}
        await asyncio.sleep(IDLE_SECONDS)
        for each in stages:
            name = each.peer.name
            cpu[name] = (each.server.cpu_seconds() - used[name]) / IDLE_SECONDS * 100
            memory[name] = (each.server.memory_bytes() - before[name]) / (many - FEW) / 1e3
            if lost := await each.crowd.lost():
                raise RuntimeError(f"{name} lost {lost} idle clients")
    per_client = Figure("memory", "memory per idle client", "kB", memory, f"≤ {MOST_KB:g} kB")
    if "ours" in memory:
        per_client.reached = memory["ours"] <= MOST_KB
    return [
        per_client,
        Figure("memory", f"CPU with {many:,} idle clients", "% of a core", cpu),
    ]
