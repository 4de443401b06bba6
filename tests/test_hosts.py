"""The hosts a server answers to, as values."""

import time

import pytest

from app.hosts import Hosts

LOOPBACK = [
    "localhost", "localhost:8000", "LOCALHOST.", "my.localhost:1", "127.0.0.1", "127.1.2.3:80",
    "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "localhost:", "127.0.0.1.",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
    "notlocalhost", "128.0.0.1", "[::2]", "0.0.0.0", "2130706433", "192.168.0.1",
]  # fmt: skip
MALFORMED = [
    None, "", " ", ":", ":80", "local host", "localhost:port", "localhost:80:80", "::1", "[::1",
    "a,localhost", "localhost,a", "user@localhost", "localhost/", "http://localhost", "[localhost]",
    "localhost\n", "\x00localhost", "lócalhost", "[]", ".localhost\\", "x" * 300 + ".localhost",
]  # fmt: skip


@pytest.mark.parametrize("listening_on", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_has_loopback_names(listening_on: str) -> None:
    """A developer's server on loopback has the names that only this machine has, and no other."""
    hosts = Hosts((), listening_on)
    assert [host for host in LOOPBACK if not hosts.allow(host)] == []
    assert [host for host in [*FOREIGN, *MALFORMED] if hosts.allow(host)] == []


@pytest.mark.parametrize("listening_on", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_servers_have_any_name(listening_on: str) -> None:
    """A server that others can reach has any name, as long as none is listed."""
    hosts = Hosts((), listening_on)
    assert all(hosts.allow(host) for host in [*LOOPBACK, *FOREIGN])


@pytest.mark.parametrize("listening_on", ["0.0.0.0", "127.0.0.1"])
def test_listed_names(listening_on: str) -> None:
    """An operator lists names: a request may be for these, in any case and with any port, and for
    loopback names.
    """
    hosts = Hosts(("Example.org", "*.example.net", "10.0.0.1", "[fd00::1]"), listening_on)
    allowed = [
        "example.org", "EXAMPLE.ORG.:443", "a.example.net", "a.b.example.net:1", "10.0.0.1:80",
        "[fd00::1]", "[FD00::1]:80", *LOOPBACK,
    ]  # fmt: skip
    assert [host for host in allowed if not hosts.allow(host)] == []
    refused = [
        "example.net", "www.example.org", "example.org.evil", "notexample.net", "10.0.0.2",
        *FOREIGN, *MALFORMED,
    ]  # fmt: skip
    assert [host for host in refused if hosts.allow(host)] == []


def test_any_name() -> None:
    """An operator allows any name."""
    assert all(Hosts(("*",), "127.0.0.1").allow(host) for host in [*FOREIGN, *MALFORMED])


def test_long_hosts_are_judged_quickly() -> None:
    """A peer sends the longest Host there can be."""
    hosts = Hosts((), "127.0.0.1")
    began = time.process_time()
    for host in ("a" * 16_000, "[" * 16_000, "a." * 8_000, ":" * 16_000):
        assert not hosts.allow(host)
    assert time.process_time() - began < 0.05
