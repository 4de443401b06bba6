"""Deadlines that share a timer, and what a session does with them."""

import asyncio
import socket
from typing import Any

import pytest

from app.deadlines import Deadlines
from app.forwarded import Origins, TrustedProxies
from app.live.subscriber import CloseReason
from app.socketio import engine as engine_module
from app.socketio.engine import Engine
from app.socketio.handshake import EngineRequest
from app.socketio.session import Session
from app.socketio.websocket import WebSocketSession
from tests.support.feeds import eventually

UPGRADE = EngineRequest(
    "GET",
    {"EIO": "4", "transport": "websocket"},
    {"host": "test", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="},
)


class Ignore:
    """A receiver of sessions that have nothing to say."""

    def received(self, session: Session, data: Any) -> None: ...
    def replaced(self, old: Session, new: Session) -> None: ...
    def ended(self, session: Session) -> None: ...


async def test_things_are_due_in_the_order_they_were_added() -> None:
    """Each thing is due once, not before its time, unless it was removed or added again."""
    due: list[str] = []
    deadlines: Deadlines[str] = Deadlines(0.2, due.append)
    for thing in "abcd":
        deadlines.add(thing)
    assert deadlines.remove("b") and not deadlines.remove("b")
    await asyncio.sleep(0.1)
    deadlines.add("a")
    assert due == [] and list(deadlines) == ["c", "d", "a"]
    await eventually(lambda: due == ["c", "d"])
    assert "a" in deadlines
    await eventually(lambda: due == ["c", "d", "a"])
    assert list(deadlines) == []


async def test_what_is_due_may_remove_what_is_due_with_it() -> None:
    """Of two things that are due together, the first one's action removes the second."""
    due: list[str] = []

    def act(thing: str) -> None:
        due.append(thing)
        deadlines.remove("b")

    deadlines: Deadlines[str] = Deadlines(0.05, act)
    deadlines.add("a")
    deadlines.add("b")
    await eventually(lambda: due)
    await asyncio.sleep(0.1)
    assert due == ["a"]


async def test_many_that_are_due_together_are_done_in_portions() -> None:
    """Ten thousand things are due now: other work goes on between them, and each is due once."""
    due: list[int] = []
    seen: set[int] = set()
    deadlines: Deadlines[int] = Deadlines(60, due.append)
    for thing in range(10_000):
        deadlines.add(thing)
    deadlines.expire_all()
    while len(due) < 10_000:
        await asyncio.sleep(0)
        seen.add(len(due))
    assert due == list(range(10_000)) and len(seen) > 10
    assert list(deadlines) == []


async def test_a_parting_client_that_does_not_read_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that says goodbye, reads nothing and keeps its connection open is cut off."""
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.3)
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    engine = Engine(
        Ignore(), ping_interval=25, ping_timeout=20, origins=Origins((), TrustedProxies(()))
    )
    engine.accept(transport, UPGRADE)
    session = transport.get_protocol()
    assert isinstance(session, WebSocketSession)
    while not session.unsent_bytes():
        session.write_packet("x" * 1000)
    session.close(CloseReason.CLIENT_CLOSED)
    assert session in engine.waiting and engine.stats().sessions == 0
    await eventually(lambda: session not in engine.waiting)
    received = b""
    while data := await asyncio.to_thread(theirs.recv, 1 << 20):
        received += data
    assert not received.endswith(b"\x88\x02\x03\xe8")  # the close frame was never sent
    theirs.close()


async def test_stopping_ends_what_is_not_a_session_yet() -> None:
    """A server that stops closes connections that are about to take over a polling session."""
    engine = Engine(
        Ignore(), ping_interval=25, ping_timeout=20, origins=Origins((), TrustedProxies(()))
    )
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": "GET", "scheme": "http", "path": "/", "headers": [],
        "query_string": b"EIO=4&transport=polling",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    await engine.handle_request(scope, receive, send)
    sid = sent[1]["body"].decode().partition('"sid":"')[2].partition('"')[0]
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    engine.accept(
        transport, EngineRequest("GET", dict(UPGRADE.query) | {"sid": sid}, UPGRADE.headers)
    )
    assert b"101" in await asyncio.to_thread(theirs.recv, 4096)
    engine.close()
    assert await asyncio.to_thread(theirs.recv, 4096) == b""
    assert engine.stats().sessions == 0 and list(engine.waiting) == []
    theirs.close()
