"""What a page may want to know about this server: its version, how to write to its database."""

from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.rest.requests import NO_STORE
from app.rest.resource import resource
from app.settings import Settings


def routes(settings: Settings) -> list[Route]:
    """Return the endpoint's routes. Its `psql` is null where no command would help the client."""
    shown = {
        "version": version("tablecast"),
        "things": settings.things,
        "psql": settings.psql_command,
    }

    async def about(_: Request) -> Response:
        """GET what this server is."""
        return JSONResponse(shown, headers=NO_STORE)

    return [resource("/about", get=about)]
