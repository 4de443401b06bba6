"""Shared by the parts: the laboratory, a stage for each peer, and figures."""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from app.database.embedded import binary
from bench.crowd import Crowd
from bench.postgres import Postgres
from bench.servers import Peer, Server, running

PGBENCH_SECONDS = 120
INSERT_SCRIPT = Path(__file__).parent / "insert.sql"


@dataclass(frozen=True)
class Lab:
    """The Postgres of this run and the peers measured in it."""

    postgres: Postgres
    peers: tuple[Peer, ...]


@dataclass
class Figure:
    """One line of the table. Values are by peer name; the ratio is ours to Node's."""

    part: str
    what: str
    unit: str
    values: dict[str, float]
    target: str = ""
    reached: bool | None = None
    limit: float | None = None
    limit_is: str = ""
    note: str = ""
    ratio: float | None = field(init=False)

    def __post_init__(self) -> None:
        ours, node = self.values.get("ours"), self.values.get("node")
        self.ratio = None if ours is None or not node else ours / node

    def as_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return asdict(self)


def at_most(ratio: float | None, most: float) -> bool | None:
    """Return whether a target is reached, or None if it could not be measured."""
    return None if ratio is None else ratio <= most


def at_least(ratio: float | None, least: float) -> bool | None:
    """Return whether a target is reached, or None if it could not be measured."""
    return None if ratio is None else ratio >= least


@dataclass
class Stage:
    """A peer's server on its own database, a crowd connected to it, and a connection to write."""

    peer: Peer
    postgres: Postgres
    server: Server
    crowd: Crowd
    database: str
    connection: "asyncpg.Connection[asyncpg.Record]"
    written: int = 0

    async def delivered(self, rows: int) -> dict[str, Any]:
        """Wait until the crowd has all rows written so far: those before, and `rows` more."""
        self.written += rows
        return await self.crowd.expect(self.written * self.crowd.clients)


def ready_mark(peer: Peer) -> str:
    """Return the text after which a client receives every event."""
    return '42["feed:hello"' if peer.name == "ours" else '40{"sid"'


@asynccontextmanager
async def stage(
    lab: Lab, peer: Peer, clients: int, probe: str | None = None
) -> AsyncIterator[Stage]:
    """Set up a stage; tear it down at the end."""
    async with (
        lab.postgres.clone(peer.template, f"stage_{peer.name}") as database,
        running(peer, lab.postgres, database) as server,
        Crowd.start() as crowd,
        lab.postgres.connect(database) as connection,
    ):
        if clients:
            await crowd.connect(server.port, clients, ready_mark(peer), probe)
        yield Stage(peer, lab.postgres, server, crowd, database, connection)


@dataclass(frozen=True)
class Written:
    """What pgbench did: committed transactions, their rate, and their mean time."""

    rows: int
    per_second: float
    mean_ms: float


async def write_singly(
    postgres: Postgres,
    database: str,
    connections: int,
    *,
    seconds: int | None = None,
    rows_each: int | None = None,
    per_second: int | None = None,
) -> Written:
    """Insert single rows with pgbench, for a time or a number of rows per connection."""
    argv = [binary("pgbench"), "--no-vacuum", "--protocol=prepared"]
    argv += [f"--file={INSERT_SCRIPT}", f"--client={connections}", f"--jobs={min(connections, 2)}"]
    argv += [f"--time={seconds}"] if seconds else [f"--transactions={rows_each}"]
    argv += [f"--rate={per_second}"] if per_second else []
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=postgres.environment(database),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), PGBENCH_SECONDS)
    if process.returncode:
        raise RuntimeError(f"pgbench failed: {errors.decode()}")
    return Written(
        rows=int(_found(rb"actually processed: (\d+)", output)),
        per_second=float(_found(rb"tps = ([\d.]+)", output)),
        mean_ms=float(_found(rb"latency average = ([\d.]+)", output)),
    )


def least(measured: dict[str, list[float]]) -> dict[str, float]:
    """Each peer's best round where less is better: other work on the machine only adds to it."""
    return {name: min(rounds) for name, rounds in measured.items() if rounds}


def most(measured: dict[str, list[float]]) -> dict[str, float]:
    """Each peer's best round where more is better; the worst where less is."""
    return {name: max(rounds) for name, rounds in measured.items() if rounds}


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the value that `percent` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _found(pattern: bytes, text: bytes) -> bytes:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]
