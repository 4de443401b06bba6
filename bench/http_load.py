"""A cheap HTTP client: concurrent requests over kept connections, for a given time.

Run as a separate process; prints one JSON line with the numbers of answers, seconds and bytes.
"""

import argparse
import itertools
import json
import random
import select
import socket
import time
from collections.abc import Callable

READ_BYTES = 4 * 1024 * 1024
LONGEST_SECONDS = 60


def main() -> None:
    """Parse the arguments, send requests until the time is over, print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("request", choices=REQUESTS)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--things", type=int, default=10_000)
    asked = parser.parse_args()
    request = REQUESTS[asked.request](asked.things)
    expected = b"HTTP/1.1 201" if asked.request == "post" else b"HTTP/1.1 200"
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    for _ in range(asked.connections):
        connection = socket.create_connection(("127.0.0.1", asked.port), LONGEST_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
    answered, received = 0, 0
    begin = time.monotonic()
    end = begin + asked.seconds
    for connection in sockets.values():
        connection.sendall(request())
    waiting = len(sockets)
    while waiting:
        for fd, _ in poll.poll(LONGEST_SECONDS):
            received += read_answer(sockets[fd], expected)
            answered += 1
            if time.monotonic() < end:
                sockets[fd].sendall(request())
            else:
                waiting -= 1
    seconds = time.monotonic() - begin
    print(json.dumps({"answers": answered, "seconds": seconds, "bytes": received}))


def read_answer(connection: socket.socket, expected: bytes) -> int:
    """Read one whole answer; return its size. RuntimeError if it is not the expected one."""
    data = connection.recv(READ_BYTES)
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    if not data.startswith(expected):
        raise RuntimeError(data[:500].decode(errors="replace"))
    head, _, body = data.partition(b"\r\n\r\n")
    head = head.lower()
    parts, size = [body], len(body)
    if (at := head.find(b"content-length:")) >= 0:
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        while size < length:
            parts.append(_more(connection))
            size += len(parts[-1])
    elif b"transfer-encoding: chunked" in head:
        while not b"".join(parts[-2:]).endswith(b"0\r\n\r\n"):
            parts.append(_more(connection))
            size += len(parts[-1])
    else:
        raise RuntimeError(f"an answer without a length: {head!r}")
    return len(head) + 4 + size


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(READ_BYTES)
    if not data:
        raise RuntimeError("the server closed a connection")
    return data


def _list(_things: int) -> Callable[[], bytes]:
    request = b"GET /api/things HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    return lambda: request


def _one(things: int) -> Callable[[], bytes]:
    return lambda: (
        b"GET /api/things/thing-%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % random.randint(1, things)
    )


def _post(_things: int) -> Callable[[], bytes]:
    stem, numbers = f"{random.getrandbits(64):x}", itertools.count()

    def request() -> bytes:
        body = json.dumps({"name": f"{stem}-{next(numbers)}", "info": "measured"}).encode()
        return (
            b"POST /api/things HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )

    return request


REQUESTS = {"list": _list, "one": _one, "post": _post}

if __name__ == "__main__":
    main()
