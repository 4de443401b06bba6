"""Many clients connecting to a running server: what each costs it until it has joined."""

import asyncio
from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, Stage, at_most, least, ready_mark, stage

WARM_UP_CLIENTS = 500
CLIENTS = 3_000  # in a round: half a second of CPU for the cheapest, fifty clock ticks
ROUNDS = 4
SETTLE_SECONDS = 1.5  # for the server to finish what joining and leaving clients left to do
MOST_OF_NODE = 0.25


async def run(lab: Lab) -> list[Figure]:
    """CPU and time per connecting client."""
    cpu: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    took: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    async with AsyncExitStack() as stack:
        stages = [
            await stack.enter_async_context(stage(lab, peer, WARM_UP_CLIENTS)) for peer in lab.peers
        ]
        for each in stages:
            await close(each)
        for _ in range(ROUNDS):
            for each in stages:
                before = each.server.cpu_seconds()
                begin = asyncio.get_running_loop().time()
                await each.crowd.connect(each.server.port, CLIENTS, ready_mark(each.peer))
                took[each.peer.name].append(
                    (asyncio.get_running_loop().time() - begin) / CLIENTS * 1e6
                )
                await asyncio.sleep(SETTLE_SECONDS)
                used = each.server.cpu_seconds() - before
                cpu[each.peer.name].append(used / CLIENTS * 1e6)
                if lost := await each.crowd.lost():
                    raise RuntimeError(f"{each.peer.name} lost {lost} clients")
                await close(each)
    per_client = Figure(
        "connect",
        "a WebSocket client connecting, server CPU until it has joined",
        "µs",
        least(cpu),
        target=f"≤ {MOST_OF_NODE} × Node",
    )
    per_client.reached = at_most(per_client.ratio, MOST_OF_NODE)
    return [
        per_client,
        Figure("connect", f"{CLIENTS:,} clients connecting, time per client", "µs", least(took)),
    ]


async def close(on: Stage) -> None:
    """Close all connections and give the server time to forget them."""
    await on.crowd.close()
    await asyncio.sleep(SETTLE_SECONDS)
