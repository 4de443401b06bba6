"""Filters: what a change costs a node with many of them, and what many clients with one cost."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import asyncpg

from bench.lab import Figure, Lab, percentile
from bench.servers import Server, running
from bench.subscribers import Subscribers

CUSTOMERS = 10_000
RANGES = 1_000
EACH = 50  # subscriptions of a connection: all that it may hold
PER_SECOND = 400
CHANGES = 2_000  # in a round
WARM_UP = 200
ROUNDS = 3
MOST_TIMES = 1.2
RETURNING = 500
SETTLE_SECONDS = 1.0

# A total matches only the first range.
TABLE = f"""
    CREATE TABLE orders (
        id bigint PRIMARY KEY, n bigint NOT NULL DEFAULT 0, customer_id bigint NOT NULL,
        total numeric NOT NULL DEFAULT 0.5, note text NOT NULL DEFAULT 'some words about it'
    );
    SELECT feed.watch('orders', 'order');
    INSERT INTO orders (id, customer_id) SELECT i, i FROM generate_series(1, {CUSTOMERS}) AS i;
"""
UPDATE = "UPDATE orders SET n = $1 WHERE id = $2"
# With each reading of rows, this is read once.
SNAPSHOT = re.compile(rb'execute [^\n]*\n?[^\n]*SELECT feed\.offset\(\) AS "offset"')


@dataclass
class Desk:
    """A server with its subscribers, and a connection to write."""

    server: Server
    subscribers: Subscribers
    connection: "asyncpg.Connection[asyncpg.Record]"
    written: int = 0


@dataclass(frozen=True)
class Cost:
    """What changes cost: the server's CPU for each, and the median time from commit to client."""

    cpu_us: float
    median_ms: float


async def run(lab: Lab) -> list[Figure]:
    """The cost of a change with one subscription and with many, and of many clients at once."""
    return [*await changes(lab), *await loading(lab)]


async def changes(lab: Lab) -> list[Figure]:
    """Costs of changes, by what is subscribed, in turns."""
    by_customer = [f"customer_id=eq.{number}" for number in range(1, CUSTOMERS + 1)]
    ranges = [f"total=gt.{number}" for number in range(RANGES)]
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(desk(lab, "one"))
        many = await stack.enter_async_context(desk(lab, "many"))
        scanned = await stack.enter_async_context(desk(lab, "ranges"))
        await one.subscribers.subscribe(one.server.port, [by_customer[:1]], False)
        joining_us, memory_kb = await join(many, by_customer)
        await scanned.subscribers.subscribe(scanned.server.port, parts(ranges), False)
        same = [1] * CHANGES
        anyone = [random.randint(1, CUSTOMERS) for _ in same]
        turns = [(one, same), (many, same), (many, anyone), (scanned, same)]
        costs: list[list[Cost]] = [[] for _ in turns]
        for on, ids in turns:
            await write(on, ids[:WARM_UP])
        for _ in range(ROUNDS):
            for rounds, (on, ids) in zip(costs, turns, strict=True):
                rounds.append(await write(on, ids))
    alone, indexed, spread, evaluated = map(best, costs)
    many_of = f"{CUSTOMERS:,} subscriptions customer_id=eq.N"
    note = f"{PER_SECOND} changes/s; each matches one subscription"
    target = f"≤ {MOST_TIMES:g} × with one"
    return [
        Figure(
            "filters", f"{what}, {figure}", unit, {"ours": getattr(cost, name)}, aim,
            getattr(cost, name) <= MOST_TIMES * getattr(alone, name) if aim else None,
            getattr(alone, name), "with one subscription", note,
        )
        for what, cost, aim in (
            (f"{many_of}, changes for one of them", indexed, target),
            (f"{many_of}, changes for any of them", spread, ""),
            (f"{RANGES:,} subscriptions total=gt.N", evaluated, ""),
        )
        for name, figure, unit in (
            ("cpu_us", "server CPU per change", "µs"),
            ("median_ms", "commit to client, p50", "ms"),
        )
    ] + [
        Figure("filters", f"{many_of}, server CPU to join, each", "µs", {"ours": joining_us}),
        Figure("filters", f"{many_of}, memory for each", "kB", {"ours": memory_kb}),
    ]  # fmt: skip


async def loading(lab: Lab) -> list[Figure]:
    """Many clients come at once for all rows."""
    async with desk(lab, "loading", log_statement="all") as on:
        await on.subscribers.subscribe(on.server.port, [["id=eq.1"]], True)  # to warm up
        logged = lab.postgres.log.stat().st_size
        on.server.reset_peak()
        peak, cpu, begin = on.server.peak_bytes(), on.server.cpu_seconds(), time.monotonic()
        answer = await on.subscribers.subscribe(on.server.port, [[""]] * RETURNING, True)
        seconds, cpu = answer["at"] - begin, on.server.cpu_seconds() - cpu
        grown = (on.server.peak_bytes() - peak) / 1e6
        with lab.postgres.log.open("rb") as log:
            log.seek(logged)
            reads = len(SNAPSHOT.findall(log.read()))
    who = f"{RETURNING} clients at once for {CUSTOMERS:,} rows"
    note = f"the clients' own CPU meanwhile: {answer['cpu']:.2f} s"
    return [
        Figure("filters", f"{who}, reads of the table", "", {"ours": reads}, "1", reads == 1),
        Figure("filters", f"{who}, until all have them", "s", {"ours": seconds}, note=note),
        Figure("filters", f"{who}, server CPU", "s", {"ours": cpu}, note=note),
        Figure("filters", f"{who}, growth of the server's memory (peak)", "MB", {"ours": grown}),
    ]


@asynccontextmanager
async def desk(lab: Lab, name: str, log_statement: str = "none") -> AsyncIterator[Desk]:
    """Start a server on a database with orders."""
    [ours] = [peer for peer in lab.peers if peer.name == "ours"]
    async with (
        lab.postgres.clone("ours", f"filters_{name}") as database,
        lab.postgres.connect(database) as connection,
    ):
        await connection.execute(TABLE)
        await connection.execute(f"ALTER DATABASE {database} SET log_statement = '{log_statement}'")
        async with running(ours, lab.postgres, database) as server, Subscribers.start() as clients:
            yield Desk(server, clients, connection)


async def join(on: Desk, filters: Sequence[str]) -> tuple[float, float]:
    """Subscribe to all of these; return the CPU (µs) and the memory (kB) that each took."""
    cpu, memory = on.server.cpu_seconds(), on.server.memory_bytes()
    await on.subscribers.subscribe(on.server.port, parts(filters), False)
    cpu = on.server.cpu_seconds() - cpu
    await asyncio.sleep(SETTLE_SECONDS)
    memory = on.server.memory_bytes() - memory
    return cpu / len(filters) * 1e6, memory / len(filters) / 1e3


async def write(on: Desk, ids: Sequence[int]) -> Cost:
    """Change orders, one after the other, at a steady rate, and wait until each has arrived."""
    committed: dict[int, float] = {}
    cpu, begin = on.server.cpu_seconds(), time.monotonic()
    statement = await on.connection.prepare(UPDATE)
    for place, id in enumerate(ids):
        await asyncio.sleep(begin + place / PER_SECOND - time.monotonic())
        on.written += 1
        await statement.fetch(on.written, id)
        committed[on.written] = time.monotonic()
    read = await on.subscribers.expect(len(ids))
    cpu = on.server.cpu_seconds() - cpu
    median = percentile((read[number] - at for number, at in committed.items()), 50)
    return Cost(cpu / len(ids) * 1e6, median * 1e3)


def best(rounds: Iterable[Cost]) -> Cost:
    """The least of each in some rounds: anything else the machine does only adds to it."""
    found = list(rounds)
    return Cost(min(cost.cpu_us for cost in found), min(cost.median_ms for cost in found))


def parts(filters: Sequence[str]) -> list[Sequence[str]]:
    """Divide filters among connections."""
    return [filters[begin : begin + EACH] for begin in range(0, len(filters), EACH)]
