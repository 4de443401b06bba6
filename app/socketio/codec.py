"""Engine.IO and Socket.IO packets as text, by the codecs of python-engineio and python-socketio.

Importing either package imports its clients, and with them every HTTP library that is installed:
half of the time a server takes to start. So they are imported when the first packet needs them, or
by `load`, once the server has started.
"""

from collections.abc import Iterable
from typing import Any

# Packet types of Engine.IO 4.
OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = range(7)
# Packet types of Socket.IO 5.
CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR, BINARY_EVENT, BINARY_ACK = range(7)

POLL_PACKETS = 16
"""Packets in one answer to a poll: python-engineio's client refuses more."""


class ProtocolError(Exception):
    """The client sent what the protocol or this server does not allow."""


def load() -> None:
    """Import the libraries now."""
    import socketio.packet  # noqa: F401


def encode(packet_type: int, data: Any = None) -> str:
    """The text of an Engine.IO packet."""
    from engineio.packet import Packet

    text: str = Packet(packet_type, data).encode(b64=True)
    return text


def decode(message: str | bytes) -> tuple[int, Any]:
    """An Engine.IO packet's type and data. Raises ProtocolError."""
    from engineio.packet import Packet

    try:
        packet = Packet(encoded_packet=message)
    except Exception as error:  # its decoder raises whatever the text leads it to
        raise ProtocolError(f"not an Engine.IO packet: {error}") from error
    return packet.packet_type, packet.data


def encode_payload(packets: Iterable[str]) -> str:
    """The body of an answer to a poll, of packets encoded before."""
    return "\x1e".join(packets)


def decode_payload(body: bytes) -> list[tuple[int, Any]]:
    """The packets in the body of a POST. Raises ProtocolError."""
    from engineio.payload import Payload

    try:
        text = body.decode()
        if not text:
            raise ValueError("it is empty")
        if text.startswith("d="):
            raise ValueError("JSONP is not served")
        payload = Payload(encoded_payload=text)
    except Exception as error:  # as above
        raise ProtocolError(f"not an Engine.IO payload: {error}") from error
    return [(packet.packet_type, packet.data) for packet in payload.packets]


def decode_message(text: str) -> Any:
    """A python-socketio `Packet`. Raises ProtocolError."""
    from socketio.packet import Packet

    try:
        if not text:
            raise ValueError("it is empty")
        return Packet(encoded_packet=text)
    except Exception as error:  # as above
        raise ProtocolError(f"not a Socket.IO packet: {error}") from error
