"""Errors as clients see them: problem+json (RFC 9457), with a sentence that says what to do."""

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_S = 1


class ProblemDetails(msgspec.Struct, kw_only=True):
    """The body of every error response."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    field: str | msgspec.UnsetType = msgspec.UNSET
    code: str | msgspec.UnsetType = msgspec.UNSET


class Problem(HTTPException):
    """An error response: its status and a sentence; optionally the field that it is about, and a
    code that tells programs what is wrong.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        field: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.field = field
        self.code = code


class Unavailable(Problem):
    """The database is down or too slow: 503, try again soon."""

    def __init__(self, detail: str, code: str | None = None) -> None:
        super().__init__(503, detail, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def problem_response(error: HTTPException) -> Response:
    """Return the response for an error, including Starlette's own."""
    details = ProblemDetails(
        title=HTTPStatus(error.status_code).phrase, status=error.status_code, detail=error.detail
    )
    if isinstance(error, Problem):
        details.field = error.field or msgspec.UNSET
        details.code = error.code or msgspec.UNSET
    return Response(
        msgspec.json.encode(details),
        error.status_code,
        {"Cache-Control": "no-store", **(error.headers or {})},
        PROBLEM_JSON,
    )


def wrong_host(host: str | None) -> tuple[HTTPStatus, str]:
    """Return the status and sentence for a Host header that is missing, or names another server."""
    named = "a request without a host" if host is None else f"the host {host[:100]!r}"
    detail = (
        f"This server does not serve {named}; if it should, add the host, without a port, to"
        " ALLOWED_HOSTS."
    )
    return HTTPStatus.MISDIRECTED_REQUEST, detail


async def http_error(request: Request, error: HTTPException) -> Response:
    """Answer a `Problem`, or an error that Starlette itself raised, with a sentence of ours."""
    if isinstance(error, Problem):
        return problem_response(error)
    if error.status_code == 404:
        return problem_response(Problem(404, "There is nothing at this URL."))
    if error.status_code == 405:
        # Starlette's StaticFiles refuses a method without saying which ones it allows.
        allow = (error.headers or {}).get("Allow", "GET, HEAD")
        detail = f"{request.method} is not allowed here, only {allow}."
        return problem_response(Problem(405, detail, headers={"Allow": allow}))
    return problem_response(error)


async def client_gone(_: Request, __: ClientDisconnect) -> Response:
    """The client disconnected while sending its body: nobody reads this response."""
    return problem_response(Problem(400, "The body ended too early."))


async def unforeseen(_: Request, __: Exception) -> Response:
    """Answer a bug of ours. Starlette raises it again afterwards, and the server logs it."""
    return problem_response(Problem(500, "Internal error; the server's log has the details."))


exception_handlers: dict[Any, Any] = {
    HTTPException: http_error,
    ClientDisconnect: client_gone,
    Exception: unforeseen,
}
