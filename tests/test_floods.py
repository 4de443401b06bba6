"""What a peer sends without end costs the server little, and nobody else notices."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.floods import (
    FINAL,
    FLOODS,
    GET,
    MIB,
    REST,
    TEXT,
    UPGRADE,
    Watch,
    client_frame,
    send,
)
from tests.support.postgres import clone
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import PollingClient, joined, until_ready

AMOUNT_BYTES = scaled(24, 100) * MIB
GROWTH_MIB = 20
WAIT_S = 0.2
CROWD = scaled(1000, 3000)


async def use(url: str) -> None:
    """Do what loads the libraries and fills the caches."""
    await until_ready(url)
    async with joined(url), httpx.AsyncClient(base_url=url) as http:
        await http.get("/openapi.json")
        await http.post("/api/things", json={"name": "a"})
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")


@pytest.fixture(scope="module")
def server(
    server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for all floods: what one of them left behind would show in the next."""
    with clone(server_url, migrated_template) as url:
        log: Path = tmp_path_factory.mktemp("floods") / "server.log"
        running = RunningServer(url, log)
        running.start()
        asyncio.run(use(running.url))
        yield running
        running.kill()


def hardly_felt(watch: Watch) -> None:
    """Check that the memory has hardly grown, and that health checks were answered at once."""
    print(f"{watch.grown_mib:.1f} MiB more, health checks within {watch.slowest_s * 1000:.0f} ms")
    assert watch.grown_mib < GROWTH_MIB
    assert watch.slowest_s <= WAIT_S


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_hardly_felt(server: RunningServer, name: str) -> None:
    """A peer sends as much as it can and reads nothing: the server's memory hardly grows, the
    health check is answered at once, and the log holds no fault.
    """
    with Watch(server).looking() as watch:
        send(server, FLOODS[name], AMOUNT_BYTES)
    hardly_felt(watch)
    assert "Traceback" not in server.log and "ERROR" not in server.log


HEADS = [GET + b"x: " + b"y" * 15_000, UPGRADE[:-2] + b"x: " + b"y" * 15_000]
BODY = REST.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000000") + b"y" * 950_000


FRAME = UPGRADE + client_frame(TEXT | FINAL, b"4" * 99_990)[:-1]
FRAGMENT = UPGRADE + client_frame(TEXT, b"4" * 99_990)


@pytest.mark.parametrize(
    "half",
    [*HEADS, BODY, FRAME, FRAGMENT],
    ids=["heads", "heads of ours", "bodies", "frames", "messages"],
)
def test_many_halves_are_hardly_felt(server: RunningServer, half: bytes) -> None:
    """Many peers send the longest halves of requests that are waited for; meanwhile others are
    served.
    """
    with Watch(server).looking() as watch, ExitStack() as stack:
        for number in range(AMOUNT_BYTES // len(half)):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with suppress(ConnectionError):
                peer.sendall(half)
            if number % 100 == 0:
                assert httpx.get(f"{server.url}/api/things").status_code == 200
    hardly_felt(watch)
    assert "Traceback" not in server.log and "ERROR" not in server.log


@pytest.mark.parametrize("said", [b"", GET, UPGRADE[:-2]], ids=["silent", "half", "half of ours"])
def test_a_crowd_that_asks_nothing_is_hardly_felt(server: RunningServer, said: bytes) -> None:
    """A thousand peers connect and send no request, or half of one."""
    with Watch(server).looking() as watch, ExitStack() as stack:
        for _ in range(CROWD):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            peer.sendall(said)
    hardly_felt(watch)
