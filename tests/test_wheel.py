"""The wheel works wherever it is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.support.server import RunningServer
from tests.test_cli import LIMIT_S

ROOT = Path(__file__).parent.parent
# What a build needs of the checkout; all of it is in the source distribution as well.
SOURCES = ("app", "migrations", "static", "alembic.ini", "pyproject.toml", "README.md", "LICENSE")
CLIENT = "node_modules/socket.io-client/dist"
FOREIGN = "raise ImportError('this is somebody else')"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: str | Path, **environ: str) -> str:
    """Run a command as in a shell elsewhere; return what it prints."""
    done = subprocess.run(
        command, env=elsewhere() | environ, cwd="/", capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def elsewhere() -> dict[str, str]:
    """The environment of a shell that knows nothing of the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed() -> Iterator[Path]:
    """A virtual environment with the wheel, built offline, and with somebody else's packages `app`,
    `migrations` and `static`; the dependencies are those of the tests.
    """
    with TemporaryDirectory(prefix="tablecast-wheel-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # for the embedded Postgres, which has a user of its own under root
        source, environment = directory / "source", directory / "venv"
        source.mkdir()
        for part in SOURCES:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, source / part)
        shutil.copytree(ROOT / CLIENT, source / CLIENT)
        build = ("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", name)
        run(*PIP, *build, source)
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        [wheel] = directory.glob("*.whl")
        python = environment / "bin" / "python"
        run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
        packages = next((environment / "lib").glob("python*")) / "site-packages"
        assert sorted(path.name for path in packages.iterdir() if "-" not in path.name) == [
            "tablecast"
        ]
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        for foreign in ("app", "migrations", "static"):
            (packages / foreign).mkdir()
            (packages / foreign / "__init__.py").write_text(FOREIGN)
        shutil.rmtree(source)
        yield environment


def start(
    environment: Path, database_url: str, directory: Path, **settings: object
) -> RunningServer:
    """Start the server of a virtual environment."""
    server = RunningServer(database_url, directory / "log", **settings)
    server.command[0] = str(environment / "bin" / "tablecast")
    server.env.pop("PYTHONPATH", None)
    server.start()
    return server


def test_an_installed_wheel_migrates_and_serves(
    installed: Path, empty_database_url: str, tmp_path: Path
) -> None:
    """A user installs the wheel next to packages of the same names as our directories, migrates a
    database and opens the page.
    """
    migrated = run(installed / "bin" / "tablecast", "migrate", DATABASE_URL=empty_database_url)
    assert migrated == "The database is up to date.\n"
    server = start(installed, empty_database_url, tmp_path)
    try:
        with httpx.Client(base_url=server.url) as http:
            for path in ("/", "/feed.js", "/page.js", "/style.css", "/openapi.json", "/api/things"):
                assert http.get(path).status_code == 200, path
            for path in ("socket.io.js", "socket.io.min.js", "socket.io.esm.min.js"):
                assert http.get(f"/socket.io-client/{path}").status_code == 200, path
    finally:
        server.kill()
    assert "WARNING" not in server.log


def test_an_installed_wheel_runs_the_embedded_postgres(installed: Path, tmp_path: Path) -> None:
    """The same user has no Postgres."""
    with TemporaryDirectory(prefix="tablecast-data-") as data:
        server = start(installed, "", tmp_path, DATA_DIR=data)
        assert len(httpx.get(f"{server.url}/api/things").json()) == 3
        assert server.stop() == 0


def test_a_wheel_without_the_client_says_so(
    installed: Path, database_url: str, tmp_path: Path
) -> None:
    """The wheel was built where the Socket.IO client's files were not installed."""
    client = next(installed.glob("lib/python*/site-packages/tablecast")) / CLIENT
    client.rename(client.with_name("away"))
    try:
        server = start(installed, database_url, tmp_path)
        server.kill()
    finally:
        client.with_name("away").rename(client)
    assert "pages cannot load the Socket.IO client" in server.log
