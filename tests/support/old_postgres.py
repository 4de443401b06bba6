"""A socket that greets like a Postgres of another version, for versions we cannot install."""

import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def message(kind: bytes, body: bytes) -> bytes:
    """Return a message of the Postgres protocol."""
    return kind + struct.pack("!I", len(body) + 4) + body


@contextmanager
def server_of_version(version: str) -> Iterator[str]:
    """Yield the URL of a server that accepts everybody, reports its version and does no more."""
    greeting = (
        message(b"R", struct.pack("!I", 0))
        + message(b"S", b"server_version\0" + version.encode() + b"\0")
        + message(b"S", b"client_encoding\0UTF8\0")
        + message(b"Z", b"I")
    )

    class Greeter(socketserver.BaseRequestHandler):
        request: socket.socket

        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(greeting)
            self.request.recv(65536)  # the session's settings
            self.request.sendall(message(b"C", b"SET\0") + message(b"Z", b"I"))
            self.request.recv(65536)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"postgresql://me@127.0.0.1:{server.server_address[1]}/x?sslmode=disable"
        server.shutdown()
