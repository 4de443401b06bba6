"""pgbouncer, the usual pooler, in front of a Postgres."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.support.machine import require

START_TIMEOUT_S = 10
UNPRIVILEGED = "nobody"  # it refuses to run as root

# Everything else has its default.
CONFIGURATION = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_file = {directory}/users
pool_mode = {mode}
"""


@contextmanager
def pgbouncer(database_url: str, mode: str) -> Iterator[str]:
    """Yield the URL that leads to a database through a pgbouncer in this pool mode."""
    program = require("pgbouncer", "/usr/sbin/pgbouncer")
    at = urlsplit(database_url)
    directory = Path(tempfile.mkdtemp(prefix="tablecast-pgbouncer-"))
    port = free_port()
    (directory / "users").write_text(f'"{at.username}" "{unquote(at.password or "")}"\n')
    (directory / "ini").write_text(
        CONFIGURATION.format(
            host=at.hostname, port=at.port, own_port=port, directory=directory, mode=mode
        )
    )
    command = [program, str(directory / "ini")]
    if os.geteuid() == 0:
        command[1:1] = ["-u", UNPRIVILEGED]
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, UNPRIVILEGED)
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until_it_listens(port, process, directory / "log")
        credentials, at_sign, _ = at.netloc.rpartition("@")
        yield at._replace(netloc=f"{credentials}{at_sign}127.0.0.1:{port}").geturl()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def wait_until_it_listens(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        else:
            return


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
