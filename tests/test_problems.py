"""Errors that are not about things, and unexpected ones."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.rest.problems import exception_handlers
from tests.support.server import RunningServer


async def test_the_page_and_the_client_files_refuse_alike(server: RunningServer) -> None:
    """A client writes to files, and asks for files that do not exist."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        for address in ("/", "/index.html", "/socket.io/socket.io.js", "/nothing"):
            refused = await client.delete(address)
            assert refused.status_code == 405
            assert refused.headers["Allow"] == "GET, HEAD"
            assert refused.json()["status"] == 405
        for address in ("/nothing", "/socket.io/nothing.js", "/../app/cli.py", "/%00", "/%FF"):
            missing = await client.get(address)
            assert missing.status_code == 404
            assert missing.headers["Content-Type"] == "application/problem+json"
    assert "Traceback" not in server.log


async def test_an_internal_error_is_reported_without_its_secrets() -> None:
    """A handler fails: the client gets a problem, and the server gets the exception to log."""

    async def broken(_: Request) -> Response:
        raise RuntimeError("the secret")

    app = Starlette(routes=[Route("/", broken)], exception_handlers=exception_handlers)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://tablecast") as client:
        answer = await client.get("/")
    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "secret" not in answer.text

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tablecast") as client:
        with pytest.raises(RuntimeError, match="the secret"):
            await client.get("/")
