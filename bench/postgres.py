"""One private Postgres for all peers, with the same settings for each."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg

from app.database.embedded import ADDRESS, DATABASE, USER, Server

PEERS = Path(__file__).parent / "peers"
MIGRATE_SECONDS = 60
OPTIONS: dict[str, str | int] = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": 200,
    "shared_buffers": "512MB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "timezone": "UTC",
}


class Postgres:
    """A running server: its address, and how to create databases in it."""

    def __init__(self, server: Server) -> None:
        self.log = server.log
        self._port = (server.directory / "port").read_text()
        self._password = (server.directory / "password").read_text()

    def url(self, database: str) -> str:
        """Return a database's URL."""
        return f"postgresql://{USER}:{self._password}@{ADDRESS}:{self._port}/{database}"

    def environment(self, database: str) -> dict[str, str]:
        """Return the environment in which libpq, pg, asyncpg and Tablecast use this database."""
        return os.environ | {
            "PGHOST": ADDRESS,
            "PGPORT": self._port,
            "PGUSER": USER,
            "PGPASSWORD": self._password,
            "PGDATABASE": database,
            "DATABASE_URL": self.url(database),
        }

    @asynccontextmanager
    async def connect(self, database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Open a connection; close it at the end."""
        connection = await asyncpg.connect(self.url(database), command_timeout=300)
        try:
            yield connection
        finally:
            await connection.close()

    async def make_templates(self) -> None:
        """Create the template databases: `plain`, `classic` and `ours`."""
        async with self.connect(DATABASE) as connection:
            for database in ("plain", "classic", "ours"):
                await connection.execute(f"CREATE DATABASE {database}")
        for database, scripts in (
            ("plain", ["things.sql"]),
            ("classic", ["things.sql", "classic.sql"]),
        ):
            async with self.connect(database) as connection:
                for script in scripts:
                    await connection.execute((PEERS / script).read_text())

    async def migrate(self) -> None:
        """Migrate `ours`. RuntimeError with the output if that fails."""
        process = await asyncio.create_subprocess_exec(
            tablecast(),
            "migrate",
            env=self.environment("ours"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), MIGRATE_SECONDS)
        if process.returncode:
            raise RuntimeError(f"tablecast migrate failed:\n{output.decode()}")

    @asynccontextmanager
    async def clone(self, template: str, name: str) -> AsyncIterator[str]:
        """Create a database from the template; drop it at the end."""
        async with self.connect(DATABASE) as connection:
            await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield name
        finally:
            async with self.connect(DATABASE) as connection:
                await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def tablecast() -> str:
    """Return the path of the `tablecast` command in this virtual environment."""
    return str(Path(sys.executable).parent / "tablecast")


@contextmanager
def private_postgres() -> Iterator[Postgres]:
    """Start a server in a temporary directory; stop it and delete its data at the end."""
    with tempfile.TemporaryDirectory(prefix="tablecast-bench-") as directory:
        server = Server(Path(directory), **OPTIONS)
        server.start()
        try:
            yield Postgres(server)
        finally:
            server.stop()
