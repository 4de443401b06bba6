"""The oracle: writers write, clients watch, faults strike; then everything is compared."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
from asyncpg.cursor import CursorFactory

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.database.migration import migrate
from tests.faults.checker import (
    THE_END,
    THING,
    Findings,
    Log,
    Reader,
    Snapshot,
    logged_key,
    snapshot,
)
from tests.faults.expected import Expected
from tests.faults.faults import Fault, Faults
from tests.faults.nodes import ROOT, Node
from tests.faults.orders import OrderWriter
from tests.faults.receiver import Subscriber
from tests.faults.sabotage import IN_DATABASE
from tests.faults.subscriptions import Asked, random_namespaces
from tests.faults.tables import (
    BACKLOG_WRITERS,
    TOPICS,
    BacklogWriter,
    NestedWriter,
    make_tables,
    miscaptured,
)
from tests.faults.writers import EXPECTED, Pace, RestWriter, SlowWriter, SqlWriter
from tests.support.gateway import Entrance, Gateway
from tests.support.postgres import private_server
from tests.support.proxy import Proxy

HERE = Path(__file__).parent
# Durable, as in production: a server that is killed must not lose what it has shown.
POSTGRES: dict[str, str | int] = {
    "max_connections": 60, "shared_buffers": "256MB", "max_wal_size": "4GB",
    "deadlock_timeout": "50ms",
}  # fmt: skip
SAMPLE_S = 5.0
PEACE_TIMEOUT_S = 120.0  # for faults to finish
DELIVERY_TIMEOUT_S = 120.0  # since the last arrival, when waiting for everything
BACKLOG_TIMEOUT_S = 600.0  # after the planned time
STOP_TIMEOUT_S = 30.0
CANCEL_AGAIN_S = 5.0
OVERLAP = 10_000  # transaction ids that may have been reused after a crash
LOG_ROWS = 5_000  # read at once
NOWHERE = "127.0.0.1", 9  # nothing listens there
# The clients that are not JavaScript, and the browser: each kind's module.
PROGRAMS = {
    "python": "tests.faults.watch",
    "browser": "tests.faults.watch_browser",
    "subscribe-python": "tests.faults.subscribe",
}
# The share of the planned time for writing the backlog.
AWAY = 0.4

WEBSOCKET, POLLING, BOTH = ["websocket"], ["polling"], ["polling", "websocket"]
CLIENTS: tuple[tuple[str, list[str]], ...] = (
    ("official", WEBSOCKET), ("official", POLLING), ("official", BOTH), ("bare", WEBSOCKET),
    ("page", WEBSOCKET), ("page", POLLING), ("python", WEBSOCKET), ("python", POLLING),
)  # fmt: skip

# Clients with subscriptions, several on one connection each.
SUBSCRIBERS: tuple[tuple[str, list[str]], ...] = (
    ("official", WEBSOCKET), ("official", POLLING), ("official", BOTH), ("official", WEBSOCKET),
    ("bare", WEBSOCKET), ("python", WEBSOCKET), ("python", POLLING),
)  # fmt: skip
NAMESPACES = 6  # of each
# How often a client that connects asks for something else than before.
SWITCHING = 0.25
# How long a subscription stays without an offset: at the end all have to have a late one.
QUIET_S = 1

# A second record of what was written, row by row, made by other means than the product's.
AUDIT = """
CREATE TABLE audit (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, xid xid8 DEFAULT pg_current_xact_id(),
    op text, id bigint, name text, info text, created_at timestamptz
);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO audit (op) VALUES ('truncate');
    ELSIF TG_OP = 'UPDATE' AND OLD.id = NEW.id THEN
        IF OLD IS DISTINCT FROM NEW THEN
            INSERT INTO audit (op, id, name, info, created_at)
            VALUES ('update', NEW.id, NEW.name, NEW.info, NEW.created_at);
        END IF;
    ELSE
        IF TG_OP <> 'INSERT' THEN
            INSERT INTO audit (op, id, name, info, created_at)
            VALUES ('destroy', OLD.id, OLD.name, OLD.info, OLD.created_at);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            INSERT INTO audit (op, id, name, info, created_at)
            VALUES ('create', NEW.id, NEW.name, NEW.info, NEW.created_at);
        END IF;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_rows AFTER INSERT OR UPDATE OR DELETE ON things
FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER audit_truncate AFTER TRUNCATE ON things
FOR EACH STATEMENT EXECUTE FUNCTION audit();
"""

# What only one of the records has: each row's changes of a transaction, in order.
AUDITED = """
WITH logged AS MATERIALIZED (
    SELECT xid, op, row ->> 'id' AS id, row ->> 'name' AS name, row ->> 'info' AS info,
           (row ->> 'created_at')::timestamptz AS created_at,
           row_number() OVER (PARTITION BY xid, row ->> 'id' ORDER BY id) AS place
    FROM (SELECT xid, id, op, coalesce(new, old) AS row FROM feed.change WHERE topic = 'thing')
             AS change
), audited AS MATERIALIZED (
    SELECT xid, op, id::text, name, info, created_at,
           row_number() OVER (PARTITION BY xid, id ORDER BY n) AS place
    FROM audit
)
SELECT (SELECT count(*) FROM (SELECT * FROM logged EXCEPT ALL SELECT * FROM audited) AS more)
     + (SELECT count(*) FROM (SELECT * FROM audited EXCEPT ALL SELECT * FROM logged) AS less)
"""


WHOLE = "SELECT coalesce(json_agg(whole), '[]')::text FROM public.{table} AS whole"
# No table is altered, so every change can be followed.
RELOADS = """
SELECT string_agg(topic || ' ' || count, ', ')
FROM (SELECT topic, count(*) AS count FROM feed.change WHERE op = 'reload' GROUP BY topic) AS topic
"""


@dataclass(frozen=True)
class Plan:
    """A run: how many seconds, how many changes a second, faults after pauses of at most `pause`
    seconds (None: no faults), on how many nodes, of which the first `spared` are never killed.

    `subscribers` hold subscriptions: in random namespaces, or all in those of `namespaces`. When
    one connects, it asks with the probability `switching` for something else.

    With a `backlog`, the clients numbered in `away` soon disconnect, and return when that many more
    changes have been logged.
    """

    seed: int
    seconds: float
    rate: float = 600
    pause: float | None = 2.0
    nodes: int = 2
    spared: int = 0
    clients: Sequence[tuple[str, list[str]]] = CLIENTS
    subscribers: Sequence[tuple[str, list[str]]] = ()
    namespaces: Mapping[str, Sequence[Asked]] | None = None
    switching: float = SWITCHING
    cutting: bool = False  # official subscribers disconnect once within a snapshot
    backlog: int = 0
    away: Sequence[int] = (2, 6)
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Report:
    """The result of a run."""

    changes: int = 0
    missed: int = 0  # of these, how many were logged while some clients were away
    faults: Counter[str] = field(default_factory=Counter)
    clients: dict[str, Findings] = field(default_factory=dict)
    miscaptured: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> Findings:
        return sum(self.clients.values(), Findings())

    def failures(self) -> int:
        return self.total.failures() + self.miscaptured + len(self.problems)

    def __str__(self) -> str:
        lines = [f"{self.changes} changes; miscaptured {self.miscaptured}; {self.total}"]
        if self.missed:
            lines.append(f"  {self.missed} changes were logged while some clients were away")
        lines += [f"  fault: {name}: {count}" for name, count in sorted(self.faults.items())]
        lines += [f"  {name}: {findings}" for name, findings in self.clients.items()]
        lines += [f"  {note}" for note in self.total.notes + self.problems]
        return "\n".join(lines)


class Oracle:
    """A run on a migrated, empty database. `async with` it, `run` it, then ask for the `verdict`.

    `sabotage` names a safeguard of the product to disable (sabotage.py). Clients connect through
    the `gateway`, if there is one.
    """

    def __init__(
        self, plan: Plan, directory: Path, postgres: Server, url: str, sabotage: str = "",
        gateway: Gateway | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.postgres = postgres
        self.url = url
        self.directory = directory
        self.report = Report()
        settings = {"SABOTAGE": sabotage, "QUIET_S": QUIET_S, **plan.settings}
        self.nodes = [Node(f"n{n}", directory, **settings) for n in range(plan.nodes)]
        self.pace = Pace(plan.rate)
        self.faults: Faults
        self._chance = random.Random(plan.seed)
        self._log = Log()
        self._things = Log()  # of these, the changes to things
        self._readers: list[Reader] = []
        self.subscribers: list[Subscriber] = []
        self._expected = Expected(())
        self._files: list[tuple[Reader | Subscriber, Any]] = []
        self._the_end = 0  # the transaction that wrote the last mark
        self.fronts: list[Proxy] = []
        self._exposed: list[Proxy] = []  # those that faults may strike
        self._sabotage = sabotage
        self._gateway = gateway
        self.entrance: Entrance | None = None
        self._watchers: list[asyncio.subprocess.Process] = []
        self._writing: list[asyncio.Task[None]] = []
        self._striking: list[asyncio.Task[None]] = []
        self._measuring: list[asyncio.Task[None]] = []
        self._returning: list[asyncio.Task[None]] = []
        self._reading = asyncio.Lock()
        self._peace = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Oracle":
        async with contextlib.AsyncExitStack() as stack:
            async with self.session() as connection:
                await connection.execute(AUDIT)
                await make_tables(connection)
                if self._sabotage in IN_DATABASE:
                    await connection.execute(IN_DATABASE[self._sabotage])
            await self._start_nodes(stack)
            await self._start_clients(stack)
            await self._start_subscribers(stack)
            away = {self.fronts[number] for number in self.plan.away if self.plan.backlog}
            self._exposed = [front for front in self.fronts if front not in away]
            self.faults = Faults(
                random.Random(self._chance.random()), self.postgres, self.nodes, self._exposed,
                [watcher.pid for watcher in self._watchers], self.nodes[: self.plan.spared],
            )  # fmt: skip
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await end([*self._writing, *self._striking, *self._measuring, *self._returning])
        finally:
            await self._stack.aclose()

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Connection]:
        """Yield a session with the database."""
        connection = await connect(self.url, command_timeout=300)
        try:
            yield connection
        finally:
            connection.terminate()

    async def _start_nodes(self, stack: contextlib.AsyncExitStack) -> None:
        for node in self.nodes:
            ready = asyncio.Event()
            task = asyncio.create_task(node.run(self.url, ready), name=node.name)
            stack.push_async_callback(end, [task])
            await first(task, ready.wait())
        if self._gateway is not None:
            ports = [node.server.port for node in self.nodes]
            self.entrance = await stack.enter_async_context(self._gateway(ports))

    def _front(self, number: int) -> tuple[Proxy, str]:
        """Return what stands before a client, and the scheme of its URL."""
        if self.entrance is None:
            return Proxy("127.0.0.1", self.nodes[number % len(self.nodes)].server.port), "http"
        # The gateway chooses a node by the client's address.
        return Proxy("127.0.0.1", self.entrance.port, f"127.0.1.{number + 1}"), "https"

    async def _start_clients(self, stack: contextlib.AsyncExitStack) -> None:
        programs: dict[str, list[dict[str, Any]]] = {}
        for number, (kind, transports) in enumerate(self.plan.clients):
            name = f"{number} {kind} {'+'.join(transports)}"
            file = self.directory / f"{name.replace(' ', '-')}.jsonl"
            file.touch()
            front, scheme = self._front(number)
            await stack.enter_async_context(front)
            self.fronts.append(front)
            subscribes = kind in ("page", "browser")
            self._readers.append(
                Reader(name, self._things, THING) if subscribes else Reader(name, self._log)
            )
            self._files.append((self._readers[-1], stack.enter_context(file.open("rb"))))
            programs.setdefault(
                "page" if kind == "page" else kind.replace("bare", "official"), []
            ).append(
                {
                    "kind": kind,
                    "url": f"{scheme}://127.0.0.1:{front.port}",
                    "transports": transports,
                    "file": str(file),
                }
            )
        for kind, clients in programs.items():
            await self._start_watcher(stack, kind, "watch.mjs", clients)

    async def _start_subscribers(self, stack: contextlib.AsyncExitStack) -> None:
        chance = random.Random(self._chance.random())
        programs: dict[str, list[dict[str, Any]]] = {}
        asked: set[Asked] = set()
        given = []
        for _ in self.plan.subscribers:
            given.append(self.plan.namespaces or random_namespaces(chance, NAMESPACES))
            asked.update(each for alternatives in given[-1].values() for each in alternatives)
        self._expected = Expected(asked)
        for number, (kind, transports) in enumerate(self.plan.subscribers):
            name = f"subscriber {number} {kind} {'+'.join(transports)}"
            file = self.directory / f"{name.replace(' ', '-')}.jsonl"
            file.touch()
            front, scheme = self._front(len(self.plan.clients) + number)
            await stack.enter_async_context(front)
            self.fronts.append(front)
            self.subscribers.append(Subscriber(name, given[number], self._expected))
            self._files.append((self.subscribers[-1], stack.enter_context(file.open("rb"))))
            programs.setdefault("official" if kind == "official" else "python", []).append(
                {
                    "kind": kind,
                    "url": f"{scheme}://127.0.0.1:{front.port}",
                    "transports": transports,
                    "file": str(file),
                    "switching": self.plan.switching,
                    "cutting": self.plan.cutting,
                    "namespaces": {
                        namespace: [each.options for each in alternatives]
                        for namespace, alternatives in given[number].items()
                    },
                }
            )
        for kind, clients in programs.items():
            await self._start_watcher(stack, f"subscribe-{kind}", "subscribe.mjs", clients)

    async def _start_watcher(
        self, stack: contextlib.AsyncExitStack, kind: str, script: str,
        clients: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        command = [sys.executable, "-m", PROGRAMS[kind]] if kind in PROGRAMS else [
            node_program(), "--no-warnings", script
        ]  # fmt: skip
        said = stack.enter_context((self.directory / f"watch-{kind}.log").open("w"))
        watcher = await asyncio.create_subprocess_exec(
            *command, json.dumps(clients), stdin=subprocess.PIPE, stdout=said, stderr=said,
            cwd=ROOT if kind in PROGRAMS else HERE,
            env=os.environ | (self.entrance.environment if self.entrance else {}),
        )  # fmt: skip
        stack.push_async_callback(self._kill_watcher, watcher)
        self._watchers.append(watcher)

    async def _kill_watcher(self, watcher: asyncio.subprocess.Process) -> None:
        if watcher.returncode is None:
            watcher.kill()
            await watcher.wait()

    # The run

    async def run(self) -> None:
        """Let everything loose for the planned time."""
        self.start_writers()
        self._measuring = [asyncio.create_task(self._measure(), name="measure")]
        if self.plan.pause is not None:
            self._striking = [
                asyncio.create_task(self._strike(group), name="faults")
                for group in (self.faults.on_servers, self.faults.on_clients)
            ]
        if self.plan.backlog:
            self._returning = [asyncio.create_task(self._stay_away(), name="away")]
        pause = asyncio.create_task(asyncio.sleep(self.plan.seconds))
        busy = [*self._writing, *self._striking, *self._measuring]
        await first(*busy, asyncio.gather(pause, *self._returning))
        self._peace.set()
        async with asyncio.timeout(PEACE_TIMEOUT_S):
            await asyncio.gather(*self._striking)

    def start_writers(self) -> None:
        url, chance = self.url, self._chance
        writers: list[SqlWriter | RestWriter] = [
            SqlWriter(number, url, random.Random(chance.random()), self.pace) for number in range(5)
        ]
        writers += [SlowWriter(9, url, random.Random(chance.random()), self.pace)] * 2
        urls = [node.url for node in self.nodes]
        writers.append(RestWriter(urls, random.Random(chance.random()), self.pace))
        self._writing = [asyncio.create_task(writer.run(), name="writer") for writer in writers]
        nested: list[SqlWriter] = [
            NestedWriter(number, url, random.Random(chance.random()), self.pace)
            for number in range(20, 22)
        ]
        if self.plan.subscribers:
            nested.append(OrderWriter(30, url, random.Random(chance.random()), self.pace))
        self._writing.append(asyncio.create_task(self._write_nested(nested), name="writer"))

    async def _write_nested(self, writers: Sequence[SqlWriter]) -> None:
        """Write the other tables, once every client without subscriptions has seen them empty."""
        await self.until(lambda: all(reader.findings.sessions for reader in self._readers))
        await asyncio.gather(*(writer.run() for writer in writers))

    async def greeted(self) -> None:
        """Wait until every client has connected. Raises TimeoutError."""
        await self.until(lambda: min(self.sessions()) > 0)

    async def _stay_away(self) -> None:
        """Keep some clients disconnected until the backlog is written."""
        await self.greeted()
        before = await self._logged()
        fronts = [self.fronts[number] for number in self.plan.away]
        for front in fronts:
            front.target = NOWHERE
            front.cut()
        rate = self.plan.backlog / max(self.plan.seconds * AWAY, 1)
        pace = Pace(rate)
        async with asyncio.timeout(self.plan.seconds + BACKLOG_TIMEOUT_S):
            await asyncio.gather(
                *(
                    BacklogWriter(number, self.url, random.Random(number), pace).write(
                        self.plan.backlog
                    )
                    for number in range(BACKLOG_WRITERS)
                )
            )
            self.report.missed = await self._logged() - before
        if self.report.missed < self.plan.backlog:
            self.report.problems.append(f"the backlog had only {self.report.missed} changes")
        for front in fronts:
            front.target = "127.0.0.1", self._chance.choice(self.nodes).server.port
            self._exposed.append(front)

    async def _logged(self) -> int:
        """Return about how many changes have been logged so far."""
        async with asyncio.timeout(DELIVERY_TIMEOUT_S):
            while True:
                with contextlib.suppress(*EXPECTED):  # Postgres is down at the moment
                    async with self.session() as connection:
                        count: int = await connection.fetchval("SELECT count(*) FROM feed.change")
                        return count
                await asyncio.sleep(0.1)

    async def _strike(self, faults: dict[str, Fault]) -> None:
        """Strike in random order, each fault as often as the others."""
        assert self.plan.pause is not None
        await self.until(lambda: all(subscriber.sessions for subscriber in self.subscribers))
        while True:
            for name in self._chance.sample(list(faults), len(faults)):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._chance.uniform(0, self.plan.pause)):
                        await self._peace.wait()
                if self._peace.is_set():
                    return
                self.report.faults[name] += 1
                await faults[name]()

    async def _measure(self) -> None:
        while True:
            for node in self.nodes:
                node.sample()
            await asyncio.sleep(SAMPLE_S)

    async def check(self) -> None:
        """Compare what has been received so far. Raises OSError or asyncpg's errors if Postgres is
        down.
        """
        await self._read_clients()
        async with self.session() as connection:
            await self._read_log(connection)
        for reader, _ in self._files:
            reader.judge()
        self._expected.forget(
            place
            for subscriber in self.subscribers
            for receiver in subscriber.receivers.values()
            for place in receiver.needed
        )

    async def _read_log(self, connection: Connection) -> Snapshot:
        """Read what is final: transactions below which all others have ended."""
        since = max(self._log.known_below - OVERLAP, 0)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            now = snapshot(await connection.fetchval("SELECT pg_current_snapshot()::text"))
            below = min(now.open, default=now.end)
            await self._add_to_log(
                connection.cursor(
                    "SELECT xid::text::bigint, id, topic, op, old, new FROM feed.change"
                    " WHERE xid >= $1::bigint::text::xid8 AND xid < $2::bigint::text::xid8"
                    " ORDER BY xid, change.id",
                    since, below, prefetch=LOG_ROWS,
                )
            )  # fmt: skip
            await self._expected.read(connection, since, below)
        self._log.known_below = self._things.known_below = below
        self.report.changes = self._log.count
        return now

    async def _add_to_log(self, rows: CursorFactory) -> None:
        decode = msgspec.json.decode
        pending: list[tuple[int, int, int]] = []
        things: list[tuple[int, int, int]] = []
        async for xid, id, topic, op, old, new in rows:
            if len(pending) >= LOG_ROWS and pending[-1][0] != xid:
                self._log.add(pending)
                self._things.add(things)
                pending, things = [], []
            content = logged_key(topic, op, old and decode(old), new and decode(new))
            pending.append((xid, id, content))
            if topic == THING:
                things.append((xid, id, content))
        self._log.add(pending)
        self._things.add(things)

    async def _read_clients(self) -> bool:
        """Read what the clients have written since the last time; return whether there was any."""
        async with self._reading:
            return await self._read_files()

    async def _read_files(self) -> bool:
        found = False
        for reader, file in self._files:
            for count, line in enumerate(file):
                if not line.endswith(b"\n"):
                    file.seek(-len(line), 1)  # still being written
                    break
                found = True
                reader.take(msgspec.json.decode(line))
                if count % 1000 == 0:
                    await asyncio.sleep(0)
            self.report.clients[reader.name] = reader.findings
        return found

    # The end

    async def verdict(self) -> Report:
        """Repair everything, let the clients catch up, and compare it all."""
        await end([*self._writing, *self._measuring])
        await self._repair()
        async with self.session() as connection:
            await self._all_ended(connection)
            self._the_end = await connection.fetchval(
                "INSERT INTO things (name) VALUES ($1)"
                " RETURNING pg_current_xact_id()::text::bigint",
                THE_END,
            )
            await self._let_clients_finish(connection)
            now = await self._all_ended(connection)
            tables = {
                topic: msgspec.json.decode(await connection.fetchval(WHOLE.format(table=table)))
                for topic, table in {THING: "things", **TOPICS}.items()
            }
            rows = await self._expected.rows(connection)
            self.report.miscaptured = await connection.fetchval(AUDITED)
            self.report.miscaptured += await miscaptured(connection)
            if reloads := await connection.fetchval(RELOADS):
                self.report.problems.append(f"unexpected reloads: {reloads}")
        for reader in self._readers:
            self.report.clients[reader.name] = reader.finish(now, tables)
        for subscriber in self.subscribers:
            self.report.clients[subscriber.name] = subscriber.finish(now, rows)
        for node in self.nodes:
            if count := node.server.log.count("Traceback"):
                self.report.problems.append(f"{node.name} logged {count} tracebacks")
        return self.report

    async def _all_ended(self, connection: Connection) -> Snapshot:
        """Wait until no transaction is open, and read the log to its end."""
        async with asyncio.timeout(DELIVERY_TIMEOUT_S):
            while (now := await self._read_log(connection)).open:
                await asyncio.sleep(0.1)
        return now

    def sessions(self) -> list[int]:
        """Return how many hellos each client has received so far."""
        return [reader.findings.sessions for reader in self._readers] + [
            subscriber.sessions for subscriber in self.subscribers
        ]

    def events(self) -> int:
        """Return how many changes the clients have received so far in total."""
        return sum(reader.findings.events for reader, _ in self._files)

    def marks(self) -> list[set[str]]:
        """Return the marks each client has received so far."""
        return [set(reader.marks) for reader in self._readers]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on what the clients received holds. Raises TimeoutError."""
        async with asyncio.timeout(DELIVERY_TIMEOUT_S):
            while not condition():
                await self._read_clients()
                await asyncio.sleep(0.05)

    async def seen(self, name: str, by: int | None = None) -> None:
        """Wait until every client, or the client numbered `by`, has received the thing with this
        name.

        Raises TimeoutError.
        """
        readers = self._readers if by is None else [self._readers[by]]
        await self.until(lambda: all(name in reader.marks for reader in readers))

    @contextlib.asynccontextmanager
    async def bounded_memory(self, most_mib: float) -> AsyncIterator[None]:
        """Report a server that grows by more than this during the block."""
        pids = [node.server.pid for node in self.nodes]
        before = [memory_mib(pid) for pid in pids]
        peaks = before[:]

        async def watch() -> None:
            while True:
                peaks[:] = map(max, peaks, map(memory_mib, pids))
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch(), name="memory")
        try:
            yield
        finally:
            await end([watching])
        for node, low, high in zip(self.nodes, before, peaks, strict=True):
            if high - low > most_mib:
                self.report.problems.append(f"{node.name} grew by {high - low:.0f} MiB")

    async def _repair(self) -> None:
        for proxy in [*self.fronts, *(node.database for node in self.nodes)]:
            proxy.pass_on()
        if self.postgres.pid is None:
            await asyncio.to_thread(self.postgres.start)
        for node in self.nodes:
            if not node.running():
                await node.start()
            if not await node.ready():
                self.report.problems.append(f"{node.name} did not become ready")

    async def _let_clients_finish(self, connection: Connection) -> None:
        """Wait until each has read to the end, stop them, and read the rest."""
        late: list[Reader | Subscriber] = [reader for reader, _ in self._files]
        heard = time.monotonic()
        while late and time.monotonic() < heard + DELIVERY_TIMEOUT_S:
            if await self._read_clients():
                heard = time.monotonic()
            late = [reader for reader in self._readers if THE_END not in reader.marks]
            late += [each for each in self.subscribers if not each.has_reached(self._the_end)]
            await asyncio.sleep(0.05)
        if late:
            names = ", ".join(reader.name for reader in late)
            self.report.problems.append(f"did not reach the end: {names}")
        for watcher in self._watchers:
            assert watcher.stdin is not None
            watcher.stdin.close()
        for watcher in self._watchers:
            if code := await asyncio.wait_for(watcher.wait(), STOP_TIMEOUT_S):
                self.report.problems.append(f"a client exited with {code}")
        await self._read_clients()


def node_program() -> str:
    """Return the path of Node.js: the system's, or the one `make setup` installed. Raises
    RuntimeError.
    """
    installed = Path(sys.executable).parent
    found = shutil.which("node") or shutil.which("node", path=installed)
    if found is None:
        raise RuntimeError("The oracle needs node: run `make setup`.")
    return found


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


async def first(*awaitables: Any) -> None:
    """Wait for the first of these, and raise what it raises."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended: the error of a statement that fails just then can take
    the place of a cancellation, and a writer goes on after errors. Raises TimeoutError.
    """
    async with asyncio.timeout(STOP_TIMEOUT_S):
        while running := [task for task in tasks if not task.done()]:
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=CANCEL_AGAIN_S)


@contextlib.asynccontextmanager
async def private_oracle(
    plan: Plan, directory: Path, gateway: Gateway | None = None
) -> AsyncIterator[Oracle]:
    """Yield an oracle with its own Postgres, which faults may stop and kill."""
    with contextlib.ExitStack() as stack:
        postgres = await asyncio.to_thread(stack.enter_context, private_server(**POSTGRES))
        await asyncio.to_thread(migrate, postgres.url)
        async with Oracle(plan, directory, postgres, postgres.url, gateway=gateway) as oracle:
            yield oracle
