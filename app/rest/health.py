"""Health checks: whether the process is alive, and whether it is caught up."""

from starlette.responses import JSONResponse, Response

from app.rest.problems import Unavailable
from app.rest.requests import NO_STORE, RestRequest
from app.rest.resource import resource


async def healthz(_: RestRequest) -> Response:
    """Alive: the event loop answers."""
    return JSONResponse({"status": "alive"}, headers=NO_STORE)


async def readyz(request: RestRequest) -> Response:
    """Listening and caught up; 503 with the reason otherwise."""
    trouble = request.state.feed.trouble()
    if trouble is not None:
        raise Unavailable(f"{trouble[0].upper()}{trouble[1:].rstrip('.')}.")
    return JSONResponse({"status": "ready"}, headers=NO_STORE)


routes = [resource("/healthz", get=healthz), resource("/readyz", get=readyz)]
