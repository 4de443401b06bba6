"""Engine.IO protocol 4, as its official test suite has it.

The suite is docs/engine.io-protocol/v4-test-suite/test-suite.js in the repository of Socket.IO.
Each test here is named after the suite's section, transport and test; those after "Beyond the
suite" have no model in it. The suite's server sends every message back, and this one takes no
messages from clients but CONNECT. So where the suite waits for an echo, these tests join the
namespace and wait for the event of a row.

Every test of the suite has its counterpart. These apply only in part:

message, HTTP long-polling, "one plain text packet" and "several plain text packets"
    Nothing is echoed: what is sent is CONNECT and events, what is received is CONNECT and events.
message, HTTP long-polling, "plain text and binary packets"; WebSocket, "a binary packet"
    Well-formed binary messages end the session: this server has no use for them.
handshake, "successfully opens a session"
    `maxPayload` is this server's own limit, not the suite's 1,000,000.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import socketio
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from app.database.connections import Connection
from app.socketio import engine as engine_module
from tests.support.feeds import eventually
from tests.support.server import RunningServer
from tests.support.sockets import (
    FRAME_TIMEOUT_S,
    PATH,
    App,
    PollingClient,
    RawClient,
    created,
    joined,
    opened,
    serving_here,
    until_ready,
    waiting_poll,
)
from tests.support.writing import insert

PING_INTERVAL_S, PING_TIMEOUT_S = 0.3, 0.2
OPENING_KEYS = {"sid", "upgrades", "pingInterval", "pingTimeout", "maxPayload"}
SEPARATOR = "\x1e"
ANSWER_PACKETS = 16  # python-engineio's client refuses to decode more

TRANSPORT_UNKNOWN = {"code": 0, "message": "Transport unknown"}
SESSION_UNKNOWN = {"code": 1, "message": "Session ID unknown"}
BAD_METHOD = {"code": 2, "message": "Bad handshake method"}
BAD_REQUEST = {"code": 3, "message": "Bad request"}
UNSUPPORTED_VERSION = {"code": 5, "message": "Unsupported protocol version"}

# Queries that open no session, with what is wrong with them; `{}` is the transport.
WRONG_VERSION = ["?transport={}", "?EIO=abc&transport={}", "?EIO=3&transport={}"]
WRONG_TRANSPORT = ["?EIO=4", "?EIO=4&transport=abc"]

MALFORMED = ["abc", "", "7"]


@pytest.fixture
def app(any_app: App) -> App:
    """The application, with the default heartbeat, which is too slow to show."""
    return any_app


@pytest.fixture
async def pinging(database_url: str, plain: bool) -> AsyncIterator[App]:
    """The application with the heartbeat of the suite."""
    async with serving_here(
        database_url, plain=plain, ping_interval=PING_INTERVAL_S, ping_timeout=PING_TIMEOUT_S
    ) as served:
        yield served


@asynccontextmanager
async def session(url: str) -> AsyncIterator[PollingClient]:
    """A polling session that has not sent CONNECT."""
    async with httpx.AsyncClient(base_url=url, timeout=FRAME_TIMEOUT_S) as http:
        polling = PollingClient(http)
        await polling.open()
        yield polling


@pytest.fixture
async def polling(app: App) -> AsyncIterator[PollingClient]:
    """A polling session that has not sent CONNECT."""
    async with session(app.url) as client:
        yield client


async def get(polling: PollingClient) -> httpx.Response:
    """Poll, and return the answer as it is."""
    return await polling.http.get(polling.address)


async def join(polling: PollingClient) -> None:
    """Send CONNECT, and take its answer and hello."""
    assert (await polling.post("40")).status_code == 200
    assert_joined((await get(polling)).text.split(SEPARATOR))


async def poll_names(polling: PollingClient, count: int) -> list[str]:
    """Poll until `count` things were created; return their names."""
    names: list[str] = []
    while len(names) < count:
        names += [created(packet) for packet in (await get(polling)).text.split(SEPARATOR)]
    return names


@asynccontextmanager
async def websocket_of(polling: PollingClient) -> AsyncIterator[RawClient]:
    """A WebSocket for the session of a polling client."""
    url = str(polling.http.base_url).rstrip("/").replace("http", "ws", 1)
    address = url + polling.address.replace("transport=polling", "transport=websocket")
    async with open_websocket(address, proxy=None, close_timeout=0.5) as websocket:
        yield RawClient(websocket, {})


@asynccontextmanager
async def probed(polling: PollingClient) -> AsyncIterator[RawClient]:
    """A WebSocket that has been probed; what is left to do for an upgrade is to send it."""
    async with websocket_of(polling) as client:
        await client.send("2probe")
        assert await client.frame() == "3probe"
        yield client


def assert_joined(packets: list[str]) -> None:
    """The packets are the answer to CONNECT."""
    answer, hello = packets
    assert answer.startswith('40{"sid":') and hello.startswith('42["feed:hello",')


def assert_refused(answer: httpx.Response, fault: dict[str, Any]) -> None:
    """The answer is 400 and says which fault there was in the request."""
    assert answer.status_code == 400
    assert answer.headers["Content-Type"].split(";")[0] == "application/json", answer.text
    assert answer.json() == fault


async def assert_websocket_refused(app: App, query: str, fault: dict[str, Any] | None) -> None:
    """The handshake is refused with an HTTP status; where a fault is given, 400 and that."""
    address = app.url.replace("http", "ws", 1) + PATH + query
    with pytest.raises(InvalidStatus) as refusal:
        async with open_websocket(address, proxy=None):
            pass
    response = refusal.value.response
    assert 400 <= response.status_code < 500
    if fault is not None:
        assert response.status_code == 400
        assert response.headers["Content-Type"].split(";")[0] == "application/json"
        assert json.loads(response.body) == fault


async def assert_gone(polling: PollingClient) -> None:
    """Nothing is left of the session."""
    assert_refused(await get(polling), SESSION_UNKNOWN)
    assert_refused(await polling.post("3"), SESSION_UNKNOWN)


async def assert_turned_away(poll: "asyncio.Task[httpx.Response]") -> None:
    """The poll ended with 400, or its connection did, and it got no CLOSE."""
    try:
        answer = await poll
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        return  # its connection has ended
    assert answer.status_code == 400, answer.text


# Handshake


async def test_handshake_polling_opens_a_session(pinging: App) -> None:
    """A GET without a session is answered with OPEN, which offers the upgrade."""
    async with httpx.AsyncClient(base_url=pinging.url) as http:
        answer = await http.get(PATH + "?EIO=4&transport=polling")
    assert answer.status_code == 200 and answer.text[0] == "0"
    opening = json.loads(answer.text[1:])
    assert set(opening) == OPENING_KEYS
    assert isinstance(opening["sid"], str) and opening["sid"]
    assert opening["upgrades"] == ["websocket"]
    assert (opening["pingInterval"], opening["pingTimeout"]) == (300, 200)
    assert isinstance(opening["maxPayload"], int) and opening["maxPayload"] > 0


@pytest.mark.parametrize("query", WRONG_VERSION)
async def test_handshake_polling_fails_with_an_invalid_eio(app: App, query: str) -> None:
    """A client that does not speak protocol 4 learns that its version is not supported."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        assert_refused(await http.get(PATH + query.format("polling")), UNSUPPORTED_VERSION)


@pytest.mark.parametrize("query", WRONG_TRANSPORT)
async def test_handshake_polling_fails_with_an_invalid_transport(app: App, query: str) -> None:
    """A client that names no transport, or an unknown one, is refused."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        assert_refused(await http.get(PATH + query), TRANSPORT_UNKNOWN)


@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_handshake_polling_fails_with_an_invalid_method(app: App, method: str) -> None:
    """A client that tries to open a session by anything but GET is refused."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        assert_refused(await http.request(method, PATH + "?EIO=4&transport=polling"), BAD_METHOD)


async def test_handshake_websocket_opens_a_session(pinging: App) -> None:
    """A WebSocket without a session gets OPEN first, which offers no upgrade."""
    async with opened(pinging.url) as client:
        assert set(client.opening) == OPENING_KEYS
        assert isinstance(client.opening["sid"], str) and client.opening["sid"]
        assert client.opening["upgrades"] == []
        assert (client.opening["pingInterval"], client.opening["pingTimeout"]) == (300, 200)
        assert isinstance(client.opening["maxPayload"], int) and client.opening["maxPayload"] > 0


@pytest.mark.parametrize("query", WRONG_VERSION)
async def test_handshake_websocket_fails_with_an_invalid_eio(
    app: App, plain: bool, query: str
) -> None:
    """A WebSocket whose client does not say it speaks protocol 4 is refused."""
    fault = None if plain else UNSUPPORTED_VERSION
    await assert_websocket_refused(app, query.format("websocket"), fault)


@pytest.mark.parametrize("query", WRONG_TRANSPORT)
async def test_handshake_websocket_fails_with_an_invalid_transport(
    app: App, plain: bool, query: str
) -> None:
    """A WebSocket whose query names no transport, or one that does not exist, is refused."""
    await assert_websocket_refused(app, query, None if plain else TRANSPORT_UNKNOWN)


# Message


async def test_message_polling_sends_and_receives_one_packet(
    polling: PollingClient, connection: Connection
) -> None:
    """A body of one packet is answered `ok`; an event that comes alone is the whole answer."""
    answer = await polling.post("40")
    assert (answer.status_code, answer.text) == (200, "ok")
    assert_joined((await get(polling)).text.split(SEPARATOR))
    await insert(connection, "a")
    answer = await get(polling)
    assert answer.status_code == 200 and created(answer.text) == "a"


async def test_message_polling_sends_and_receives_several_packets(
    polling: PollingClient, connection: Connection
) -> None:
    """Packets of one body are taken in their order; packets of one answer are separated alike."""
    answer = await polling.post(SEPARATOR.join(["40", '42["ignored",1]', '42["ignored",2]']))
    assert (answer.status_code, answer.text) == (200, "ok")
    answer = await get(polling)
    assert answer.status_code == 200
    assert_joined(answer.text.split(SEPARATOR))
    await insert(connection, "a", "b", "c")
    assert await poll_names(polling, 3) == ["a", "b", "c"]


@pytest.mark.parametrize("body", ["bAQIDBA==", f'42["hello"]{SEPARATOR}bAQIDBA=='])
async def test_message_polling_closes_upon_a_binary_packet(
    polling: PollingClient, body: str
) -> None:
    """A client that sends a binary message, though it is well-formed, loses its session."""
    await join(polling)
    assert (await polling.post(body)).status_code in (200, 400)
    await assert_gone(polling)


@pytest.mark.parametrize("body", [*MALFORMED, f"40{SEPARATOR}abc", f"40{SEPARATOR}", b"4\xff"])
async def test_message_polling_closes_upon_an_invalid_packet(
    polling: PollingClient, body: str | bytes
) -> None:
    """The first body with a packet that is none is answered 400, and ends the session."""
    assert (await polling.post(body)).status_code == 400
    await assert_gone(polling)


async def test_message_polling_closes_upon_duplicate_polls(polling: PollingClient) -> None:
    """A poll that comes while another waits is answered 400, the other with CLOSE."""
    waiting = await waiting_poll(polling)
    assert (await get(polling)).status_code == 400
    answer = await waiting
    assert (answer.status_code, answer.text) == (200, "1")
    await assert_gone(polling)


async def test_message_polling_closes_upon_a_cancelled_poll(polling: PollingClient) -> None:
    """A client that hangs up while its poll waits loses its session: an answer might be lost."""
    waiting = await waiting_poll(polling)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert (await get(polling)).status_code == 400
    await assert_gone(polling)


async def test_message_websocket_sends_and_receives_a_packet(
    app: App, connection: Connection
) -> None:
    """Each packet is a text frame, both ways."""
    async with opened(app.url) as client:
        await client.send("40")
        assert_joined([await client.frame(), await client.frame()])
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


async def test_message_websocket_closes_upon_a_binary_packet(app: App) -> None:
    """A client that sends a binary frame is closed, and gets nothing back."""
    async with joined(app.url) as client:
        await client.send(bytes([1, 2, 3, 4]))
        assert await client.closed() == []


@pytest.mark.parametrize("frame", MALFORMED)
async def test_message_websocket_closes_upon_an_invalid_packet(app: App, frame: str) -> None:
    """The first frame that is no packet closes the connection."""
    async with opened(app.url) as client:
        await client.send(frame)
        assert await client.closed() == []


# Heartbeat


async def test_heartbeat_polling_pings_and_takes_pongs(pinging: App) -> None:
    """The only thing a silent session is sent is PING; it lives while it answers."""
    async with session(pinging.url) as polling:
        for _ in range(3):
            answer = await get(polling)
            assert (answer.status_code, answer.text) == (200, "2")
            assert (await polling.post("3")).status_code == 200


async def test_heartbeat_polling_closes_upon_ping_timeout(pinging: App) -> None:
    """A session whose PING is not answered ends, though its client polls."""
    async with session(pinging.url) as polling:
        answer = await get(polling)
        assert (answer.status_code, answer.text) == (200, "2")
        await assert_turned_away(asyncio.create_task(get(polling)))
        await assert_gone(polling)


async def test_heartbeat_websocket_pings_and_takes_pongs(pinging: App) -> None:
    """The only thing a silent connection is sent is PING; it lives while it answers."""
    async with opened(pinging.url) as client, asyncio.timeout(FRAME_TIMEOUT_S):
        for _ in range(3):
            assert await client.websocket.recv() == "2"
            await client.send("3")


async def test_heartbeat_websocket_closes_upon_ping_timeout(pinging: App) -> None:
    """A connection whose first PING is not answered is closed."""
    async with opened(pinging.url) as client, asyncio.timeout(FRAME_TIMEOUT_S):
        assert await client.websocket.recv() == "2"
        with pytest.raises(ConnectionClosed):
            await client.websocket.recv()


# Close


async def test_close_polling_ends_the_session(polling: PollingClient) -> None:
    """A client that sends CLOSE has its waiting poll released with NOOP, and no session."""
    waiting = await waiting_poll(polling)
    assert (await polling.post("1")).status_code == 200
    answer = await waiting
    assert (answer.status_code, answer.text) == (200, "6")
    await assert_gone(polling)


async def test_close_websocket_ends_the_session(app: App) -> None:
    """A client that sends CLOSE is closed, and its session is gone."""
    async with opened(app.url) as client:
        await client.send("1")
        assert await client.closed() == []
        async with httpx.AsyncClient(base_url=app.url) as http:
            polling = PollingClient(http)
            polling.sid = client.opening["sid"]
            await assert_gone(polling)


# Upgrade


async def test_upgrade_goes_from_polling_to_websocket(
    polling: PollingClient, connection: Connection
) -> None:
    """Polls that come after the probe are released with NOOP, and what comes after the upgrade
    comes by the WebSocket, where no NOOP ever does.
    """
    await join(polling)
    async with probed(polling) as client:
        for _ in range(2):
            answer = await get(polling)
            assert (answer.status_code, answer.text) == (200, "6")
        await client.send("5")
        await insert(connection, "a")
        assert created(await client.frame()) == "a"
        await insert(connection, "b")
        assert created(await client.frame()) == "b"


@pytest.mark.parametrize("frames", [["2probe"], []])
async def test_upgrade_by_one_websocket_at_a_time(
    app: App, polling: PollingClient, connection: Connection, frames: list[str]
) -> None:
    """While there is one WebSocket that may take over a session, whether it has sent its probe or
    not, another one is refused, and the first one's upgrade succeeds.
    """
    await polling.post("40")
    await get(polling)
    async with websocket_of(polling) as first:
        for frame in frames:
            await first.send(frame)
            assert await first.frame() == "3probe"
        with pytest.raises(InvalidStatus) as refused:
            async with websocket_of(polling):
                pass
        assert refused.value.response.status_code == 400
        for frame in ["2probe"][len(frames) :]:
            await first.send(frame)
            assert await first.frame() == "3probe"
        await first.send("5")
        await insert(connection, "a")
        assert created(await first.frame()) == "a"
    await eventually(lambda: app.empty)


async def test_upgrade_ignores_requests_with_the_same_sid(
    polling: PollingClient, connection: Connection
) -> None:
    """A client that polls or posts after the upgrade is refused; the WebSocket does not notice."""
    await join(polling)
    async with probed(polling) as client:
        await client.send("5")
        await insert(connection, "upgraded")
        assert created(await client.frame()) == "upgraded"
        assert_refused(await get(polling), BAD_REQUEST)
        assert_refused(await polling.post('42["hello"]'), BAD_REQUEST)
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


async def test_upgrade_ignores_a_websocket_with_the_same_sid(
    polling: PollingClient, connection: Connection
) -> None:
    """A second WebSocket for a session that has one is turned away; the first does not notice."""
    await join(polling)
    async with probed(polling) as client:
        await client.send("5")
        await insert(connection, "upgraded")
        assert created(await client.frame()) == "upgraded"
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            async with websocket_of(polling) as second:
                await second.frame()
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


# Beyond the suite: requests


async def test_an_unknown_session_is_refused(app: App, plain: bool) -> None:
    """A client whose session does not exist (any more) learns that, whatever it asks."""
    async with httpx.AsyncClient(base_url=app.url) as http:
        polling = PollingClient(http)
        polling.sid = "nobody"
        await assert_gone(polling)
    query = "?EIO=4&transport=websocket&sid=nobody"
    await assert_websocket_refused(app, query, None if plain else SESSION_UNKNOWN)


async def test_a_request_of_another_transport_is_refused(
    app: App, polling: PollingClient, connection: Connection
) -> None:
    """A client that polls for the session of a WebSocket, or asks for a WebSocket without the
    handshake of one, is refused, and both sessions live on.
    """
    async with joined(app.url) as client:
        other = PollingClient(polling.http)
        other.sid = client.opening["sid"]
        assert_refused(await get(other), BAD_REQUEST)
        assert_refused(await other.post("3"), BAD_REQUEST)
        without_handshake = polling.address.replace("transport=polling", "transport=websocket")
        assert_refused(await polling.http.get(without_handshake), BAD_REQUEST)
        await join(polling)
        await insert(connection, "a")
        assert created(await client.frame()) == "a"
        assert await poll_names(polling, 1) == ["a"]


async def test_a_websocket_is_refused_after_the_upgrade(
    app: App, polling: PollingClient, plain: bool, connection: Connection
) -> None:
    """The refusal of a second WebSocket comes as the answer to its handshake."""
    await join(polling)
    async with probed(polling) as client:
        await client.send("5")
        await insert(connection, "upgraded")
        assert created(await client.frame()) == "upgraded"
        query = f"?EIO=4&transport=websocket&sid={polling.sid}"
        await assert_websocket_refused(app, query, None if plain else BAD_REQUEST)


async def test_an_answer_holds_at_most_sixteen_packets(
    app: App, polling: PollingClient, connection: Connection
) -> None:
    """A client that polls when forty events wait for it gets them in several answers."""
    await join(polling)
    names = [f"{number}" for number in range(40)]
    async with joined(app.url) as witness:
        await insert(connection, *names)
        await witness.take(40)
    answers: list[list[str]] = []
    while sum(len(answer) for answer in answers) < 40:
        answers.append((await get(polling)).text.split(SEPARATOR))
    assert max(len(answer) for answer in answers) <= ANSWER_PACKETS and len(answers[0]) > 1
    assert [created(packet) for answer in answers for packet in answer] == names


# Beyond the suite: upgrades


async def test_a_waiting_poll_is_released_by_the_probe(
    polling: PollingClient, connection: Connection
) -> None:
    """A poll that waits while the probe comes ends with NOOP, so that the client can go on."""
    await join(polling)
    waiting = await waiting_poll(polling)
    async with probed(polling) as client:
        answer = await waiting
        assert (answer.status_code, answer.text) == (200, "6")
        await client.send("5")
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


async def test_a_poll_after_the_probe_loses_and_doubles_nothing(
    polling: PollingClient, connection: Connection
) -> None:
    """What waits for a client whose last poll comes after the probe comes in the answer to that,
    or by the WebSocket after the upgrade.
    """
    await polling.post("40")
    async with probed(polling) as client:
        answer = await get(polling)
        packets = [packet for packet in answer.text.split(SEPARATOR) if packet != "6"]
        await client.send("5")
        while len(packets) < 2:
            packets.append(await client.frame())
        assert_joined(packets)
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


async def test_what_is_queued_at_the_upgrade_comes_by_the_websocket(
    polling: PollingClient, connection: Connection
) -> None:
    """A client that does not poll after the probe gets what waited for it by the WebSocket,
    before what came later, and no NOOP with it.
    """
    await polling.post("40")
    async with probed(polling) as client:
        await client.send("5")
        assert_joined([await client.frame(), await client.frame()])
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


# Beyond the suite: the server ends a session
#
# python-engineio's client takes CLOSE as the server's wish, and does not connect again.


async def test_ping_timeout_sends_no_close(pinging: App) -> None:
    """A joined client whose PONG is missing, but whose poll waits, learns from the end of that
    poll that it must come back.
    """
    async with session(pinging.url) as polling:
        await polling.post("40")
        packets: list[str] = []
        while "2" not in packets:
            packets = (await get(polling)).text.split(SEPARATOR)
        await assert_turned_away(asyncio.create_task(get(polling)))
        await assert_gone(polling)


async def test_the_connect_deadline_sends_no_close(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not join in time, but whose poll waits, is turned away."""
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.3)
    async with serving_here(database_url) as app, session(app.url) as polling:
        await assert_turned_away(asyncio.create_task(get(polling)))
        await assert_gone(polling)


async def test_shutting_down_sends_no_close(server: RunningServer) -> None:
    """A client whose poll waits while the server stops is turned away."""
    await until_ready(server.url)
    async with session(server.url) as polling:
        await join(polling)
        waiting = await waiting_poll(polling)
        assert await asyncio.to_thread(server.stop) == 0
        await assert_turned_away(waiting)


async def test_the_python_client_polls_on_after_a_restart(
    start_server: Callable[..., RunningServer], connection: Connection
) -> None:
    """The official Python client, polling, comes back by itself when the server was restarted,
    and gets the next event.
    """
    server = start_server()
    await until_ready(server.url)
    client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.5)
    hellos: asyncio.Queue[Any] = asyncio.Queue()
    things: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    client.on("feed:hello", lambda hello, offset: hellos.put_nowait(hello))
    client.on("thing:create", lambda thing, offset: things.put_nowait(thing))
    await client.connect(server.url, transports=["polling"])
    try:
        async with asyncio.timeout(FRAME_TIMEOUT_S):
            await hellos.get()
        await asyncio.to_thread(server.restart)
        async with asyncio.timeout(2 * FRAME_TIMEOUT_S):
            await hellos.get()
            await insert(connection, "a")
            assert (await things.get())["name"] == "a"
    finally:
        await client.disconnect()
