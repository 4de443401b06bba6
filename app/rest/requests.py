"""What any resource does with a request: read its parameters and body, run a statement, answer."""

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

import asyncpg
import msgspec
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response

from app.database.connections import SHARED_SESSION, UNAVAILABLE, Pool, absence, reason
from app.feed.feed import SHARED, Feed
from app.live.lists import Lists
from app.rest.problems import Problem, Unavailable

logger = logging.getLogger("tablecast.rest")

JSON = "application/json"
NO_STORE = {"Cache-Control": "no-store"}
BODY_LIMIT_BYTES = 1024 * 1024
POOL_TIMEOUT_S = 2.0
PAGE_LIMIT = 10_000
READING = ("GET", "HEAD")
# What the server needs on each kind of object to which Postgres may deny it access.
PRIVILEGES = {
    "table": "SELECT, INSERT, UPDATE, DELETE ON {}",
    "view": "SELECT, INSERT, UPDATE, DELETE ON {}",
    "sequence": "USAGE ON SEQUENCE {}",
    "schema": "USAGE ON SCHEMA {}",
    "function": "EXECUTE ON ALL FUNCTIONS IN SCHEMA feed",
}

T = TypeVar("T")


class RestState(State):
    """The part of the lifespan's state that resources use."""

    pool: Pool
    feed: Feed
    lists: Lists


RestRequest: TypeAlias = Request[RestState]


class RestOfPath(Convertor[str]):
    """The rest of a path, line breaks included; Starlette's `path` stops at a line break."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", RestOfPath())


def text_of(request: RestRequest, parameter: str) -> str | None:
    """Return a parameter from the path, or else from the query.

    Raises ValueError if it cannot be Postgres text.
    """
    text: str = request.path_params.get(parameter) or single(request, parameter) or ""
    if "\ufffd" in text:
        # Servers replace bytes that are not UTF-8 with U+FFFD; only the raw URL shows whether the
        # client sent that character itself.
        unquote_to_bytes(request.scope["raw_path"] + request.scope["query_string"]).decode()
    if "\0" in text:
        raise ValueError("U+0000")
    return text


def prefix_of(request: RestRequest) -> str:
    """Return the prefix of every path that a client asks for (ROOT_PATH)."""
    prefix: str = request.scope.get("root_path", "")
    return prefix


def single(request: RestRequest, parameter: str) -> str | None:
    """Return a query parameter, or None if absent. Raises the 422 if it is given twice."""
    values = request.query_params.getlist(parameter)
    if len(values) > 1:
        raise Problem(422, f"Give {parameter} only once.", field=parameter)
    return values[0] if values else None


def integer(request: RestRequest, parameter: str, low: int, high: int) -> int | None:
    """Return a query parameter as an integer, or None if absent. Raises the 422 if invalid."""
    value = single(request, parameter)
    if value is None:
        return None
    if not re.fullmatch("-?[0-9]{1,19}", value) or not low <= int(value) <= high:
        detail = f"{parameter} must be a whole number from {low} to {high}."
        raise Problem(422, detail, field=parameter)
    return int(value)


async def decode_body(
    request: RestRequest, decoder: msgspec.json.Decoder[T], rules: Mapping[str, str]
) -> T:
    """Decode the request's JSON body. Raises the 400, 413, 415 or 422.

    `rules` has a sentence for each field, which the 422 quotes. A missing Content-Type is refused
    too: browsers let any site send such a request.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    refusal = too_large() if media_type == JSON else another_type()
    if int(request.headers.get("content-length", "0")) > BODY_LIMIT_BYTES:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT_BYTES:
            raise refusal
    # Not before the body has come in full, which would cost the client its connection.
    if media_type != JSON:
        raise refusal
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise unfit(str(error), rules) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The body is not JSON in UTF-8: {error}.") from error


def another_type() -> Problem:
    """Return the 415 for a body that is not declared as JSON."""
    return Problem(415, f"Send JSON, with Content-Type: {JSON}.", headers={"Accept": JSON})


def unfit(message: str, rules: Mapping[str, str]) -> Problem:
    """Return the 422 for msgspec's message, which ends with the name of the field."""
    fields = " and ".join(rules)
    found = re.search(r"(?:field `|at `\$\.)(.*)`$", message, re.DOTALL)
    if found is None:
        return Problem(422, f"Send a JSON object with the fields {fields}.")
    field = found[1]
    if field in rules:
        return Problem(422, rules[field], field=field)
    return Problem(422, f"Remove {field[:50]!r}: the only fields are {fields}.")


def too_large() -> Problem:
    """Return the 413."""
    return Problem(413, f"Send at most {BODY_LIMIT_BYTES} bytes.")


async def fetch_row(
    request: RestRequest, statement: str, *arguments: object
) -> asyncpg.Record | None:
    """Return the first row of a statement, or None.

    Raises what `using_the_database` does.
    """
    with using_the_database(request):
        return await _fetch_row(request.state.pool, statement, *arguments)


@contextmanager
def using_the_database(request: RestRequest) -> Iterator[None]:
    """Turn errors of the database into problems.

    Raises `Unavailable` if the database is down, busy or too slow, and another Problem if it
    refuses a statement; but lets UniqueViolationError (a key is taken) and
    ProgramLimitExceededError (a value is too long) pass.
    """
    if request.state.feed.trouble() == SHARED:
        raise Unavailable(SHARED)  # another client's settings could change how rows look
    try:
        yield
    except SHARED_SESSION as error:
        raise Unavailable(SHARED) from error
    except UnicodeDecodeError as error:
        logger.error("the database holds text that is not UTF-8: %s", error)
        raise Unavailable("The database holds text that is not UTF-8.") from error
    except ValueError:
        raise  # an argument of the wrong type: our bug, although asyncpg's is an InterfaceError
    except UNAVAILABLE as error:
        logger.info("the database does not answer: %s", reason(error))  # the feed warns, once
        raise Unavailable(absence(error)) from error
    except (asyncpg.UniqueViolationError, asyncpg.ProgramLimitExceededError):
        raise
    except (asyncpg.PostgresError, asyncpg.PostgresWarning) as error:
        raise refused(request, error) from error


async def _fetch_row(pool: Pool, statement: str, *arguments: object) -> asyncpg.Record | None:
    async with asyncio.timeout(POOL_TIMEOUT_S):
        connection = await pool.acquire()
    try:
        return await connection.fetchrow(statement, *arguments)
    except asyncpg.InsufficientPrivilegeError as error:
        report_privilege(connection.get_settings().session_authorization, error)
        raise
    finally:
        await pool.release(connection, timeout=POOL_TIMEOUT_S)


def report_privilege(role: str, error: asyncpg.InsufficientPrivilegeError) -> None:
    """Log what to grant."""
    found = re.search(
        r"permission denied for (table|view|sequence|schema|function) (.+)", str(error)
    )
    if found is None:
        logger.error("the role %s is refused: %s", role, error)
        return
    kind, name = found.groups()
    logger.error(
        "the role %s is refused: %s; let its owner run: GRANT %s TO %s",
        role, error, PRIVILEGES[kind].format(name), role,
    )  # fmt: skip


def refused(request: RestRequest, error: Exception) -> Problem:
    """Return the problem for an error that the database raises for a statement."""
    # Without the error's DETAIL, which may contain this row and others.
    message = str(error.args[0]).rstrip(".")
    match error:
        case asyncpg.InsufficientPrivilegeError() if "row-level security" in str(error):
            return Problem(403, "A row-level security policy of the table does not allow this.")
        case asyncpg.InsufficientPrivilegeError():
            detail = "The server's database role may not do this; its log says what to grant."
            return Problem(403, detail)
        case asyncpg.DataError() if request.method not in READING:
            return Problem(422, f"The database cannot store this: {message}.")
        case asyncpg.IntegrityConstraintViolationError() | asyncpg.RaiseError():
            # Not from our schema: a constraint, foreign key or trigger that a user has added.
            return Problem(409, f"The database rejected this: {message}.")
    logger.error("the database has failed: %s (%s)", error, type(error).__name__)
    if request.method in READING:
        return Unavailable("The database cannot answer this; the server's log has the details.")
    return Problem(409, "The database rejected this; the server's log has the details.")


def json_response(
    text: str | bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response with JSON that Postgres has rendered."""
    return Response(text, status, NO_STORE | dict(headers or {}), JSON)
