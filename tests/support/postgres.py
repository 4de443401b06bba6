"""The Postgres that all tests share, and private ones that a test may stop, kill and restart."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from app.database.connections import connect
from app.database.embedded import Server, binary
from app.database.migration import migrate
from app.database.unprivileged import UNPRIVILEGED

P = ParamSpec("P")
T = TypeVar("T")

IMAGE = "postgres:18"
# Nothing in the shared server outlives the tests, so nothing needs to reach the disk.
CARELESS = {"fsync": "off", "full_page_writes": "off"}
SHARED_SETTINGS: dict[str, str | int] = {**CARELESS, "max_connections": 300}
TEMPLATE_LOCK = 8_140_263


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that starts an event loop, even if one is already running."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *args, **kwargs).result()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to completion in a new event loop."""
    return in_thread(asyncio.run, work)


def with_database(url: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def execute(url: str, *statements: str) -> None:
    """Run statements one by one, each in its own transaction."""
    connection = await connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@contextlib.contextmanager
def shared_server() -> Iterator[tuple[str, str]]:
    """Yield the URL and a description of a server for all tests: DATABASE_URL, Docker or embedded.

    TABLECAST_TEST_POSTGRES is the Docker image to use, if set.
    """
    image = os.environ.get("TABLECAST_TEST_POSTGRES")
    given = os.environ.get("DATABASE_URL")
    if image is None and given:
        yield given, "the one in DATABASE_URL"
        return
    with contextlib.ExitStack() as stack:
        if image is not None:
            url = stack.enter_context(container(image))
            yield url, image
            return
        if docker_answers():
            try:
                url = stack.enter_context(container(IMAGE))
            except Exception as error:  # the image is not here and cannot be pulled
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                note = f"embedded (Docker has no {IMAGE}: {reason:.80})"
            else:
                yield url, IMAGE
                return
        else:
            note = "embedded"
        server = stack.enter_context(private_server(**SHARED_SETTINGS))
        yield server.url, note


def docker_answers() -> bool:
    """Return whether there is a Docker engine."""
    if shutil.which("docker") is None and not Path("/var/run/docker.sock").exists():
        return False
    import docker  # slow to import, and useless without an engine
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=3)
    except DockerException:
        return False
    try:
        return bool(client.ping())
    except (DockerException, OSError):
        return False
    finally:
        client.close()


@contextlib.contextmanager
def container(image: str) -> Iterator[str]:
    """Yield the URL of a Postgres in a container of this image."""
    # The reaper would be another image to pull; the block below removes the container.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    from testcontainers.community.postgres import PostgresContainer

    settings = " ".join(f"-c {name}={value}" for name, value in SHARED_SETTINGS.items())
    with PostgresContainer(image, driver=None).with_command(f"postgres {settings}") as postgres:
        yield postgres.get_connection_url()


@contextlib.contextmanager
def private_server(**options: str | int) -> Iterator[Server]:
    """Yield a running private server, removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="tablecast-postgres-"))
    server = Server(directory, **options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory)


@contextlib.contextmanager
def standby_of(primary: Server) -> Iterator[Server]:
    """Yield a running hot standby that follows a private server, removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="tablecast-postgres-"))
    standby = Server(directory, **primary.options)
    shutil.copy(primary.directory / "password", directory)
    subprocess.run(
        [binary("pg_basebackup"), "--dbname", primary.url, "--pgdata", standby.data,
         "--write-recovery-conf", "--checkpoint=fast", "--no-sync"],
        check=True,
    )  # fmt: skip
    if os.geteuid() == 0:
        for path in directory.rglob("*"):
            shutil.chown(path, UNPRIVILEGED)
    try:
        standby.start()
        yield standby
    finally:
        standby.kill()
        shutil.rmtree(directory)


def template(server_url: str, name: str) -> str:
    """Create the migrated database `name` unless it exists; concurrent callers wait."""

    async def make() -> None:
        admin = await connect(server_url)
        try:
            await admin.fetchval("SELECT pg_advisory_lock($1)", TEMPLATE_LOCK)
            if not await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
                await admin.execute(f'CREATE DATABASE "{name}_new" TEMPLATE template0')
                await asyncio.to_thread(migrate, with_database(server_url, f"{name}_new"))
                await admin.execute(f'ALTER DATABASE "{name}_new" RENAME TO "{name}"')
        finally:
            await admin.close()

    run(make())
    return name


@contextlib.contextmanager
def clone(server_url: str, template: str) -> Iterator[str]:
    """Yield the URL of a fresh copy of the template, dropped at the end."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    run(execute(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    try:
        yield with_database(server_url, name)
    finally:
        with contextlib.suppress(OSError, asyncpg.InterfaceError):  # the test run is being aborted
            run(execute(server_url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
