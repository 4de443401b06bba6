"""Socket.IO protocol 5, as its official test suite has it.

The suite is docs/socket.io-protocol/v5-test-suite/test-suite.js in the repository of Socket.IO.
Each test here is named after the suite's section and test; those after "Beyond the suite" have no
model in it. The suite's server has a second namespace and sends every event back; this one has a
namespace for each topic and ignores events. So where the suite waits for an echo, these tests wait
for the event of a row.

Tests of the suite that do not apply, or only in part:

"Engine.IO protocol", all of it
    It repeats the suite of Engine.IO, whose counterpart is test_engineio_protocol.py.
connect, "to the main namespace", with and without a payload
    The answer holds `pid` too, for connection state recovery. What follows it is `feed:hello`,
    not the payload sent back.
connect, "to a custom namespace", with and without a payload
    As for the main one; after `feed:hello` come the rows.
message, "a plain-text packet" and "a plain-text packet with an ack"
    Events are ignored: they are neither answered nor acknowledged, and the connection lives on.
message, "binary attachments", with and without an ack
    Binary events close the connection.
"""

import asyncio
import json

import httpx
import pytest

from app.database.connections import Connection
from app.socketio import engine as engine_module
from tests.support.sockets import (
    FRAME_TIMEOUT_S,
    App,
    PollingClient,
    created,
    joined,
    opened,
    serving_here,
)
from tests.support.writing import insert

PLACEHOLDERS = '{"_placeholder":true,"num":0},{"_placeholder":true,"num":1}'
UNKNOWN_TYPE = ["4abc", "47", "4"]
WRONG_PAYLOAD = ["42{}", "42", "42[]", '42"text"', "42[", "42[1"]
WRONG_ACK_ID = ['42abc["message-with-ack",1,"2",{"3":[false]}]', '42-1["message"]']


@pytest.fixture
def app(any_app: App) -> App:
    """The application, with the default heartbeat, which is too slow to show."""
    return any_app


# Connect


@pytest.mark.parametrize("payload", ["", "{}", '{"token":"123"}'])
async def test_connect_to_the_main_namespace(app: App, payload: str) -> None:
    """A client that sends CONNECT, with or without a payload, gets the ids of its connection, and
    then hello.
    """
    async with opened(app.url) as client:
        await client.send("40" + payload)
        answer = await client.frame()
        assert answer.startswith("40{")
        ids = json.loads(answer[2:])
        assert set(ids) == {"sid", "pid"}
        assert all(isinstance(each, str) and each for each in ids.values())
        name, hello, offset = json.loads((await client.frame()).removeprefix("42"))
        assert (name, hello) == ("feed:hello", {"recovered": False}) and isinstance(offset, str)


@pytest.mark.parametrize("payload", ["", "{}", '{"token":"123"}'])
async def test_connect_to_a_custom_namespace(app: App, payload: str) -> None:
    """A client connects to the namespace of a topic, as to the main one."""
    async with opened(app.url) as client:
        await client.send("40/thing," + payload)
        answer = await client.frame()
        assert answer.startswith("40/thing,{")
        assert set(json.loads(answer.partition(",")[2])) == {"sid", "pid"}
        assert (await client.frame()).startswith('42/thing,["feed:hello",{"recovered":false},')
        assert (await client.frame()).startswith('42/thing,["feed:loaded",')


def message_of(frame: str, namespace: str) -> str:
    """The message of a CONNECT_ERROR, which must be for a namespace."""
    assert frame.startswith(f"44{namespace},"), frame
    message: str = json.loads(frame.removeprefix(f"44{namespace},"))["message"]
    return message


@pytest.mark.parametrize(
    ("connect", "namespace"),
    [
        ("40/random", "/random"),
        ("40/random,", "/random"),
        ('40/random/label,{"token":"abc"}', "/random/label"),
        ("40/Random,", "/Random"),
    ],
)
async def test_connect_to_an_unknown_namespace_is_refused(
    app: App, connection: Connection, connect: str, namespace: str
) -> None:
    """A client that asks for a namespace there is not gets an error, and may join the main one."""
    async with opened(app.url) as client:
        await client.send(connect)
        assert message_of(await client.frame(), namespace) == "Invalid namespace"
        await client.join()
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


@pytest.mark.parametrize("frame", UNKNOWN_TYPE)
async def test_connect_with_an_invalid_handshake_is_closed(app: App, frame: str) -> None:
    """A client whose first packet is none is closed."""
    async with opened(app.url) as client:
        await client.send(frame)
        assert await client.closed() == []


@pytest.mark.parametrize("plain", [False, True])
async def test_connect_not_received_closes_the_connection(
    database_url: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that never sends CONNECT is closed when its time is over."""
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.3)
    async with serving_here(database_url, plain=plain) as app, opened(app.url) as client:
        assert await client.closed() == []


# Disconnect


async def test_disconnect_from_the_main_namespace(
    database_url: str, plain: bool, connection: Connection
) -> None:
    """A client that leaves the namespace gets no answer and no events, but is still pinged."""
    async with (
        serving_here(database_url, plain=plain, ping_interval=0.3) as app,
        joined(app.url) as client,
        asyncio.timeout(FRAME_TIMEOUT_S),
    ):
        await client.send("41")
        for name in ("a", "b"):
            assert await client.websocket.recv() == "2"
            await client.send("3")
            await insert(connection, name)
        assert await client.websocket.recv() == "2"


async def test_disconnect_from_a_custom_namespace(app: App, connection: Connection) -> None:
    """A client that leaves one of two namespaces goes on getting the events of the other."""
    async with joined(app.url) as client:
        await client.send("40/thing,")
        for start in ("40/thing,", '42/thing,["feed:hello"', '42/thing,["feed:loaded"'):
            assert (await client.frame()).startswith(start)
        await client.send("41/thing,")
        await client.send("40/random,")
        assert message_of(await client.frame(), "/random") == "Invalid namespace"
        await insert(connection, "a")
        assert created(await client.frame()) == "a"
        await insert(connection, "b")
        assert created(await client.frame()) == "b"


# Message


@pytest.mark.parametrize(
    "event",
    [
        '42["message",1,"2",{"3":[true]}]',
        '42456["message-with-ack",1,"2",{"3":[false]}]',
    ],
    ids=["plain text", "with an ack"],
)
async def test_message_of_plain_text_is_ignored(
    app: App, connection: Connection, event: str
) -> None:
    """A well-formed event is neither answered nor acknowledged, and its client lives on."""
    async with joined(app.url) as client:
        await client.send(event)
        await insert(connection, "a")
        assert created(await client.frame()) == "a"


@pytest.mark.parametrize(
    "event",
    [f'452-["message",{PLACEHOLDERS}]', f'452-789["message-with-ack",{PLACEHOLDERS}]'],
    ids=["event", "with an ack"],
)
async def test_message_with_binary_attachments_closes_the_connection(app: App, event: str) -> None:
    """A client that sends binary attachments is closed, and gets nothing back."""
    async with joined(app.url) as client:
        for frame in (event, bytes([1, 2, 3]), bytes([4, 5, 6])):
            await client.send(frame)
        assert await client.closed() == []


@pytest.mark.parametrize("frame", UNKNOWN_TYPE)
async def test_message_of_unknown_packet_type_closes_the_connection(app: App, frame: str) -> None:
    """The first packet whose type does not exist closes the connection."""
    async with joined(app.url) as client:
        await client.send(frame)
        assert await client.closed() == []


@pytest.mark.parametrize("frame", WRONG_PAYLOAD)
async def test_message_of_invalid_payload_closes_the_connection(app: App, frame: str) -> None:
    """The first packet whose payload is not what its type asks for closes the connection."""
    async with joined(app.url) as client:
        await client.send(frame)
        assert await client.closed() == []


@pytest.mark.parametrize("frame", WRONG_ACK_ID)
async def test_message_of_invalid_ack_id_closes_the_connection(app: App, frame: str) -> None:
    """The first packet whose acknowledgment id is no number closes the connection."""
    async with joined(app.url) as client:
        await client.send(frame)
        assert await client.closed() == []


# Beyond the suite


@pytest.mark.parametrize("frame", ['42["message"]', "41"])
async def test_a_client_must_connect_first(app: App, frame: str) -> None:
    """A client whose first packet is not CONNECT is closed at once, as the protocol demands."""
    async with opened(app.url) as client:
        await client.send(frame)
        assert await client.closed() == []


@pytest.mark.parametrize("packet", [UNKNOWN_TYPE[0], WRONG_PAYLOAD[0], WRONG_ACK_ID[0]])
async def test_an_invalid_packet_ends_a_polling_session(app: App, packet: str) -> None:
    """A client that posts a packet that is no Socket.IO packet loses its session."""
    async with httpx.AsyncClient(base_url=app.url, timeout=FRAME_TIMEOUT_S) as http:
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        await polling.post(packet)
        answer = await http.get(polling.address)
        assert answer.status_code == 400
        assert answer.json() == {"code": 1, "message": "Session ID unknown"}
