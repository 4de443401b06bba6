"""Fixtures: a separate database for every test, and the real server on it."""

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.database.migration import migrate
from app.settings import Settings, variable
from tests.support.postgres import clone, in_thread, private_server, shared_server, template
from tests.support.server import RunningServer
from tests.support.sockets import App, serving_here

# Environment variables that tell the pytest-xdist workers where the shared server is.
SHARED_URL, RUN = "TABLECAST_TEST_SERVER", "TABLECAST_TEST_RUN"
SETTINGS = [variable(option) for option in fields(Settings)]

shared = contextlib.ExitStack()
shared_name = ""


def pytest_configure(config: pytest.Config) -> None:
    global shared_name
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    os.environ[SHARED_URL], shared_name = shared.enter_context(shared_server())
    os.environ[RUN] = uuid.uuid4().hex[:8]
    for name in SETTINGS:  # a server under test has only the settings its test passes
        os.environ.pop(name, None)


def pytest_report_header() -> str:
    return f"postgres: {shared_name}"


def pytest_unconfigure() -> None:
    shared.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        uses_database = "server_url" in getattr(item, "fixturenames", ())
        if uses_database and "end_to_end" not in item.path.parts:
            item.add_marker("database")


@pytest.fixture(scope="session")
def server_url() -> str:
    """The shared Postgres server, as a user who may create databases."""
    return os.environ[SHARED_URL]


@pytest.fixture(scope="session")
def migrated_template(server_url: str) -> str:
    """The name of a migrated, empty database to clone."""
    return template(server_url, f"template_{os.environ[RUN]}")


@pytest.fixture
def database_url(server_url: str, migrated_template: str) -> Iterator[str]:
    """A migrated, empty database for this test only."""
    with clone(server_url, migrated_template) as url:
        yield url


@pytest.fixture
def empty_database_url(server_url: str) -> Iterator[str]:
    """A database for this test only, not migrated."""
    with clone(server_url, "template0") as url:
        yield url


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """A connection to the test's database."""
    opened = await connect(database_url)
    try:
        yield opened
    finally:
        opened.terminate()


@pytest.fixture
def start_server(database_url: str, tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers on the test's database: `start_server(PING_INTERVAL=1)`.

    `database_url=` selects another database, `files=` limits the files it may open.
    """
    servers: list[RunningServer] = []

    def start(
        *arguments: str, database_url: str = database_url, files: int = 0, **settings: object
    ) -> RunningServer:
        log = tmp_path / f"server{len(servers)}.log"
        server = RunningServer(database_url, log, *arguments, **settings)
        if files:
            server.limit_files(files)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def server(start_server: Callable[..., RunningServer]) -> RunningServer:
    """The real server on the test's database."""
    return start_server()


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[App]:
    """The application, running in the test's event loop."""
    async with serving_here(database_url) as served:
        yield served


@pytest.fixture(params=[False, True], ids=["our server", "any server"])
def plain(request: pytest.FixtureRequest) -> bool:
    """Whether the application is served as any ASGI server would."""
    return bool(request.param)


@pytest.fixture
async def any_app(database_url: str, plain: bool) -> AsyncIterator[App]:
    """The application, served by our server, and then as any ASGI server would."""
    async with serving_here(database_url, plain=plain) as served:
        yield served


@pytest.fixture
def private_postgres() -> Iterator[Callable[..., Server]]:
    """Starts Postgres servers that the test may stop, kill and restart; their databases are
    migrated.

    Options are Postgres settings: `private_postgres(max_prepared_transactions=10)`.
    """
    with contextlib.ExitStack() as stack:

        def start(**options: str | int) -> Server:
            server = stack.enter_context(private_server(**options))
            in_thread(migrate, server.url)
            return server

        yield start
