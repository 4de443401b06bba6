"""Databases that belong to ordinary roles, as a hosting provider makes them."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from tests.support.postgres import clone, execute, run

PASSWORD = "ordinary"


@dataclass(frozen=True, slots=True)
class Home:
    """Somebody's database: its URL as a superuser, and two ordinary roles: its owner, and one that
    may only connect.
    """

    url: str
    owner: str
    guest: str

    def as_role(self, role: str) -> str:
        """The URL of the database for one of the roles."""
        parts = urlsplit(self.url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{role}:{PASSWORD}@{place}"))

    @property
    def as_owner(self) -> str:
        return self.as_role(self.owner)

    @property
    def as_guest(self) -> str:
        return self.as_role(self.guest)


@contextlib.contextmanager
def somebodys_database(server_url: str) -> Iterator[Home]:
    """Yield an empty database that belongs to an ordinary role; both are dropped at the end."""
    tag = uuid.uuid4().hex[:12]
    owner, guest = f"owner_{tag}", f"guest_{tag}"
    make = "CREATE ROLE {} LOGIN PASSWORD '{}'"
    run(execute(server_url, *(make.format(role, PASSWORD) for role in (owner, guest))))
    try:
        with clone(server_url, "template0") as url:
            database = urlsplit(url).path[1:]
            run(execute(server_url, f'ALTER DATABASE "{database}" OWNER TO {owner}'))
            yield Home(url, owner, guest)
    finally:
        run(execute(server_url, f"DROP ROLE {owner}, {guest}"))
