"""Many subscriptions in one cheap process: few connections, with many subscriptions each.

Like the crowd, it does the least a client can do: it searches what it reads for the few things it
has to know. Of each event it notes when it was read, and the number `n` in its row.

The parent gives orders as JSON lines (see `Subscribers`); the child answers each with one line.
"""

import asyncio
import json
import re
import select
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from bench.crowd import PING, PONG, UPGRADE, client_frame

ORDER_SECONDS = 120
READ_BYTES = 256 * 1024
KEPT_BYTES = 256  # the end of the stream: may hold part of what is searched for
OPENED = b'0{"sid"'
REFUSED = b'{"message":'
EVENT = re.compile(rb'\["order:update",\{"id":\d+,"n":(\d+),')


class Client:
    """A connection with several subscriptions to orders, each in its namespace."""

    def __init__(self, filters: Sequence[str], with_rows: bool) -> None:
        self.filters = filters
        self.with_rows = with_rows
        self.ready_mark = b'["feed:loaded"' if with_rows else b'["feed:hello"'
        self.is_open = False
        self.waiting = len(filters)
        self.tail = b""

    def connect(self, port: int) -> None:
        """Open the connection and request a WebSocket."""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setblocking(False)
        self.socket.sendall(UPGRADE % port)

    def read(self, data: bytes) -> list[int]:
        """Take what was read; return the numbers in the events that end in it."""
        kept = len(self.tail)
        data = self.tail + data
        self.tail = data[-KEPT_BYTES:]
        if data.find(PING, max(0, kept - len(PING) + 1)) >= 0:
            self.socket.sendall(PONG)
        if not self.is_open:
            self.is_open = OPENED in data
            if self.is_open:
                self.subscribe()
        elif self.waiting:
            if REFUSED in data:
                raise RuntimeError(f"a subscription was refused: {data!r}")
            self.waiting -= data.count(self.ready_mark, max(0, kept - len(self.ready_mark) + 1))
        else:
            return [int(event[1]) for event in EVENT.finditer(data) if event.end() > kept]
        return []

    def subscribe(self) -> None:
        """Ask for everything, in one write."""
        options = {} if self.with_rows else {"snapshot": "false"}
        packets = (
            f"40/order/{number},{json.dumps({'where': where, **options})}"
            for number, where in enumerate(self.filters)
        )
        self.socket.sendall(b"".join(client_frame(packet.encode()) for packet in packets))


class Child:
    """The process of the clients: orders on standard input, all sockets in one epoll."""

    def __init__(self) -> None:
        self.poll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.joining: set[int] = set()
        self.noted: list[tuple[int, float]] = []
        self.expected: int | None = None
        self.cpu_at_order = 0.0

    def run(self) -> None:
        """Run until the parent closes standard input."""
        orders = sys.stdin.fileno()
        self.poll.register(orders, select.EPOLLIN)
        while True:
            for fd, _ in self.poll.poll():
                if fd != orders:
                    self.read(fd)
                    continue
                line = sys.stdin.readline()
                if not line:
                    return
                self.cpu_at_order = time.process_time()
                self.obey(json.loads(line))

    def obey(self, order: dict[str, Any]) -> None:
        """Start what the parent ordered."""
        if order["do"] == "expect":
            self.expected = order["events"]
            self.report()
            return
        clients = [Client(filters, order["with_rows"]) for filters in order["filters"]]
        for client in clients:
            client.connect(order["port"])
            fd = client.socket.fileno()
            self.clients[fd] = client
            self.joining.add(fd)
            self.poll.register(fd, select.EPOLLIN)

    def read(self, fd: int) -> None:
        """Read what there is on a connection, and answer the parent if that was the last of it."""
        client = self.clients[fd]
        data = client.socket.recv(READ_BYTES)
        if not data:
            raise RuntimeError("the server has closed a connection")
        now = time.monotonic()
        self.noted += [(number, now) for number in client.read(data)]
        if fd in self.joining and not client.waiting:
            self.joining.discard(fd)
            if not self.joining:
                self.answer()
        self.report()

    def report(self) -> None:
        """Answer the parent once the expected events have come."""
        if self.expected is not None and len(self.noted) >= self.expected:
            self.expected = None
            self.answer(noted=self.noted)
            self.noted = []

    def answer(self, **answer: Any) -> None:
        """Answer the parent, adding the time and the CPU used since its order."""
        answer["at"] = time.monotonic()
        answer["cpu"] = time.process_time() - self.cpu_at_order
        print(json.dumps(answer), flush=True)


class Subscribers:
    """The parent's side: orders, each answered when it is done; TimeoutError if it never is.

    The answers hold `at`, by the monotonic clock, and `cpu`, the seconds the child has used since
    the order.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator[Self]:
        """Start the process; kill it, and with it all connections, at the end."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.subscribers",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 28,
        )
        try:
            yield cls(process)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def subscribe(
        self, port: int, filters: Sequence[Sequence[str]], with_rows: bool
    ) -> dict[str, Any]:
        """Open a connection for each list of filters; return when all are subscribed, or, if they
        ask for rows, have them.
        """
        return await self._order(do="subscribe", port=port, filters=filters, with_rows=with_rows)

    async def expect(self, events: int) -> dict[int, float]:
        """Wait for a number of events since the last call; return when each was read, by the number
        in its row. RuntimeError if one came twice.
        """
        noted = (await self._order(do="expect", events=events))["noted"]
        found = dict(noted)
        if len(found) < len(noted):
            raise RuntimeError("an event came twice")
        return found

    async def _order(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(ORDER_SECONDS):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the subscribers' process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    Child().run()
