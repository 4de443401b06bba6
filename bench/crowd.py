"""Many Socket.IO clients in one cheap process.

The server under test must be the bottleneck, so the crowd does the least a client can do: it
shakes hands, answers heartbeats, and counts events by searching what it reads, without parsing
it. One of the clients, the probe, also notes the age of each event when it reads it.

The parent gives orders as JSON lines (see `Crowd`); the child answers each with one line.
"""

import asyncio
import json
import re
import select
import socket
import sys
import time
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, Self

ORDER_SECONDS = 120
CONNECTING_AT_ONCE = 200
READ_BYTES = 256 * 1024
KEPT_BYTES = 512  # the end of the stream: holds the last event, with its offset
MARK = b'42["thing:create"'
PING = b"\x81\x012"
PING_LENGTH = PING[1:2]
PONG = b"\x81\x81\0\0\0\x003"  # client frames are masked; a mask of zeros leaves the text readable

UPGRADE = (
    b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

EVENT = re.compile(re.escape(MARK))
CONNECTED = re.compile(rb'40(\{"sid"[^}]*\})')
OFFSET = re.compile(rb'"([^"\\]*)"\]$')


class Transcript:
    """The bytes that clients returning from the same offset all read, and where its events are.

    Comparing a read with what another client has read is ten times as fast as counting the events
    in it. Whichever client is ahead extends the transcript.
    """

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends = array("q")  # of the marks

    def follow(self, at: int, data: memoryview) -> int | None:
        """Return the number of events whose mark ends in `data`, read at position `at`, or None if
        it differs from what others have read there.
        """
        known = min(len(data), len(self.text) - at)
        if not self.text.startswith(data[:known], at):
            return None
        if known < len(data):
            unsearched = max(0, len(self.text) - len(MARK) + 1)
            self.text += data[known:]
            self.ends.extend(mark.end() for mark in EVENT.finditer(self.text, unsearched))
        return bisect_right(self.ends, at + len(data)) - bisect_right(self.ends, at)


class Client:
    """A connection that counts events."""

    __slots__ = (
        "at", "auth", "count", "joined", "pid", "ready_mark", "socket", "tail", "transcript",
    )  # fmt: skip

    def __init__(self, ready_mark: bytes, auth: bytes = b"") -> None:
        self.ready_mark = ready_mark
        self.auth = auth
        self.pid: str | None = None
        self.transcript: Transcript | None = None
        self.at = 0  # in the transcript
        self.count = 0

    def connect(self, port: int) -> None:
        """Open the connection and request a WebSocket."""
        self.tail = b""
        self.joined = False
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setblocking(False)
        self.socket.sendall(UPGRADE % port)

    def join(self, data: bytes) -> int:
        """Go on with the handshake; return the number of events that came with its end."""
        asked = b'0{"sid"' in self.tail
        self.tail += data
        if not asked and b'0{"sid"' in self.tail:
            self.socket.sendall(client_frame(b"40" + self.auth))
        if self.ready_mark not in self.tail:
            return 0
        self.joined = True
        connected = CONNECTED.search(self.tail)
        assert connected is not None
        self.pid = json.loads(connected[1]).get("pid")
        found = self.tail.count(MARK)
        if self.transcript is not None:
            hello_ends = self.tail.find(b"]", self.tail.index(self.ready_mark)) + 1
            missed = memoryview(self.tail)[hello_ends:]
            if not hello_ends or self.transcript.follow(0, missed) is None:
                self.transcript = None
            self.at = len(missed)
        self.tail = self.tail[-KEPT_BYTES:]
        self.count += found
        return found

    def read(self, buffer: bytearray, end: int) -> int:
        """Count the events in `buffer[KEPT_BYTES:end]`, including one begun in the tail."""
        start = KEPT_BYTES - len(self.tail)
        buffer[start:KEPT_BYTES] = self.tail
        found = None
        if self.transcript is not None:
            found = self.transcript.follow(self.at, memoryview(buffer)[KEPT_BYTES:end])
            self.at += end - KEPT_BYTES
        if found is None:
            self.transcript = None
            found = buffer.count(MARK, max(start, KEPT_BYTES - len(MARK) + 1), end)
        # A search for one byte is a memchr, sixty times as fast as one for three. Only frames of
        # 256 to 511 bytes have this byte in their length, too.
        ping = max(start, KEPT_BYTES - len(PING) + 1)
        if buffer.find(PING_LENGTH, ping, end) >= 0 and buffer.find(PING, ping, end) >= 0:
            self.socket.sendall(PONG)
        self.tail = bytes(buffer[max(start, end - KEPT_BYTES) : end])
        self.count += found
        return found

    def resume(self, transcripts: dict[bytes, Transcript]) -> None:
        """Prepare to continue after the last event, as the official client does."""
        offset = OFFSET.search(self.tail)
        if self.pid is not None and offset is not None:
            self.auth = json.dumps({"pid": self.pid, "offset": offset[1].decode()}).encode()
            self.transcript = transcripts.setdefault(offset[1], Transcript())


class Probe(Client):
    """A client that also notes the ids of events, and their ages when it reads them."""

    __slots__ = ("ages", "ids", "mark", "pattern")

    def __init__(self, ready_mark: bytes, names: str) -> None:
        super().__init__(ready_mark)
        self.mark = f'"name":"{names}'.encode()
        self.pattern = re.compile(
            rb'"id":(\d+),%s[^"]*","info":"[^"]*","created_at":"([^"]*)"' % re.escape(self.mark)
        )
        self.forget()

    def forget(self) -> None:
        """Discard what was noted."""
        self.ids = array("q")
        self.ages = array("d")

    def read(self, buffer: bytearray, end: int) -> int:
        """Count the events, and note those that end in `buffer[KEPT_BYTES:end]`."""
        now = time.time()
        start = KEPT_BYTES - len(self.tail)
        found = super().read(buffer, end)
        if buffer.find(self.mark, start, end) >= 0:
            for event in self.pattern.finditer(buffer, start, end):
                if event.end() > KEPT_BYTES:  # else it was noted with the tail
                    self.ids.append(int(event[1]))
                    written = datetime.fromisoformat(event[2].decode())
                    self.ages.append(now - written.timestamp())
        return found


class Child:
    """The crowd's own process: orders on standard input, all sockets in one epoll."""

    def __init__(self) -> None:
        self.poll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.lost: list[Client] = []
        self.joining: set[int] = set()
        self.to_connect: list[Client] = []
        self.probe: Probe | None = None
        self.port = 0
        self.total = 0
        self.expected: int | None = None
        self.expected_lost: int | None = None
        self.connecting = False
        self.cpu_at_order = 0.0

    def run(self) -> None:
        """Run until the parent closes standard input."""
        buffer = bytearray(KEPT_BYTES + READ_BYTES)
        view = memoryview(buffer)[KEPT_BYTES:]
        orders = sys.stdin.fileno()
        self.poll.register(orders, select.EPOLLIN)
        clients = self.clients
        while True:
            for fd, _ in self.poll.poll():
                if fd == orders:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self.cpu_at_order = time.process_time()
                    self.obey(json.loads(line))
                    continue
                client = clients.get(fd)
                if client is None:  # closed since by an order
                    continue
                try:
                    size = client.socket.recv_into(view)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    size = 0
                if not size:
                    self.lose(client, fd)
                elif client.joined:
                    self.total += client.read(buffer, KEPT_BYTES + size)
                else:
                    self.join(client, fd, bytes(view[:size]))
            self.report()

    def obey(self, order: dict[str, Any]) -> None:
        """Start what the parent ordered."""
        match order["do"]:
            case "connect":
                self.port = order["port"]
                ready_mark = order["ready_mark"].encode()
                self.to_connect = [Client(ready_mark) for _ in range(order["clients"])]
                if order["probe"] is not None:
                    self.probe = Probe(ready_mark, order["probe"])
                    self.to_connect[len(self.to_connect) // 2] = self.probe
                self.connecting = True
            case "reconnect":
                self.to_connect, self.lost = self.lost, []
                transcripts: dict[bytes, Transcript] = {}
                for client in self.to_connect:
                    client.resume(transcripts)
                self.connecting = True
            case "close":
                for fd, client in self.clients.items():
                    self.poll.unregister(fd)
                    client.socket.close()
                self.clients.clear()
                self.answer()
            case "expect":
                self.expected = order["total"]
            case "counts":
                counts = [client.count for client in self.clients.values()]
                self.answer(total=self.total, least=min(counts), most=max(counts))
            case "lost":
                self.answer(lost=len(self.lost))
            case "expect_lost":
                self.expected_lost = order["clients"]
            case "noted":
                assert self.probe is not None
                self.answer(
                    ages=list(self.probe.ages),
                    ids=list(self.probe.ids),
                )
                self.probe.forget()

    def join(self, client: Client, fd: int, data: bytes) -> None:
        """Go on with a client's handshake."""
        self.total += client.join(data)
        if client.joined:
            self.joining.discard(fd)

    def lose(self, client: Client, fd: int) -> None:
        """Forget a closed connection; if its handshake was incomplete, connect it again."""
        self.poll.unregister(fd)
        client.socket.close()
        del self.clients[fd]
        if fd in self.joining:
            self.joining.discard(fd)
            self.to_connect.append(client)
        else:
            self.lost.append(client)

    def report(self) -> None:
        """Connect more clients, and answer the parent once its order is done."""
        while self.to_connect and len(self.joining) < CONNECTING_AT_ONCE:
            client = self.to_connect.pop()
            try:
                client.connect(self.port)
            except ConnectionRefusedError:  # the server is restarting
                self.to_connect.append(client)
                time.sleep(0.005)
                continue
            fd = client.socket.fileno()
            self.clients[fd] = client
            self.joining.add(fd)
            self.poll.register(fd, select.EPOLLIN)
        if self.connecting and not self.to_connect and not self.joining:
            self.connecting = False
            self.answer(clients=len(self.clients))
        if self.expected is not None and self.total >= self.expected:
            self.expected = None
            self.answer(total=self.total)

        if self.expected_lost is not None and len(self.lost) >= self.expected_lost:
            self.expected_lost = None
            self.answer(lost=len(self.lost))

    def answer(self, **answer: Any) -> None:
        """Answer the parent, adding the time and the CPU used since its order."""
        answer["at"] = time.monotonic()
        answer["cpu"] = time.process_time() - self.cpu_at_order
        print(json.dumps(answer), flush=True)


class Crowd:
    """The parent's side: orders, each answered when it is done; TimeoutError if it never is.

    The answers hold `at`, by the monotonic clock, and `cpu`, the seconds the child has used since
    the order.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.clients = 0

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator[Self]:
        """Start the process; kill it, and with it all connections, at the end."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.crowd",
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

    async def connect(
        self, port: int, clients: int, ready_mark: str, probe: str | None = None
    ) -> dict[str, Any]:
        """Connect clients; return when each has joined, that is, has read `ready_mark`.

        One of them notes the events of rows whose names begin with `probe`, unless that is None.
        """
        self.clients += clients
        return await self._order(
            do="connect", port=port, clients=clients, ready_mark=ready_mark, probe=probe
        )

    async def close(self) -> None:
        """Close all connections."""
        self.clients = 0
        await self._order(do="close")

    async def reconnect(self) -> dict[str, Any]:
        """Reconnect the lost clients, each from its last offset; return when all have joined."""
        return await self._order(do="reconnect")

    async def expect(self, total: int) -> dict[str, Any]:
        """Return when all clients together have counted `total` events since they were started."""
        return await self._order(do="expect", total=total)

    async def check(self, each: int) -> None:
        """Raise RuntimeError unless every client counted exactly `each` events."""
        counts = await self._order(do="counts")
        if not counts["least"] == counts["most"] == each:
            raise RuntimeError(f"clients should have counted {each} events each: {counts}")

    async def expect_lost(self, clients: int) -> None:
        """Return when `clients` clients have noticed that their connection is closed."""
        await self._order(do="expect_lost", clients=clients)

    async def lost(self) -> int:
        """Return the number of clients that have lost their connection."""
        return int((await self._order(do="lost"))["lost"])

    async def ages(self) -> dict[int, float]:
        """Return what the probe has noted since the last call: ages in seconds by id.

        RuntimeError if it read a row twice.
        """
        noted = await self._order(do="noted")
        ages = dict(zip(noted["ids"], noted["ages"], strict=True))
        if len(ages) < len(noted["ids"]):
            raise RuntimeError("the probe read a row twice")
        return ages

    async def _order(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(ORDER_SECONDS):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the crowd's process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def client_frame(text: bytes) -> bytes:
    """Return a text as a WebSocket frame of a client."""
    if len(text) < 126:
        return b"\x81" + bytes([0x80 | len(text)]) + b"\0\0\0\0" + text
    return b"\x81\xfe" + len(text).to_bytes(2, "big") + b"\0\0\0\0" + text


if __name__ == "__main__":
    Child().run()
