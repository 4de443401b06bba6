"""One change at a time to 1,000 clients: what a delivery costs the server."""

from contextlib import AsyncExitStack
from time import monotonic

from bench.lab import Figure, Lab, Stage, at_most, least, stage
from bench.limits import send_loop_seconds

CLIENTS = 1_000
ROUNDS = 3
CHANGES = {"ours": 150, "node": 150, "python": 15}  # in a round


async def run(lab: Lab) -> list[Figure]:
    """CPU per delivery, and the time until all clients have a change."""
    cpu: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    spread: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(stage(lab, peer, CLIENTS)) for peer in lab.peers]
        for each in stages:
            await one_at_a_time(each, 5)  # to warm up
        for _ in range(ROUNDS):
            for each in stages:
                changes = CHANGES[each.peer.name]
                before = each.server.cpu_seconds()
                seconds = await one_at_a_time(each, changes)
                used = each.server.cpu_seconds() - before
                cpu[each.peer.name].append(used / (changes * CLIENTS) * 1e6)
                spread[each.peer.name].append(seconds / changes * 1e3)
        for each in stages:
            await each.crowd.check(each.written)
    limit = await send_loop_seconds(CLIENTS, CHANGES["ours"]) * 1e6
    figure = Figure(
        "fanout",
        f"one change to {CLIENTS:,} clients, server CPU per delivery",
        "µs",
        least(cpu),
        target="≤ 0.6 × Node",
        limit=limit,
        limit_is="a bare loop of send()",
    )
    figure.reached = at_most(figure.ratio, 0.6)
    return [
        figure,
        Figure(
            "fanout",
            f"one change to {CLIENTS:,} clients, until the last has it",
            "ms",
            least(spread),
        ),
    ]


async def one_at_a_time(on: Stage, changes: int) -> float:
    """Insert a row, wait until all clients have it, insert the next; return the seconds."""
    begin = monotonic()
    for _ in range(changes):
        await on.connection.execute("INSERT INTO things (name) VALUES (gen_random_uuid()::text)")
        await on.delivered(1)
    return monotonic() - begin
