"""Whether the process lives, and whether what it shows is true."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.problems import Problem


async def healthz(_: Request) -> Response:
    """Alive: the event loop answers."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """Listening and caught up; 503 with the reason otherwise."""
    trouble = request.app.state.feed.trouble()
    if trouble is not None:
        raise Problem(503, trouble)
    return JSONResponse({"status": "ready"})


routes = [Route("/healthz", healthz), Route("/readyz", readyz)]
