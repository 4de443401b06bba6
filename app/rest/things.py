"""The REST resource `/api/things`: reads and writes the table, and knows nothing of the feed."""

import asyncio
import logging
import re
from typing import Annotated, TypeVar
from urllib.parse import quote, unquote_to_bytes

import asyncpg
import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from app.database.connections import FLUSH, UNAVAILABLE, Pool
from app.rest.problems import Problem, Unavailable
from app.rest.resource import resource

logger = logging.getLogger("tablecast")

COLLECTION = "/api/things"
JSON = "application/json"
NO_STORE = {"Cache-Control": "no-store"}
BODY_LIMIT_BYTES = 1024 * 1024
POOL_TIMEOUT_S = 2.0
PAGE_LIMIT = 10_000
LOWEST_ID, HIGHEST_ID = -(2**63), 2**63 - 1

# The list and its offset come from one statement, so from one snapshot. `more_after` is the last
# id of the page if more follow. `unflushed`: the list may contain commits that a crash would undo.
LIST = """
    SELECT feed.offset() AS "offset",
           pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() AS unflushed,
           '[' || coalesce(string_agg(row_to_json(page)::text, ',' ORDER BY id), '') || ']' AS list,
           (SELECT max(page.id)
            WHERE EXISTS (SELECT FROM public.things WHERE id > max(page.id))) AS more_after
    FROM (SELECT * FROM public.things WHERE id > $1 ORDER BY id LIMIT $2) AS page
"""
READ = """
    SELECT row_to_json(things)::text FROM public.things WHERE name = $1
"""
CREATE = """
    INSERT INTO public.things (name, info) VALUES ($1, $2) RETURNING row_to_json(things)::text, name
"""
UPDATE = """
    UPDATE public.things SET name = coalesce($2, name), info = coalesce($3, info) WHERE name = $1
    RETURNING row_to_json(things)::text
"""
DELETE = """
    DELETE FROM public.things WHERE name = $1 RETURNING id
"""

# U+0000 is the only character that Postgres text cannot hold.
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\u0000]*$")]
Info = Annotated[str, Meta(pattern=r"^[^\u0000]*$")]


class NewThing(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST."""

    name: Name
    info: Info = ""


class ThingChanges(msgspec.Struct, forbid_unknown_fields=True):
    """The body of PATCH: omitted fields stay as they are."""

    name: Name | UnsetType = UNSET
    info: Info | UnsetType = UNSET


FIELD_RULES = {
    "name": "name must be a string of 1 to 200 characters, none of them U+0000.",
    "info": "info must be a string without the character U+0000.",
}
new_thing = msgspec.json.Decoder(NewThing)
thing_changes = msgspec.json.Decoder(ThingChanges)

T = TypeVar("T")


class NameConvertor(Convertor[str]):
    """The rest of a path, line breaks included; Starlette's `path` stops at a line break."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("name", NameConvertor())


async def list_things(request: Request) -> Response:
    """GET things as a JSON array ordered by id: all, or at most `limit` with ids above `after`."""
    limit = _integer(request, "limit", 1, PAGE_LIMIT)
    after = _integer(request, "after", LOWEST_ID, HIGHEST_ID)
    try:
        found = await _fetch(request, LIST, LOWEST_ID if after is None else after, limit)
    except asyncpg.ProgramLimitExceededError as error:
        raise Problem(422, "The list is too long for one response: add ?limit=1000.") from error
    assert found is not None
    if found["unflushed"]:
        await _fetch(request, FLUSH)
    headers = {"Feed-Offset": found["offset"]}
    if limit is not None and found["more_after"] is not None:
        headers["Link"] = f'<{COLLECTION}?limit={limit}&after={found["more_after"]}>; rel="next"'
    return _json(found["list"], headers=headers)


async def create_thing(request: Request) -> Response:
    """POST a new thing: 201 and the thing, or 409 if the name is taken."""
    thing = await _body(request, new_thing)
    created = await _fetch(request, CREATE, thing.name, thing.info)
    if created is None:
        raise Problem(409, "The database rejected this: a trigger on the table discarded it.")
    return _json(created[0], 201, {"Location": address_of(created["name"])})


async def read_thing(request: Request) -> Response:
    """GET one thing."""
    found = await _fetch(request, READ, _name(request))
    if found is None:
        raise _not_found()
    return _json(found[0])


async def update_thing(request: Request) -> Response:
    """PATCH one thing: 200 and the updated thing, or 409 if the new name is taken."""
    name = _name(request)
    changes = await _body(request, thing_changes)
    new_name = None if changes.name is UNSET else changes.name
    new_info = None if changes.info is UNSET else changes.info
    updated = await _fetch(request, UPDATE, name, new_name, new_info)
    if updated is None:
        raise _not_found()
    return _json(updated[0])


async def delete_thing(request: Request) -> Response:
    """DELETE one thing: 204."""
    if await _fetch(request, DELETE, _name(request)) is None:
        raise _not_found()
    return Response(status_code=204, headers=NO_STORE)


def address_of(name: str) -> str:
    """Return the path of the thing with this name, percent-encoded.

    URL parsers remove `.` and `..` from a path, even if they are encoded, so these two names go
    into the query.
    """
    if name in (".", ".."):
        return f"{COLLECTION}/?name={name}"
    return f"{COLLECTION}/{quote(name, safe='')}"


def _name(request: Request) -> str:
    """Return the name in the request's URL. Raises the 404 if it cannot be a name."""
    name: str = request.path_params["name"] or _single(request, "name") or ""
    if "\ufffd" in name:
        # Servers replace bytes that are not UTF-8 with U+FFFD; only the raw URL shows whether the
        # client sent that character itself.
        try:
            unquote_to_bytes(request.scope["raw_path"] + request.scope["query_string"]).decode()
        except UnicodeDecodeError as error:
            raise _not_found() from error
    if "\0" in name:
        raise _not_found()
    return name


def _single(request: Request, parameter: str) -> str | None:
    """Return a query parameter, or None if absent. Raises the 422 if it is given twice."""
    values = request.query_params.getlist(parameter)
    if len(values) > 1:
        raise Problem(422, f"Give {parameter} only once.", field=parameter)
    return values[0] if values else None


def _integer(request: Request, parameter: str, low: int, high: int) -> int | None:
    """Return a query parameter as an integer, or None if absent. Raises the 422 if invalid."""
    value = _single(request, parameter)
    if value is None:
        return None
    if not re.fullmatch("-?[0-9]{1,19}", value) or not low <= int(value) <= high:
        detail = f"{parameter} must be a whole number from {low} to {high}."
        raise Problem(422, detail, field=parameter)
    return int(value)


async def _body(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode the request's JSON body. Raises the 400, 413, 415 or 422.

    A missing Content-Type is refused too: browsers let any site send such a request.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != JSON:
        raise Problem(415, f"Send JSON, with Content-Type: {JSON}.", headers={"Accept": JSON})
    if int(request.headers.get("content-length", "0")) > BODY_LIMIT_BYTES:
        raise _too_large()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT_BYTES:
            raise _too_large()
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _unfit(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"The body is not JSON in UTF-8: {error}.") from error


def _unfit(message: str) -> Problem:
    """Return the 422 for msgspec's message, which ends with the name of the field."""
    found = re.search(r"(?:field `|at `\$\.)(.*)`$", message, re.DOTALL)
    if found is None:
        return Problem(422, "Send a JSON object with the fields name and info.")
    field = found[1]
    if field in FIELD_RULES:
        return Problem(422, FIELD_RULES[field], field=field)
    return Problem(422, f"Remove {field[:50]!r}: the only fields are name and info.")


async def _fetch(request: Request, statement: str, *arguments: object) -> asyncpg.Record | None:
    """Return the first row of a statement, or None.

    Raises `Unavailable` if the database is down, busy or too slow, and the 409 if it rejects what
    the statement writes.
    """
    pool: Pool = request.state.pool
    try:
        async with asyncio.timeout(POOL_TIMEOUT_S):
            connection = await pool.acquire()
        try:
            return await connection.fetchrow(statement, *arguments)
        finally:
            await pool.release(connection, timeout=POOL_TIMEOUT_S)
    except UNAVAILABLE as error:
        logger.warning("the database does not answer: %r", error)
        raise Unavailable("The database is not answering; try again soon.") from error
    except asyncpg.UniqueViolationError as error:
        raise Problem(409, "Another thing has this name; choose another.", field="name") from error
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.RaiseError) as error:
        # Not from our schema: a constraint, foreign key or trigger that a user has added.
        raise Problem(409, f"The database rejected this: {error}.") from error


def _json(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status, NO_STORE | (headers or {}), JSON)


def _not_found() -> Problem:
    return Problem(404, f"No thing has this name; GET {COLLECTION} lists them all.")


def _too_large() -> Problem:
    return Problem(413, f"Send at most {BODY_LIMIT_BYTES} bytes.")


routes = [
    resource(COLLECTION, get=list_things, post=create_thing),
    resource(COLLECTION + "/{name:name}", get=read_thing, patch=update_thing, delete=delete_thing),
]
