"""One address of the API with its methods, as a Starlette route."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Handler = Callable[[Request], Awaitable[Response]]


def resource(path: str, **handlers: Handler) -> Route:
    """A route that gives each method (`get=`, `post=`, ...) to its handler.

    HEAD goes to GET's handler (the server leaves the body out), OPTIONS is answered from the list
    of methods, and any other method is refused by Starlette: 405 with `Allow`.
    """
    by_method = {method.upper(): handler for method, handler in handlers.items()}
    if "GET" in by_method:
        by_method["HEAD"] = by_method["GET"]

    async def options(_: Request) -> Response:
        return Response(status_code=204, headers={"Allow": ", ".join(sorted(by_method))})

    by_method["OPTIONS"] = options

    async def dispatch(request: Request) -> Response:
        return await by_method[request.method](request)

    return Route(path, dispatch, methods=list(by_method))
