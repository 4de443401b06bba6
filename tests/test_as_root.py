"""Root starts Tablecast in its own directories, and in those of an ordinary user.

The tests need to be root, as in a container. The ordinary user is one that every machine has.
"""

import atexit
import functools
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest

from app.database.embedded import embedded, has_database
from app.database.unprivileged import PACKAGE, PUBLIC, Account, programs
from tests.support.server import TABLECAST

LIMIT_S = 60
ROOT = Path(__file__).parent.parent
UNNEEDED = shutil.ignore_patterns(".*", "node_modules", "site-packages", "test", "tests")
COUNT = "SELECT count(*) FROM things"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="these tests are about root")


@pytest.fixture
def sam() -> Account:
    """An ordinary user, whom root does not know."""
    return Account.of("games")


@pytest.fixture
def closed() -> Iterator[Path]:
    """A directory of root's that nobody else may enter, like /root."""
    with TemporaryDirectory(prefix="tablecast-closed-") as name:
        yield Path(name)
        shutil.rmtree(PUBLIC / "data" / Path(name).relative_to("/"), ignore_errors=True)


@pytest.fixture
def home(closed: Path, sam: Account) -> Path:
    """The ordinary user's own directory, closed to others."""
    closed.chmod(0o711)
    directory = closed / "sam"
    directory.mkdir(mode=0o700)
    os.chown(directory, sam.uid, sam.gid)
    return directory


def modes_above(directory: Path) -> list[tuple[int, int]]:
    """Return mode and owner of every directory from this one up."""
    return [(path.stat().st_mode, path.stat().st_uid) for path in (directory, *directory.parents)]


@functools.cache
def reachable(path: Path) -> Path:
    """Return this directory, or a copy of it, where every user can get at it."""
    if Account.of("nobody").may("-x", path):
        return path
    copy = Path(mkdtemp(prefix="tablecast-open-"))
    atexit.register(shutil.rmtree, copy)
    shutil.copytree(path, copy, symlinks=True, ignore=UNNEEDED, dirs_exist_ok=True)
    copy.chmod(0o755)
    return copy


def command(account: Account | None) -> list[str]:
    """Return how this user runs `tablecast`."""
    if account is None:
        return [str(TABLECAST)]
    python = reachable(Path(sys.base_prefix)) / "bin" / f"python3.{sys.version_info.minor}"
    return [str(python), "-c", "from app.cli import main; main()"]


def environment(account: Account | None, **environ: str) -> dict[str, str]:
    """Return a user's environment, in which Python finds the tests' packages and its library."""
    parts = ROOT, Path(sysconfig.get_path("purelib"))
    if account is None:
        return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, parts))} | environ
    users = {
        "PYTHONPATH": os.pathsep.join(str(reachable(part)) for part in parts),
        "LD_LIBRARY_PATH": str(reachable(Path(sys.base_prefix)) / "lib"),
        "HOME": pwd.getpwuid(account.uid).pw_dir,
    }
    return os.environ | users | environ


def psql(directory: Path, sql: str, account: Account | None = None, **environ: str) -> str:
    """Run `tablecast psql` as root or another user; return what it prints."""
    done = subprocess.run(
        [*command(account), "psql", "--data-dir", str(directory), "-Atc", sql],
        cwd="/",
        env=environment(account, **environ),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        **(account.identity() if account else {}),
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


def serve_once(directory: Path, account: Account | None = None, **environ: str) -> str:
    """Run `tablecast serve` until it answers, then stop it; return what it printed."""
    with subprocess.Popen(
        [*command(account), "serve", "--port", "0", "--data-dir", str(directory)],
        cwd="/",
        env=environment(account, **environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **(account.identity() if account else {}),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        if not first:
            return str(process.stderr.read())
        process.send_signal(signal.SIGINT)
        return str(first + process.stdout.read())


def test_root_leaves_a_users_directory_to_the_user(home: Path, sam: Account) -> None:
    """`sudo tablecast serve`, then `tablecast serve` by the owner, and again the other way."""
    before = modes_above(home)
    serve_once(home / ".data")
    assert {path.stat().st_uid for path in home.rglob("*")} == {sam.uid}
    serve_once(home / ".data", sam)
    assert psql(home / ".data", COUNT, sam) == "3"
    psql(home / ".data", "INSERT INTO things (name) VALUES ('root was here')")
    assert psql(home / ".data", COUNT, sam) == "4"
    assert {path.stat().st_uid for path in home.rglob("*")} == {sam.uid}
    assert modes_above(home) == before


def test_root_opens_no_directory(closed: Path) -> None:
    """Root works where nobody else may enter; the data goes elsewhere, and the console says so."""
    before = modes_above(closed)
    elsewhere = PUBLIC / "data" / closed.relative_to("/") / ".data"
    assert f"Its data is in {elsewhere}: the user nobody, " in serve_once(closed / ".data")
    assert psql(closed / ".data", COUNT) == "3"
    assert modes_above(closed) == before
    assert list(closed.iterdir()) == []


def test_programs_out_of_reach_are_copied(closed: Path) -> None:
    """Root's programs are installed where nobody else may enter, and stay as closed as that."""
    package = programs(None).parent.parent
    for part in (PACKAGE, f"{PACKAGE}.libs"):
        shutil.copytree(package.parent / part, closed / part)
    (closed / PACKAGE).chmod(0o700)
    before = modes_above(closed / PACKAGE)
    path = os.pathsep.join((str(closed), str(ROOT)))
    assert "Tablecast is at http" in serve_once(closed / ".data", PYTHONPATH=path)
    assert modes_above(closed / PACKAGE) == before
    [copy] = (PUBLIC / "programs").iterdir()
    assert not copy.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) and copy.stat().st_uid == 0


def test_data_of_earlier_versions_goes_on_working(closed: Path) -> None:
    """Earlier versions opened the way for nobody, and left the data to it."""
    closed.chmod(0o711)
    serve_once(closed / ".data")
    assert (closed / ".data" / "postgres").stat().st_uid == Account.of("nobody").uid
    assert psql(closed / ".data", COUNT) == "3"
    closed.chmod(0o700)  # and root closes it again
    assert f"move that directory to {PUBLIC}/data{closed}/.data" in serve_once(closed / ".data")


def test_a_locked_out_user_reads_what_to_do(home: Path, sam: Account) -> None:
    """An earlier version, run as root, gave the user's data to nobody."""
    serve_once(home / ".data", sam)
    data = home / ".data" / "postgres"
    os.chown(data, Account.of("nobody").uid, -1)
    message = serve_once(home / ".data", sam)
    assert f"{data} belongs to nobody." in message
    assert message.endswith(f"take it over: sudo chown -R {sam.name} {home}/.data.\n")
    subprocess.run(["chown", "-R", sam.name, str(home / ".data")], check=True)
    assert psql(home / ".data", COUNT, sam) == "3"


def test_another_user_of_a_running_database_reads_who_uses_it(home: Path, sam: Account) -> None:
    """Root runs a database in a directory of its own; taking it over would break it."""
    home.chmod(0o755)
    os.chown(home, 0, 0)
    with embedded(home / ".data"):
        message = serve_once(home / ".data", sam)
        assert message.endswith(
            " It is running: use it as root, or name another directory with DATA_DIR or"
            " --data-dir.\n"
        )
        assert "chown" not in message
    assert "take it over: " in serve_once(home / ".data", sam)


def test_a_home_out_of_reach_is_passed_over(home: Path, sam: Account, closed: Path) -> None:
    """The environment names somebody else's home directory, as `sudo -u` can leave it."""
    serve_once(home / ".data", sam)
    theirs = closed / "theirs"
    theirs.mkdir(mode=0o700)
    assert psql(home / ".data", COUNT, sam, HOME=str(theirs)) == "3"
    theirs.chmod(0o755)
    (theirs / ".pgpass").touch(mode=0o600)
    assert psql(home / ".data", COUNT, sam, HOME=str(theirs)) == "3"
    assert "Tablecast is at http" in serve_once(home / ".data", sam, HOME=str(theirs))


def test_a_user_without_a_home_or_name() -> None:
    """A container runs Tablecast as a user that its image does not know."""
    stranger = Account("12345", 12345, 12345)
    done = subprocess.run(
        ["env", "--unset=HOME", *command(stranger), "topics"],
        cwd="/",
        env=environment(Account.of("nobody"), DATABASE_URL="postgresql://me@127.0.0.1:1/x"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        user=stranger.uid,
        group=stranger.gid,
        extra_groups=[],
    )
    assert done.stderr == (
        "tablecast: The database cannot be reached: nothing listens at its address.\n"
    )


def test_a_port_below_1024_is_refused_in_a_sentence(home: Path, sam: Account) -> None:
    """An ordinary user asks for port 80."""
    done = subprocess.run(
        [*command(sam), "serve", "--port", "1", "--data-dir", str(home / ".data")],
        cwd="/",
        env=environment(sam),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        **sam.identity(),
    )
    allowed = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1
    assert allowed or done.stderr == (
        "tablecast: Cannot listen on 127.0.0.1, port 1: this user may not use that port; choose one"
        " above 1023 with PORT or --port.\n"
    )


def test_two_users_cannot_share_a_directory_by_accident(home: Path, sam: Account) -> None:
    """A user names a directory that another one owns."""
    other = Account.of("daemon")
    home.chmod(0o755)
    with embedded(home / ".data"):
        assert has_database(home / ".data")
        message = serve_once(home / ".data", other)
    assert message.startswith(f"tablecast: The embedded database cannot be kept in {home}/.data: ")
    assert f" belongs to {sam.name}." in message


def test_make_as_root_works_as_the_owner_of_the_checkout(home: Path, sam: Account) -> None:
    """`sudo make run` in a user's checkout: nothing of it becomes root's."""
    rules = (ROOT / "Makefile").read_text().removesuffix("endif\n")
    (home / "Makefile").write_text(f"{rules}\nwho:\n\t@id -un; echo $$HOME; touch made\nendif\n")
    done = subprocess.run(
        ["make", "-C", str(home), "who"],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"This directory belongs to {sam.name}: working as {sam.name}, not as root." in lines
    assert sam.name in lines and os.path.expanduser(f"~{sam.name}") in lines  # noqa: PTH111
    assert (home / "made").stat().st_uid == sam.uid
