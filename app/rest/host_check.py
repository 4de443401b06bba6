"""Refuses requests for hosts that this server does not serve, whatever they ask for."""

from starlette.types import ASGIApp, Receive, Scope, Send

from app.hosts import Hosts
from app.rest.problems import Problem, problem_response, wrong_host


class HostCheck:
    """Middleware that answers 421 to requests and WebSockets for other hosts."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._hosts.allow(host := host_of(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            status, detail = wrong_host(host)
            await problem_response(Problem(status, detail))(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "another host"})


def host_of(scope: Scope) -> str | None:
    """Return the Host header; None if there is none, or more than one."""
    found = [value for name, value in scope["headers"] if name == b"host"]
    return found[0].decode("latin-1") if len(found) == 1 else None
