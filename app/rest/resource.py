"""One path of the API and its methods, as a Starlette route."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.rest.problems import Problem

Handler = Callable[[Request[Any]], Awaitable[Response]]


class Resource:
    """An ASGI application that passes each method (`get=`, `post=`, ...) to its handler.

    HEAD goes to GET's handler (the server drops the body); OPTIONS and all other methods are
    answered here. A Starlette route with a list of methods would not do: any other method would
    fall through to the static files, whose 405 lists only their own methods.
    """

    def __init__(self, **handlers: Handler) -> None:
        self._handlers = {method.upper(): handler for method, handler in handlers.items()}
        if "GET" in self._handlers:
            self._handlers["HEAD"] = self._handlers["GET"]
        self._handlers["OPTIONS"] = self._options
        self._allow = {"Allow": ", ".join(sorted(self._handlers))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope["method"], self._refuse)
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _options(self, _: Request) -> Response:
        return Response(status_code=204, headers=self._allow)

    async def _refuse(self, request: Request) -> Response:
        detail = f"{request.method} is not allowed here, only {self._allow['Allow']}."
        raise Problem(405, detail, headers=self._allow)


class Absent:
    """An ASGI application that answers 404 to every method."""

    def __init__(self, detail: str) -> None:
        self._detail = detail

    async def __call__(self, *_: object) -> None:
        raise Problem(404, self._detail)


def resource(path: str, **handlers: Handler) -> Route:
    """Return a route that answers every method on `path`; `get=`, `post=`, ... are handlers."""
    return Route(path, Resource(**handlers))
