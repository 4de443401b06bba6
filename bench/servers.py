"""The servers under test: how to start each, and what it uses."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from bench.postgres import PEERS, Postgres, tablecast

START_SECONDS = 30
STOP_SECONDS = 10
INSTALL_SECONDS = 300
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
NODE_PEER = PEERS / "node"


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A server to measure: its name in tables, and the database it needs."""

    name: str
    template: str
    argv: tuple[str, ...]
    ready_path: str | None = None


OURS = Peer("ours", "ours", (tablecast(), "serve"), ready_path="/readyz")


@cache
def node() -> Peer:
    """The Node.js peer, with its packages installed. Unavailable if that fails."""
    npm, command = find_command("npm"), find_command("node")
    if command is None or npm is None:
        raise Unavailable("there is no node or no npm, neither on the PATH nor in .venv/bin")
    if not (NODE_PEER / "node_modules").exists():
        install = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=NODE_PEER,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
        )
        if install.returncode:
            raise Unavailable(f"npm ci failed in {NODE_PEER}: {install.stderr.strip()}")
    os.environ["NODE_ENV"] = "production"
    return Peer("node", "classic", (command, str(NODE_PEER / "server.js")))


PYTHON = Peer("python", "classic", (sys.executable, str(PEERS / "python" / "server.py")))


class Server:
    """A running server process, and the CPU and memory it used, by the kernel's account."""

    def __init__(self, peer: Peer, process: subprocess.Popen[bytes], port: int) -> None:
        self.peer = peer
        self.process = process
        self.port = port

    def cpu_seconds(self) -> float:
        """CPU time of all its threads and children, user and system."""
        return sum(_cpu_seconds(pid) for pid in self._pids())

    def memory_bytes(self) -> int:
        """Proportional set size: a page shared by n processes counts as an nth."""
        return sum(_rollup_bytes(pid, "Pss:") for pid in self._pids())

    def peak_bytes(self) -> int:
        """The highest resident size since the last `reset_peak`."""
        return sum(_status_bytes(pid, "VmHWM:") for pid in self._pids())

    def reset_peak(self) -> None:
        """Reset `peak_bytes` to what is resident now."""
        for pid in self._pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def check_alive(self) -> None:
        """Raise RuntimeError if the process has exited."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.peer.name} exited with {self.process.returncode}")

    def kill(self) -> None:
        """End it as a crash would, with SIGKILL."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if it does not exit in time."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def _pids(self) -> list[int]:
        process = psutil.Process(self.process.pid)
        return [process.pid, *(child.pid for child in process.children(recursive=True))]


@asynccontextmanager
async def running(
    peer: Peer, postgres: Postgres, database: str, port: int | None = None, **settings: str
) -> AsyncIterator[Server]:
    """Start a peer on its database, wait until it is ready, stop it at the end.

    `settings` are environment variables.
    """
    server = await start(peer, postgres, database, port, **settings)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


async def start(
    peer: Peer, postgres: Postgres, database: str, port: int | None = None, **settings: str
) -> Server:
    """Start a peer and wait until it is ready; the caller stops it. RuntimeError if it exits."""
    server = spawn(peer, postgres, database, port, **settings)
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await asyncio.to_thread(_is_ready, peer, server.port):
                server.check_alive()
                await asyncio.sleep(0.01)
    except BaseException:
        server.kill()
        raise
    return server


def spawn(
    peer: Peer, postgres: Postgres, database: str, port: int | None = None, **settings: str
) -> Server:
    """Execute a peer and wait for nothing; the caller stops it."""
    port = port or free_port()
    process = subprocess.Popen(
        peer.argv,
        env=postgres.environment(database) | {"PORT": str(port), "LOG_LEVEL": "warning"} | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    return Server(peer, process, port)


def find_command(name: str) -> str | None:
    """Return the path of a program on the PATH or, failing that, in this virtual environment."""
    return shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@cache
def versions() -> str:
    """The versions of everything compared, in one line."""
    installed = [f"Python {sys.version.split()[0]}"]
    if command := find_command("node"):
        found = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=10)
        installed.append(f"Node.js {found.stdout.strip().removeprefix('v')}")
    packages = json.loads((NODE_PEER / "package.json").read_text())["dependencies"]
    installed += [f"{name} {packages[name]}" for name in ("socket.io", "ws", "pg", "express")]
    return ", ".join(installed)


def _is_ready(peer: Peer, port: int) -> bool:
    try:
        if peer.ready_path is None:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}{peer.ready_path}", timeout=1
        ) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def _rollup_bytes(pid: int, key: str) -> int:
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), key)


def _status_bytes(pid: int, key: str) -> int:
    return _kilobytes(Path(f"/proc/{pid}/status"), key)


def _kilobytes(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
