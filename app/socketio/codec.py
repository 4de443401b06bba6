"""Engine.IO and Socket.IO packets as text, using python-engineio's and python-socketio's codecs.

Importing either package imports its clients, and with them every HTTP library that is installed:
half of the time a server takes to start. So `libraries` imports them when the first packet needs
them, or once the server has started.
"""

import threading
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

# Packet types of Engine.IO 4.
OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = range(7)
# Packet types of Socket.IO 5.
CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = range(7)

# The three steps of an upgrade (Engine.IO protocol, section "Upgrade").
PROBE, PROBE_ANSWER, CONFIRM = f"{PING}probe", f"{PONG}probe", str(UPGRADE)

POLL_PACKETS = 16
"""Packets in one answer to a poll: python-engineio's client refuses more."""

# Official clients send the CONNECTs of all their namespaces at once.
POSTED_PACKETS = 100

IMPORTING = threading.Lock()


class ProtocolError(Exception):
    """The client sent something that the protocol or this server does not allow."""


class Libraries(NamedTuple):
    """What we use of python-engineio and python-socketio."""

    engine_packet: Any
    socket_packet: Any


@cache
def libraries() -> Libraries:
    """Import the libraries, once: two threads that import circular modules can fail each other."""
    with IMPORTING:
        from engineio.packet import Packet as EnginePacket
        from socketio.packet import Packet as SocketPacket

        return Libraries(EnginePacket, SocketPacket)


def encode(packet_type: int, data: Any = None) -> str:
    """Return the text of an Engine.IO packet."""
    text: str = libraries().engine_packet(packet_type, data).encode(b64=True)
    return text


def decode(message: str | bytes) -> tuple[int, Any]:
    """Return an Engine.IO packet's type and data. Raises ProtocolError."""
    packet_class = libraries().engine_packet
    try:
        packet = packet_class(encoded_packet=message)
    except Exception as error:  # the decoder may raise anything
        raise ProtocolError(f"not an Engine.IO packet: {error}") from error
    return packet.packet_type, packet.data


def encode_payload(packets: Iterable[str]) -> str:
    """Return the body of an answer to a poll, given encoded packets."""
    return "\x1e".join(packets)


def decode_payload(body: bytes) -> list[tuple[int, Any]]:
    """Return the types and data of the packets in the body of a POST. Raises ProtocolError."""
    try:
        text = body.decode()
        if not text:
            raise ValueError("it is empty")
        if text.startswith("d="):
            raise ValueError("JSONP is not served")
    except ValueError as error:
        raise ProtocolError(f"not an Engine.IO payload: {error}") from error
    packets = text.split("\x1e")
    if len(packets) > POSTED_PACKETS:
        raise ProtocolError(f"more than {POSTED_PACKETS} packets in a payload")
    return [decode(packet) for packet in packets]


def decode_message(text: str) -> Any:
    """Return the python-socketio `Packet` in a message. Raises ProtocolError."""
    packet_class = libraries().socket_packet
    try:
        if not text:
            raise ValueError("it is empty")
        return packet_class(encoded_packet=text)
    except Exception as error:  # as above
        raise ProtocolError(f"not a Socket.IO packet: {error}") from error
