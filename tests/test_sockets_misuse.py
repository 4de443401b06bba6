"""What a Socket.IO client may not do, and that nothing it sends does harm."""

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import connect as open_websocket_sync

from app.database.connections import Connection
from app.socketio.server import RESERVED_EVENTS
from app.socketio.session import INBOUND_BYTES, INBOUND_MESSAGES
from tests.support.feeds import eventually
from tests.support.floods import FINAL, TEXT, UPGRADE, client_frame
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import (
    PATH,
    QUERY,
    App,
    PollingClient,
    joined,
    opened,
)
from tests.support.writing import insert


@pytest.fixture
async def http(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=app.url, timeout=10) as client:
        yield client


# What a client may not do


async def test_reserved_events_are_refused(app: App) -> None:
    """A client that sends events with names of the library's own is closed."""
    for name in RESERVED_EVENTS:
        async with joined(app.url) as client:
            await client.send("42" + json.dumps([name, "x"]))
            assert await client.closed() == [], name
    await eventually(lambda: app.empty)


NONSENSE: list[str | bytes] = [
    b"", b"\x04binary", "451-" + json.dumps(["x", {"_placeholder": True, "num": 0}]),
    "461-0" + json.dumps([{"_placeholder": True, "num": 0}]), "450-[]", "4599999999999-[1]",
    "430[]", "4", "4x", "", "x", "7", "9{}", "0{}", "42", "42{}", "42[", "42[]", "42[1]",
    "42[null]", '42/admin,["x"]', "42" + "[" * 5000, "40", "40{}",
    "44{}", "4\ud7ff", "42\u0000", "49", "bQUJD", "b!", "6", "42" + "9" * 5000,
]  # fmt: skip


async def test_protocol_errors_close(
    app: App, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that sends nonsense is closed at once, and nobody else notices."""
    async with joined(app.url) as witness:
        for frame in NONSENSE:
            async with joined(app.url) as client:
                await client.send(frame)
                assert await client.closed() == [], frame
        await insert(connection, "a")
        assert (await witness.event())[1]["name"] == "a"
        await eventually(lambda: app.broadcast.stats().subscribers == 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_another_namespace(app: App, connection: Connection) -> None:
    """A client that asks for an unknown namespace is refused, and can still join the main one."""
    async with opened(app.url) as client:
        await client.send('40/admin,{"token":"x"}')
        frame = await client.frame()
        assert frame.startswith("44/admin,") and "namespace" in json.loads(frame[9:])["message"]
        await client.join()
        await insert(connection, "a")
        assert (await client.event())[0] == "thing:create"


async def test_odd_credentials(app: App) -> None:
    """Whatever a client sends with CONNECT, it joins as a new one unless it can continue."""
    odd: list[Any] = [
        None, [], "text", 7, {"pid": 1}, {"offset": []}, {"pid": "p", "offset": 5}, {"since": {}},
        {"timing": "yes", "pid": None}, {"pid": "p" * 50_000},
        {"pid": "\ud800", "offset": "\ud800"},
    ]  # fmt: skip
    for auth in odd:
        async with joined(app.url, auth) as client:
            assert client.recovered is False and client.pid != "p", auth


async def test_inbound_events_are_bounded(app: App) -> None:
    """A client that talks without end is closed, though each event is well-formed."""
    async with joined(app.url) as client:
        for number in range(INBOUND_MESSAGES + 5):
            await client.send(f'42["chatter",{number}]')
        assert await client.closed() == []
    await eventually(lambda: app.empty)


async def test_inbound_bytes_are_bounded(app: App, http: httpx.AsyncClient) -> None:
    """A frame or body longer than the limit closes the connection before it is kept."""
    async with joined(app.url) as client:
        await client.send('42["x","' + "x" * INBOUND_BYTES + '"]')
        assert await client.closed() == []
    polling = PollingClient(http)
    await polling.open()
    await polling.post("40")
    assert (await polling.post("4" + "x" * INBOUND_BYTES)).status_code in (400, 413)
    with suppress(httpx.HTTPError):
        await polling.post("1")
    await eventually(lambda: app.empty)


async def test_nonsense_by_polling(app: App, http: httpx.AsyncClient) -> None:
    """Nonsense in a POST is a 400 and ends the session."""
    nonsense = [b"\xff\xfe", b"4\x1e" * 40, b"42[", b"b\x1eb!", b"x", b"\x1e", b"4" * 99_000]
    for body in nonsense:
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        assert (await polling.post(body)).status_code in (400, 413), body
        assert (await polling.post("3")).status_code == 400, body
    await eventually(lambda: app.empty)


async def test_text_that_is_not_unicode(app: App, http: httpx.AsyncClient) -> None:
    """A client that smuggles half a surrogate into a packet is disconnected."""
    async with opened(app.url) as client:
        await client.send('4"0/\\ud800,"')
        assert await client.closed() == []
    polling = PollingClient(http)
    await polling.open()
    assert (await polling.post('4"0/\\ud800,"')).status_code == 400
    await eventually(lambda: app.empty)


async def test_a_refused_websocket_is_no_error(app: App, caplog: pytest.LogCaptureFixture) -> None:
    """Clients with sessions of another node, or of another version, are refused without a line in
    the log that would alarm anybody.
    """
    for query in ("?EIO=3&transport=websocket", "?EIO=4&transport=websocket&sid=elsewhere"):
        with pytest.raises(InvalidStatus) as refused:
            async with open_websocket(app.url.replace("http", "ws") + PATH + query, proxy=None):
                pass
        assert refused.value.response.status_code == 400
        assert json.loads(refused.value.response.body)["code"] in (1, 5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("glue", [b"\r\n" * 2, b"\n" * 2])
async def test_odd_requests_on_our_paths_are_answered(app: App, glue: bytes) -> None:
    """A request on a Socket.IO path that is very long, or not HTTP, still gets an answer."""
    address = urlsplit(app.url)
    long = b"X: " + b"x" * 20_000 if glue == b"\r\n" * 2 else b"X: y"
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    line = f"GET {PATH}{QUERY}polling HTTP/1.1\r\nHost: {address.netloc}\r\n".encode()
    writer.write(line + long + glue)
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 ")
    writer.close()


async def test_a_session_that_ends_during_a_post(
    any_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """A session ends while its client is in the middle of a POST: the POST is refused."""
    address = urlsplit(any_app.url)
    async with httpx.AsyncClient(base_url=any_app.url) as http:
        polling = PollingClient(http)
        await polling.open()
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST {polling.address} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 4\r\n"
        writer.write(head.encode() + b"\r\n40")
        await polling.post("40")
        await polling.post("nonsense")
        await eventually(lambda: any_app.empty)
        writer.write(b"{}")
        async with asyncio.timeout(5):
            assert b" 400 " in await reader.readline()
        writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_leaves_during_a_post(
    any_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """A client goes in the middle of a POST: its session lives on, and nothing is logged."""
    address = urlsplit(any_app.url)
    async with httpx.AsyncClient(base_url=any_app.url) as http:
        polling = PollingClient(http)
        await polling.open()
        for lines in ("Content-Length: 10\r\n\r\n40", "Transfer-Encoding: chunked\r\n\r\n2\r\n40"):
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            head = f"POST {polling.address} HTTP/1.1\r\nHost: {address.netloc}\r\n{lines}"
            writer.write(head.encode())
            await writer.drain()
            assert (await http.get("/healthz")).status_code == 200
            writer.close()
            await writer.wait_closed()
        assert (await polling.post("40")).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_post_in_chunks(any_app: App) -> None:
    """A polling client sends a POST in chunks; it is heard."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"4"
        yield b"0"

    async with httpx.AsyncClient(base_url=any_app.url) as http:
        polling = PollingClient(http)
        await polling.open()
        assert (await http.post(polling.address, content=chunks())).text == "ok"
        assert (await polling.poll())[0].startswith("40{")


@pytest.mark.parametrize("packet", ["4", "40", "42"])
async def test_deeply_nested_json(
    any_app: App, caplog: pytest.LogCaptureFixture, packet: str
) -> None:
    """A client sends JSON nested 50,000 deep; it is closed, and there is no traceback."""
    deep = packet + "[" * 50_000
    async with httpx.AsyncClient(base_url=any_app.url) as http, opened(any_app.url) as client:
        await client.send(deep)
        assert await client.closed() == []
        polling = PollingClient(http)
        await polling.open()
        assert (await polling.post(deep)).status_code == 400
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_cannot_forge_a_line_of_the_log(
    start_server: Callable[..., RunningServer],
) -> None:
    """A client puts line breaks and terminal commands wherever the log may quote it."""
    server = start_server(LOG_LEVEL="debug")
    breaks = [
        "\n",
        "\r",
        "\r\n",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\u2028",
        "\u2029",
        "\x1b[2K\x1b[1G",
    ]
    async with httpx.AsyncClient(base_url=server.url) as http:
        for line_break in breaks:
            forged = f"x{line_break}2026-01-01 00:00:00,000 CRITICAL tablecast: forged"
            for packet in (
                f"40/{forged},",
                f"42/{forged},[1]",
                f'42["{forged}"]',
                f"4{forged}",
                forged,
            ):
                async with joined(server.url) as client:
                    await client.send(packet)
                    await client.send("nonsense")
                    await client.closed()
            await http.get(f"{PATH}{QUERY}polling", params={"sid": forged})
            await http.get("/api/things/" + quote(forged), headers={"Origin": quote(forged)})
    lines = server.log_path.read_bytes().decode().splitlines()
    assert "forged" in server.log
    assert not [
        line for line in lines if not re.match(r"\d{4}-\d\d-\d\d .* (DEBUG|INFO) tablecast", line)
    ]


# Fuzzed

VALUES = st.text(max_size=20) | st.sampled_from(["4", "polling", "websocket", "0", "-1", "1e9"])
QUERIES = st.dictionaries(
    st.sampled_from(["EIO", "transport", "sid", "j", "t", "b64"]) | st.text(max_size=5), VALUES,
    max_size=6,
)  # fmt: skip
METHODS = st.sampled_from(["GET", "POST", "OPTIONS", "PUT", "DELETE", "HEAD", "PATCH"])
HEADERS = st.dictionaries(
    st.sampled_from(["Upgrade", "Connection", "Origin", "Accept-Encoding", "Content-Type", "Cookie",
                     "Sec-WebSocket-Version", "Sec-WebSocket-Key", "X-Forwarded-Proto"]),
    st.sampled_from(["websocket", "Upgrade", "13", "gzip", "null", "http://x", "a=b", "", "%ff"]),
    max_size=4,
)  # fmt: skip
PACKETS = st.lists(
    st.builds(
        "".join,
        st.lists(
            st.sampled_from([*"0123456b-[],/", "{}", '"x"', "\x1e", '{"pid":"p","offset":"o"}',
                             '{"_placeholder":true,"num":0}'])
            | st.text(max_size=5), max_size=8,
        ),
    )
    | st.binary(max_size=20),
    max_size=6,
)  # fmt: skip
FUZZING = settings(
    max_examples=scaled(120, 3000), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def no_fault_shows(server: RunningServer) -> None:
    """The log tells of no fault of ours, and the server is ready."""
    assert "Traceback" not in server.log
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_fuzzed_requests(server: RunningServer) -> None:
    """Whatever is asked of the Socket.IO paths, with and without a session, is no 5xx."""
    with httpx.Client(base_url=server.url, timeout=10) as http:

        @FUZZING
        @given(METHODS, QUERIES, HEADERS, st.binary(max_size=50), st.booleans(), st.booleans())
        def ask(
            method: str, query: dict[str, str], headers: dict[str, str], body: bytes,
            in_session: bool, well_formed: bool,
        ) -> None:  # fmt: skip
            if well_formed:
                query = query | {"EIO": "4", "transport": "polling"}
            if in_session:
                opening = http.get(f"{PATH}{QUERY}polling")
                assert opening.status_code == 200, opening.text
                query = query | {"sid": json.loads(opening.text[1:])["sid"]}
                if method == "GET":  # else it would wait for something to come
                    http.post(f"{PATH}{QUERY}polling&sid={query['sid']}", content="40")
            answer = http.request(method, PATH, params=query, headers=headers, content=body)
            assert answer.status_code < 500, answer.text

        ask()
    no_fault_shows(server)


PIECES = st.sampled_from(
    [
        b"GET ", b"POST ", PATH.encode(), QUERY.encode(), b"polling", b"websocket", b"/healthz",
        b"/api/things", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: localhost\r\n", b"Host: x\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Content-Length: 4\r\n", b"Content-Length: -1\r\n",
        b"Content-Type: application/json\r\n", b"Expect: 100-continue\r\n", b"\r\n", b"\n\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"Upgrade: h2c\r\n",
        b"Connection: close\r\n", b"Connection: Upgrade\r\n",
        b"4\r\n1234\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n", UPGRADE, UPGRADE[:-2],
        client_frame(FINAL | TEXT, b"40"), client_frame(FINAL | TEXT, b"42[")[:-3], b"{}",
        b"%ff%00",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"a" * 20_000,
    ]
) | st.binary(max_size=10)  # fmt: skip


def test_fuzzed_connections(server: RunningServer) -> None:
    """Whatever bytes a peer sends, however they are cut, no answer is a 5xx."""

    @FUZZING
    @given(st.lists(PIECES, max_size=12), st.booleans())
    def talk(pieces: list[bytes], whole: bool) -> None:
        with (
            suppress(ConnectionError, TimeoutError),
            socket.create_connection(("127.0.0.1", server.port), 0.05) as peer,
        ):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for data in [b"".join(pieces)] if whole else pieces:
                peer.sendall(data)
            received = b""
            while data := peer.recv(65536):
                received += data
                assert b"HTTP/1.1 5" not in received

    talk()
    no_fault_shows(server)
    assert "ERROR" not in server.log


def test_an_upgrade_with_a_body_is_refused(server: RunningServer) -> None:
    """A request for a WebSocket that has a body is answered, not left waiting."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    answer = httpx.request("GET", f"{server.url}{PATH}", headers=upgrade, content=b"x")
    assert answer.status_code == 400
    no_fault_shows(server)


def test_fuzzed_frames(server: RunningServer) -> None:
    """Whatever frames a client sends, before and after CONNECT, the server stands."""
    address = server.url.replace("http", "ws") + PATH + QUERY + "websocket"

    @FUZZING
    @given(PACKETS, st.booleans())
    def talk(frames: list[str | bytes], join: bool) -> None:
        with (
            suppress(ConnectionClosed, InvalidHandshake),
            open_websocket_sync(address, proxy=None, open_timeout=10) as websocket,
        ):
            for frame in ["40"] * join + frames:
                websocket.send(frame)
            websocket.recv(timeout=5)

    talk()
    no_fault_shows(server)


def test_fuzzed_bodies(server: RunningServer) -> None:
    """Whatever a polling client posts is answered with 200, 400 or 413."""
    with httpx.Client(base_url=server.url, timeout=10) as http:

        @FUZZING
        @given(PACKETS, st.booleans())
        def post(packets: list[str | bytes], join: bool) -> None:
            opening = http.get(f"{PATH}{QUERY}polling").text
            address = f"{PATH}{QUERY}polling&sid={json.loads(opening[1:])['sid']}"
            parts = [part.encode() if isinstance(part, str) else part for part in packets]
            for body in [b"40"] * join + [b"\x1e".join(parts)]:
                assert http.post(address, content=body).status_code in (200, 400, 413)

        post()
    no_fault_shows(server)
