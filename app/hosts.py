"""The host names a server answers to, as values. No I/O.

A page of another site can make its own host name resolve to this machine (DNS rebinding). The
browser then takes this server for that site, and lets the page read and write here. Only the Host
header gives the page away: it still holds the other site's name.
"""

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache

ANY = "*"
# A name or an IPv4 address, or an IPv6 address in brackets, and perhaps a port.
HOST = re.compile(r"(?P<name>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]*)?", re.IGNORECASE)
LONGEST_NAME = 255


class Hosts:
    """The hosts that requests may name: loopback names always, and those that are listed.

    `listed` holds names such as `example.org`, `*.example.org` for every name below it, and `*` for
    any name. If it is empty, a server that listens on loopback accepts only loopback names, and any
    other server accepts every name.
    """

    def __init__(self, listed: Iterable[str], listening_on: str) -> None:
        given = tuple(listed) or (() if is_loopback(normal(listening_on)) else (ANY,))
        self._any = ANY in given
        self._names = frozenset(normal(name) for name in given if not name.startswith(ANY))
        self._endings = tuple(normal(name[1:]) for name in given if name.startswith("*."))

    def allow(self, host: str | None) -> bool:
        """Return whether a request with this Host header (None: without a valid one) is for us."""
        if self._any:
            return True
        name = name_in(host) if host is not None else None
        return name is not None and (
            name in self._names or name.endswith(self._endings) or is_loopback(name)
        )


@lru_cache(maxsize=100)  # most requests name the same few
def short_name_in(host: str) -> str | None:
    """Return the name in a Host header of reasonable length."""
    found = HOST.fullmatch(host)
    return normal(found["name"]) if found else None


def name_in(host: str) -> str | None:
    """Return the name in a Host header, without the port; None if it is malformed."""
    return short_name_in(host) if len(host) <= LONGEST_NAME + len(":65535") else None


def normal(name: str) -> str:
    """Return a name as it is compared: in lower case, without brackets or a final dot."""
    return name.lower().removeprefix("[").removesuffix("]").removesuffix(".")


@lru_cache(maxsize=100)
def is_loopback(name: str) -> bool:
    """Return whether a name can only mean this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
