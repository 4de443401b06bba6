"""Two nodes behind nginx and behind HAProxy, each with the configuration in docs/ and TLS."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import socketio

from tests.faults.checker import THE_END
from tests.faults.oracle import BOTH, POLLING, WEBSOCKET, Oracle, Plan, private_oracle
from tests.support.feeds import eventually
from tests.support.gateway import Entrance, MakeGateway, haproxy, nginx

TRANSPORTS = (POLLING, WEBSOCKET, BOTH)
CLIENTS = [
    (kind, transports) for kind in ("official", "python", "browser") for transports in TRANSPORTS
]
SEED = 5
RATE = 100
PATIENCE_S = 30


class PatientClient:
    """One of python-socketio's own clients, which reconnects by itself. It keeps an offset, and
    notes the changes that it receives.
    """

    def __init__(self, client: Any, transports: list[str]) -> None:
        self.changes: list[str] = []
        self._offset: str | None = None
        self._transports = transports
        self._client = client
        client.on("*", self._note)

    def connecting(self, url: str) -> Any:
        """Connect, or return the coroutine that does."""
        return self._client.connect(
            url, auth=lambda: {"since": self._offset}, transports=self._transports,
            wait_timeout=PATIENCE_S, retry=True,
        )  # fmt: skip

    def _note(self, event: str, *arguments: Any) -> None:
        if event == "feed:state":  # no change, and no offset
            return
        *what, self._offset = arguments
        if event == "thing:create" and what[0]["name"].startswith("mark "):
            self.changes.append(what[0]["name"])
        elif event != "feed:hello":
            self.changes.append(json.dumps([event, *what]))

    def between(self, first: str, last: str) -> Counter[str]:
        """Return the changes between two marks."""
        return Counter(self.changes[self.changes.index(first) : self.changes.index(last)])


@contextlib.asynccontextmanager
async def patient_clients(entrance: Entrance) -> AsyncIterator[list[PatientClient]]:
    """Yield official Python clients that reconnect as they do by default, only faster: one on each
    transport, and a threaded one (which polls).
    """
    fast: dict[str, Any] = {"reconnection_delay": 0.2, "reconnection_delay_max": 1}
    sessions = [
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=entrance.trust()))
        for _ in TRANSPORTS
    ]
    clients = [socketio.AsyncClient(http_session=session, **fast) for session in sessions]
    threaded = socketio.Client(**fast)
    patient = [PatientClient(*each) for each in zip(clients, TRANSPORTS, strict=True)]
    for each in patient:
        await each.connecting(entrance.url)
    in_thread = PatientClient(threaded, POLLING)
    await asyncio.to_thread(in_thread.connecting, entrance.url)
    try:
        yield [*patient, in_thread]
    finally:
        for client in clients:
            await client.disconnect()
        for session in sessions:
            await session.close()
        await asyncio.to_thread(threaded.disconnect)


async def mark(oracle: Oracle, patient: list[PatientClient], number: int) -> None:
    """Write a thing, and wait until every client has seen it."""
    name = f"mark {number}"
    async with oracle.session() as connection:
        await connection.execute("INSERT INTO things (name) VALUES ($1)", name)
    await oracle.seen(name)
    await eventually(lambda: all(name in client.changes for client in patient), PATIENCE_S)


@pytest.mark.parametrize("make", [nginx, haproxy], ids=["nginx", "HAProxy"])
async def test_clients_of_every_kind_stay_exact_behind_a_proxy(
    make: MakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Browsers, Node and Python clients follow two nodes through a proxy, on every transport, while
    a writer writes; each node in turn is stopped and killed, and started again. Each client goes
    on at the node that is left, and has every change once.
    """
    plan = Plan(SEED, seconds=0, rate=RATE, clients=CLIENTS)
    async with private_oracle(plan, tmp_path, make(tmp_path)) as oracle:
        assert oracle.entrance is not None
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(oracle.entrance.certificate))
        async with patient_clients(oracle.entrance) as patient:
            await oracle.greeted()
            await mark(oracle, patient, 0)  # first: nodes may show what is written at once in turns
            oracle.start_writers()
            first, second = oracle.nodes
            for number, node in enumerate((first, second, second, first), 1):
                if number % 2:
                    await node.stop()
                else:
                    node.kill()
                await mark(oracle, patient, number)
                await node.start()
                await node.ready()
            report = await oracle.verdict()
            await eventually(lambda: all(THE_END in client.changes for client in patient))
    assert not report.failures(), report
    assert all(findings.sessions > 1 for findings in report.clients.values()), report
    # The threaded client may apply events out of order, and so continue from an older one.
    received = [client.between("mark 0", THE_END) for client in patient[:-1]]
    assert received[0] == received[1] == received[2]
