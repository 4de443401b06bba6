"""COPY of a million rows, all of it to a client, and what somebody else's insert has to wait."""

import asyncio
import io
import statistics
import time
from contextlib import suppress

import asyncpg

from bench.lab import Figure, Lab, Stage, stage

ROWS = 1_000_000
SINGLE_EVERY_SECONDS = 0.1
MOST_OF_PLAIN = 2.5
MOST_GROWTH_MB = 150.0
MOST_WAIT_MS = 1_000.0


async def run(lab: Lab) -> list[Figure]:
    """Time of the COPY, growth of the server, time to deliver, and age of the singles."""
    data = "".join(f"bulk {number}\n" for number in range(ROWS)).encode()
    plain = [await copy_to_plain(lab, data)]
    took: dict[str, float] = {}
    growth: dict[str, float] = {}
    arrived: dict[str, float] = {}
    during: dict[str, float] = {}
    after: dict[str, float] = {}
    for peer in lab.peers:
        name = peer.name
        if name == "python":
            continue  # it would need minutes
        async with stage(lab, peer, 1, probe="single ") as on:
            on.server.reset_peak()
            before = on.server.peak_bytes()
            enough = asyncio.Event()
            writing = asyncio.create_task(write_singles(on, enough))
            begin = time.time()
            await copy(on.connection, data)
            committed = time.time()
            await on.delivered(ROWS)
            arrived[name] = time.time() - committed
            enough.set()
            singles = await writing
            await on.delivered(len(singles))
            await on.crowd.check(on.written)
            took[name] = committed - begin
            growth[name] = (on.server.peak_bytes() - before) / 1e6
            ages = await on.crowd.ages()
            during[name] = max(ages[id] for id, at in singles.items() if at < committed) * 1e3
            after[name] = max(ages[id] for id, at in singles.items() if at >= committed) * 1e3
    plain.append(await copy_to_plain(lab, data))
    limit = statistics.mean(plain)
    copied = Figure(
        "bulk", f"COPY of {ROWS:,} rows, its time", "s", took, limit=limit, limit_is="no trigger"
    )
    grown = Figure("bulk", "growth of the server's memory (peak)", "MB", growth)
    meanwhile = Figure(
        "bulk", "oldest single insert when read, written before the COPY's commit", "ms", during
    )
    behind = Figure("bulk", "oldest single insert when read, written after it", "ms", after)
    copied.target = f"≤ {MOST_OF_PLAIN} × no trigger"
    grown.target = f"< {MOST_GROWTH_MB:g} MB"
    meanwhile.target = behind.target = f"≤ {MOST_WAIT_MS:,.0f} ms"
    if "ours" in took:
        copied.reached = took["ours"] <= MOST_OF_PLAIN * limit
        grown.reached = growth["ours"] < MOST_GROWTH_MB
        meanwhile.reached = during["ours"] <= MOST_WAIT_MS
        behind.reached = after["ours"] <= MOST_WAIT_MS
    all_of_it = Figure("bulk", "from its commit until a client has all of it", "s", arrived)
    return [copied, grown, all_of_it, meanwhile, behind]


async def copy_to_plain(lab: Lab, data: bytes) -> float:
    """Seconds of the same COPY into a table nobody watches."""
    async with (
        lab.postgres.clone("plain", "stage_plain") as database,
        lab.postgres.connect(database) as connection,
    ):
        begin = time.monotonic()
        await copy(connection, data)
        return time.monotonic() - begin


async def copy(connection: "asyncpg.Connection[asyncpg.Record]", data: bytes) -> None:
    """COPY the names into the table, as one transaction."""
    await connection.copy_to_table("things", source=io.BytesIO(data), columns=["name"])


async def write_singles(on: Stage, enough: asyncio.Event) -> dict[int, float]:
    """Be the somebody else: insert a row now and then until it is enough; when, by id."""
    written: dict[int, float] = {}
    insert = "INSERT INTO things (name) VALUES ($1) RETURNING id"
    async with on.postgres.connect(on.database) as connection:
        while not enough.is_set():
            at = time.time()
            written[await connection.fetchval(insert, f"single {len(written)}")] = at
            with suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), SINGLE_EVERY_SECONDS)
    return written
