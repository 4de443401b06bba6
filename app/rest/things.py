"""The REST resource `/api/things`. It reads and writes the table like any other client; only the
list asks the feed for its offset.
"""

from typing import Annotated
from urllib.parse import quote

import asyncpg
import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response
from starlette.routing import Route

from app.database.connections import FLUSH
from app.rest.problems import Problem
from app.rest.requests import (
    NO_STORE,
    PAGE_LIMIT,
    RestRequest,
    decode_body,
    fetch_row,
    integer,
    json_response,
    prefix_of,
    text_of,
)
from app.rest.resource import Absent, resource

COLLECTION = "/api/things"
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


async def list_things(request: RestRequest) -> Response:
    """GET things as a JSON array ordered by id: all, or at most `limit` with ids above `after`."""
    limit = integer(request, "limit", 1, PAGE_LIMIT)
    after = integer(request, "after", LOWEST_ID, HIGHEST_ID)
    try:
        found = await fetch_row(request, LIST, LOWEST_ID if after is None else after, limit)
    except asyncpg.ProgramLimitExceededError as error:
        raise Problem(422, "The list is too long for one response: add ?limit=1000.") from error
    assert found is not None
    if found["unflushed"]:
        await fetch_row(request, FLUSH)
    headers = {"Feed-Offset": found["offset"]}
    if limit is not None and found["more_after"] is not None:
        query = f"limit={limit}&after={found['more_after']}"
        headers["Link"] = f'<{prefix_of(request)}{COLLECTION}?{query}>; rel="next"'
    return json_response(found["list"], headers=headers)


async def create_thing(request: RestRequest) -> Response:
    """POST a new thing: 201 and the thing, or 409 if the name is taken."""
    thing = await decode_body(request, new_thing, FIELD_RULES)
    created = await write(request, CREATE, thing.name, thing.info)
    if created is None:
        raise Problem(409, "The database rejected this: a trigger on the table discarded it.")
    location = prefix_of(request) + address_of(created["name"])
    return json_response(created[0], 201, {"Location": location})


async def read_thing(request: RestRequest) -> Response:
    """GET one thing."""
    found = await fetch_row(request, READ, name_of(request))
    if found is None:
        raise not_found()
    return json_response(found[0])


async def update_thing(request: RestRequest) -> Response:
    """PATCH one thing: 200 and the updated thing, or 409 if the new name is taken."""
    name = name_of(request)
    changes = await decode_body(request, thing_changes, FIELD_RULES)
    new_name = None if changes.name is UNSET else changes.name
    new_info = None if changes.info is UNSET else changes.info
    updated = await write(request, UPDATE, name, new_name, new_info)
    if updated is None:
        raise not_found()
    return json_response(updated[0])


async def delete_thing(request: RestRequest) -> Response:
    """DELETE one thing: 204."""
    if await write(request, DELETE, name_of(request)) is None:
        raise not_found()
    return Response(status_code=204, headers=NO_STORE)


def address_of(name: str) -> str:
    """Return the path of the thing with this name, percent-encoded, without any prefix.

    URL parsers remove `.` and `..` from a path, even when encoded, so these two names go into the
    query.
    """
    if name in (".", ".."):
        return f"{COLLECTION}/?name={name}"
    return f"{COLLECTION}/{quote(name, safe='')}"


def name_of(request: RestRequest) -> str:
    """Return the name in the request's URL. Raises the 404 if it cannot be a name."""
    try:
        return text_of(request, "name") or ""
    except ValueError as error:
        raise not_found() from error


async def write(request: RestRequest, statement: str, *arguments: object) -> asyncpg.Record | None:
    """Run a statement that writes. Raises the 409 if the name is taken, the 422 for a value that an
    index cannot hold.
    """
    try:
        return await fetch_row(request, statement, *arguments)
    except asyncpg.UniqueViolationError as error:
        raise Problem(409, "Another thing has this name; choose another.", field="name") from error
    except asyncpg.ProgramLimitExceededError as error:
        raise Problem(422, f"The database cannot store this: {error}.") from error


def not_found() -> Problem:
    """Return the 404 for a name."""
    return Problem(404, f"No thing has this name; GET {COLLECTION} lists them all.")


ONE_THING = COLLECTION + "/{name:rest}"
routes = [
    resource(COLLECTION, get=list_things, post=create_thing),
    resource(ONE_THING, get=read_thing, patch=update_thing, delete=delete_thing),
]
absent = Absent("The sample table is not served here (THINGS=no).")
routes_without_things = [Route(COLLECTION, absent), Route(ONE_THING, absent)]
