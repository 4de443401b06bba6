"""The command line, as a user at a terminal sees it."""

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote, urlsplit

import httpx
import psutil
import pytest

from app.cli import EXAMPLE
from app.database.connections import Connection
from app.database.embedded import Server, embedded, locked
from app.database.migration import migrate
from app.database.psql import without_password
from tests.support.old_postgres import server_of_version
from tests.support.postgres import execute, run, with_database
from tests.support.server import TABLECAST, RunningServer

LIMIT_S = 60


def tablecast(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command until it exits."""
    return subprocess.run(
        [TABLECAST, *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def wait_for_the_end_of(postgres: Server) -> None:
    """Return once this server has stopped by itself."""
    deadline = time.monotonic() + LIMIT_S
    while postgres.pid is not None:
        assert time.monotonic() < deadline, "the embedded server is still running"
        time.sleep(0.01)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory for an embedded database (pytest's own are not accessible to other users)."""
    with TemporaryDirectory(prefix="tablecast-data-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # root's Postgres runs as nobody
        yield directory
        # The keeper outlives a killed process for a moment, and writes here until it exits.
        wait_for_the_end_of(Server(directory / "postgres"))
        with locked(directory / "users", fcntl.LOCK_EX):
            pass


def refusal(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the command's error message: one sentence, and no other output."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("tablecast: ")
    return done.stderr.removeprefix("tablecast: ").strip()


@contextmanager
def serving(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Run `tablecast serve` on an embedded database; yield the process, URL and psql line."""
    process = subprocess.Popen(
        [TABLECAST, "serve", "--port", "0", "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[-1]
            psql_line = process.stdout.readline()
            yield process, address, psql_line
        finally:
            process.kill()


def names(address: str) -> list[str]:
    """Return the names of all things."""
    return [thing["name"] for thing in httpx.get(f"{address}/api/things").json()]


def test_first_start_second_start_and_the_end(data_dir: Path) -> None:
    """A user starts Tablecast from scratch, writes with psql, stops it and starts it again."""
    with serving(data_dir) as (process, address, psql_line):
        assert f"psql --data-dir {data_dir} -c" in psql_line
        samples = names(address)
        assert len(samples) == 3
        insert = "INSERT INTO things (name) VALUES ('mine')"
        done = tablecast("psql", "--data-dir", str(data_dir), "-c", insert)
        assert (done.returncode, done.stdout) == (0, "INSERT 0 1\n")
        assert names(address) == [*samples, "mine"]
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
        assert time.monotonic() - asked < 2
    assert Server(data_dir / "postgres").pid is None

    started = time.monotonic()
    with serving(data_dir) as (process, address, same_psql_line):
        assert time.monotonic() - started < 5
        assert names(address) == [*samples, "mine"]
        assert same_psql_line == psql_line
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


def test_an_embedded_database_without_the_sample(data_dir: Path, tmp_path: Path) -> None:
    """A user wants no sample table, then does; samples come only with a new database."""

    def start(things: str) -> RunningServer:
        server = RunningServer("", tmp_path / "log", DATA_DIR=data_dir, THINGS=things)
        server.start()
        return server

    server = start("no")
    assert httpx.get(f"{server.url}/api/things").status_code == 404
    server.stop()
    server = start("yes")
    assert names(server.url) == []
    drop = "INSERT INTO things (name) VALUES ('mine'); DROP SCHEMA feed CASCADE"
    assert tablecast("psql", "-c", drop, DATA_DIR=str(data_dir)).returncode == 0
    server.stop()
    server = start("yes")
    assert names(server.url) == ["mine"]
    server.stop()


def test_the_printed_psql_line_works(data_dir: Path) -> None:
    """A user pastes the printed line into a shell, twice."""
    with serving(data_dir) as (_, address, psql_line):
        samples = names(address)
        for _ in range(2):
            line = psql_line.removeprefix("Change its table:")
            subprocess.run(line, shell=True, check=True, timeout=LIMIT_S, env={"PATH": ""})
        assert len([name for name in names(address) if name.startswith("hello at ")]) == 2
        assert len(names(address)) == len(samples) + 2


def test_the_embedded_server_ends_with_a_killed_process(data_dir: Path) -> None:
    """Tablecast is killed outright; its embedded server stops by itself."""
    postgres = Server(data_dir / "postgres")
    with serving(data_dir) as (process, _, _):
        assert postgres.pid is not None
        process.kill()
        process.wait(LIMIT_S)
        wait_for_the_end_of(postgres)


def test_two_users_of_one_embedded_server(data_dir: Path) -> None:
    """Two processes use one embedded database at once; the first to exit does not stop it."""
    postgres = Server(data_dir / "postgres")
    with embedded(data_dir) as first:
        with embedded(data_dir) as second:
            assert first == second
        assert postgres.pid is not None
        assert tablecast("psql", "--data-dir", str(data_dir), "-c", "SELECT 1").returncode == 0
        assert postgres.pid is not None
    assert postgres.pid is None


def test_a_killed_embedded_server_comes_back(data_dir: Path) -> None:
    """Somebody kills Postgres's processes one after the other; the page goes on."""
    postgres = Server(data_dir / "postgres")
    with serving(data_dir) as (_, address, _):
        samples = names(address)
        deadline = time.monotonic() + LIMIT_S
        for kill in (postgres.kill, lambda: os.kill(postgres.pid or 0, signal.SIGKILL)):
            killed = postgres.pid
            kill()
            while (
                postgres.pid in (None, killed)
                or httpx.get(f"{address}/readyz").status_code != 200
                or httpx.get(f"{address}/api/things").status_code != 200
            ):
                assert time.monotonic() < deadline, (data_dir / "postgres" / "log").read_text()
                time.sleep(0.1)
            assert names(address) == samples


@pytest.mark.parametrize("command", ["psql", "migrate"])
def test_no_database_is_created_by_the_way(data_dir: Path, command: str) -> None:
    """A user asks for psql in a directory where no embedded database is."""
    message = refusal(tablecast(command, DATA_DIR=str(data_dir)))
    assert message.startswith(f"There is no embedded database in {data_dir} yet: start Tablecast")
    assert list(data_dir.iterdir()) == []


PASSWORD = "s3cret:@/%"


@pytest.mark.parametrize(
    "form",
    [
        "postgresql://{user}:{password}@127.0.0.1:{port}/{name}",
        "postgresql://{user}@127.0.0.1:{port}/{name}?password={password}&connect_timeout=9",
        "postgresql:///{name}?host=127.0.0.1&port={port}&user={user}&password={password}",
    ],
)
def test_nobody_sees_the_password(private_postgres: Callable[..., Server], form: str) -> None:
    """Another user of the machine lists the processes while psql is open."""
    url = urlsplit(private_postgres().url)
    run(execute(url.geturl(), f"CREATE ROLE sam LOGIN SUPERUSER PASSWORD '{PASSWORD}'"))
    given = form.format(
        user="sam", password=quote(PASSWORD, safe=""), port=url.port, name=url.path[1:]
    )
    command = [str(TABLECAST), "psql", "-c", "\\! echo connected", "-f", "-"]
    with subprocess.Popen(
        command,
        env=os.environ | {"DATABASE_URL": given},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "connected\n"
        [psql] = psutil.Process(process.pid).children()
        shown = psql.cmdline()
        process.stdin.close()
    assert process.returncode == 0
    assert shown[0].endswith("psql") and "s3cret" not in " ".join(shown)


@pytest.mark.parametrize(
    ("url", "shown", "password"),
    [
        ("postgresql://u@h/d", "postgresql://u@h/d", None),
        ("postgresql://u:a%40b@h:1,[::1]:2/d?x=1", "postgresql://u@h:1,[::1]:2/d?x=1", "a@b"),
        ("postgresql://u:a@h/d?password=b&x=1&password=c", "postgresql://u@h/d?x=1", "c"),
        ("postgresql://h:1/d?options=-c%20a:b@c", "postgresql://h:1/d?options=-c%20a:b@c", None),
        ("postgres://u:a@h?password=b", "postgres://u@h", "b"),
    ],
)
def test_a_password_is_found_wherever_a_url_has_it(
    url: str, shown: str, password: str | None
) -> None:
    """A user writes the password before the host, in the query, or twice."""
    assert without_password(url) == (shown, password)


def test_the_command_shown_reaches_this_database(
    database_url: str, start_server: Callable[..., RunningServer]
) -> None:
    """The console and /about name a command; on a public address only the operator's own."""
    for settings, console, page in (
        ({}, 'psql "$DATABASE_URL"', 'psql "$DATABASE_URL"'),
        ({"HOST": "0.0.0.0"}, 'psql "$DATABASE_URL"', None),
        ({"HOST": "0.0.0.0", "PSQL_COMMAND": "ssh db psql"}, "ssh db psql", "ssh db psql"),
    ):
        server = start_server(**settings)
        assert server.url.startswith("http://127.0.0.1:")
        assert server.line() == f'Change its table:  {console} -c "{EXAMPLE}"'
        assert httpx.get(f"{server.url}/about").json() == {
            "version": version("tablecast"),
            "things": True,
            "psql": page,
        }
        server.stop()


def test_a_password_in_an_option_is_not_printed(
    database_url: str, empty_database_url: str, start_server: Callable[..., RunningServer]
) -> None:
    """A user names the database by an option; the console shows its URL without the password."""
    server = start_server("--database-url", database_url, database_url=empty_database_url)
    secret = urlsplit(database_url).password
    assert secret
    line = server.line()
    assert line.startswith("Change its table:  psql postgresql://") and f":{secret}@" not in line


def test_a_deep_directory_with_odd_characters(data_dir: Path) -> None:
    """A user keeps the data in a deep directory with spaces, quotes and a long name."""
    directory = data_dir / 'it\'s a "deep" $HOME' / ("d" * 100) / "данные"
    with serving(directory) as (process, _, psql_line):
        line = psql_line.removeprefix("Change its table:")
        subprocess.run(line, shell=True, check=True, timeout=LIMIT_S)
        done = tablecast("psql", "-Atc", "SELECT count(*) FROM things", DATA_DIR=str(directory))
        assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
    wait_for_the_end_of(Server(directory / "postgres"))


def test_a_server_that_died_is_started_again(data_dir: Path) -> None:
    """The machine loses power; the next start recovers from what was left behind."""
    insert = "INSERT INTO things (name) VALUES ('kept')"
    with embedded(data_dir) as url:
        migrate(url)
        assert tablecast("psql", "-c", insert, DATA_DIR=str(data_dir)).returncode == 0
        Server(data_dir / "postgres").kill()
    select = "SELECT name FROM things WHERE name = 'kept'"
    assert tablecast("psql", "-Atc", select, DATA_DIR=str(data_dir)).stdout == "kept\n"


def test_a_wrong_option_is_refused() -> None:
    """A user mistypes an option, a value or a command."""
    assert "--prot" in refusal(tablecast("serve", "--prot", "1"), 2)
    assert refusal(tablecast("serve", "--port", "x"), 2).startswith("PORT (or --port) is 'x'")
    assert refusal(tablecast("serve", PORT="x"), 2).startswith("PORT (or --port) is 'x'")
    assert "server" in refusal(tablecast("server"), 2)


def test_an_option_wins_over_the_environment(database_url: str) -> None:
    """A user has a wrong DATABASE_URL in the environment and passes the right one as an option."""
    done = tablecast("migrate", "--database-url", database_url, DATABASE_URL="nonsense")
    assert (done.returncode, done.stdout) == (0, "The database is up to date.\n")


def test_help_names_every_setting() -> None:
    """A user asks for help."""
    done = tablecast("serve", "--help")
    assert done.returncode == 0
    for name in ("HOST", "PORT", "DATABASE_URL", "FEED_RETENTION", "CLIENT_BUFFER", "LOG_LEVEL"):
        assert name in done.stdout


def test_a_taken_port_is_refused(database_url: str) -> None:
    """A user starts a second server on the same port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refusal(tablecast("serve", "--port", port, DATABASE_URL=database_url))
    assert message == f"Port {port} on 127.0.0.1 is in use: choose another with PORT or --port."


def test_an_address_of_another_machine_is_refused(database_url: str) -> None:
    """A user asks to listen on an address that is not this machine's, or is not an address."""
    for host in ("192.0.2.1", "no-such-host.invalid"):
        message = refusal(tablecast("serve", "--host", host, DATABASE_URL=database_url))
        assert message.startswith(f"Cannot listen on {host}, port 8000: ")
        assert message.endswith("; choose another with HOST or --host.")


def test_unusable_data_directories_are_refused(data_dir: Path) -> None:
    """A user names a file, a directory in a file, data of another Postgres, or broken data."""
    file = data_dir / "file"
    file.touch()
    message = refusal(tablecast("serve", DATA_DIR=str(file)), 2)
    assert message.endswith("it must be a directory, not a file.")
    inside = refusal(tablecast("serve", DATA_DIR=str(file / "x")))
    assert inside.startswith(f"The embedded database cannot be kept in {file}/x: Not a directory")
    old = data_dir / "old"
    with embedded(old):
        pass
    (old / "postgres" / "data" / "PG_VERSION").write_text("17\n")
    assert refusal(tablecast("serve", DATA_DIR=str(old))).startswith(
        f"Postgres 17 made the data in {old}, but the embedded one is Postgres "
    )
    broken = data_dir / "broken"
    with embedded(broken):
        pass
    (broken / "postgres" / "data" / "global" / "pg_control").write_bytes(bytes(8192))
    assert refusal(tablecast("serve", DATA_DIR=str(broken))) == (
        "The embedded Postgres does not start: database files are incompatible with server."
        f" Its log: {broken}/postgres/log"
    )


def test_an_unreachable_database_is_refused() -> None:
    """A user names a database where nothing is listening."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"postgresql://127.0.0.1:{free.getsockname()[1]}/x"
    for command in ("serve", "migrate"):
        message = refusal(tablecast(command, DATABASE_URL=url))
        assert message.startswith("The database cannot be reached: ")
        assert message.endswith(".")


def test_a_silent_database_is_refused() -> None:
    """A user names an address that accepts connections but never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x"
        message = refusal(tablecast("serve", DATABASE_URL=url))
    assert message.startswith("The database cannot be reached: ")


def test_a_missing_database_is_refused(server_url: str) -> None:
    """A user names a database that does not exist on the server."""
    message = refusal(tablecast("serve", DATABASE_URL=with_database(server_url, "nowhere")))
    assert message == 'The database cannot be reached: database "nowhere" does not exist.'


def test_an_old_database_is_refused() -> None:
    """A user names a Postgres 14 (simulated by a socket)."""
    with server_of_version("14.19") as url:
        message = refusal(tablecast("serve", DATABASE_URL=url))
    assert message == "The database runs Postgres 14; Tablecast needs 15 or later."


def test_an_unmigrated_database_is_refused_then_migrated(empty_database_url: str) -> None:
    """A user serves a database before migrating it, then migrates it from two processes at once."""
    message = refusal(tablecast("serve", "--port", "0", DATABASE_URL=empty_database_url))
    command = message.removeprefix("The database is not migrated yet: run `")
    assert command.endswith(" migrate` first.")
    assert shutil.which(command.split()[0]), "it is not how the command is started from here"
    environ = os.environ | {"DATABASE_URL": empty_database_url}
    both = [
        subprocess.Popen([TABLECAST, "migrate"], env=environ, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=LIMIT_S)[1] == ""
        assert process.returncode == 0


def test_serve_can_migrate(
    empty_database_url: str, start_server: Callable[..., RunningServer]
) -> None:
    """A user serves an empty database with --migrate; only the embedded database gets samples."""
    server = start_server("--migrate", database_url=empty_database_url)
    assert names(server.url) == []


async def test_a_database_of_another_version_is_refused(
    connection: Connection, database_url: str
) -> None:
    """A newer Tablecast has migrated the database; this one reports that instead of serving it."""
    await connection.execute("UPDATE feed.alembic_version SET version_num = '9999_future'")
    for command in ("serve", "migrate"):
        done = await asyncio.to_thread(tablecast, command, DATABASE_URL=database_url)
        assert "9999_future" in refusal(done)


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_in_time(server: RunningServer, with_signal: int) -> None:
    """A user stops the server while a client is connected."""
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/healthz").status_code == 200
        with client.stream("GET", "/socket.io/", params={"EIO": 4, "transport": "polling"}):
            asked = time.monotonic()
            assert server.stop(signal.Signals(with_signal)) == 0
            assert time.monotonic() - asked < 2
    assert "Traceback" not in server.log


def test_the_version_can_be_asked() -> None:
    """A user asks for the version."""
    done = tablecast("--version")
    assert (done.returncode, done.stdout) == (0, f"tablecast, version {version('tablecast')}\n")


async def test_an_interrupted_watch_leaves_nothing_behind(
    connection: Connection, database_url: str
) -> None:
    """A user watches a table that a transaction has in use, and gives up: others can use the table,
    and it is not watched when the transaction ends.
    """
    await connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"
    deadline = time.monotonic() + LIMIT_S
    async with connection.transaction():
        await connection.execute("SELECT FROM t")
        watching = await asyncio.create_subprocess_exec(
            TABLECAST, "watch", "t", "--database-url", database_url
        )
        while not await connection.fetchval(waits):
            assert time.monotonic() < deadline
        watching.send_signal(signal.SIGINT)
        await watching.wait()
        while await connection.fetchval(waits):
            assert time.monotonic() < deadline
    async with connection.transaction():
        await connection.execute("LOCK TABLE t")
    assert await connection.fetchval("SELECT count(*) FROM feed.topic WHERE topic = 't'") == 0


def test_an_argument_that_is_no_text(database_url: str) -> None:
    """A user names a table in bytes that are not UTF-8."""
    message = refusal(tablecast("watch", "\udcff", DATABASE_URL=database_url), 2)
    assert message.endswith("it must be UTF-8.")


async def test_watching_from_the_command_line(connection: Connection, database_url: str) -> None:
    """A user watches tables by their names as SQL has them, lists them, and unwatches them."""
    await connection.execute(
        'CREATE TABLE orders (id int PRIMARY KEY); CREATE SCHEMA "My Shop";'
        'CREATE TABLE "My Shop"."Lines"'
        " (o int, n int, sku text UNIQUE NOT NULL, PRIMARY KEY (o, n))"
    )

    def run(*arguments: str) -> str:
        done = tablecast(*arguments, DATABASE_URL=database_url)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run("watch", "orders").endswith("orders:create, orders:update, orders:destroy and"
                                           " orders:truncate.\n")  # fmt: skip
    lines = '"My Shop"."Lines"'
    run("watch", lines, "--topic", "line", "--destroy-with", "sku")
    await connection.execute("ALTER TABLE orders DISABLE TRIGGER ALL")
    listed = run("topics").splitlines()
    assert listed[1].split() == ["line", '"My', 'Shop"."Lines"', "o,", "n", "sku", "none"]
    assert listed[2].endswith(
        "triggers are disabled or missing: what is written now is not captured"
    )
    assert run("unwatch", "orders") == "orders is not watched any more; its topic was orders.\n"
    assert "orders" not in run("topics")
    assert run("watch", lines).startswith(f"{lines} is watched: its events are line:create")
    assert "Its topic was line before" in run("watch", lines, "--topic", "position")
    run("unwatch", lines)
    run("unwatch", "things")
    assert run("topics") == "No table is watched.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("watch", "nowhere"), "There is no table nowhere: name it as in SQL"),
        (("watch", "a b"), "'a b' is not the name of a table"),
        (("watch", "things", "--topic", ""), "The topic '' cannot be used"),
        (("watch", "things", "--topic", "A"), "The topic 'A' cannot be used"),
        (("watch", "v"), "public.v cannot be watched: only ordinary, permanent tables can."),
        (("watch", "pg_class"), "pg_class cannot be watched: it is Postgres's own."),
        (("watch", "Odd"), "There is no table Odd"),
        (("watch", '"Odd"'), "The topic 'Odd' cannot be used: take a lower-case letter, then at"),
        (("watch", '"Odd"', "--topic", "thing"), "The topic thing is taken by the table"),
        (("watch", "things", "--destroy-with", "info"), "public.things cannot be watched with"),
        (("unwatch", '"Odd"'), '"Odd" is not watched.'),
    ],
)
async def test_what_cannot_be_watched_is_a_sentence(
    connection: Connection, database_url: str, arguments: tuple[str, ...], sentence: str
) -> None:
    """A user names a table or a topic that cannot be."""
    await connection.execute('CREATE VIEW v AS SELECT 1; CREATE TABLE "Odd" (id int PRIMARY KEY)')
    assert refusal(tablecast(*arguments, DATABASE_URL=database_url)).startswith(sentence)
