"""Health checks: whether the process is alive, and whether it is caught up."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from app.rest.problems import Unavailable
from app.rest.resource import resource

NO_STORE = {"Cache-Control": "no-store"}


async def healthz(_: Request) -> Response:
    """Alive: the event loop answers."""
    return JSONResponse({"status": "alive"}, headers=NO_STORE)


async def readyz(request: Request) -> Response:
    """Listening and caught up; 503 with the reason otherwise."""
    trouble = request.state.feed.trouble()
    if trouble is not None:
        raise Unavailable(trouble)
    return JSONResponse({"status": "ready"}, headers=NO_STORE)


routes = [resource("/healthz", get=healthz), resource("/readyz", get=readyz)]
