"""Where a request was really sent, and which pages may send it: values."""

import time
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.forwarded import (
    LOOPBACK,
    Origins,
    Target,
    TrustedProxies,
    forwarded_parameters,
    normal_origin,
)

LOCAL = TrustedProxies(LOOPBACK)
OURS = {"host": "ours:8000"}
FORWARDED = 'for="[2001:db8::1]:47011";proto=https;host="public.example:8443"'


@pytest.mark.parametrize(
    ("origin", "normal"),
    [
        ("http://Example.ORG:80", "http://example.org"),
        ("https://example.org:443", "https://example.org"),
        ("https://example.org:80", "https://example.org:80"),
        ("HTTP://[::1]:8000", "http://[::1]:8000"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("null", None),
        ("", None),
        ("https://example.org/", None),
        ("https://user@example.org", None),
        ("https://a,https://b", None),
        ("https://" + "a" * 1000, None),
    ],
)
def test_origins_are_compared_without_case_and_default_ports(
    origin: str, normal: str | None
) -> None:
    """A browser, a proxy or a user writes an origin in any of the ways that mean the same."""
    assert normal_origin(origin) == normal


@pytest.mark.parametrize(
    ("value", "parameters"),
    [
        (FORWARDED,
         {"for": "[2001:db8::1]:47011", "proto": "https", "host": "public.example:8443"}),
        ("for=1.2.3.4, for=10.0.0.1;Proto=https , host=a.example;proto=http",
         {"for": "1.2.3.4", "proto": "https", "host": "a.example"}),
        ('for="_a,b;c=\\"d\\"";host=ours', {"for": '_a,b;c="d"', "host": "ours"}),
        ("host=ours:8000;;,by=x", {"host": "ours:8000", "by": "x"}),
        ('proto=https;host="open', {"proto": "https"}),
        ("proto = https", {}),
        ("x_id=7;proto=https;x-y!=z", {"x_id": "7", "proto": "https", "x-y!": "z"}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_forwarded_header_as_rfc_7239_has_it(value: str, parameters: dict[str, str]) -> None:
    """Proxies write quoted values, several elements, and some of them nonsense."""
    assert forwarded_parameters(value) == parameters


@given(st.text(alphabet='ab=;," \\\t', max_size=40))
def test_no_forwarded_header_is_too_odd(value: str) -> None:
    """Anybody sends anything."""
    assert all(name.isalpha() for name in forwarded_parameters(value))


@pytest.mark.parametrize("part", ["a", 'a="', '\\"', '"', "a=;", " ", ';a="\\"'])
def test_long_forwarded_headers_take_linear_time(part: str) -> None:
    """A header as long as a server takes costs little, whatever is in it."""
    began = time.perf_counter()
    forwarded_parameters(part * (60_000 // len(part)))
    forwarded_parameters('a="' + part * (60_000 // len(part)))
    assert time.perf_counter() - began < 0.3


@pytest.mark.parametrize(
    ("headers", "target"),
    [
        ({}, ("http", "ours:8000")),
        ({"x-forwarded-proto": "https"}, ("https", "ours:8000")),
        ({"x-forwarded-proto": "https, http", "x-forwarded-host": "public.example, inner"},
         ("https", "public.example")),
        ({"x-forwarded-host": "public.example", "x-forwarded-port": "8080"},
         ("http", "public.example:8080")),
        ({"x-forwarded-host": "public.example:81", "x-forwarded-port": "8080"},
         ("http", "public.example:81")),
        ({"x-forwarded-host": "[::1]", "x-forwarded-port": "8080"}, ("http", "[::1]:8080")),
        ({"x-forwarded-port": "https"}, ("http", "ours:8000")),
        ({"x-forwarded-proto": "wss"}, ("https", "ours:8000")),
        ({"x-forwarded-proto": "gopher"}, ("http", "ours:8000")),
        ({"forwarded": FORWARDED}, ("https", "public.example:8443")),
        ({"forwarded": "for=1.2.3.4", "x-forwarded-proto": "https"}, ("https", "ours:8000")),
    ],
)  # fmt: skip
def test_what_a_proxy_says_is_believed_from_trusted_addresses_only(
    headers: dict[str, str], target: tuple[str, str]
) -> None:
    """A proxy, and then somebody else, says where the client has sent its request."""
    assert LOCAL.target(OURS | headers, "http", "127.0.0.1") == Target(*target)
    for peer in ("192.0.2.1", "2001:db8::1", "somebody", "", None):
        assert LOCAL.target(OURS | headers, "http", peer) == Target("http", "ours:8000")


def test_addresses_and_networks_of_proxies() -> None:
    """A proxy is named by its address or its network; IPv4 addresses may come in IPv6's clothes."""
    for network in ("10.0.0.0/8", "::ffff:10.0.0.0/104"):
        proxies = TrustedProxies([ip_network(network), ip_network("2001:db8::7")])
        for peer in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::7"):
            assert proxies.trust(peer), peer
    for peer in ("11.0.0.1", "::ffff:11.0.0.1", "2001:db8::8", "127.0.0.1", "::1", "fe80::1%eth0"):
        assert not proxies.trust(peer), peer


ORIGINS = [
    ("http://ours:8000", {}, True),
    ("HTTP://OURS:8000", {}, True),
    ("https://ours:8000", {}, False),
    ("http://ours", {}, False),
    ("http://ours:80", {"host": "ours"}, True),
    ("https://ours", {"host": "ours:443", "x-forwarded-proto": "https"}, True),
    ("null", {}, False),
    ("null", {"host": "null"}, False),
    ("", {"host": ""}, False),
    ("https://Allowed.example:443", {}, True),
    ("https://allowed.example.evil", {}, False),
    ("https://ours:8000", {"x-forwarded-proto": "https"}, True),
    ("http://ours:8000", {"x-forwarded-proto": "https"}, False),
    ("https://public.example:8443", {"forwarded": FORWARDED}, True),
]


@pytest.mark.parametrize(("origin", "headers", "allowed"), ORIGINS)
def test_pages_of_our_own_origin_and_of_listed_ones_may_come(
    origin: str, headers: dict[str, str], allowed: bool
) -> None:
    """The server's own page may connect, by its own address or a proxy's, and pages of the origins
    that are listed; no others.
    """
    given = OURS | {"origin": origin} | headers
    listed = Origins(("https://allowed.example",), LOCAL)
    assert (listed.refusal(given, "http", "127.0.0.1") is None) is allowed
    assert Origins(("*",), LOCAL).refusal(given, "http", "127.0.0.1") is None


def test_clients_that_are_no_pages() -> None:
    """A client without an origin is no browser's page, and may connect."""
    assert Origins((), LOCAL).refusal(OURS, "http", "192.0.2.1") is None


def test_a_refusal_names_both_origins_and_the_remedy() -> None:
    """A page behind a proxy that forgets a header, or is not trusted, is refused: the sentence says
    what its origin is, what the server takes for its own, and what to change.
    """
    page = {"host": "public.example", "origin": "https://public.example"}
    forgetful = Origins((), LOCAL).refusal(page, "http", "127.0.0.1")
    assert forgetful is not None
    for part in (
        "https://public.example,", "http://public.example.", "X-Forwarded-Proto", "ALLOWED_ORIGINS",
    ):  # fmt: skip
        assert part in forgetful
    said = page | {"x-forwarded-proto": "https"}
    stranger = Origins((), LOCAL).refusal(said, "http", "172.17.0.2")
    assert stranger is not None and "172.17.0.2, is not one of TRUSTED_PROXIES" in stranger
