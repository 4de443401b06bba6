"""Settings: read from the environment once, into one frozen value."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from app.forwarded import LOOPBACK, Network, normal_origin

UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
UNITS_BYTES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
LOG_LEVELS = ("debug", "info", "warning", "error")
OWN_SEGMENTS = ("api", "socket.io", "socket.io-client")
LONGEST_S = 10 * 365 * UNITS_S["d"]
POSTGRES_PORT = 5432
SESSION_ATTRS = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
ENCODE = "percent-encode special characters in a user name or password (/ is %2F, @ is %40)"


class SettingError(ValueError):
    """A setting is invalid; the message is a sentence that says why."""


def number(low: int, high: int) -> Callable[[str], int]:
    """Return a parser for whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        if (
            not re.fullmatch(r"-?[0-9]{1,3}(_?[0-9]{1,3}){0,6}", text)
            or not low <= int(text) <= high
        ):
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return int(text)

    return read


def duration(shortest_s: float) -> Callable[[str], float]:
    """Return a parser for durations such as `90s`, `15m`, `24h`, `7d` or `0.5`, in seconds."""

    def read(text: str) -> float:
        found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)?", text)
        if not found:
            raise ValueError("it must be a duration such as 90s, 15m, 24h or 7d")
        seconds = float(found[1]) * UNITS_S[found[2] or "s"]
        if not shortest_s <= seconds <= LONGEST_S:
            raise ValueError(f"it must be at least {shortest_s:g} s and at most 10 years")
        return seconds

    return read


def size(text: str) -> int:
    """Parse a size such as `65536`, `512KiB` or `1MiB`, in bytes."""
    found = re.fullmatch(r"([0-9]{1,15})\s*(B|KiB|MiB|GiB)?", text)
    if not found:
        raise ValueError("it must be a size such as 65536, 512KiB or 1MiB")
    count = int(found[1]) * UNITS_BYTES[found[2] or "B"]
    if count < 1024:
        raise ValueError("it must be at least 1KiB")
    return count


def postgres_url(text: str) -> str:
    """Parse the URL of a database, which may list several hosts."""
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("it must look like postgresql://user:password@host:5432/database")
    database_hosts(text)
    query = dict(parse_qsl(urlsplit(text).query))
    if query.get("target_session_attrs", "any") not in SESSION_ATTRS:
        raise ValueError(f"it must have target_session_attrs of {', '.join(SESSION_ATTRS)}")
    if query.get("channel_binding") == "require":
        raise ValueError("it must not require channel binding, which the driver does not have")
    return text


def database_hosts(url: str) -> list[tuple[str, int]]:
    """Return the hosts and ports that the URL of a database lists; none if the driver's defaults
    apply. A host may be the directory of a Unix socket.

    Raises ValueError. Its message never quotes the URL, which may contain a password.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ValueError("it is not a URL") from None
    credentials, _, listed = parts.netloc.rpartition("@")
    if "@" in credentials + parts.path or parts.fragment:
        raise ValueError(f"it must {ENCODE}")
    ports = [""]
    if not listed:
        listed, ports = query.get("host", ""), query.get("port", "").split(",")
    hosts = listed.split(",") if listed else []
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ValueError("it must give one port, or one for each host")
    return [database_host(*pair) for pair in zip(hosts, ports, strict=True)]


def database_host(given: str, port: str) -> tuple[str, int]:
    """Parse one host of a database; a port of its own precedes `port`. Raises ValueError."""
    if given.startswith("/"):
        host = given
    else:
        found = re.fullmatch(r"\[([^\]]+)\](?::(.*))?|([^:]+)(?::(.*))?", given, re.DOTALL)
        if found is None:
            raise ValueError("it must name a host before each port and between commas")
        host = unquote(found[1] or found[3])
        port = found[2] or found[4] or port
    if port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError(f"it must give ports from 1 to 65535, and {ENCODE}")
    return host, int(port or POSTGRES_PORT)


def host(text: str) -> str:
    """Parse an address to listen on."""
    if not text or re.search(r"[\s/]", text):
        raise ValueError("it must be a host name or an IP address")
    return text


def directory(text: str) -> Path:
    """Parse the path of a directory, which need not exist yet."""
    path = Path(text).expanduser()
    with suppress(PermissionError):  # cannot be inspected; opening it will say so
        if path.exists() and not path.is_dir():
            raise ValueError("it must be a directory, not a file")
    return path


def origins(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of web origins, or `*`."""
    given = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in given:
        if origin != "*" and normal_origin(origin) is None:
            raise ValueError("it must list origins such as https://example.org, or be *")
    return given


def networks(text: str) -> tuple[Network, ...]:
    """Parse a comma-separated list of IP addresses and networks."""
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            "it must list IP addresses and networks such as 192.0.2.7 or 10.0.0.0/8"
        ) from None


def root_path(text: str) -> str:
    """Parse a path prefix. It must not begin like our own paths: we could not tell whether a proxy
    has stripped it.
    """
    path = text.rstrip("/")
    segments = path.split("/")[1:]
    if path and (
        not re.fullmatch(r"(/[A-Za-z0-9_~.-]+)+", path)
        or not {".", ".."}.isdisjoint(segments)
        or segments[0] in OWN_SEGMENTS
    ):
        own = ", ".join(f"/{segment}" for segment in OWN_SEGMENTS)
        raise ValueError(f"it must be a path such as /app, and not begin with {own}")
    return path


def yes_or_no(text: str) -> bool:
    """Parse yes or no."""
    if text.lower() not in ("yes", "no"):
        raise ValueError("it must be yes or no")
    return text.lower() == "yes"


def command(text: str) -> str:
    """Parse a command to show: one line."""
    if not text.isprintable():
        raise ValueError("it must be one line of printable characters")
    return text


def hosts(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list of host names, or `*`."""
    given = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in given:
        if name != "*" and not re.fullmatch(r"(\*\.)?[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise ValueError(
                "it must list host names such as example.org or *.example.org, without a scheme or"
                " port, or be *"
            )
    return given


def log_level(text: str) -> str:
    """Parse a log level."""
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"it must be one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def setting(default: object, read: Callable[[str], object], help: str, shown: str = "") -> Any:
    """Return a field of Settings; `shown` is the default as a user would write it."""
    return field(default=default, metadata={"read": read, "help": help, "shown": shown})


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. Each field is also an environment variable and a command-line option."""

    host: str = setting("127.0.0.1", host, "address to listen on")
    port: int = setting(8000, number(0, 65535), "port to listen on; 0 picks a free one")
    database_url: str | None = setting(
        None, postgres_url, "the Postgres to use, 15 or later; without it, an embedded one"
    )
    data_dir: Path = setting(
        Path(".data"), directory, "where the embedded Postgres keeps its data", ".data"
    )
    things: bool = setting(
        True, yes_or_no, "whether there is the sample table things, with its REST", "yes"
    )
    pool_size: int = setting(10, number(1, 1000), "database connections for things by REST")
    feed_retention: float = setting(
        24 * UNITS_S["h"], duration(1), "how long a change can be replayed", "24h"
    )
    feed_max_changes: int = setting(
        10_000_000, number(1, 10**12), "how many changes are kept; older ones are pruned"
    )
    ping_interval: float = setting(25.0, duration(0.1), "how often a client is pinged", "25s")
    ping_timeout: float = setting(
        20.0, duration(0.1), "how long a client may take to answer a ping", "20s"
    )
    max_event_bytes: int = setting(
        UNITS_BYTES["MiB"],
        size,
        "the longest row that an event carries; of a longer one it carries the key, and too_large",
        "1MiB",
    )
    snapshot_bytes: int = setting(
        64 * UNITS_BYTES["MiB"],
        size,
        "the longest snapshot of a subscription; a longer one is refused",
        "64MiB",
    )
    client_buffer: int = setting(
        UNITS_BYTES["MiB"],
        size,
        "unread bytes a client may have; beyond this it reads the log at its own pace",
        "1MiB",
    )
    client_stall: float = setting(
        10.0,
        duration(0.1),
        "how long a client may read nothing before it is disconnected",
        "10s",
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        origins,
        "other web origins whose pages may use this server, separated by commas; * allows any",
        "none",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        LOOPBACK,
        networks,
        "addresses and networks of proxies whose X-Forwarded-* and Forwarded headers are believed,"
        " separated by commas",
        "127.0.0.0/8,::1",
    )
    psql_command: str | None = setting(
        None,
        command,
        "the command that opens psql on this database, for the console and the page to show",
        "what reaches it from here",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        hosts,
        "host names that requests may be for, separated by commas; *.example.org allows all below"
        " it, * any",
        "loopback names when listening on loopback, else any",
    )
    max_clients: int | None = setting(
        None,
        number(1, 10_000_000),
        "connections, and Socket.IO sessions, at once; others are told to try again later",
        "as many as the limit on open files allows",
    )
    root_path: str = setting(
        "", root_path, "the path prefix under which a proxy shows the server, such as /app", "none"
    )
    log_level: str = setting("info", log_level, f"one of {', '.join(LOG_LEVELS)}")

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the settings from the variables in `environ`; an empty variable counts as unset.

        Raises SettingError.
        """
        values = {}
        for option in fields(cls):
            text = environ.get(variable(option), "").strip()
            if not text:
                continue
            try:
                values[option.name] = option.metadata["read"](text)
            except ValueError as error:
                shown = "" if option.name == "database_url" else f" is {text!r}, but"  # a secret
                raise SettingError(
                    f"{variable(option)} (or {flag(option)}){shown or ' is wrong:'} {error}."
                ) from None
        return cls(**values)


def misspelled(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return variables that look like misspelled settings, each with the setting it resembles."""
    # Short names resemble variables of other programs by chance: HOSTS, for one.
    names = [variable(option) for option in fields(Settings) if len(option.name) > 6]
    return [
        (name, similar)
        for name in sorted(environ.keys() - set(names))
        for similar in get_close_matches(name, names, n=1, cutoff=0.9)
    ]


def variable(option: "Field[Any]") -> str:
    """Return the name of a field's environment variable."""
    return option.name.upper()


def flag(option: "Field[Any]") -> str:
    """Return the name of a field's command-line option."""
    return "--" + option.name.replace("_", "-")
