"""What a peer may do before and around a handler: lengths, times, numbers and hosts are bounded."""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from app.database.connections import Connection
from app.doorway import limits
from app.doorway.limits import HEAD_BYTES, MOST_PIPELINED
from app.socketio import codec
from app.socketio import engine as engine_module
from app.socketio.session import INBOUND_MESSAGES
from tests.support.feeds import eventually
from tests.support.floods import CONTINUATION, FINAL, PING, TEXT, UPGRADE, client_frame
from tests.support.machine import require
from tests.support.server import RunningServer
from tests.support.sockets import (
    PATH,
    QUERY,
    App,
    PollingClient,
    joined,
    opened,
    serving_here,
    until_ready,
)

WAITING_FOR_THINGS = """
    SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'things'::regclass
"""
LIMIT_S = 10.0
SHORT_S = 0.3
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
OURS = f"GET {PATH}{QUERY}polling HTTP/1.1\r\nHost: localhost\r\n".encode()
HALF_A_POST = (
    b"POST /api/things HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"name": "half'
)


class Peer:
    """A peer that sends any bytes it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes, piece_bytes: int = 0) -> None:
        """Send bytes, in segments of at most `piece_bytes`, until the other side closes."""
        if not piece_bytes:
            self.writer.write(data)
            return
        for at in range(0, len(data), piece_bytes):
            if self.writer.is_closing() or self.reader.at_eof():
                return
            self.writer.write(data[at : at + piece_bytes])
            await asyncio.sleep(0)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers and body."""
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            line, *lines = head.decode().strip().split("\r\n")
            headers = dict(each.lower().split(": ", 1) for each in lines)
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(line.split()[1]), headers, body

    async def problem(self) -> tuple[int, str]:
        """The next answer, which must be a problem and the last: status and sentence."""
        status, headers, body = await self.answer()
        assert headers["content-type"] == "application/problem+json"
        assert headers["connection"] == "close"
        details = json.loads(body)
        assert details["status"] == status and details["detail"].endswith(".")
        assert await self.rest() == b""
        return status, details["detail"]

    async def rest(self) -> bytes:
        """Everything until the other side closes."""
        async with asyncio.timeout(LIMIT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def peer_of(url: str, **options: Any) -> AsyncIterator[Peer]:
    """A connection to a server."""
    address = urlsplit(url)
    peer = Peer(*await asyncio.open_connection(address.hostname, address.port, **options))
    try:
        yield peer
    finally:
        peer.writer.transport.abort()


@pytest.fixture
async def hasty_app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    """The application, with little patience."""
    monkeypatch.setattr(limits, "PATIENCE_S", SHORT_S)
    monkeypatch.setattr(limits, "BODY_S", SHORT_S)
    monkeypatch.setattr(engine_module, "PATIENCE_S", SHORT_S)
    codec.libraries()  # importing them with the first packet would take a good part of that
    async with serving_here(database_url) as app:
        yield app


# Length


@pytest.mark.parametrize("piece_bytes", [0, 1000, 7])
@pytest.mark.parametrize("before", [b"", HEALTH + b"\r\n"], ids=["first", "later"])
@pytest.mark.parametrize(
    "head",
    [
        HEALTH + b"x: " + b"y" * 3 * HEAD_BYTES,
        HEALTH + b"x: y\r\n" * (3 * HEAD_BYTES // 6),
        b"GET /" + b"y" * 3 * HEAD_BYTES,
        OURS + b"x: " + b"y" * 3 * HEAD_BYTES,
        OURS + b"x: y\r\n" * (3 * HEAD_BYTES // 6),
        OURS.replace(b"polling", b"polling" + b"y" * 3 * HEAD_BYTES),
    ],
    ids=["header", "headers", "URL", "our header", "our headers", "our URL"],
)
async def test_long_heads_are_refused(
    app: App, head: bytes, before: bytes, piece_bytes: int
) -> None:
    """A peer sends a header, headers or a URL without end, at once or in small segments, in its
    first request or a later one: it is told so, and the connection is closed.
    """
    async with peer_of(app.url) as peer:
        if before:
            await peer.send(before)
            assert (await peer.answer())[0] == 200
        await peer.send(head, piece_bytes)
        assert (await peer.problem())[0] == 431


@pytest.mark.parametrize("line", [HEALTH, OURS], ids=["health", "ours"])
@pytest.mark.parametrize("piece_bytes", [0, 1])
async def test_the_longest_head_is_served(app: App, line: bytes, piece_bytes: int) -> None:
    """A request that just fits is served, however it arrives; with a few bytes more it is not."""
    for extra, status in ((-50, 200), (50, 431)):
        async with peer_of(app.url) as peer:
            head = line + b"x: " + b"y" * (HEAD_BYTES + extra - len(line) - 7) + b"\r\n\r\n"
            await peer.send(head, piece_bytes)
            assert (await peer.answer())[0] == status


async def test_what_follows_the_chunks_is_bounded(app: App) -> None:
    """A peer ends a chunked body with trailers without end, or names a chunk's size at length."""
    for endless in (b"0\r\nx: ", b"0\r\n" + b"x: y\r\n" * 3000, b"1;"):
        async with peer_of(app.url) as peer:
            await peer.send(
                HALF_A_POST.replace(b"Content-Length: 100", b"Transfer-Encoding: chunked")[:-14]
            )
            await peer.send(endless + b"y" * 40_000, 1000)
            assert (await peer.problem())[0] == 431


# Time


async def test_silent_connections_are_closed(hasty_app: App) -> None:
    """A peer connects and says nothing; another one has had an answer and says nothing more."""
    async with peer_of(hasty_app.url) as silent, peer_of(hasty_app.url) as kept:
        await kept.send(HEALTH + b"\r\n")
        assert (await kept.answer())[0] == 200
        assert await silent.rest() == b"" and await kept.rest() == b""


@pytest.mark.parametrize("half", [HEALTH, OURS, HALF_A_POST, UPGRADE[:-2], b"GET /h"])
async def test_half_requests_are_answered(hasty_app: App, half: bytes) -> None:
    """A peer sends the beginning of a request, and then nothing, or a byte now and then."""
    async with peer_of(hasty_app.url) as still, peer_of(hasty_app.url) as slow:
        await still.send(half)
        await slow.send(half)

        async def drip() -> None:
            while not slow.writer.is_closing():
                await slow.send(b"y")
                await asyncio.sleep(SHORT_S / 10)

        dripping = asyncio.create_task(drip())
        try:
            assert (await still.problem())[0] == 408
            assert (await slow.problem())[0] == 408
        finally:
            dripping.cancel()


async def test_a_request_may_take_its_time(hasty_app: App, connection: Connection) -> None:
    """A handler that takes longer than a peer may is not interrupted."""
    async with peer_of(hasty_app.url) as peer, connection.transaction():
        await connection.execute("LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
        await peer.send(HEALTH.replace(b"healthz", b"api/things") + b"\r\n")
        await asyncio.sleep(SHORT_S * 2)
        await connection.execute("COMMIT")
        assert (await peer.answer())[0] == 200
        await connection.execute("BEGIN")


async def test_unread_responses_end(hasty_app: App, connection: Connection) -> None:
    """A peer asks for a long list and reads nothing, whether the connection is kept or not, or
    another request follows.
    """
    await connection.execute(
        "INSERT INTO things (name, info) SELECT i, repeat(md5(i::text), 1000)"
        " FROM generate_series(1, 500) AS i"
    )
    get = HEALTH.replace(b"healthz", b"api/things")
    for request in (
        get + b"\r\n", get + b"Connection: close\r\n\r\n", get + b"\r\n" + HEALTH + b"\r\n"
    ):  # fmt: skip
        async with peer_of(hasty_app.url, limit=1) as peer:
            await peer.send(request)
            async with asyncio.timeout(LIMIT_S):
                while not peer.writer.transport.is_closing():
                    peer.writer.write(b"\r\n")  # finds out that the connection is gone
                    await asyncio.sleep(0.02)


async def test_unfinished_upgrades_end(hasty_app: App) -> None:
    """A WebSocket never sends its probe, or never confirms; its session ends, and so does it."""
    async with httpx.AsyncClient(base_url=hasty_app.url) as http:
        for frames in ([], ["2probe"]):
            polling = PollingClient(http)
            await polling.open()
            address = hasty_app.url.replace("http", "ws") + polling.address
            address = address.replace("polling", "websocket")
            async with open_websocket(address, proxy=None) as websocket, asyncio.timeout(LIMIT_S):
                for frame in frames:
                    await websocket.send(frame)
                with pytest.raises(ConnectionClosed):
                    while True:
                        await websocket.recv()
    await eventually(lambda: hasty_app.empty and hasty_app.socketio.connections == 0)


async def test_closing_handshakes_end(hasty_app: App) -> None:
    """A client closes its WebSocket but not the connection."""
    async with peer_of(hasty_app.url) as peer:
        await peer.send(UPGRADE + client_frame(FINAL | 0x08, (1000).to_bytes(2)))
        assert b"101 Switching" in await peer.rest()
    await eventually(lambda: hasty_app.socketio.connections == 0)


# Pipelining and upgrades


@pytest.mark.parametrize("piece_bytes", [0, 7])
async def test_an_offer_of_another_protocol_is_passed_over(app: App, piece_bytes: int) -> None:
    """A client offers to go on in HTTP/2, and posts. Its body is a body, whatever is in it, and
    not the next request.
    """
    body = b'{"name": "GET /healthz HTTP/1.1"}'
    head = (
        b"POST /api/things HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nContent-Type: application/json\r\n"
    )
    smuggled = HEALTH + b"\r\n"
    async with peer_of(app.url) as peer:
        await peer.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body, piece_bytes)
        assert (await peer.answer())[0] == 201
        await peer.send(head + b"Content-Length: %d\r\n\r\n" % len(smuggled) + smuggled)
        assert (await peer.answer())[0] == 400
        chunked = b"Transfer-Encoding: chunked\r\n\r\n21\r\n" + body.replace(b"GET", b"PUT")
        await peer.send(head + chunked + b"\r\n0\r\n\r\n" + HEALTH + b"\r\n", piece_bytes)
        assert (await peer.answer())[0] == 201
        assert (await peer.answer())[0] == 200
        await peer.send(
            head.replace(b"Upgrade, ", b"Upgrade, close, ") + b"Content-Length: 0\r\n\r\n"
        )
        assert (await peer.answer())[0] == 400
        assert await peer.rest() == b""


@pytest.mark.parametrize("offer", [b"", b"Connection: upgrade\r\nUpgrade: h2c\r\n"])
@pytest.mark.parametrize("target", [b"localhost:80", b"/healthz", b"http://localhost/healthz"])
async def test_a_tunnel_is_refused(app: App, target: bytes, offer: bytes) -> None:
    """A peer takes the server for a proxy."""
    async with peer_of(app.url) as peer:
        head = b"CONNECT " + target + b" HTTP/1.1\r\nHost: localhost\r\n"
        await peer.send(head + offer + b"\r\n" + HEALTH + b"\r\n")
        assert (await peer.answer())[0] in (400, 404, 405)


async def test_peers_that_leave_at_any_moment(start_server: Callable[..., RunningServer]) -> None:
    """Browsers reload pages: requests are given up at once, a little later, or half read."""
    server = start_server()
    files = HEALTH.replace(b"healthz", b"feed.js") + b"\r\n"
    for number in range(600):
        async with peer_of(server.url) as peer:
            await peer.send(files * (1 + number % 2))
            await asyncio.sleep(0.004 * random.random())
    assert (await asyncio.to_thread(server.stop)) == 0
    assert "Traceback" not in server.log and "ERROR" not in server.log


async def test_a_poll_that_nobody_waits_for_ends_the_session(app: App) -> None:
    """A client polls, sends another request after that, and is gone: whatever the poll would have
    been answered is lost, so it has to begin again.
    """
    async with httpx.AsyncClient(base_url=app.url) as http:
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        await polling.poll()
        async with peer_of(app.url) as peer:
            poll = f"GET {polling.address} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            await peer.send(poll + HEALTH + b"\r\n")
        await eventually(lambda: app.empty)


async def test_pipelined_requests_are_answered_in_order(app: App) -> None:
    """A peer sends some requests at once and gets all answers; then too many, of which it gets the
    first ones before the connection is closed.
    """
    async with peer_of(app.url) as peer:
        await peer.send(b"".join(HEALTH.replace(b"healthz", b"%d" % i) + b"\r\n" for i in range(5)))
        assert [(await peer.answer())[0] for _ in range(5)] == [404] * 5
    async with peer_of(app.url) as peer:
        await peer.send((HEALTH + b"\r\n") * 500)
        answers = (await peer.rest()).split(b"HTTP/1.1 ")[1:]
        assert MOST_PIPELINED <= len(answers) < 500
        assert all(answer.startswith(b"200 ") for answer in answers)
        assert b"connection: close" in answers[-1].lower()


async def test_a_bad_request_does_not_harm_the_one_before(app: App) -> None:
    """A peer sends nonsense after a request: the request is answered, and then it is closed."""
    async with peer_of(app.url) as peer:
        await peer.send(HEALTH + b"\r\n" + b"nonsense\r\n\r\n")
        assert (await peer.answer())[0] == 200
        assert await peer.rest() == b""


async def test_a_refusal_waits_for_the_body(app: App) -> None:
    """A peer sends a body of another type some time after the head, and then another request on the
    same connection: both are answered.
    """
    head = b"POST /api/things HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
    async with peer_of(app.url) as peer:
        await peer.send(head)
        async with httpx.AsyncClient(base_url=app.url) as http:  # the server has read the head
            assert (await http.get("/healthz")).status_code == 200
        await peer.send(b"{}")
        assert (await peer.answer())[0] == 415
        await peer.send(head + b"{}")
        assert (await peer.answer())[0] == 415


async def test_an_answer_that_does_not_wait_for_the_body(app: App) -> None:
    """A peer gets its answer though it goes on sending a body that nobody wants."""
    async with peer_of(app.url) as peer:
        await peer.send(
            HALF_A_POST.replace(b"application/json", b"text/plain").replace(b"100", b"3000000")
        )
        await peer.send(b"y" * 1_000_000, 50_000)
        assert (await peer.answer())[0] == 415
        assert await peer.rest() == b""


async def test_a_websocket_on_a_used_connection(app: App) -> None:
    """A proxy sends an upgrade on a connection that has served requests before; frames that come
    with it are heard.
    """
    async with peer_of(app.url) as peer:
        await peer.send(HEALTH + b"\r\n")
        assert (await peer.answer())[0] == 200
        odd = UPGRADE.replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\nX: y\r\nX: z\r\n\r\n")
        await peer.send(odd + client_frame(FINAL | TEXT, b"40"))
        assert (await peer.answer())[0] == 101
        async with asyncio.timeout(LIMIT_S):
            assert b"feed:hello" in await peer.reader.readuntil(b"feed:hello")
        assert app.socketio.connections == 1
    await eventually(lambda: app.empty and app.socketio.connections == 0)


async def test_another_upgrade_is_ignored(app: App) -> None:
    """A client offers HTTP/2 with each request, as curl --http2 does: it gets HTTP/1.1."""
    request = HEALTH + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    async with peer_of(app.url) as peer:
        await peer.send(request * 2)
        assert [(await peer.answer())[0] for _ in range(2)] == [200, 200]
        await peer.send(request)
        assert (await peer.answer())[0] == 200


@pytest.mark.parametrize("cut", [0, 1, 20])
async def test_frames_glued_to_the_handshake(app: App, cut: int) -> None:
    """A client does not wait for the handshake's answer: its frames, or parts, are not lost."""
    frame = client_frame(FINAL | TEXT, b"40")
    data = UPGRADE + frame
    async with peer_of(app.url) as peer:
        await peer.send(data[: len(data) - cut])
        await asyncio.sleep(0.05)
        await peer.send(data[len(data) - cut :])
        async with asyncio.timeout(LIMIT_S):
            assert b"feed:hello" in await peer.reader.readuntil(b"feed:hello")


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (PATH.encode(), b"/elsewhere", 404), (b"GET", b"POST", 400), (b": 13", b": 8", 400),
        (b"/1.1", b"/1.0", 400), (b"==\r\n", b"\r\n", 400),
        (b"Upgrade: websocket", b"Content-Length: 4\r\nUpgrade: websocket", 400),
    ],
)  # fmt: skip
async def test_odd_upgrades_are_refused(app: App, old: bytes, new: bytes, status: int) -> None:
    """A request for a WebSocket that there is not, or that no library would accept."""
    async with peer_of(app.url) as peer:
        await peer.send(UPGRADE.replace(old, new, 1) + b"body")
        assert (await peer.answer())[0] == status
        assert await peer.rest() == b""


async def test_a_message_in_tiny_segments_takes_linear_time(app: App) -> None:
    """A client sends a long message byte by byte."""
    async with peer_of(app.url) as peer:
        await peer.send(UPGRADE + client_frame(FINAL | TEXT, b"40"))
        await peer.reader.readuntil(b"feed:hello")
        session = client_frame(FINAL | TEXT, b"42" + b'["' + b"y" * 60_000 + b'"]')
        before = psutil.Process().cpu_times().user
        await peer.send(session, 30)
        await peer.send(client_frame(FINAL | 0x08))
        await peer.rest()
        assert psutil.Process().cpu_times().user - before < 2


async def test_fragments_and_pings_are_counted(app: App) -> None:
    """A client sends pings, or empty parts of a message, without end."""
    for head, frame in (
        (b"", client_frame(FINAL | PING)),
        (client_frame(TEXT), client_frame(CONTINUATION)),
    ):
        async with peer_of(app.url) as peer:
            await peer.send(
                UPGRADE + client_frame(FINAL | TEXT, b"40") + head + frame * (INBOUND_MESSAGES + 50)
            )
            await peer.rest()
    await eventually(lambda: app.empty and app.socketio.connections == 0)


# Number


async def test_a_full_node_refuses_clients(database_url: str) -> None:
    """A node with as many clients as it may have refuses others on every transport and still
    answers health checks; when one leaves another one gets in.
    """
    async with (
        serving_here(database_url, max_clients=3) as app,
        httpx.AsyncClient(base_url=app.url, headers={"Connection": "close"}) as http,
        AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(joined(app.url)) for _ in range(3)]
        for _ in range(3):
            with pytest.raises(InvalidStatus) as refused:
                async with opened(app.url):
                    pass
            answer = refused.value.response
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert b"MAX_CLIENTS" in answer.body
            polled = await http.get(f"{PATH}{QUERY}polling")
            assert polled.status_code == 503 and "MAX_CLIENTS" in polled.json()["detail"]
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/readyz")).status_code == 200
        await clients[0].websocket.close()
        await eventually(lambda: app.socketio.connections == 2)
        async with joined(app.url):
            assert (await http.get("/healthz")).status_code == 200


async def test_a_full_node_keeps_room_for_requests(database_url: str) -> None:
    """Peers that say nothing take every place of a node, and those kept for requests; a health
    check gets through all the same.
    """
    async with serving_here(database_url, max_clients=3) as app, AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer_of(app.url)) for _ in range(100)]
        async with httpx.AsyncClient(base_url=app.url) as http:
            for _ in range(5):
                assert (await http.get("/healthz")).status_code == 200
        assert (await peers[3].problem())[0] == 503  # the first that made room


async def test_sessions_are_bounded_on_any_server(database_url: str) -> None:
    """Polling clients open sessions and go: no more than allowed are kept, whatever serves them."""
    async with (
        serving_here(database_url, plain=True, max_clients=3) as app,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        answers = [await http.get(f"{PATH}{QUERY}polling") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 503, 503]
        assert "Retry-After" in answers[-1].headers and "MAX_CLIENTS" in answers[-1].text
        assert app.socketio.stats().sessions == 3
        with pytest.raises(InvalidStatus) as refused:
            async with opened(app.url):
                pass
        assert refused.value.response.status_code == 503


KNOCKING = """
import { io } from 'socket.io-client';
const socket = io(process.argv[1], {
  path: '/socket.io-client', reconnectionDelay: 50, reconnectionDelayMax: 100,
  transports: [process.argv[2]],
});
socket.on('connect_error', () => console.log('refused'));
socket.on('feed:hello', () => { console.log('in'); process.exit(0); });
"""


@pytest.mark.parametrize("transport", ["polling", "websocket"])
async def test_the_official_client_waits_for_room(database_url: str, transport: str) -> None:
    """The official client comes to a full node, keeps trying, and gets in once there is room."""
    async with serving_here(database_url, max_clients=1) as app, joined(app.url) as client:
        knocking = await asyncio.create_subprocess_exec(
            require("node"), "--input-type=module", "-e", KNOCKING, app.url, transport,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert knocking.stdout is not None
            async with asyncio.timeout(30):
                for _ in range(3):
                    assert await knocking.stdout.readline() == b"refused\n"
                await client.websocket.close()
                while (said := await knocking.stdout.readline()) != b"in\n":
                    assert said == b"refused\n"
        finally:
            if knocking.returncode is None:
                knocking.kill()
            await knocking.wait()


async def test_few_descriptors(start_server: Callable[..., RunningServer]) -> None:
    """A node may open few files, and far more clients come: it stays idle, answers requests, and
    can still reach its database.
    """
    server = start_server(files=160)
    await until_ready(server.url)
    async with AsyncExitStack() as stack, httpx.AsyncClient(base_url=server.url) as http:
        for _ in range(400):
            await stack.enter_async_context(peer_of(server.url))
        await until_idle(server.pid)
        for number in range(20):
            created = await http.post(
                "/api/things", json={"name": f"{number}"}, headers={"Connection": "close"}
            )
            assert created.status_code == 201
    assert "ERROR" not in server.log


async def until_idle(pid: int) -> None:
    """Wait for half a second in which a process uses little; one that spins never does."""
    process = psutil.Process(pid)
    async with asyncio.timeout(20):
        took_s = 0.5
        while took_s > 0.125:
            before = process.cpu_times()
            await asyncio.sleep(0.5)
            after = process.cpu_times()
            took_s = after.user + after.system - before.user - before.system


def test_more_clients_than_descriptors(
    start_server: Callable[..., RunningServer],
) -> None:
    """An operator asks for more clients than the process may have files."""
    with pytest.raises(RuntimeError) as refused:
        start_server(MAX_CLIENTS=1000, files=200)
    assert "MAX_CLIENTS is 1000" in str(refused.value) and "ulimit" in str(refused.value)


# Hosts

FOREIGN = ["evil.example", "evil.example:8000", "", "localhost.evil.example", "a b"]


async def test_foreign_hosts_are_refused(any_app: App) -> None:
    """A page of another site has its own name resolve to a developer's machine: it cannot read,
    write or connect.
    """
    async with httpx.AsyncClient(base_url=any_app.url) as http:
        for host in FOREIGN:
            for method, path in (
                ("GET", "/api/things"), ("POST", "/api/things"), ("GET", "/"), ("GET", "/healthz"),
                ("GET", f"{PATH}{QUERY}polling"), ("GET", "/nowhere"),
            ):  # fmt: skip
                answer = await http.request(
                    method, path, headers={"Host": host}, json={"name": "a"}
                )
                assert answer.status_code == 421, (host, path)
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert "ALLOWED_HOSTS" in answer.json()["detail"]
        assert (await http.get("/api/things", headers={"Host": "LOCALHOST.:1"})).text == "[]"
    for host in FOREIGN[:-1]:
        with pytest.raises(InvalidStatus) as refused:
            async with opened(any_app.url, additional_headers={"Host": host}):
                pass
        assert refused.value.response.status_code == 421
    assert any_app.empty


async def test_the_host_of_a_whole_url_counts(app: App) -> None:
    """A peer asks for a whole URL, as it would ask a proxy, whatever its Host header says."""
    async with peer_of(app.url) as peer:
        for host, status in ((b"evil.example", 421), (b"localhost:1", 200)):
            await peer.send(HEALTH.replace(b"/healthz", b"http://" + host + b"/healthz") + b"\r\n")
            assert (await peer.answer())[0] == status


@pytest.mark.parametrize("headers", [b"", b"Host: localhost\r\nHost: evil.example\r\n"])
async def test_a_host_must_be_one(app: App, headers: bytes) -> None:
    """A peer names no host, or two."""
    async with peer_of(app.url) as peer:
        await peer.send(b"GET /healthz HTTP/1.1\r\n" + headers + b"\r\n")
        assert (await peer.answer())[0] == 421
    async with peer_of(app.url) as peer:
        await peer.send(UPGRADE.replace(b"Host: localhost\r\n", headers))
        assert (await peer.answer())[0] in (400, 421)


async def test_listed_hosts_are_served(start_server: Callable[..., RunningServer]) -> None:
    """An operator lists the hosts of a server that listens everywhere."""
    server = start_server(HOST="0.0.0.0", ALLOWED_HOSTS="example.org, *.example.net")
    async with httpx.AsyncClient(base_url=server.url.replace("0.0.0.0", "127.0.0.1")) as http:
        for host, status in (
            ("example.org", 200), ("Example.ORG.:80", 200), ("a.example.net", 200),
            ("example.net", 421), ("evil.example", 421),
        ):  # fmt: skip
            assert (await http.get("/healthz", headers={"Host": host})).status_code == status, host


async def test_listening_on_ipv6(start_server: Callable[..., RunningServer]) -> None:
    """A developer's server listens on the loopback address of IPv6."""
    server = start_server(HOST="::1")
    assert server.url.startswith("http://[::1]:")
    async with httpx.AsyncClient(base_url=server.url) as http, joined(server.url):
        assert (await http.get("/healthz")).status_code == 200
        refused = await http.get("/healthz", headers={"Host": "evil.example"})
        assert refused.status_code == 421


# The end


async def test_a_half_sent_post_at_shutdown(server: RunningServer) -> None:
    """The server stops while peers are in the middle of their requests: it does not wait for them,
    and has nothing to complain of.
    """
    await until_ready(server.url)
    async with AsyncExitStack() as stack:
        for half in (
            b"",
            HEALTH,
            OURS,
            HALF_A_POST,
            OURS.replace(b"GET", b"POST") + b"Content-Length: 5\r\n\r\n",
        ):
            peer = await stack.enter_async_context(peer_of(server.url))
            await peer.send(half)
        await until_ready(server.url)
        assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
    assert "ERROR" not in server.log and "Traceback" not in server.log


async def test_a_slow_handler_at_shutdown(server: RunningServer, connection: Connection) -> None:
    """The server stops while a request waits for the database: it waits a while, not for ever, and
    has nothing to complain of.
    """
    await until_ready(server.url)
    async with peer_of(server.url) as peer, connection.transaction():
        await connection.execute("LOCK TABLE things IN ACCESS EXCLUSIVE MODE")
        await peer.send(HEALTH.replace(b"healthz", b"api/things") + b"\r\n")
        async with asyncio.timeout(LIMIT_S):
            while not await connection.fetchval(WAITING_FOR_THINGS):
                await asyncio.sleep(0.02)
        assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
        assert await peer.rest() == b""
    assert "ERROR" not in server.log and "Traceback" not in server.log


async def test_unread_responses_at_shutdown(server: RunningServer, connection: Connection) -> None:
    """The server stops while a peer does not read its response."""
    await connection.execute(
        "INSERT INTO things (name, info) SELECT i, repeat(md5(i::text), 1000)"
        " FROM generate_series(1, 500) AS i"
    )
    async with peer_of(server.url, limit=1) as peer:
        await peer.send(HEALTH.replace(b"healthz", b"api/things") + b"\r\n")
        await peer.reader.read(1)
        assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
    assert "ERROR" not in server.log and "Traceback" not in server.log
