"""What happens to nodes that share a database: stopped, frozen, restarted in turn."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from app.database.connections import Connection
from tests.faults.follower import Follower, followed, until_readiness
from tests.support.feeds import eventually
from tests.support.scale import scaled
from tests.support.server import RunningServer
from tests.support.sockets import joined, serving_here, until_ready

StartServer = Callable[..., RunningServer]


@contextmanager
def frozen(server: RunningServer) -> Iterator[None]:
    """Freeze a node: it gets no CPU time, and keeps its connections and locks."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("whom", [0, 1], ids=["who leads", "who follows"])
async def test_a_frozen_node(start_server: StartServer, database_url: str, whom: int) -> None:
    """One of two nodes is frozen for a while: the other's clients do not notice, and its own get
    everything when it resumes.
    """
    nodes = [await asyncio.to_thread(start_server) for _ in range(2)]
    for node in nodes:
        await until_ready(node.url)
    followers = [Follower(node.url) for node in nodes]
    async with followed(database_url, *followers) as writer:
        with frozen(nodes[whom]):
            awake = followers[1 - whom]
            until = time.monotonic() + scaled(2, 20)
            while time.monotonic() < until:
                await writer.write_on()
                written = f"{writer.written - 1}"
                await eventually(lambda name=written: name in awake.names, 5)  # type: ignore[misc]
        await until_readiness(nodes[whom].url, 200)
    assert [follower.joined for follower in followers] == [1, 1]


async def test_rolling_restarts(start_server: StartServer, database_url: str) -> None:
    """Two nodes are restarted in turn under load; clients of each, and some that move to the other
    node, receive everything once.
    """
    nodes = [await asyncio.to_thread(start_server) for _ in range(2)]
    urls = [node.url for node in nodes]
    followers = [Follower(urls[0]), Follower(urls[1]), Follower(*urls), Follower(*reversed(urls))]
    async with followed(database_url, *followers) as writer:
        for number in range(scaled(2, 20)):
            await asyncio.to_thread(nodes[number % 2].restart)
            await writer.write_on()
    assert all(follower.joined > 1 for follower in followers)
    assert not any("Traceback" in node.log for node in nodes)


async def test_killed_nodes(start_server: StartServer, database_url: str) -> None:
    """The leading node is killed repeatedly; the one that remains leads, and no client misses
    anything.
    """
    nodes = [await asyncio.to_thread(start_server) for _ in range(2)]
    followers = [Follower(nodes[0].url), Follower(nodes[1].url)]
    async with followed(database_url, *followers) as writer:
        for number in range(scaled(2, 20)):
            nodes[number % 2].kill()
            await writer.write_on()
            await asyncio.to_thread(nodes[number % 2].start)


async def test_steps_of_the_clock(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps a day ahead and back: no client is disconnected, and nothing stalls."""
    real = time.time
    offset = 0.0
    monkeypatch.setattr(time, "time", lambda: real() + offset)
    async with (
        serving_here(database_url, ping_interval=0.3, ping_timeout=0.3) as app,
        joined(app.url) as client,
    ):
        for number, step in enumerate((86400.0, -86400.0, 0.0)):
            offset = step
            for part in range(5):
                await connection.execute(f"INSERT INTO things (name) VALUES ('{number} {part}')")
                assert (await client.event(timeout=5))[1]["name"] == f"{number} {part}"
            await client.ping()  # heartbeats are exchanged under each clock
        assert app.broadcast.stats().subscribers == 1
