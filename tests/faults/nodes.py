"""The servers under test: started, killed, stopped, and measured from outside."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil

from tests.support.proxy import Proxy, proxied
from tests.support.server import RunningServer

ROOT = Path(__file__).parent.parent.parent
READY_TIMEOUT_S = 30
SETTINGS: dict[str, object] = {
    "PING_INTERVAL": "2s",
    "PING_TIMEOUT": "2s",
    "CLIENT_STALL": "3s",
    "FEED_RETENTION": "3650d",
    "FEED_MAX_CHANGES": 10**12,
}


class Sample(NamedTuple):
    """The resources a process used at one moment (`at` in seconds of the monotonic clock)."""

    at: float
    memory: float
    tasks: float
    descriptors: float
    connections: float


class Node:
    """A series of server processes on one port, with their database behind a proxy."""

    def __init__(self, name: str, directory: Path, **settings: object) -> None:
        self.name = name
        self.lives: list[list[Sample]] = []
        self._up = False
        self.database: Proxy
        self.server: RunningServer
        self._directory = directory
        self._settings = SETTINGS | settings
        self._tasks = directory / f"tasks-{name}"

    async def run(self, database_url: str, ready: asyncio.Event) -> None:
        """Start, and run until cancelled."""
        async with proxied(database_url) as (self.database, url):
            self.server = RunningServer(
                url, self._directory / f"server-{self.name}.log",
                TASKS_FILE=self._tasks, PYTHONPATH=ROOT, **self._settings,
            )  # fmt: skip
            self.server.command = [sys.executable, "-m", "tests.faults.launcher", "serve"]
            try:
                await self.start()
                ready.set()
                await asyncio.Event().wait()
            finally:
                self.server.kill()

    @property
    def url(self) -> str:
        return self.server.url

    async def start(self) -> None:
        """Start a new process."""
        self._tasks.unlink(missing_ok=True)
        await asyncio.to_thread(self.server.start)
        self.lives.append([])
        self._up = True

    async def stop(self) -> None:
        """Ask the process to stop, and wait until it has."""
        self._up = False
        await asyncio.to_thread(self.server.stop, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process."""
        self._up = False
        self.server.kill()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.server.pid, number)

    def running(self) -> bool:
        """Return whether there is a live process."""
        try:
            return psutil.Process(self.server.pid).status() != psutil.STATUS_ZOMBIE
        except (AssertionError, psutil.NoSuchProcess):
            return False

    async def ready(self, wanted: bool = True) -> bool:
        """Wait until /readyz reports ready, or not ready; return False if it does not in time."""
        end = time.monotonic() + READY_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(5)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while time.monotonic() < end:
                try:
                    async with http.get(f"{self.url}/readyz") as answer:
                        if (answer.status == 200) is wanted:
                            return True
                except (OSError, aiohttp.ClientError):
                    pass
                await asyncio.sleep(0.1)
        return False

    def sample(self) -> None:
        """Measure the process, if it has started."""
        if not self._up:
            return  # it does not handle the signal yet
        try:
            process = psutil.Process(self.server.pid)
            with process.oneshot():
                used = process.memory_info().rss, process.num_fds()
                connections = len(process.net_connections("tcp"))
            process.send_signal(signal.SIGUSR1)
            tasks = int(self._tasks.read_text())  # from the previous signal
        except (AssertionError, FileNotFoundError, psutil.Error):
            return
        self.lives[-1].append(Sample(time.monotonic(), used[0], tasks, used[1], connections))


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Return the growth per hour of each measure, by least squares."""
    growth = {}
    start = samples[0].at
    times = [sample.at - start for sample in samples]
    mean = sum(times) / len(times)
    spread = sum((at - mean) ** 2 for at in times)
    for name in Sample._fields[1:]:
        values = [getattr(sample, name) for sample in samples]
        average = sum(values) / len(values)
        covered = sum(
            (at - mean) * (value - average) for at, value in zip(times, values, strict=True)
        )
        growth[name] = covered / spread * 3600
    return growth
