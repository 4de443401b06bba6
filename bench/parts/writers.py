"""The cost of watching a table to its writers: pgbench, single-row INSERT."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

from bench.crowd import Crowd
from bench.lab import Figure, Lab, at_least, most, ready_mark, write_singly
from bench.servers import Peer, running

ROUNDS = {1: 2, 8: 2, 32: 6}  # by the number of connections
SECONDS = 3
SETTLE_SECONDS = 0.5
LEAST_OF_CLASSIC = 3.0
LEAST_OF_PLAIN = 0.65


@dataclass(frozen=True)
class Variant:
    """A table to write to, and the number of servers that watch it."""

    name: str
    template: str
    peer: Peer | None = None
    nodes: int = 0


async def run(lab: Lab) -> list[Figure]:
    """Commits per second by number of writers, with one and with two nodes of ours."""
    peers = {peer.name: peer for peer in lab.peers}
    variants = [Variant("plain", "plain")]
    if "node" in peers:
        variants.append(Variant("node", "classic", peers["node"], 1))
    if "ours" in peers:
        variants.append(Variant("ours", "ours", peers["ours"], 1))
        variants.append(Variant("ours, two nodes", "ours", peers["ours"], 2))
    measured: dict[int, dict[str, list[float]]] = {
        connections: {variant.name: [] for variant in variants} for connections in ROUNDS
    }
    for connections, rounds in ROUNDS.items():
        for _ in range(rounds):
            for variant in variants:
                rate = await commits_per_second(lab, variant, connections)
                measured[connections][variant.name].append(rate)
    figures = []
    for connections in ROUNDS:
        rates = most(measured[connections])
        for ours, nodes in (("ours", "one node"), ("ours, two nodes", "two nodes")):
            values = {"ours": rates.get(ours), "node": rates.get("node")}
            figure = Figure(
                "writers",
                f"commits/s of {connections} writer{'s' * (connections > 1)}, {nodes}",
                "/s",
                {name: rate for name, rate in values.items() if rate is not None},
                limit=rates["plain"],
                limit_is="no trigger",
            )
            if connections == max(ROUNDS):
                figure.target = f"≥ {LEAST_OF_CLASSIC:g} × Node, ≥ {LEAST_OF_PLAIN} of no trigger"
                if figure.ratio is not None:
                    figure.reached = bool(
                        at_least(figure.ratio, LEAST_OF_CLASSIC)
                        and rates[ours] >= LEAST_OF_PLAIN * rates["plain"]
                    )
            figures.append(figure)
    return figures


async def commits_per_second(lab: Lab, variant: Variant, connections: int) -> float:
    """Write to a fresh table for a while; each watching server has one client."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            lab.postgres.clone(variant.template, "stage_writers")
        )
        crowds = []
        for _ in range(variant.nodes):
            assert variant.peer is not None
            server = await stack.enter_async_context(running(variant.peer, lab.postgres, database))
            crowd = await stack.enter_async_context(Crowd.start())
            await crowd.connect(server.port, 1, ready_mark(variant.peer))
            crowds.append(crowd)
        await asyncio.sleep(SETTLE_SECONDS)
        written = await write_singly(lab.postgres, database, connections, seconds=SECONDS)
        for crowd in crowds:
            await crowd.expect(written.rows)
            await crowd.check(written.rows)
    return written.per_second
