"""Adds the headers that let pages of other origins read the responses (CORS).

`CrossOrigin` wraps everything else, so that every response of the application has them, including
errors and Socket.IO's.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.forwarded import ANY, Origins

ALLOW_ORIGIN = "Access-Control-Allow-Origin"
EXPOSED = "Feed-Offset, Link, Location, Retry-After"
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Content-Type",
    "Access-Control-Max-Age": "600",
}


class CrossOrigin:
    """Adds the headers to an application's responses."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._origins.others:
            await self._app(scope, receive, send)
            return
        allowed = self._allowed(Headers(scope=scope).get("origin"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add(MutableHeaders(scope=message), allowed)
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _allowed(self, origin: str | None) -> str | None:
        """Return who may read the response, or None for only the server's own pages."""
        if self._origins.any:
            return ANY
        return origin if origin is not None and self._origins.lists(origin) else None

    def _add(self, headers: MutableHeaders, allowed: str | None) -> None:
        if allowed != ANY:
            headers.add_vary_header("Origin")
        if allowed is not None:
            headers[ALLOW_ORIGIN] = allowed
            headers["Access-Control-Expose-Headers"] = EXPOSED


class Preflights:
    """Answers the preflight requests that browsers send before a page of another origin writes."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_allowed(scope):
            await Response(status_code=204, headers=PREFLIGHT)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        return is_preflight and origin is not None and self._origins.lists(origin)
