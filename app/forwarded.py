"""Where a client really sent a request, whatever proxies it came through, and which pages may send
it. No I/O.

A proxy says in X-Forwarded-Proto, -Host and -Port, or in Forwarded (RFC 7239), what the client
asked for. These headers are believed only from trusted addresses, because anybody can send them.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK: tuple[Network, ...] = (
    ipaddress.ip_network("127.0.0.0/8"),
    ipaddress.ip_network("::1/128"),
)
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
ANY = "*"
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<name>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?P<port>:[0-9]{1,5})?"
)
LONGEST_ORIGIN = 300  # the longest name has 253 characters
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# Some proxies send the scheme of a WebSocket.
SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
HAS_PORT = re.compile(r":[0-9]+$")
PORT = re.compile(r"[0-9]{1,5}")
# A parameter of Forwarded, and what separates it from the next one: `;`, or `,` between proxies.
# Colons and brackets must be quoted, but not every proxy does so.
PARAMETER = re.compile(
    r"[\t ;,]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=(?:\"((?:[^\"\\]|\\.)*)\"|([^\s;,\"]*))[\t ]*(?=[;,]|$)"
)
FORWARDED_HEADERS = (
    "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "forwarded",
)  # fmt: skip


def normal_origin(origin: str) -> str | None:
    """Return an origin as it is compared: in lower case, without its scheme's default port.

    None if the text is not an origin: `null`, say, or a URL with a path.
    """
    found = ORIGIN.fullmatch(origin.lower()) if len(origin) <= LONGEST_ORIGIN else None
    if found is None:
        return None
    port = found["port"] or ""
    if port == DEFAULT_PORTS.get(found["scheme"]):
        port = ""
    return f"{found['scheme']}://{found['name']}{port}"


def forwarded_parameters(value: str) -> dict[str, str]:
    """Return the parameters of a Forwarded header, by name in lower case.

    Each is taken from the first proxy that gave it, the one next to the client. What follows a
    syntax error is ignored.
    """
    parameters: dict[str, str] = {}
    at = 0
    while (found := PARAMETER.match(value, at)) is not None:
        name, quoted, plain = found.groups()
        text = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        parameters.setdefault(name.lower(), text)
        at = found.end()
    return parameters


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client sent a request: the scheme, and the host with its port, as it wrote them."""

    scheme: str
    host: str

    @property
    def origin(self) -> str | None:
        """The origin of the pages served there; None if the host is malformed."""
        return normal_origin(f"{self.scheme}://{self.host}")


def unmapped(network: Network) -> Network:
    """Return the IPv4 network that an IPv4-mapped IPv6 one stands for; any other as it is."""
    if isinstance(network, ipaddress.IPv4Network) or not network.subnet_of(MAPPED):
        return network
    address = network.network_address.ipv4_mapped
    return ipaddress.ip_network(f"{address}/{network.prefixlen - MAPPED.prefixlen}")


class TrustedProxies:
    """The proxies whose headers are believed, by address."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = tuple(map(unmapped, networks))

    def trust(self, peer: str | None) -> bool:
        """Return whether to believe what the peer at this IP address says about its client."""
        try:
            address = ipaddress.ip_address((peer or "").partition("%")[0])
        except ValueError:
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any((mapped or address) in network for network in self._networks)

    def target(self, headers: Mapping[str, str], scheme: str, peer: str | None) -> Target:
        """Return where the client sent a request that came from `peer`.

        `headers` by name in lower case; `scheme` is that of the connection with the peer.

        The result is only as honest as the client: a page whose own name was made to resolve to
        this machine can send X-Forwarded-Host from a loopback address. To catch such a page, check
        the Host header as well.
        """
        host = headers.get("host", "")
        if not self.trust(peer):
            return Target(scheme, host)
        standard = forwarded_parameters(headers.get("forwarded", ""))
        said_scheme = first(headers, "x-forwarded-proto") or standard.get("proto", "")
        host = first(headers, "x-forwarded-host") or standard.get("host") or host
        port = first(headers, "x-forwarded-port")
        if PORT.fullmatch(port) and not HAS_PORT.search(host):
            host = f"{host}:{port}"
        return Target(SCHEMES.get(said_scheme.lower(), scheme), host)


def first(headers: Mapping[str, str], name: str) -> str:
    """Return the first value of a header with a list: that of the proxy next to the client."""
    return headers.get(name, "").partition(",")[0].strip()


class Origins:
    """The pages that may use this server from a browser: its own, and those of listed origins.

    `listed` may contain `*` for any.
    """

    def __init__(self, listed: Iterable[str], proxies: TrustedProxies) -> None:
        given = tuple(listed)
        self.any = ANY in given
        self.others = bool(given)  # whether pages of other origins may use it at all
        self._listed = frozenset(map(normal_origin, given)) - {None}
        self._proxies = proxies

    def lists(self, origin: str) -> bool:
        """Return whether an origin is listed."""
        return self.any or normal_origin(origin) in self._listed

    def refusal(self, headers: Mapping[str, str], scheme: str, peer: str | None) -> str | None:
        """Return why the page that sent a request may not; None if it may, or no page sent it.

        The arguments are those of `TrustedProxies.target`.
        """
        origin = headers.get("origin")
        if origin is None or self.lists(origin):
            return None
        target = self._proxies.target(headers, scheme, peer)
        own = target.origin
        if own is not None and normal_origin(origin) == own:
            return None
        shown = origin[:LONGEST_ORIGIN]
        advice = f" If the page is another site's, add {shown} to ALLOWED_ORIGINS."
        return (
            f"Forbidden: this is a page of {shown}, but the server's own origin is"
            f" {own or 'unknown, for want of a valid Host header'}. {self._remedy(headers, peer)}"
            f"{advice if normal_origin(origin) else ''}"
        )

    def _remedy(self, headers: Mapping[str, str], peer: str | None) -> str:
        if self._proxies.trust(peer) or not any(map(headers.__contains__, FORWARDED_HEADERS)):
            return (
                "If a proxy stands between, it must pass on Host and send X-Forwarded-Proto, and"
                " its address must be one of TRUSTED_PROXIES."
            )
        return (
            f"The proxy's X-Forwarded-* or Forwarded headers are ignored, because its address,"
            f" {peer}, is not one of TRUSTED_PROXIES."
        )
