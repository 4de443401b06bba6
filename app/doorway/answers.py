"""The responses to requests that reach no handler, as bytes."""

from http import HTTPStatus

import msgspec

from app.doorway.limits import BODY_S, FULL_RETRY_S, HEAD_BYTES, PATIENCE_S
from app.rest.problems import PROBLEM_JSON, ProblemDetails
from app.socketio.handshake import HEAD_END


def answer_of(status: HTTPStatus, detail: str, *headers: str) -> bytes:
    """Return a complete problem+json response, after which the connection is closed."""
    body = msgspec.json.encode(
        ProblemDetails(title=status.phrase, status=status.value, detail=detail)
    )
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {PROBLEM_JSON}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + HEAD_END + body


TOO_LONG = answer_of(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"Send at most {HEAD_BYTES} bytes of URL and headers.",
)
TOO_SLOW = answer_of(
    HTTPStatus.REQUEST_TIMEOUT,
    f"Send the headers of a request within {PATIENCE_S:g} seconds, its body within {BODY_S:g}.",
)
FULL = answer_of(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "This server has as many clients as MAX_CLIENTS allows; try again later.",
    f"Retry-After: {FULL_RETRY_S}",
)
BUSY = answer_of(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "Too many requests are being sent at once; try again later.",
    f"Retry-After: {FULL_RETRY_S}",
)
NOT_HTTP = answer_of(HTTPStatus.BAD_REQUEST, "Send a request in HTTP/1.1.")
NO_WEBSOCKET = answer_of(HTTPStatus.NOT_FOUND, "There is no WebSocket at this URL.")
NOT_AN_UPGRADE = answer_of(
    HTTPStatus.BAD_REQUEST, "Open a WebSocket as RFC 6455 says: GET, a key, version 13, no body."
)
