"""Lower bounds that no server can beat: the system calls alone."""

import asyncio
import socket
import time

from bench.crowd import Crowd

HANDSHAKE = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    b'\x81\x090{"sid":1}'
    b'\x81\x0a40{"sid":1}'
)
EVENT = (
    b'42["thing:create",{"id":1000,"name":"0b2e5d9e-7c1f-4d4e-9d1b-2f5a8f6c3e10","info":"",'
    b'"created_at":"2026-11-22T22:00:00.123456+00:00"}]'
)


async def send_loop_seconds(clients: int, writes: int, together: int = 1) -> float:
    """CPU seconds per delivery of a loop that only sends: one write to each client, then the next.

    Each write holds `together` events, each in its own frame.
    """
    data = (b"\x81\x7e" + len(EVENT).to_bytes(2, "big") + EVENT) * together
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        accepting = asyncio.create_task(asyncio.to_thread(_accept, listener, clients))
        async with Crowd.start() as crowd:
            await crowd.connect(listener.getsockname()[1], clients, ready_mark='40{"sid"')
            sockets = await accepting
            try:
                used = 0.0
                for written in range(1, writes + 1):
                    before = time.thread_time()
                    _send(sockets, data)
                    used += time.thread_time() - before
                    await crowd.expect(written * together * clients)
            finally:
                for each in sockets:
                    each.close()
    return used / (writes * together * clients)


def _send(sockets: list[socket.socket], data: bytes) -> None:
    for each in sockets:
        each.sendall(data)


def _accept(listener: socket.socket, clients: int) -> list[socket.socket]:
    accepted = []
    for _ in range(clients):
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(HANDSHAKE)
        accepted.append(connection)
    return accepted
