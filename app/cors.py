"""Answers with the headers that let pages of other origins read them (CORS).

It stands before everything else, so that every answer has them: errors and Socket.IO's too.
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
    """Adds the headers to what an application answers, and answers preflights itself."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._origins.others:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = self._allowed(origin)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add(MutableHeaders(scope=message), allowed)
            await send(message)

        if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            preflight = Response(status_code=204, headers=PREFLIGHT)
            await preflight(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _allowed(self, origin: str | None) -> str | None:
        """Return what may read the answer, if anything besides the server's own pages."""
        if self._origins.any:
            return ANY
        return origin if origin is not None and self._origins.lists(origin) else None

    def _add(self, headers: MutableHeaders, allowed: str | None) -> None:
        if allowed != ANY:
            headers.add_vary_header("Origin")
        if allowed is not None:
            headers[ALLOW_ORIGIN] = allowed
            headers["Access-Control-Expose-Headers"] = EXPOSED
