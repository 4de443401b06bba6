"""COPY of a million rows to one client, and how long another connection's insert has to wait."""

import asyncio
import io
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from bench.lab import Figure, Lab, Stage, least, most, stage
from bench.servers import Peer

ROWS = 1_000_000
ROUNDS = 2
SINGLE_EVERY_SECONDS = 0.1
MOST_OF_PLAIN = 2.5
MOST_GROWTH_MB = 150.0
MOST_WAIT_MS = 1_000.0


@dataclass(frozen=True)
class Copied:
    """What one COPY did: seconds, bytes, and the age of the oldest single row when it was read,
    among those committed while the COPY ran and among those committed from then on.
    """

    took: float
    grown: int
    delivered: float
    oldest_meanwhile: float
    oldest_after: float


async def run(lab: Lab) -> list[Figure]:
    """Time of the COPY, growth of the server, time to deliver, and age of the singles."""
    data = "".join(f"bulk {number}\n" for number in range(ROWS)).encode()
    peers = [peer for peer in lab.peers if peer.name != "python"]  # it would need minutes
    plain: list[float] = []
    runs: dict[str, list[Copied]] = {peer.name: [] for peer in peers}
    for _ in range(ROUNDS):
        plain.append(await copy_to_plain(lab, data))
        for peer in peers:
            runs[peer.name].append(await copy_watched(lab, peer, data))

    def best(value: Callable[[Copied], float]) -> dict[str, float]:
        return least({name: [value(run) for run in rounds] for name, rounds in runs.items()})

    def worst(value: Callable[[Copied], float]) -> dict[str, float]:
        return most({name: [value(run) for run in rounds] for name, rounds in runs.items()})

    limit = min(plain)
    copied = Figure(
        "bulk",
        f"COPY of {ROWS:,} rows, its time",
        "s",
        best(lambda run: run.took),
        target=f"≤ {MOST_OF_PLAIN} × no trigger",
        limit=limit,
        limit_is="no trigger",
    )
    grown = Figure(
        "bulk",
        "growth of the server's memory (peak)",
        "MB",
        worst(lambda run: run.grown / 1e6),
        target=f"< {MOST_GROWTH_MB:g} MB",
    )
    meanwhile = Figure(
        "bulk",
        "oldest single insert when read, committed while the COPY ran",
        "ms",
        worst(lambda run: run.oldest_meanwhile * 1e3),
        target=f"≤ {MOST_WAIT_MS:,.0f} ms",
    )
    after = Figure(
        "bulk",
        "oldest single insert when read, from the COPY's commit on",
        "ms",
        worst(lambda run: run.oldest_after * 1e3),
        note="there is one order for all changes: it comes after the million rows",
    )
    if "ours" in runs:
        copied.reached = copied.values["ours"] <= MOST_OF_PLAIN * limit
        grown.reached = grown.values["ours"] < MOST_GROWTH_MB
        meanwhile.reached = meanwhile.values["ours"] <= MOST_WAIT_MS
    delivered = Figure(
        "bulk",
        "from its commit until a client has all of it",
        "s",
        best(lambda run: run.delivered),
    )
    return [copied, grown, delivered, meanwhile, after]


async def copy_watched(lab: Lab, peer: Peer, data: bytes) -> Copied:
    """COPY into a table that a peer watches, while another connection inserts single rows."""
    async with stage(lab, peer, 1, probe="single ") as on:
        on.server.reset_peak()
        resident = on.server.peak_bytes()
        enough = asyncio.Event()
        writing = asyncio.create_task(write_singles(on, enough))
        begin = time.time()
        async with on.connection.transaction():
            await copy(on.connection, data)
            copied = time.time()
        committed = time.time()
        await on.delivered(ROWS)
        delivered = time.time() - committed
        enough.set()
        singles = await writing
        await on.delivered(len(singles))
        await on.crowd.check(on.written)
        ages = await on.crowd.ages()
        return Copied(
            took=committed - begin,
            grown=on.server.peak_bytes() - resident,
            delivered=delivered,
            oldest_meanwhile=max(ages[id] for id, at in singles.items() if at < copied),
            oldest_after=max((ages[id] for id, at in singles.items() if at >= copied), default=0),
        )


async def copy_to_plain(lab: Lab, data: bytes) -> float:
    """Return the seconds of the same COPY into a table without a trigger."""
    async with (
        lab.postgres.clone("plain", "stage_plain") as database,
        lab.postgres.connect(database) as connection,
    ):
        begin = time.monotonic()
        await copy(connection, data)
        return time.monotonic() - begin


async def copy(connection: "asyncpg.Connection[asyncpg.Record]", data: bytes) -> None:
    """COPY the names into the table."""
    await connection.copy_to_table("things", source=io.BytesIO(data), columns=["name"])


async def write_singles(on: Stage, enough: asyncio.Event) -> dict[int, float]:
    """Insert a row now and then until `enough` is set; return when each was committed, by id."""
    written: dict[int, float] = {}
    insert = "INSERT INTO things (name) VALUES ($1) RETURNING id"
    async with on.postgres.connect(on.database) as connection:
        while not enough.is_set():
            id = await connection.fetchval(insert, f"single {len(written)}")
            written[id] = time.time()
            with suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), SINGLE_EVERY_SECONDS)
    return written
