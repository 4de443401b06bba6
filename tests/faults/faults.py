"""The faults: each a coroutine that does damage, waits, and repairs it."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable

import asyncpg

from app.database.embedded import Server
from tests.faults.nodes import Node
from tests.support.proxy import Proxy

LOCKS, PRESENT = 1413563213, 3  # the advisory lock that every node's listener holds
ADMIN_TIMEOUT_S = 10
STOP_TIMEOUT_S = 30
STARTS = 3

Fault = Callable[[], Awaitable[None]]


class Faults:
    """The faults by name, against a Postgres, the nodes, and the connections of clients.

    `spared`: nodes that are never killed, so that their memory can be measured.
    """

    def __init__(
        self, chance: random.Random, postgres: Server, nodes: list[Node], fronts: list[Proxy],
        watchers: list[int], spared: list[Node],
    ) -> None:  # fmt: skip
        self._chance = chance
        self._postgres = postgres
        self._nodes = nodes
        self._fronts = fronts
        self._watchers = watchers
        self._killable = [node for node in nodes if node not in spared]
        self.on_servers: dict[str, Fault] = {
            "server killed": self.kill_server,
            "all servers killed": self.kill_all_servers,
            "server restarted": self.restart_server,
            "server frozen": self.freeze_server,
            "listener's backend killed": self.kill_listener,
            "all backends killed": self.kill_backends,
            "Postgres restarted (fast)": self.restart_postgres_fast,
            "Postgres restarted (immediate)": self.restart_postgres_immediate,
            "Postgres killed": self.kill_postgres,
            "database in a black hole": self.black_hole,
            "database in a black hole (replies)": self.black_hole_back,
            "database in a black hole (requests)": self.black_hole_forth,
            "database connections cut": self.cut_database,
            "storm of foreign bells": self.storm,
        }
        self.on_clients: dict[str, Fault] = {
            "all clients cut": self.cut_all_clients,
            "a client cut": self.cut_client,
            "clients moved to the other node": self.move_clients,
            "a client in a black hole": self.hold_client,
            "clients frozen": self.freeze_clients,
        }

    async def _pause(self, shortest: float, longest: float) -> None:
        await asyncio.sleep(self._chance.uniform(shortest, longest))

    async def _start(self, *nodes: Node) -> None:
        for node in nodes:
            for attempt in range(STARTS):
                try:
                    await node.start()
                    break
                except RuntimeError:  # the database was not ready yet
                    if attempt == STARTS - 1:
                        raise
                    await asyncio.sleep(1)

    # Servers

    async def kill_server(self) -> None:
        node = self._chance.choice(self._killable)
        node.kill()
        await self._pause(0, 1)
        await self._start(node)

    async def kill_all_servers(self) -> None:
        for node in self._killable:
            node.kill()
        await self._pause(0, 1)
        await self._start(*self._killable)

    async def restart_server(self) -> None:
        node = self._chance.choice(self._killable)
        await node.stop()
        await self._start(node)

    async def freeze_server(self) -> None:
        node = self._chance.choice(self._nodes)
        node.signal(signal.SIGSTOP)
        try:
            await self._pause(0.5, 6)
        finally:
            node.signal(signal.SIGCONT)

    # Postgres

    async def _admin(self, statement: str, *arguments: object) -> None:
        connection = await asyncpg.connect(self._postgres.url, timeout=ADMIN_TIMEOUT_S)
        try:
            await connection.execute(statement, *arguments, timeout=ADMIN_TIMEOUT_S)
        except asyncpg.OperatorInterventionError:
            pass  # its own backend was killed too
        finally:
            connection.terminate()

    async def kill_listener(self) -> None:
        await self._admin(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            " AND classid = $1 AND objid = $2",
            LOCKS, PRESENT,
        )  # fmt: skip

    async def kill_backends(self) -> None:
        for _ in range(self._chance.randint(1, 10)):
            await self._admin(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            await asyncio.sleep(0.3)

    async def _stop_postgres(self, number: signal.Signals) -> None:
        pid = self._postgres.pid
        assert pid is not None
        os.kill(pid, number)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            while self._postgres.pid is not None:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(self._postgres.kill)  # reaps the ended process
        await self._start_postgres()

    async def _start_postgres(self) -> None:
        await self._pause(0, 2)
        await asyncio.to_thread(self._postgres.start)

    async def restart_postgres_fast(self) -> None:
        await self._stop_postgres(signal.SIGINT)

    async def restart_postgres_immediate(self) -> None:
        await self._stop_postgres(signal.SIGQUIT)

    async def kill_postgres(self) -> None:
        await asyncio.to_thread(self._postgres.kill)
        await self._start_postgres()

    async def storm(self) -> None:
        await self._admin(
            "DO $$ BEGIN FOR n IN 1..5000 LOOP"
            " PERFORM pg_notify('feed', CASE n % 3 WHEN 0 THEN '' ELSE n::text END);"
            " END LOOP; END $$"
        )

    # Networks

    async def _hold(self, proxy: Proxy, longest: float, **ways: bool) -> None:
        proxy.hold(**ways)
        try:
            await self._pause(0.5, longest)
        finally:
            if self._chance.random() < 0.5:
                proxy.cut()
            proxy.pass_on()

    async def black_hole(self) -> None:
        await self._hold(self._chance.choice(self._nodes).database, 12)

    async def black_hole_back(self) -> None:
        await self._hold(self._chance.choice(self._nodes).database, 12, forth=False)

    async def black_hole_forth(self) -> None:
        await self._hold(self._chance.choice(self._nodes).database, 12, back=False)

    async def cut_database(self) -> None:
        self._chance.choice(self._nodes).database.cut()

    # Clients

    async def cut_all_clients(self) -> None:
        for front in self._fronts:
            front.cut()

    async def cut_client(self) -> None:
        self._chance.choice(self._fronts).cut()

    async def move_clients(self) -> None:
        for front in self._fronts:
            if self._chance.random() < 0.5:
                node = self._chance.choice(self._nodes)
                front.target = "127.0.0.1", node.server.port
                front.cut()

    async def hold_client(self) -> None:
        way = self._chance.choice([{}, {"forth": False}, {"back": False}])
        await self._hold(self._chance.choice(self._fronts), 8, **way)

    async def freeze_clients(self) -> None:
        pid = self._chance.choice(self._watchers)
        os.kill(pid, signal.SIGSTOP)
        try:
            await self._pause(0.5, 6)
        finally:
            os.kill(pid, signal.SIGCONT)
