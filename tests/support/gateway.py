"""nginx and HAProxy before the nodes, as docs/proxies.md sets them up, with TLS."""

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import aiohttp

from tests.support.machine import require

DOCS = Path(__file__).parent.parent.parent / "docs"
START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 10
# nginx.conf of docs/ belongs into a file like this, which Debian's package brings along.
NGINX = """
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/gateway.log;
{user}
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/site.conf;
}}
"""


@dataclass(frozen=True)
class Entrance:
    """A running gateway: its ports for HTTPS and HTTP, and environment variables with which clients
    trust its certificate.
    """

    port: int
    plain_port: int
    certificate: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def trust(self) -> ssl.SSLContext:
        """What a client that trusts the certificate connects with."""
        return ssl.create_default_context(cafile=str(self.certificate))


Gateway: TypeAlias = Callable[[Sequence[int]], AbstractAsyncContextManager[Entrance]]
"""Given the ports of two nodes, an entrance to both."""
MakeGateway: TypeAlias = Callable[[Path], Gateway]
"""Given a directory for its files, a gateway."""


def nginx(directory: Path) -> Gateway:
    """nginx with docs/nginx.conf."""

    def command(site: str) -> list[str]:
        user = "user root;" if os.geteuid() == 0 else ""  # as pytest's directories are
        (directory / "site.conf").write_text(site)
        (directory / "main.conf").write_text(NGINX.format(directory=directory, user=user))
        log = directory / "gateway.log"
        return [require("nginx"), "-e", str(log), "-c", str(directory / "main.conf")]

    return lambda nodes: running(directory, "nginx.conf", nodes, command)


def haproxy(directory: Path) -> Gateway:
    """HAProxy with docs/haproxy.cfg."""

    def command(config: str) -> list[str]:
        (directory / "haproxy.cfg").write_text(config)
        return [require("haproxy"), "-db", "-f", str(directory / "haproxy.cfg")]

    return lambda nodes: running(directory, "haproxy.cfg", nodes, command)


@contextlib.asynccontextmanager
async def running(
    directory: Path, name: str, nodes: Sequence[int], command: Callable[[str], list[str]]
) -> AsyncIterator[Entrance]:
    """Run a gateway with a configuration of docs/, on free ports, before the nodes."""
    certificate = make_certificate(directory)
    port, plain_port = free_ports(2)
    entrance = Entrance(
        port, plain_port, certificate,
        {"NODE_EXTRA_CA_CERTS": str(certificate), "SSL_CERT_FILE": str(certificate)},
    )  # fmt: skip
    config = (DOCS / name).read_text()
    for written, meant in {
        "/etc/ssl/certs/tablecast.pem": str(certificate),
        "/etc/ssl/private/tablecast.key": str(directory / "key.pem"),
        "/etc/haproxy/tablecast.pem": str(directory / "both.pem"),
        "listen 443": f"listen 127.0.0.1:{port}",
        "listen 80": f"listen 127.0.0.1:{plain_port}",
        "bind :443": f"bind 127.0.0.1:{port}",
        "bind :80": f"bind 127.0.0.1:{plain_port}",
        "127.0.0.1:8001": f"127.0.0.1:{nodes[0]}",
        "127.0.0.1:8002": f"127.0.0.1:{nodes[-1]}",
    }.items():
        config = config.replace(written, meant)
    with (directory / "gateway.out").open("w") as log:
        process = await asyncio.create_subprocess_exec(*command(config), stdout=log, stderr=log)
    try:
        await until_ready(entrance, process)
        yield entrance
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)


async def until_ready(entrance: Entrance, process: asyncio.subprocess.Process) -> None:
    """Wait until a gateway passes requests on to a node that is ready."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=entrance.trust())) as http,
        asyncio.timeout(START_TIMEOUT_S),
    ):
        while True:
            assert process.returncode is None, "the gateway did not start: see gateway.log"
            with contextlib.suppress(OSError, aiohttp.ClientError):
                async with http.get(f"{entrance.url}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.05)


def make_certificate(directory: Path) -> Path:
    """Make a certificate that is signed by itself, and its key, and a file with both."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        [
            require("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout", key, "-out", certificate,
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (directory / "both.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    return certificate


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]
