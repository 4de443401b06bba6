"""Many clients connecting: what each costs the server until it has joined.

First to servers that were just started, as clients do that come back after a restart; then again
and again to a running one, whose code the just-in-time compiler of Node.js has optimized by then.
"""

import asyncio
from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, Stage, at_most, least, ready_mark, stage

WARM_UP_CLIENTS = 500
CLIENTS = 3_000  # in a round: half a second of CPU for the cheapest, dozens of clock ticks
FRESH_ROUNDS = 4
ROUNDS = 4
SETTLE_SECONDS = 1.5  # for the server to finish what starting, joining and leaving left to do
MOST_OF_NODE = 0.25

Measured = dict[str, list[float]]


async def run(lab: Lab) -> list[Figure]:
    """CPU and time per connecting client."""
    fresh: Measured = {peer.name: [] for peer in lab.peers}
    warm: Measured = {peer.name: [] for peer in lab.peers}
    took: Measured = {peer.name: [] for peer in lab.peers}
    for _ in range(FRESH_ROUNDS):
        for peer in lab.peers:
            async with stage(lab, peer, 0) as on:
                await asyncio.sleep(SETTLE_SECONDS)
                await connect(on, fresh, {peer.name: []})
    async with AsyncExitStack() as stack:
        stages = [
            await stack.enter_async_context(stage(lab, peer, WARM_UP_CLIENTS)) for peer in lab.peers
        ]
        for each in stages:
            await close(each)
        for _ in range(ROUNDS):
            for each in stages:
                await connect(each, warm, took)
                await close(each)
    per_client = Figure(
        "connect",
        f"the first {CLIENTS:,} clients of a server, its CPU per client until it has joined",
        "µs",
        least(fresh),
        target=f"≤ {MOST_OF_NODE} × Node",
    )
    per_client.reached = at_most(per_client.ratio, MOST_OF_NODE)
    return [
        per_client,
        Figure("connect", f"{CLIENTS:,} more clients, CPU per client", "µs", least(warm)),
        Figure("connect", f"{CLIENTS:,} more clients, time per client", "µs", least(took)),
    ]


async def connect(on: Stage, cpu: Measured, took: Measured) -> None:
    """Connect clients, and note what each took."""
    before, begin = on.server.cpu_seconds(), asyncio.get_running_loop().time()
    await on.crowd.connect(on.server.port, CLIENTS, ready_mark(on.peer))
    took[on.peer.name].append((asyncio.get_running_loop().time() - begin) / CLIENTS * 1e6)
    await asyncio.sleep(SETTLE_SECONDS)
    cpu[on.peer.name].append((on.server.cpu_seconds() - before) / CLIENTS * 1e6)
    if lost := await on.crowd.lost():
        raise RuntimeError(f"{on.peer.name} lost {lost} clients")


async def close(on: Stage) -> None:
    """Close all connections and give the server time to forget them."""
    await on.crowd.close()
    await asyncio.sleep(SETTLE_SECONDS)
